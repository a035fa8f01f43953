"""The two losses of a training step, and what they tell of the game on the way."""

from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from cbgan.config import GanConfig
from cbgan.networks.augmentation import augment
from cbgan.networks.dcgan import UNDER_TEST
from cbgan.networks.losses import discriminator_loss, generator_loss, gradient_penalty
from cbgan.noise import noise
from common.metrics.gradient_variance import variances
from common.runtime.seeding import generator
from common.train.guard import Part
from common.train.task import Method

_LEAST_LOSS = 1e-3
"""A discriminator whose loss is below it tells every image apart, and the generator learns nothing more."""
_LEAST_USAGE = 1e-3
"""A component of a mixture that holds less than this share of the locations is dead."""
_FALL = 4
"""Samples that differ this many times less than they once did have collapsed."""
_ENOUGH = 0.2
"""Whether they did differ once: as much as this."""
_WINDOW = 300
"""Steps that the discriminator's verdicts are averaged over. A new one says the same of all images, and a sound game
passes through such a stretch: the digits' default, seed 0, has a loss of 2.00 in steps 75 to 150."""
_SAME = 3e-3
"""Verdicts that differ less are the same: with the hinge loss one within about 0.012 of 2. Over 300 steps they differed
by 0.017 or more in the digits' default, and on CIFAR-10, whose loss stayed at 2.00, by 0.0026 at first and then 0."""
STALLED = "the discriminator gives real and generated images the same verdict"
"""How the cause of a stalled run begins."""


class Objective:
    """The losses of one step on parts of its batch.

    Both see noise of their own. A conditional GAN's generated images are asked for the classes of the real ones beside
    them, so that classes are as frequent among them.

    Args:
        method: with the networks that are trained.
    """

    def __init__(self, method: Method[GanConfig]) -> None:
        self.method, self.cfg, self.device = method, method.cfg, method.device
        self._shown: defaultdict[str, list[Tensor]] = defaultdict(list)

    def discriminator(self, part: Part) -> Tensor:
        """Return its loss on real images and on ones that the generator, which is not trained by it, makes."""
        cfg, labels = self.cfg, self._labels(part)
        real = self.method.to_input(part["train"].images).requires_grad_(cfg.r1 > 0)
        with torch.no_grad():
            fake = self.method.networks["g"](self._noise(part)[0], *labels)
        d = self.method.wrapped["d"]
        ours, theirs = d(self._seen(real, part, "real"), *labels), d(self._seen(fake, part, "fake"), *labels)
        self._show("discriminator/real", ours.float().sigmoid().mean())
        self._show("discriminator/fake", theirs.float().sigmoid().mean())
        loss = discriminator_loss(ours, theirs, cfg.loss)
        if not cfg.r1:
            return loss
        penalty = cfg.r1 / 2 * gradient_penalty(ours, real)
        self._show("loss/r1", penalty)
        return loss + penalty

    def generator(self, part: Part) -> Tensor:
        """Return its loss by the discriminator's verdict."""
        labels = self._labels(part)
        fake = self.method.wrapped["g"](self._noise(part)[1], *labels)
        return generator_loss(self.method.networks["d"](self._seen(fake, part, "generator"), *labels), self.cfg.loss)

    def shown(self) -> dict[str, Tensor]:
        """Return what the log is to show of the parts so far, by tag."""
        return {name: torch.stack(values).mean() for name, values in self._shown.items()}

    def _show(self, name: str, value: Tensor) -> None:
        self._shown[name].append(value.detach())

    def _labels(self, part: Part) -> tuple[Tensor, ...]:
        return (part["train"].labels,) if self.cfg.conditional else ()

    def _noise(self, part: Part) -> tuple[Tensor, ...]:
        """Draw the generator's inputs of a part, for the discriminator's update and for its own."""
        rows = 2 * len(part["train"].images)
        return noise(self.cfg, part.number, rows, self.device, self.method.env.rank, part.seed).chunk(2)

    def _seen(self, images: Tensor, part: Part, whose: str) -> Tensor:
        kinds = self.cfg.augmentations
        if not kinds:
            return images
        place = ("augment", whose, self.method.env.rank, part.number)
        return augment(images, kinds, generator(part.seed, *place, device=self.device))


def gradient_variances(networks: Mapping[str, nn.Module]) -> dict[str, Tensor]:
    """Return mean and maximum over weight tensors of the variance within each one's last gradient, by tag.

    Of the generator also the mean over those outside the layers under test, which every kind has.
    """
    found: dict[str, Tensor] = {}
    for name, network in networks.items():
        gradients = {key: p.grad for key, p in network.named_parameters() if p.grad is not None}
        if each := variances(gradients.values()):
            stacked = torch.stack(each)
            found |= {f"gradient/{name}_variance": stacked.mean(), f"gradient/{name}_variance_max": stacked.max()}
        if each and name == "g":
            shared = variances(g for key, g in gradients.items() if not key.startswith(UNDER_TEST))
            found["gradient/g_variance_shared"] = torch.stack(shared).mean()
    return found


def verdict_gap(lines: Iterable[Mapping[str, Any]], start: int = 0) -> dict[str, float]:
    """Return by how much the discriminator's verdicts on real and generated images differ, by tag.

    Args:
        lines: of a run's log, whose mean over the last 300 steps it is.
        start: the step to look back to; before there are 300 since then nothing is returned.
    """
    real, fake = "discriminator/real", "discriminator/fake"
    gaps = [(line["step"], line[real] - line[fake]) for line in lines if line.get(real) is not None]
    if not gaps or gaps[-1][0] < start + _WINDOW:
        return {}
    recent = [gap for step, gap in gaps if step > gaps[-1][0] - _WINDOW]
    return {"discriminator/gap": sum(recent) / len(recent)}


def collapse_of_losses(means: Mapping[str, float]) -> str | None:
    """Say so when the discriminator has won, whose loss is then 0 but for a penalty."""
    loss = means["loss/d"] - means.get("loss/r1", 0.0)
    if loss >= _LEAST_LOSS:
        return None
    return f"the discriminator's loss is {loss:.2g}, less than {_LEAST_LOSS:g}: it has won"


def collapse_of_values(values: Mapping[str, float], before: Mapping[str, Any]) -> str | None:
    """Say what is wrong with a run by its layers' health, or by a measurement of it.

    Args:
        values: what is logged, by tag.
        before: the largest value so far of each tag that begins with ``metric/``.
    """
    if abs(gap := values.get("discriminator/gap", 1.0)) < _SAME:
        return f"{STALLED}: over {_WINDOW} steps they differ by {gap:.2g}, and it teaches the generator nothing"
    for tag, value in values.items():
        name = tag.split("/")[-1].replace("_", " ")
        if tag.endswith("/usage_min") and value < _LEAST_USAGE:
            return f"the least used component of {tag.split('/')[1]} holds {100 * value:.2g} % of the locations: dead"
        if name.startswith(("diversity", "recall")):
            most = before.get(tag, 0.0)
            if most >= _ENOUGH and value < most / _FALL:
                return f"{name} of samples is {value:.2g}, was {most:.2g}: the generator makes few different images"
    return None
