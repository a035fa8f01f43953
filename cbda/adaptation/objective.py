"""The two losses of a training step, what they tell of adaptation on the way, and what tells that it has collapsed."""

import math
from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from cbda.adaptation.algorithm import Terms, adamatch
from cbda.adaptation.config import MethodConfig
from cbda.adaptation.gradients import gradients_differ, gradients_vary
from cbda.adaptation.losses import REMEMBERED, Alignment, Watch, ramp, source_cross_entropy
from cbda.networks.classifier import SOURCE
from common.train.guard import Part, Update
from common.train.task import Method

_CLASSES_CHARTED = 20
_NEARLY_ALL = 0.95
"""Mask rate from which on every pseudo-label counts as passing."""
_THRESHOLD_FELL, _ACCURACY_FELL = 0.9, 0.8
"""Shares of its highest value below which threshold and source accuracy count as falling."""
_ONE_CLASS, _ONE_OF_TWO, _SOME = 0.9, 0.99, 0.1
"""Share of the pseudo-labels that counts as all, of two classes, and of the target that has to have any."""
_SETTLED = 30
"""Batches from which on it does: a network that has learnt nothing yet may well say one class of everything."""
_BY_CHANCE = 8
"""Standard deviations that an average's highest and lowest may lie apart in a long run in which nothing changes."""


class Objective:
    """The losses of one step on parts of its batch.

    Args:
        method: with the networks that are trained.
        progress: share of the run before the step, in [0, 1], which mu follows.
    """

    def __init__(self, method: Method[Any], progress: float) -> None:
        self.method, self.cfg = method, method.cfg
        self.mu = ramp(progress, method.cfg.method.warmup)
        self._shown: defaultdict[str, list[Tensor]] = defaultdict(list)

    def adamatch(self, part: Part) -> Tensor:
        """Return the classifier's loss: the source's, the labelled target's if any, and mu times the target's."""
        networks, alignment = self.method.networks, self.method.networks["alignment"]
        assert isinstance(alignment, Alignment)
        terms = adamatch(self.cfg.method, part, self.method.wrapped["adamatch"], alignment, self.method.to_input)
        values = self._told(terms, part["target"].labels)
        if self._due(part, self.cfg.variance_every):
            values |= gradients_vary(terms, networks["adamatch"])
        if self._due(part, self.cfg.noise_every):
            values |= gradients_differ(self.cfg.method, terms, part["train"].labels, networks["adamatch"])
        for name, value in values.items():
            self._shown[name].append(value.detach())
        supervised = terms.source if terms.labelled is None else terms.source + terms.labelled
        return supervised + self.mu * terms.target

    def source_only(self, part: Part) -> Tensor:
        """Return the loss of the classifier that sees the source alone, on the same images."""
        source = part["train"]
        x = self.method.to_input(torch.cat(source.views))
        logits = self.method.wrapped["source_only"](x, torch.full((len(x),), SOURCE, device=x.device))
        return source_cross_entropy(logits.float(), source.labels, self.cfg.method.source_loss or "mean")

    def show(self, update: Update) -> None:
        """Hand over what is to be logged; of gradients, which few steps measure, the means over an epoch."""
        for name, values in self._shown.items():
            kept = update.of_epoch if name.startswith("gradient/") else update.values
            kept[name] = torch.stack(values).mean(0)
        update.values["schedule/mu"] = torch.tensor(self.mu)

    def _due(self, part: Part, every: int) -> bool:
        """Say whether something is measured on a part, the last one of every so manieth step."""
        return every > 0 and (part.number + 1) % (every * self.cfg.accumulate) == 0

    def _told(self, terms: Terms, labels: Tensor) -> dict[str, Tensor]:
        """Return what tells whether adaptation works: see docs/adaptation.md."""
        values = {
            "loss/source": terms.source,
            "loss/target": terms.target,
            "adapt/threshold": terms.threshold,
            "adapt/source_accuracy": terms.accuracy,
            "adapt/largest_class": terms.shares.max(),
            "adapt/mask_rate": terms.mask.float().mean(),
        }
        if terms.labelled is not None:
            values["loss/target_labelled"] = terms.labelled
        if self.method.images["target"].labels is not None:
            values["adapt/passing_right"] = (terms.mask & (terms.pseudo.argmax(1) == labels)).float().mean()
        classes = self.method.images["train"].classes
        if len(classes) <= _CLASSES_CHARTED and self.cfg.method.alignment != "none":
            values |= {f"adapt/ratio/{name}": ratio for name, ratio in zip(classes, terms.ratio, strict=True)}
        return values


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
    (threshold, accuracy, *shares), best = watch.recent.tolist(), watch.highest.tolist()
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
    limit = _ONE_CLASS if classes > 2 else _ONE_OF_TWO
    if watch.batches >= _SETTLED and sum(shares) > _SOME and max(shares) > limit * sum(shares):
        return f"{100 * max(shares) / sum(shares):.0f} % of the pseudo-labels are of one class"
    return None
