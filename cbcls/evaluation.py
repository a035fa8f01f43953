"""What is measured of a classifier: loss, scores and the leak audit, on images it was and was not trained on."""

from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cbcls.config import ClassifierConfig
from common.classification.leak_audit import Categories, LeakAudit, audit_inputs, leak_audit
from common.data.image_set import ImageSet, to_input
from common.metrics.logits import classify, evaluating
from common.metrics.scores import measure_all
from common.runtime.device import autocast
from common.runtime.distributed import Env
from common.runtime.errors import NonFiniteError
from common.runtime.seeding import permutation
from common.train.recalibration import drawn, recalibrate_network

_SEEN = 2000
"""Most training images that are measured as test images are."""


def _nothing() -> None:
    pass


class Evaluator:
    """Measures a classifier.

    Args:
        cfg: the run's configuration.
        images: the run's images by split, as `ClassifierTask.load_images` returns them.
        device: where the classifier is.
        env: this process among those of the run; they share each measurement.

    Attributes:
        health_images: a batch of training images, the same all through a run.
    """

    def __init__(
        self, cfg: ClassifierConfig, images: Mapping[str, ImageSet], device: torch.device, env: Env | None = None
    ) -> None:
        self.cfg, self.images, self.device, self.env = cfg, images, device, env or Env()
        train, test = images["train"], images["test"]
        self.health_images = train.select(permutation(len(train), cfg.seed, "health")[: cfg.batch_size])
        count = min(len(train), len(test), _SEEN)
        self._seen = train.select(permutation(len(train), cfg.seed, "seen")[:count].sort().values)

    def scores(self, network: nn.Module, go_on: Callable[[], None]) -> dict[str, float]:
        """Return loss and scores in evaluation mode, by tag: loss/test and metric/accuracy, loss/validation and so on.

        Of training images a fixed sample is measured, as test images are; of a network that is given clusters, the
        leak audit on all test images. All ranks measure rank 0's statistics.

        Raises:
            Interrupted: if ``go_on``, called between two batches, raises it.
            NonFiniteError: if a logit is not finite.
        """
        values: dict[str, float] = {}
        with evaluating(network), self.env.buffers_of_first(network):
            logits = self.logits(network, self.images["test"], go_on=go_on)
            values |= _scored("loss/test", "", self.images["test"], logits)
            if "validation" in self.images:
                held = self.images["validation"]
                values |= _scored("loss/validation", "validation_", held, self.logits(network, held, go_on=go_on))
            seen = _scored("loss/train_eval", "train_", self._seen, self.logits(network, self._seen, go_on=go_on))
            values |= {tag: seen[tag] for tag in ("loss/train_eval", "metric/train_accuracy", "metric/train_error")}
            if self.cfg.uses_clusters:
                values |= self.audit(network, logits, go_on=go_on).scalars()
        return values

    def logits(
        self,
        network: nn.Module,
        images: ImageSet,
        clusters: Tensor | None = None,
        go_on: Callable[[], None] = _nothing,
    ) -> Tensor:
        """Return logits (N, classes) in float64 of a network in evaluation mode.

        Args:
            network: the classifier.
            images: what it classifies.
            clusters: what it is given of them, int64 (N,); by default each image's own.
            go_on: called between batches.

        Raises:
            NonFiniteError: if a logit is not finite.
        """
        ids = images.clusters if clusters is None else clusters
        logits = logits_of(
            self.cfg, network, images.images, images.num_classes, ids, self.device, env=self.env, go_on=go_on
        )
        if not logits.isfinite().all():
            raise NonFiniteError(f"logits of the {images.split} images are not finite; the checkpoint before stands")
        return logits

    def audit(
        self,
        network: nn.Module,
        known: Tensor,
        baseline: Tensor | None = None,
        go_on: Callable[[], None] = _nothing,
    ) -> LeakAudit:
        """Audit a network that is given clusters, in evaluation mode, on the test images.

        Args:
            network: the classifier.
            known: its logits with each image's own cluster.
            baseline: those of a classifier that is given the same without such a layer.
            go_on: called between batches.
        """
        train, test = _categories(self.images["train"]), _categories(self.images["test"])
        ids = audit_inputs(train.clusters, test.clusters, unknown=self.cfg.knows_unknown)
        logits = {
            name: known if name == "known" else self.logits(network, self.images["test"], given, go_on)
            for name, given in ids.items()
        }
        labelled = f"clusters.by {self.cfg.clusters.by}" if self.cfg.clusters.tells_labels else None
        num_clusters = len(self.images["test"].cluster_names)
        return leak_audit(train, test, logits, num_clusters, labelled=labelled, baseline=baseline)


def logits_of(
    cfg: ClassifierConfig,
    network: nn.Module,
    images: Tensor,
    num_classes: int,
    clusters: Tensor | None,
    device: torch.device,
    *,
    env: Env | None = None,
    go_on: Callable[[], None] = _nothing,
) -> Tensor:
    """Return logits (N, classes) in float64 of uint8 images (N, 3, S, S), as a run measures them.

    Args:
        cfg: the run's configuration.
        network: in evaluation mode.
        images: what it classifies.
        num_classes: of the network.
        clusters: what it is given of them, int64 (N,), -1 for unknown; None gives nothing.
        device: where the network is.
        env: as for `classify`.
        go_on: as for `classify`.
    """

    def classifier(batch: Tensor, cluster: Tensor | None = None) -> Tensor:
        with autocast(device, cfg.precision):
            x = to_input(batch, device, channels_last=cfg.channels_last)
            return network(x, None if cluster is None else cluster.to(device))

    return classify(classifier, images, num_classes, clusters=clusters, batch_size=cfg.batch_size, env=env, go_on=go_on)


def recalibrate(
    cfg: ClassifierConfig,
    network: nn.Module,
    train: ImageSet,
    device: torch.device,
    go_on: Callable[[], None] = _nothing,
) -> None:
    """Estimate anew what a network stores, from training images as evaluation sees them, the same each time.

    Args:
        cfg: the run's configuration, which says whether and how.
        network: on the device.
        train: the run's training images.
        device: where the network is.
        go_on: called between batches.

    Raises:
        NonFiniteError: if a layer is fed what is not finite.
    """

    def forward(index: Tensor) -> None:
        go_on()
        with autocast(device, cfg.precision):
            x = to_input(train.images[index], device, channels_last=cfg.channels_last)
            network(x, train.clusters_at(index, device))

    how = cfg.recalibrate
    recalibrate_network(cfg, network, drawn(len(train), how.images, how.batch_size, cfg.seed), forward)


def _scored(loss: str, prefix: str, images: ImageSet, logits: Tensor) -> dict[str, float]:
    assert images.labels is not None
    scores = {f"metric/{prefix}{name}": value for name, value in measure_all(images.labels, logits).items()}
    return {loss: float(F.cross_entropy(logits, images.labels)), **scores}


def _categories(images: ImageSet) -> Categories:
    assert images.labels is not None
    assert images.clusters is not None
    return Categories(images.labels, images.clusters)
