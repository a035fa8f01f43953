"""How activations are distributed: histogram, Gaussian mixture with its components, and distance from a normal."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from sklearn.mixture import GaussianMixture
from threadpoolctl import threadpool_limits
from torch import Tensor

from common.reports.figures import COLOURS, drawing_style, write_figure
from common.runtime.seeding import derive, permutation

_PANEL = (3.3, 2.5)  # inches
_FITTED = 10_000  # values that a mixture is fitted to
_TOLERANCE, _MOST_STEPS = 1e-6, 10_000  # of EM, which creeps where components overlap: scikit-learn's 1e-3 stops early
_BINS, _POINTS = 80, 400
_TAIL = 0.002  # share of the values at either end that is not shown
_MIXTURE = COLOURS[2]  # green, as in the paper
_COMPONENTS = COLOURS[:2] + COLOURS[3:]


@dataclass(frozen=True)
class Moments:
    """How a distribution differs from a normal one, whatever its mean and deviation."""

    skewness: float
    """The third standardised moment: 0 of a symmetric distribution."""
    kurtosis: float
    """The fourth standardised moment less 3, which is a normal one's: above 0 tails are heavier."""
    distance: float
    """The greatest difference between its distribution function and that of the normal one of its mean and deviation
    (Kolmogorov's and Smirnov's, as Lilliefors uses it): 0 to 1."""


def moments_of(values: Tensor) -> Moments:
    """Return what tells values (N,) from a normal distribution; nan where all are the same."""
    x = values.detach().flatten().double().cpu()
    centred = x - x.mean()
    deviation = centred.square().mean().sqrt()
    z = (centred / deviation).sort().values
    normal = 0.5 * (1 + torch.special.erf(z / math.sqrt(2)))
    n = len(z)
    above = torch.arange(1, n + 1, dtype=torch.float64) / n - normal
    below = normal - torch.arange(n, dtype=torch.float64) / n
    distance = torch.maximum(above, below).max() if deviation > 0 else torch.tensor(math.nan)
    return Moments(float(z.pow(3).mean()), float(z.pow(4).mean() - 3), float(distance))


def channel_moments(values: Tensor) -> Moments:
    """Return the means over channels of each one's |skewness|, excess kurtosis and distance; values are (N, C).

    Channels of one value alone, such as those behind a dead unit, are left out; nan where there is no other.
    """
    each = [moments_of(column) for column in values.T]
    finite = [m for m in each if math.isfinite(m.distance)]
    if not finite:
        return Moments(math.nan, math.nan, math.nan)
    mean = np.mean([(abs(m.skewness), m.kurtosis, m.distance) for m in finite], axis=0)
    return Moments(*map(float, mean))


@dataclass(frozen=True)
class Mixture:
    """A mixture of normal distributions of one variable, its components in the order of their means."""

    weights: np.ndarray
    means: np.ndarray
    deviations: np.ndarray

    def components(self, x: np.ndarray) -> np.ndarray:
        """Return the density of each component at x (M,), times its weight: (K, M)."""
        z = (x - self.means[:, None]) / self.deviations[:, None]
        return (self.weights / self.deviations)[:, None] * np.exp(-0.5 * z**2) / math.sqrt(2 * math.pi)


def fit_mixture(values: Tensor, components: int, seed: int = 0) -> Mixture:
    """Fit a mixture to values (N,) by EM, from k-means++ means; the same values give the same mixture.

    At most 10,000 of the values are used, chosen by the seed.

    Raises:
        ValueError: if there are fewer values than components, or one is not finite.
    """
    x = values.detach().flatten().double().cpu()
    if not x.isfinite().all():
        raise ValueError("values: expected finite ones")
    chosen = x[permutation(len(x), seed, "mixture")[:_FITTED]].numpy()[:, None]
    deviation = chosen.std() or 1.0
    draws = derive(seed, "mixture") % 2**32
    model = GaussianMixture(
        components, init_params="k-means++", tol=_TOLERANCE, max_iter=_MOST_STEPS, random_state=draws
    )
    with threadpool_limits(1):  # the same sums on any number of cores
        model.fit((chosen - chosen.mean()) / deviation)
    weights, means = np.asarray(model.weights_), np.asarray(model.means_)[:, 0]
    order, spread = np.argsort(means), np.sqrt(np.asarray(model.covariances_)[:, 0, 0])
    return Mixture(weights[order], means[order] * deviation + chosen.mean(), spread[order] * deviation)


@dataclass(frozen=True)
class Sample:
    """Activations of one model at one place.

    Attributes:
        values: (N, C), of C channels at N locations.
        title: the model.
        place: the layer.
    """

    values: Tensor
    title: str
    place: str


def densities(
    path: Path, samples: Sequence[Sample], *, components: int = 3, columns: int, seed: int = 0
) -> tuple[Path, Path]:
    """Draw the distribution of each sample, all channels together: histogram, mixture, dashed components.

    The solid line is the density of the mixture that is fitted to the values, the sum of its components.

    Args:
        path: PATH.png and PATH.svg are written, each whole or not at all; either ending may be given.
        samples: row by row.
        components: of the mixture.
        columns: panels a row.
        seed: of the fit's draws.

    Returns:
        The two files.

    Raises:
        ValueError: as `fit_mixture` does.
    """
    rows = -(-len(samples) // columns)
    with drawing_style():
        figure = Figure(figsize=(_PANEL[0] * columns, _PANEL[1] * rows + 0.3), layout="constrained")
        for number, sample in enumerate(samples):
            axes = figure.add_subplot(rows, columns, number + 1)
            _draw(axes, sample, fit_mixture(sample.values, components, seed))
            if number % columns == 0:
                axes.set_ylabel(f"density at {sample.place}", fontsize=9)
        handles = [line for line in figure.axes[0].get_lines() if not str(line.get_label()).startswith("_")]
        figure.legend(handles=handles, loc="outside lower center", ncols=2, fontsize=8)
        return write_figure(figure, path)


def _draw(axes: Axes, sample: Sample, mixture: Mixture) -> None:
    values = sample.values.detach().flatten().double().cpu().numpy()
    low, high = np.quantile(values, [_TAIL, 1 - _TAIL])
    if low == high:
        low, high = low - 0.5, high + 0.5
    heights, edges = np.histogram(values, bins=_BINS, range=(low, high))
    width = edges[1] - edges[0]
    # Of all values, those beyond the ends among them, so that the bars and the lines have one scale.
    axes.bar(edges[:-1], heights / (len(values) * width), width, align="edge", color="0.82", linewidth=0)
    x = np.linspace(low, high, _POINTS)
    components = mixture.components(x)
    for number, density in enumerate(components):
        label = "its components" if number == 0 else "_"  # one entry of the legend for all
        colour = _COMPONENTS[number % len(_COMPONENTS)]
        axes.plot(x, density, color=colour, linestyle="--", linewidth=1.2, label=label)
    axes.plot(x, components.sum(0), color=_MIXTURE, label="mixture fitted to the activations")
    found = moments_of(sample.values)
    text = f"skewness {found.skewness:.2f}\nkurtosis {found.kurtosis:.2f}\ndistance {found.distance:.3f}"
    axes.text(0.98, 0.97, text, transform=axes.transAxes, ha="right", va="top", fontsize=7)
    axes.set_title(sample.title, fontsize=10)
    axes.set_ylim(0, 1.35 * heights.max() / (len(values) * width))  # a component that is a needle may reach beyond
    axes.tick_params(labelsize=7)
