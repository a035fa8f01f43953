"""What is measured of a classifier: loss and scores on images it was not trained on."""

from collections.abc import Callable, Mapping
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cbcls.config import ClassifierConfig
from common.data.image_set import ImageSet, to_input
from common.errors import NonFiniteError, UsageError
from common.machine.device import autocast
from common.machine.dist import Env
from common.machine.seeding import permutation
from common.metrics.logits import classify
from common.metrics.scores import METRICS, measure_all
from common.training.method import Tracked


class Evaluation:
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
        order = permutation(len(images["train"]), cfg.seed, "health")
        self.health_images = images["train"].select(order[: cfg.batch_size])

    def scores(self, network: nn.Module, go_on: Callable[[], None]) -> dict[str, float]:
        """Return loss and scores in evaluation mode, by tag: loss/test and metric/accuracy, loss/validation and so on.

        Raises:
            Interrupted: if ``go_on``, called between two batches, raises it.
            NonFiniteError: if a logit is not finite.
        """
        values: dict[str, float] = {}
        for split in ("test", "validation"):
            if split in self.images:
                values |= self._scores(network, split, go_on)
        return values

    def _scores(self, network: nn.Module, split: str, go_on: Callable[[], None]) -> dict[str, float]:
        images = self.images[split]
        assert images.labels is not None
        logits = self._logits(network, images, go_on)
        if not logits.isfinite().all():
            raise NonFiniteError(f"logits of the {split} images are not finite; the checkpoint before them stands")
        prefix = "" if split == "test" else f"{split}_"
        found = measure_all(images.labels, logits)
        scores = {f"metric/{prefix}{name}": value for name, value in found.items()}
        return {f"loss/{split}": float(F.cross_entropy(logits, images.labels)), **scores}

    def _logits(self, network: nn.Module, images: ImageSet, go_on: Callable[[], None]) -> Tensor:
        """Return logits (N, classes) in float64, each image as a member of its own cluster."""

        def classifier(batch: Tensor, cluster: Tensor | None = None) -> Tensor:
            with autocast(self.device, self.cfg.precision):
                x = to_input(batch, self.device, channels_last=self.cfg.channels_last)
                return network(x, None if cluster is None else cluster.to(self.device))

        training = network.training
        network.eval()
        try:
            with self.env.buffers_of_first(network):  # running averages differ between ranks
                return classify(
                    classifier,
                    images.images,
                    images.num_classes,
                    clusters=images.clusters,
                    batch_size=self.cfg.batch_size,
                    env=self.env,
                    go_on=go_on,
                )
        finally:
            network.train(training)


def choosable() -> dict[str, Tracked]:
    """Return the values of validation images that epochs can be chosen by, and those that only an oracle may."""
    chosen: list[tuple[str, Literal["higher", "lower"]]] = [
        (name, metric.better) for name, metric in METRICS.items() if metric.better is not None
    ]
    return {
        **{f"metric/validation_{name}": Tracked("validation", better) for name, better in chosen},
        "loss/validation": Tracked("validation", "lower"),
        **{f"metric/{name}": Tracked("test", better, chosen_by_test=True) for name, better in chosen},
        "loss/test": Tracked("test", "lower", chosen_by_test=True),
    }


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
