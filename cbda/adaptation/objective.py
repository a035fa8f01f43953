"""What is logged of adaptation, and what shows that it has collapsed."""

import math
from collections.abc import Mapping

from cbda.adaptation.config import MethodConfig
from cbda.adaptation.losses import REMEMBERED, Watch

_NEARLY_ALL = 0.95
"""Mask rate from which on every pseudo-label counts as passing."""
_THRESHOLD_FELL, _ACCURACY_FELL = 0.9, 0.8
"""Shares of its highest value below which threshold and source accuracy count as falling."""
_LASTING = 100
"""Batches for which pseudo-labels of one class are a collapse; a shorter lean may pass."""
_BY_CHANCE = 8
"""Standard deviations that an average's highest and lowest may lie apart in a long run in which nothing changes."""


def shares_of_passing(means: Mapping[str, float]) -> dict[str, float]:
    """Return logged means with shares of the target made shares of the pseudo-labels that passed; if any did."""
    values = dict(means)
    right, largest = values.pop("adapt/passing_right", None), values.pop("adapt/largest_class", 0.0)
    if passed := values["adapt/mask_rate"]:
        values["adapt/largest_class"] = largest / passed
        if right is not None:
            values["adapt/pseudo_label_accuracy_oracle"] = right / passed
    return values


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
    noise = math.sqrt((1 - REMEMBERED) / (1 + REMEMBERED) * of_batch)
    if accuracy < _ACCURACY_FELL * best[1] and best[1] - accuracy > _BY_CHANCE * noise:
        return f"accuracy on the source has fallen from {100 * best[1]:.0f} % to {100 * accuracy:.0f} %"
    if means["schedule/mu"] < 0.5:  # nothing much is learnt from the target yet
        return None
    if means["adapt/mask_rate"] > _NEARLY_ALL and threshold < _THRESHOLD_FELL * best[0]:
        return f"every pseudo-label passes a threshold that has fallen from {best[0]:.2g} to {threshold:.2g}"
    if leaning >= _LASTING:
        return f"for {leaning} batches nearly all pseudo-labels have been of one class"
    return None
