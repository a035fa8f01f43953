"""What is measured of a classifier: loss, scores and the leak audit, on images it was and was not trained on."""

import contextlib
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cbcls.config import ClassifierConfig
from common.classification.leak_audit import Categories, LeakAudit, audit_inputs, leak_audit
from common.data.image_set import ImageSet, to_input
from common.metrics.logits import classify, evaluating
from common.metrics.scores import METRICS, measure_all
from common.runtime.atomic import write_text_atomic
from common.runtime.device import autocast
from common.runtime.distributed import Env
from common.runtime.errors import NonFiniteError, UsageError
from common.runtime.seeding import permutation
from common.train.logging import listed
from common.train.recalibration import drawn, recalibrate_network
from common.train.task import Better, SelectionMetric

CATEGORIES = "categories.json"
"""In a run's folder: names of its classes and clusters, in the order of their numbers."""
_SPLITS = (
    ("test", "", "loss/test"),
    ("validation", "validation_", "loss/validation"),
    ("train", "train_", "loss/train_eval"),
)
"""Name, prefix of metrics, and loss."""
_SEEN = 2000
"""Most training images that are measured as test images are."""
CHARTS = {
    "loss": [f"loss/{name}" for name in ("train_eval", "validation", "test")],
    "error": [f"metric/{name}error" for name in ("train_", "validation_", "")],
}
"""What TensorBoard shows in one picture."""
HEADLINE = ("loss/test", "metric/accuracy", "metric/validation_accuracy", "loss/train_eval", "metric/train_accuracy")
"""What is printed of a measurement."""


class Evaluator:
    """Measures a classifier.

    Args:
        cfg: the run's configuration.
        images: the run's images by split, as `check_labels` wants them.
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
        leak audit on all test images.

        Raises:
            Interrupted: if ``go_on``, called between two batches, raises it.
            NonFiniteError: if a logit is not finite.
        """
        values: dict[str, float] = {}
        with self.measuring(network):
            logits = self.logits(network, self.images["test"], go_on=go_on)
            values |= _scored("loss/test", "", self.images["test"], logits)
            if "validation" in self.images:
                held = self.images["validation"]
                values |= _scored("loss/validation", "validation_", held, self.logits(network, held, go_on=go_on))
            seen = _scored("loss/train_eval", "train_", self._seen, self.logits(network, self._seen, go_on=go_on))
            values |= {tag: seen[tag] for tag in ("loss/train_eval", "metric/train_accuracy", "metric/train_error")}
            if self.cfg.told_clusters:
                values |= self.audit(network, go_on, logits).scalars()
        return values

    @contextlib.contextmanager
    def measuring(self, network: nn.Module) -> Iterator[None]:
        """Make a network the one that is measured inside the block, and what it was after it.

        It is in evaluation mode, and has rank 0's statistics.
        """
        with evaluating(network), self.env.buffers_of_first(network):
            yield

    def logits(
        self,
        network: nn.Module,
        images: ImageSet,
        clusters: Tensor | None = None,
        go_on: Callable[[], None] = lambda: None,
    ) -> Tensor:
        """Return logits (N, classes) in float64, of a network inside `measuring`.

        Args:
            network: the classifier.
            images: what it classifies.
            clusters: what it is given of them, int64 (N,); by default each image's own.
            go_on: called between batches.

        Raises:
            NonFiniteError: if a logit is not finite.
        """
        told_of_them = images.clusters if clusters is None else clusters
        logits = logits_of(
            self.cfg, network, images.images, images.num_classes, told_of_them, self.device, self.env, go_on
        )
        if not logits.isfinite().all():
            raise NonFiniteError(f"logits of the {images.split} images are not finite; the checkpoint before stands")
        return logits

    def audit(
        self,
        network: nn.Module,
        go_on: Callable[[], None] = lambda: None,
        known: Tensor | None = None,
        baseline: Tensor | None = None,
    ) -> LeakAudit:
        """Audit a network that is given clusters, on the test images; inside `measuring`.

        Args:
            network: the classifier.
            go_on: called between batches.
            known: its logits with each image's own cluster, if they are there already.
            baseline: those of a classifier that is given the same without such a layer.
        """
        train, test = self.images["train"], self.images["test"]
        ids = audit_inputs(_categories(train).clusters, _categories(test).clusters, unknown=self.cfg.knows_unknown)
        logits = {
            name: known if name == "known" and known is not None else self.logits(network, test, given, go_on)
            for name, given in ids.items()
        }
        return leak_audit(
            _categories(train),
            _categories(test),
            logits,
            len(test.cluster_names),
            labelled=f"clusters.by {self.cfg.clusters.by}" if self.cfg.clusters.tells_labels else None,
            baseline=baseline,
        )

    def write_categories(self, folder: Path) -> None:
        """Write the names of classes and clusters into a run's folder, for those who have not its images."""
        names = {"classes": self.images["train"].classes, "clusters": self.images["train"].cluster_names}
        write_text_atomic(folder / CATEGORIES, json.dumps(names) + "\n")


