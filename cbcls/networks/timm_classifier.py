"""Any network of timm as a classifier, with the layer under test before it or in place of its BatchNorms."""

from collections.abc import Sequence

from torch import Tensor, nn

from cbcls.networks.classifier import Classifier
from common.networks.from_timm import blank_output
from common.norms import BatchNorm, clusters, convert_norms
from common.norms.config import NormConfig
from common.runtime.seeding import derive


class TimmClassifier(Classifier):
    """A network of timm up to its features, and its last linear map, which may be given clusters.

    Args:
        network: made by timm for the classes.
        norm: the layer under test.
        convert: BatchNorms of the network that become it, by name, or "all"; with norm.kind bn they stay as they are.
            Without, one layer of 3 channels normalises the images.
        seed: of mixtures' own generators.
        num_clusters: as for `Classifier`.

    Raises:
        ValueError: if the network has no such BatchNorms, or does not end in a linear map.
    """

    def __init__(
        self, network: nn.Module, norm: NormConfig, convert: Sequence[str] = (), *, seed: int = 0, num_clusters: int = 0
    ) -> None:
        super().__init__(norm, num_clusters)
        self.norm = nn.Identity() if convert else norm.build(3, derive(seed, "norm"))
        self._takes_clusters = self._takes_clusters and not convert
        linear = network.get_classifier()  # pyright: ignore[reportCallIssue]
        if not isinstance(linear, nn.Linear):
            raise ValueError(f"name: expected a network that ends in a linear map, got {type(linear).__name__}")
        network.reset_classifier(0)  # pyright: ignore[reportCallIssue]
        if convert:
            where = None if list(convert) == ["all"] else list(convert)
            if norm.kind == "bn":
                _check_names(network, where or ())
            else:
                convert_norms(network, norm.kind, where, norm.num_components, **norm.options(derive(seed, "norm")))
        self.network = network
        if num_clusters:
            self.end(linear.in_features, linear.out_features)
        else:
            self.linear = linear

    def features(self, x: Tensor, cluster: Tensor | None) -> Tensor:
        """Map images (N, 3, S, S) to what the linear map is given."""
        with clusters(cluster):
            return self.network(self.normalised(self.norm, x, cluster))

    def check_size(self, size: int) -> None:
        """Raise ValueError unless the network takes images of a side."""
        h = blank_output(self.network, size)
        wanted = self.linear.in_features - self.num_clusters
        if h.shape != (1, wanted):
            raise ValueError(f"it makes {tuple(h.shape)} of one image, its last map takes {wanted}")


def _check_names(network: nn.Module, where: Sequence[str]) -> None:
    """Raise ValueError as `convert_norms` does unless the network has these BatchNorms, and at least one."""
    known = [name for name, module in network.named_modules() if isinstance(module, nn.BatchNorm2d | BatchNorm)]
    if not known:
        raise ValueError("model: expected at least one BatchNorm layer inside, found none")
    for name in where:
        if name not in known:
            raise ValueError(f"where: expected the name of a BatchNorm ({', '.join(known[:5])}, ...), got {name!r}")
