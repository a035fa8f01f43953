"""Whether runs bear out a claim: paired differences over seeds, Student's t, Holm, and a verdict for each claim."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from scipy import stats

FEWEST_SEEDS = 5
"""Pairs below which nothing is judged."""
LEVEL = 0.95
Verdict = Literal["holds", "holds, smaller than claimed", "fails", "undecided", "not tested"]


class Difference(NamedTuple):
    """Mean paired difference over seeds, in the claimed direction: above 0 is what the claim says.

    Attributes:
        mean: over the pairs; nan where there is none.
        low: lower end of the 95 % interval by Student's t; nan of fewer than two pairs.
        high: its upper end.
        p: two-sided p-value of the paired t-test; 1 of fewer than two pairs.
        seeds: those that both sides have, in order.
    """

    mean: float
    low: float
    high: float
    p: float
    seeds: tuple[int, ...]


@dataclass(frozen=True)
class Judged:
    """A claim's verdict.

    Attributes:
        difference: the primary contrast.
        adjusted_p: its p-value by Holm's method over the primary contrasts of all claims that are judged; nan if this
            one is not.
        verdict: exactly one.
    """

    difference: Difference
    adjusted_p: float
    verdict: Verdict


def paired_difference(
    treated: Mapping[int, float], control: Mapping[int, float], better: Literal["higher", "lower"]
) -> Difference:
    """Compare two arms of runs seed by seed.

    Args:
        treated: a value for each seed.
        control: the same; seeds that only one side has are left out.
        better: "lower" turns the sign, so that an improvement is positive.

    Raises:
        ValueError: if a value is not finite: a run that diverged has to be counted, not averaged.
    """
    seeds = tuple(sorted(treated.keys() & control.keys()))
    sign = 1 if better == "higher" else -1
    differences = [sign * (treated[seed] - control[seed]) for seed in seeds]
    if not all(map(math.isfinite, differences)):
        bad = next(seed for seed, value in zip(seeds, differences, strict=True) if not math.isfinite(value))
        raise ValueError(f"seed {bad}: expected finite values, got {treated[bad]} and {control[bad]}")
    mean, low, high = mean_interval(differences)
    count = len(seeds)
    if count < 2:
        return Difference(mean, low, high, 1.0, seeds)
    error = (high - mean) / _reach(count)
    if not error:  # all pairs differ by the same
        return Difference(mean, low, high, float(mean == 0), seeds)
    return Difference(mean, low, high, 2 * float(stats.t.sf(abs(mean) / error, count - 1)), seeds)


def mean_interval(values: Sequence[float]) -> tuple[float, float, float]:
    """Return the mean and the ends of its 95 % interval by Student's t; nan without values, no ends of a single one."""
    count = len(values)
    mean = math.fsum(values) / count if count else math.nan
    if count < 2:
        return mean, math.nan, math.nan
    reach = _reach(count) * math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (count - 1) / count)
    return mean, mean - reach, mean + reach


def _reach(count: int) -> float:
    """Return how many standard errors the interval of a mean of ``count`` values reaches to either side."""
    return float(stats.t.ppf((1 + LEVEL) / 2, count - 1))


def holm(p_values: Sequence[float]) -> list[float]:
    """Adjust p-values by Holm's step-down method (1979), which keeps the chance of any false rejection at the level."""
    order = sorted(range(len(p_values)), key=p_values.__getitem__)
    adjusted, largest = [0.0] * len(p_values), 0.0
    for rank, index in enumerate(order):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = largest
    return adjusted


def judge(contrasts: Mapping[str, Difference], effects: Mapping[str, float | None]) -> dict[str, Judged]:
    """Give each claim its verdict, all of them together, since Holm's method looks at all.

    - holds: the interval is above 0 and the adjusted p below 0.05;
    - holds, smaller than claimed: the same, and the interval is below half the paper's effect;
    - fails: not holding, and the interval is below half the paper's effect, or below 0 for a claim without a number;
    - undecided: none of these;
    - not tested: fewer than five seeds.

    Args:
        contrasts: the primary contrast of each claim, by the claim's id.
        effects: the paper's effect in the same unit and direction, by id; None where the paper has no number.
    """
    tested = [name for name, contrast in contrasts.items() if len(contrast.seeds) >= FEWEST_SEEDS]
    adjusted = dict(zip(tested, holm([contrasts[name].p for name in tested]), strict=True))
    return {
        name: Judged(contrast, adjusted.get(name, math.nan), _verdict(contrast, adjusted.get(name), effects[name]))
        for name, contrast in contrasts.items()
    }


def _verdict(contrast: Difference, adjusted_p: float | None, effect: float | None) -> Verdict:
    if adjusted_p is None:
        return "not tested"
    below_half = contrast.high < effect / 2 if effect is not None else contrast.high < 0
    if contrast.low > 0 and adjusted_p < 1 - LEVEL:
        return "holds, smaller than claimed" if effect is not None and below_half else "holds"
    return "fails" if below_half else "undecided"
