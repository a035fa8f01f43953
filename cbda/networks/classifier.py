"""A classifier of two domains: a network with a normalization layer of the domains' clusters in it."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.func import functional_call

from common.norms import clusters, convert_norms, converted
from common.norms.config import NormConfig
from common.norms.registry import kinds
from common.runtime.seeding import derive

SOURCE, TARGET, UNKNOWN = 0, 1, -1
"""Cluster ids: the domains are the clusters."""


class Classifier(nn.Module):
    """A network whose images pass the layer under test first, or which has such layers in place of BatchNorms.

    Args:
        network: from images to logits.
        norm: the layer under test; of kind none, the network as it is.
        convert: BatchNorms of the network to convert to it, by name, or "all"; empty puts one layer of 3 channels
            before the network.
        seed: of mixtures' own generators.

    Shape: (N, 3, H, W) to (N, classes).

    Raises:
        ValueError: for a layer that cannot be where it is asked for.
    """

    def __init__(self, network: nn.Module, norm: NormConfig, convert: Sequence[str] = (), seed: int = 0) -> None:
        super().__init__()
        self.norm = nn.Identity() if convert else norm.build(3, derive(seed, "norm"))
        self.network = network
        self._routed = not convert and norm.kind in kinds(takes_clusters=True)
        if convert:
            where = None if list(convert) == ["all"] else list(convert)
            convert_norms(network, norm.kind, where, norm.num_components, **norm.options(derive(seed, "norm")))

    def forward(
        self, x: Tensor, cluster: Tensor, alone: int = 0, *, inference: bool = False
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Map images (N, 3, H, W) of clusters (N,) to logits (N, classes).

        Args:
            x: images.
            cluster: int64, 0 source, 1 target; -1 for unknown in evaluation, where the layer knows that.
            alone: if not 0, return also the logits (alone, classes) of so many first images, run by themselves
                without a trace in running statistics. One call does both, since gradients of several processes are
                averaged once a call.
            inference: run these in evaluation mode, by the statistics that the joint pass has left.

        Raises:
            ValueError: for another cluster than these, on the CPU.
        """
        if cluster.device.type == "cpu" and not torch.compiler.is_compiling():  # a GPU would have to be waited for
            low, high = (int(end) for end in cluster.aminmax())
            if low < UNKNOWN or high > TARGET:
                raise ValueError(
                    f"cluster: expected {SOURCE} for the source, {TARGET} for the target or {UNKNOWN} for unknown, got "
                    f"{low if low < UNKNOWN else high}"
                )
        together = self._logits(x, cluster)
        if not alone:
            return together
        if inference:
            training = self.training
            self.eval()
            try:
                return together, self._logits(x[:alone], cluster[:alone])
            finally:
                self.train(training)
        # After the joint pass: a layer that starts from its first batch starts from that of both domains. In training
        # mode BatchNorm does not look at what it has stored, so that the order changes nothing for it.
        buffers = {name: buffer.clone() for name, buffer in self.named_buffers()}
        return together, functional_call(self, buffers, (x[:alone], cluster[:alone]))

    def _logits(self, x: Tensor, cluster: Tensor) -> Tensor:
        with clusters(cluster):
            return self.network(self.norm(x, cluster) if self._routed else self.norm(x))


def own_parameters(network: nn.Module) -> list[nn.Parameter]:
    """Return the weights of a classifier's layer under test: of the first layer, or of what BatchNorms have become."""
    places = ("norm.", *(f"{name}." for name in converted(network)))
    return [p for name, p in network.named_parameters() if name.startswith(places)]
