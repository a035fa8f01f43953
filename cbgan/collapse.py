"""How a GAN collapses, and what its log and its evaluations show of it."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from common.train.task import Detector

_LEAST_LOSS = 1e-3
"""A discriminator whose loss is below it tells every image apart, and the generator learns nothing more."""
_LEAST_USAGE = 1e-3
"""A component of a mixture that holds less than this share of the locations is dead."""
_FALL = 4
"""Samples that differ this many times less than they once did have collapsed."""
_ENOUGH = 0.2
"""Whether they did differ once: as much as this."""
_WINDOW = 300
"""Steps that the discriminator's verdicts are averaged over. A new one says the same of all images, and a healthy game
passes through such a stretch: the digits' default, seed 0, has a loss of 2.00 in steps 75 to 150."""
_SAME = 3e-3
"""Verdicts that differ less are the same: with the hinge loss one within about 0.012 of 2. Over 300 steps they differed
by 0.017 or more in the digits' default, and on CIFAR-10, whose loss stayed at 2.00, by 0.0026 at first and then 0."""
_REMEDY = "--guard.action rewind, --r1 10, --spectral true or a lower --lr (docs/gan.md)"


def collapse_detectors(most: Callable[[], Mapping[str, float]]) -> list[Detector]:
    """Return what recognises a collapse: the discriminator has won, learns nothing, or images have become alike.

    Args:
        most: returns the largest value so far of each tag that begins with ``metric/``.
    """
    return [
        Detector(has_won, "steps", _REMEDY),
        Detector(has_stalled, "evaluation", "--loss logistic --spectral false --lr 2e-4 (docs/gan.md)"),
        Detector(lambda values: has_few_images(values, most()), "evaluation", _REMEDY),
    ]


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


def past_values(lines: list[dict[str, Any]], start: int) -> tuple[dict[str, float], dict[str, float]]:
    """Return the largest value of each ``metric/`` tag in the lines of a log, and the `verdict_gap` since a step."""
    largest: dict[str, float] = {}
    for line in lines:
        for tag, value in line.items():
            if tag.startswith("metric/") and value is not None:
                largest[tag] = max(value, largest.get(tag, value))
    return largest, verdict_gap(lines, start)


def has_won(means: Mapping[str, float]) -> str | None:
    """Say so when the discriminator has won, whose loss is then 0 but for a penalty."""
    loss = means["loss/d"] - means.get("loss/r1", 0.0)
    if loss >= _LEAST_LOSS:
        return None
    return f"the discriminator's loss is {loss:.2g}, less than {_LEAST_LOSS:g}: it has won"


def has_stalled(values: Mapping[str, float]) -> str | None:
    """Say so when the discriminator's verdicts have been the same for long."""
    if abs(gap := values.get("discriminator/gap", 1.0)) < _SAME:
        same = "the discriminator gives real and generated images the same verdict"
        return f"{same}: over {_WINDOW} steps they differ by {gap:.2g}, and it teaches the generator nothing"
    return None


def has_few_images(values: Mapping[str, float], before: Mapping[str, Any]) -> str | None:
    """Say so when a component of a layer is dead, or samples have become alike.

    Args:
        values: what is logged, by tag.
        before: the largest value so far of each tag that begins with ``metric/``.
    """
    for tag, value in values.items():
        name = tag.split("/")[-1].replace("_", " ")
        if tag.endswith("/usage_min") and value < _LEAST_USAGE:
            return f"the least used component of {tag.split('/')[1]} holds {100 * value:.2g} % of the locations: dead"
        if name.startswith(("diversity", "recall")):
            most = before.get(tag, 0.0)
            if most >= _ENOUGH and value < most / _FALL:
                return f"{name} of samples is {value:.2g}, was {most:.2g}: the generator makes few different images"
    return None
