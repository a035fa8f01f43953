"""What shows that adaptation has collapsed."""

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from cbda.adaptation.config import MethodConfig

_REMEMBERED = 0.9
"""What a batch leaves of the averages that a collapse shows by."""
_ONE_CLASS, _ONE_OF_TWO, _SOME = 0.9, 0.99, 0.1
"""Share of the pseudo-labels that counts as all, of two classes, and of the target that has to have any."""
_NEARLY_ALL = 0.95
"""Mask rate from which on every pseudo-label counts as passing."""
_THRESHOLD_FELL, _ACCURACY_FELL = 0.9, 0.8
"""Shares of its highest value below which threshold and source accuracy count as falling."""
_LASTING = 100
"""Batches for which pseudo-labels of one class are a collapse; a shorter lean may pass."""
_BY_CHANCE = 8
"""Standard deviations that an average's highest and lowest may lie apart in a long run in which nothing changes."""


class Watch(nn.Module):
    """What a collapse shows by: averages over about ten batches, and the highest that they have been.

    All averages start at 0, so that a run's first batches count for less.

    Args:
        num_classes: classes C.
    """

    recent: Tensor
    """Threshold, accuracy on the source, and for each class the share of the target taken for it with confidence."""
    highest: Tensor
    """Of the first two of them."""
    leaning: Tensor
    """Batches for which nearly all pseudo-labels have been of one class; batches with hardly any pseudo-labels, which
    a collapsed run has in between, neither count nor end it."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.register_buffer("recent", torch.zeros(2 + num_classes))
        self.register_buffer("highest", torch.zeros(2))
        self.register_buffer("leaning", torch.zeros((), dtype=torch.int64))

    @torch.no_grad()
    def forward(self, threshold: Tensor, accuracy: Tensor, shares: Tensor) -> None:
        """Take in a batch: its threshold, accuracy on the source, and shares (C,) of the target, over all ranks."""
        now = torch.cat([torch.stack([threshold, accuracy]), shares])
        self.recent.lerp_(now.to(self.recent), 1 - _REMEMBERED)
        self.highest.copy_(torch.maximum(self.highest, self.recent[:2]))
        passing, limit = self.recent[2:].sum(), _ONE_CLASS if len(shares) > 2 else _ONE_OF_TWO
        leans = self.recent[2:].max() > limit * passing
        self.leaning.copy_(torch.where(passing > _SOME, torch.where(leans, self.leaning + 1, 0), self.leaning))


def collapse(
    method: MethodConfig, watch: Watch, means: Mapping[str, float], classes: int, batch_size: int
) -> str | None:
    """Say so when the source is lost, all pseudo-labels pass a falling threshold, or they are of one class.

    Args:
        method: resolved.
        watch: averages over the last batches.
        means: logged values by tag: ``loss/source``, ``schedule/mu`` and ``adapt/mask_rate`` are read.
        classes: how many there are.
        batch_size: source images of a batch, on all ranks.
    """
    threshold, accuracy = watch.recent[:2].tolist()
    best, leaning = watch.highest.tolist(), int(watch.leaning)
    limit = 2 * math.log(classes)
    # In inference mode BatchNorm's averages are far off in a run's first steps, and losses are whatever they are.
    if method.source_pass != "inference" and means["loss/source"] > limit * (1 + (method.source_loss == "sum")):
        return f"the source's loss {means['loss/source']:.3g} is more than twice that of equal guesses"
    # Of an average that forgets by r at each batch, the variance is (1 - r) / (1 + r) of a batch's.
    of_batch = best[1] * (1 - best[1]) / batch_size
    noise = math.sqrt((1 - _REMEMBERED) / (1 + _REMEMBERED) * of_batch)
    if accuracy < _ACCURACY_FELL * best[1] and best[1] - accuracy > _BY_CHANCE * noise:
        return f"accuracy on the source has fallen from {100 * best[1]:.0f} % to {100 * accuracy:.0f} %"
    if means["schedule/mu"] < 0.5:  # nothing much is learnt from the target yet
        return None
    if means["adapt/mask_rate"] > _NEARLY_ALL and threshold < _THRESHOLD_FELL * best[0]:
        return f"every pseudo-label passes a threshold that has fallen from {best[0]:.2g} to {threshold:.2g}"
    if leaning >= _LASTING:
        return f"for {leaning} batches nearly all pseudo-labels have been of one class"
    return None
