"""What is measured of a classifier while it trains: loss and scores on the test images, health of the mixture."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cbcls.config import ClassifierConfig
from common.data.image_set import Splits, to_float
from common.errors import NonFiniteError, UsageError
from common.machine.device import autocast, memory_format
from common.machine.seeding import permutation
from common.metrics.scores import classification_scores
from common.norms import collect_health, log_scalars, mixture_layers


class Evaluation:
    """Measures a classifier on the test images.

    Args:
        cfg: the run's configuration.
        splits: the run's images, as `check_labels` wants them.
        device: where the classifier is.
    """

    def __init__(self, cfg: ClassifierConfig, splits: Splits, device: torch.device) -> None:
        self.cfg, self.device = cfg, device
        assert splits.test is not None
        assert splits.test.labels is not None
        self.test, self.labels = splits.test, splits.test.labels
        order = permutation(len(splits.train), cfg.seed, "health")
        self.health_images = splits.train.images[order[: cfg.batch_size]]
        self.warnings: list[str] = []
        self._told: set[str] = set()

    def scores(self, network: nn.Module, should_stop: Callable[[], object]) -> dict[str, float] | None:
        """Return loss and scores on the test images in evaluation mode, by tag; None if ``should_stop`` says so.

        Raises:
            NonFiniteError: if a logit is not finite.
        """
        network.eval()
        try:
            outputs = []
            for images in self.test.images.split(self.cfg.batch_size):
                if should_stop():
                    return None
                outputs.append(self._logits(network, images))
        finally:
            network.train()
        logits = torch.cat(outputs).double().cpu()
        if not logits.isfinite().all():
            raise NonFiniteError("logits of the test images are not finite; the checkpoint before them stands")
        found = classification_scores(self.labels, logits, self.test.num_classes)
        values = {
            "loss/test": float(F.cross_entropy(logits, self.labels)),
            "metric/accuracy": found.accuracy,
            "metric/macro_precision": found.macro.precision,
            "metric/macro_recall": found.macro.recall,
            "metric/macro_f1": found.macro.f1,
        }
        return values if found.top5 is None else values | {"metric/top5": found.top5}

    def health(self, network: nn.Module) -> dict[str, float]:
        """Measure the mixture layer in training mode on one batch of training images, the same all through a run."""
        if not mixture_layers(network):
            return {}
        with collect_health(network) as found:
            self._logits(network, self.health_images)
        self.warnings = [f"{name}: {line}" for name, state in found.items() for line in state.warnings()]
        return log_scalars(found)

    def new_warnings(self) -> list[str]:
        """Return what is wrong with a layer that had no warning so far: once a layer, not once an epoch."""
        new = [line for line in self.warnings if line.split(":")[0] not in self._told]
        self._told.update(line.split(":")[0] for line in new)
        return new

    @torch.no_grad()
    def _logits(self, network: nn.Module, images: Tensor) -> Tensor:
        x = to_input(images, self.device, self.cfg)
        with autocast(self.device, self.cfg.precision):
            return network(x)


def to_input(images: Tensor, device: torch.device, cfg: ClassifierConfig) -> Tensor:
    """Bring uint8 images (N, 3, S, S) to the device, in [-1, 1] and in the run's memory layout."""
    x = to_float(images.to(device, non_blocking=True))
    return x.contiguous(memory_format=memory_format(cfg.channels_last))


def check_labels(splits: Splits) -> None:
    """Raise UsageError if labels, a second class or images to test on are missing."""
    train, test = splits.train, splits.test
    if train.labels is None:
        raise UsageError(f"data.root: {train.name} has no labels; a classifier needs one sub-folder a class")
    if train.num_classes < 2:
        raise UsageError(f"data.root: a classifier needs at least 2 classes, {train.name} has {train.num_classes}")
    if test is None:
        raise UsageError("data.test_root: expected a folder of labelled images held apart from training, got null")
    if test.labels is None:
        raise UsageError(f"data.test_root: {test.name} has no labels; expected the sub-folders of data.root")