def logits_of(
    cfg: ClassifierConfig,
    network: nn.Module,
    images: Tensor,
    num_classes: int,
    clusters: Tensor | None,
    device: torch.device,
    env: Env | None = None,
    go_on: Callable[[], None] = lambda: None,
) -> Tensor:
    """Return logits (N, classes) in float64 of uint8 images (N, 3, S, S), as a run measures them.

    Args:
        cfg: the run's configuration.
        network: in evaluation mode.
        images: what it classifies.
        num_classes: of the network.
        clusters: what it is given of them, int64 (N,), -1 for unknown; None tells nothing.
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
    go_on: Callable[[], None] = lambda: None,
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


def selection_metrics() -> dict[str, SelectionMetric]:
    """Return the values of validation images that epochs can be chosen by, and those of test images."""
    chosen: list[tuple[str, Better]] = [
        (name, metric.better) for name, metric in METRICS.items() if metric.better is not None
    ]
    return {
        **{f"metric/validation_{name}": SelectionMetric("validation", better) for name, better in chosen},
        "loss/validation": SelectionMetric("validation", "lower"),
        **{f"metric/{name}": SelectionMetric("test", better, chosen_by_test=True) for name, better in chosen},
        "loss/test": SelectionMetric("test", "lower", chosen_by_test=True),
    }


def summary_rows(latest: Mapping[str, float | None]) -> list[tuple[str, str]]:
    """Return what a finished run says of its last scores and leak audit, a name and a text each."""
    rows = []
    for split, prefix, loss in _SPLITS:
        if (value := latest.get(loss)) is not None:
            names = [name for name in METRICS.names() if f"metric/{prefix}{name}" in latest]
            rows.append(
                (split, f"loss {value:.4g}, {listed({name: latest[f'metric/{prefix}{name}'] for name in names})}")
            )
    audited = {tag.removeprefix("audit/accuracy_"): latest[tag] for tag in latest if tag.startswith("audit/accuracy_")}
    if audited:
        chance = {"chance_given_the_cluster": latest["audit/chance_given_cluster"]}
        rows.append(("clusters", listed({"known": latest["metric/accuracy"], **audited, **chance})))
        if latest["audit/flagged"]:
            rows.append(("LEAK", "test clusters tell of labels: quote the accuracy with clusters unknown, or the gain "
                         "over a baseline that is given them (docs/leak-audit.md)"))  # fmt: skip
    return rows


def check_labels(images: Mapping[str, ImageSet]) -> None:
    """Raise UsageError if labels, a second class or images to test on are missing."""
    train, test = images["train"], images.get("test")
    if train.labels is None:
        raise UsageError(f"data.root: {train.name} has no labels; a classifier needs one sub-folder a class")
    if train.num_classes < 2:
        raise UsageError(f"data.root: a classifier needs at least 2 classes, {train.name} has {train.num_classes}")
    if test is None:
        raise UsageError("data.test_root: expected a folder of labelled images held apart from training, got null")
    if test.labels is None:
        raise UsageError(f"data.test_root: {test.name} has no labels; expected the sub-folders of data.root")
