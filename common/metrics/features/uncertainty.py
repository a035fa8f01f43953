"""How far a Fréchet distance of samples is from that of the distributions: an interval, and the limit of many samples.

The distance of n samples is too large by about c / n, since a covariance of few samples is too ragged.
"""

from dataclasses import dataclass
from statistics import fmean, stdev

import torch
from torch import Tensor

from common.metrics.features.frechet import Reference, Statistics
from common.runtime.seeding import generator, permutation

REPLICATES = 20
_QUANTILE = 2.0930240544  # of Student's t with 19 degrees of freedom, at 0.975
POINTS = 15
FEWEST_FOR_INTERVAL, FEWEST_FOR_LIMIT = 2, 4
"""Samples for each dimension below which a covariance says too little of its own error, and the limit falls far below
the distance: docs/evaluation.md has a simulation."""


@dataclass(frozen=True)
class Interval:
    """A 95 % interval for the distance between two distributions; ``low`` may be below 0 where they are close."""

    centre: float
    half_width: float

    @property
    def low(self) -> float:
        """The lower end."""
        return self.centre - self.half_width

    @property
    def high(self) -> float:
        """The upper end."""
        return self.centre + self.half_width


def enough(count: int, dim: int, fewest: int = FEWEST_FOR_INTERVAL) -> bool:
    """Say whether there are at least ``fewest`` samples for each dimension."""
    return count >= fewest * dim


def distance_interval(
    generated: Tensor, real: Tensor | Statistics, *, seed: int, device: torch.device | str = "cpu"
) -> Interval:
    """Return a 95 % interval for the Fréchet distance between the distributions that samples are drawn from.

    Each of 20 replicates draws as many samples as there are, with replacement. A replicate is to the sample as the
    sample is to the distribution, so the replicates' mean exceeds the sample's distance by the bias: the interval's
    centre is twice the distance less their mean, its half-width t(19) = 2.093 times their standard deviation.

    Args:
        generated: features (N, D), N at least twice D.
        real: features (M, D) that are resampled too, where they are a sample of the distribution that is meant; or
            statistics, which stay as they are.
        seed: what the draws follow from.
        device: where it is computed.

    Raises:
        ValueError: if there are too few samples.
    """
    fake, truth = (
        _Sample(generated, device),
        _Sample(real, device) if isinstance(real, Tensor) else _moved(real, device),
    )
    reference = Reference(truth.statistics() if isinstance(truth, _Sample) else truth)
    whole, distances = reference.distance(fake.statistics()), list[float]()
    for number in range(REPLICATES):
        if isinstance(truth, _Sample):
            reference = Reference(truth.resampled(seed, "real", number))
        distances.append(reference.distance(fake.resampled(seed, "generated", number)))
    return Interval(2 * whole - fmean(distances), _QUANTILE * stdev(distances))


def distance_limit(generated: Tensor, real: Statistics, *, seed: int, device: torch.device | str = "cpu") -> float:
    """Return FID-infinity: the distance that infinitely many samples would have (Chong and Forsyth 2020).

    The distance is measured on 15 random subsets of a tenth (at least twice D) to all of the samples and extrapolated
    along its regression line over 1 / n to 0.

    Arguments and errors as for `distance_interval`, N at least four times D.
    """
    sample, reference = _Sample(generated, device, FEWEST_FOR_LIMIT), Reference(_moved(real, device))
    count, dim = generated.shape
    first = max(count // 10, FEWEST_FOR_INTERVAL * dim)
    sizes = torch.linspace(first, count, POINTS).round().long().tolist()
    distances = []
    for number, size in enumerate(sizes):
        chosen = torch.zeros(count, dtype=torch.int64)
        chosen[permutation(count, seed, "subset", number)[:size]] = 1
        distances.append(reference.distance(sample.statistics(chosen)))
    x = torch.tensor(sizes, dtype=torch.float64).reciprocal()
    y = torch.tensor(distances, dtype=torch.float64)
    slope = (x - x.mean()) @ y / ((x - x.mean()) ** 2).sum()
    return float(y.mean() - slope * x.mean())


class _Sample:
    """Features whose statistics are taken many times, with other weights."""

    def __init__(self, features: Tensor, device: torch.device | str, fewest: int = FEWEST_FOR_INTERVAL) -> None:
        count, dim = features.shape
        if not enough(count, dim, fewest):
            raise ValueError(f"features: expected at least {fewest * dim} samples of {dim} dimensions, got {count}")
        x = features.to(device, torch.float64)
        self._centre = x.mean(dim=0)
        self._features = x - self._centre  # so that no digits cancel below

    def statistics(self, times: Tensor | None = None) -> Statistics:
        """Return mean and unbiased covariance, each sample counted ``times`` times, int64 (N,), or once."""
        x = self._features
        weights = (torch.ones(len(x)) if times is None else times).to(x.device).double()
        count = weights.sum()
        mean = weights @ x / count
        covariance = ((x * weights[:, None]).T @ x - count * torch.outer(mean, mean)) / (count - 1)
        return Statistics(self._centre + mean, covariance)

    def resampled(self, seed: int, what: str, number: int) -> Statistics:
        count = len(self._features)
        drawn = torch.randint(count, (count,), generator=generator(seed, "bootstrap", what, number))
        return self.statistics(torch.bincount(drawn, minlength=count))


def _moved(of: Statistics, device: torch.device | str) -> Statistics:
    return Statistics(of.mean.to(device, torch.float64), of.covariance.to(device, torch.float64))
