"""Moments in closed form, mixtures that are known, what is drawn."""

import math
import re

import numpy as np
import pytest
import torch
from torch import Tensor

from common.reports.densities import Mixture, Sample, channel_moments, densities, fit_mixture, moments_of


def normal_quantiles(count: int) -> Tensor:
    """Return values whose distribution function is as near to a normal one's as so many can come."""
    return torch.special.ndtri((torch.arange(count, dtype=torch.float64) + 0.5) / count)


def test_a_normal_distribution_has_no_skewness_excess_nor_distance():
    found = moments_of(7 - 3 * normal_quantiles(20_000))
    assert found.skewness == pytest.approx(0, abs=1e-9)
    assert found.kurtosis == pytest.approx(0, abs=0.02)
    assert found.distance < 1e-3


def test_a_uniform_distribution_has_its_moments():
    found = moments_of((torch.arange(30_000, dtype=torch.float64) + 0.5) / 30_000)
    assert (found.skewness, found.kurtosis) == pytest.approx((0, -1.2), abs=1e-4)
    at = np.linspace(0, 1, 100_001)  # against the normal one of mean 1/2 and deviation 1/sqrt 12
    normal = np.array([0.5 * (1 + math.erf((x - 0.5) * math.sqrt(6))) for x in at])
    assert found.distance == pytest.approx(np.abs(normal - at).max(), abs=1e-4)


def test_two_values_have_the_moments_of_a_coin():
    found = moments_of(torch.tensor([1.0] * 9 + [0.0]).repeat(100))
    p = 0.9
    assert found.skewness == pytest.approx((1 - 2 * p) / math.sqrt(p * (1 - p)), rel=1e-6)
    assert found.kurtosis == pytest.approx((1 - 6 * p * (1 - p)) / (p * (1 - p)), rel=1e-6)
    # The greater of the two gaps at the upper value, 1/3 of a deviation above the mean, comes from below it.
    assert found.distance == pytest.approx(0.5 * (1 + math.erf(1 / 3 / math.sqrt(2))) - 0.1, abs=2e-3)


def test_means_over_channels_take_absolute_skewness_and_leave_dead_channels_out():
    coin = torch.tensor([1.0] * 9 + [0.0]).repeat(100)
    channels = torch.stack([coin, 5 - 2 * coin, torch.full((1000,), 3.0)], 1)
    one = moments_of(coin)
    found = channel_moments(channels)
    assert found.skewness == pytest.approx(abs(one.skewness), rel=1e-5)
    assert (found.kurtosis, found.distance) == pytest.approx((one.kurtosis, one.distance), rel=1e-2)
    assert math.isnan(channel_moments(channels[:, 2:]).distance)


def test_a_known_mixture_is_found_and_repeats():
    g = torch.Generator().manual_seed(0)
    parts = [torch.randn(n, generator=g) * s + m for n, s, m in ((1000, 0.5, -40.0), (3000, 2.0, 0.0), (4000, 1, 30))]
    values = torch.cat(parts)[torch.randperm(8000, generator=g)]
    found = fit_mixture(values, 3)
    np.testing.assert_allclose(found.weights, [1 / 8, 3 / 8, 1 / 2], atol=1e-3)
    np.testing.assert_allclose(found.means, [-40, 0, 30], atol=0.15)
    np.testing.assert_allclose(found.deviations, [0.5, 2, 1], rtol=0.05)
    assert (fit_mixture(values, 3).means == found.means).all()
    with pytest.raises(ValueError, match="values: expected finite"):
        fit_mixture(torch.tensor([1.0, math.nan]), 1)


def test_no_overlap_keeps_a_mixture_from_being_fitted():
    """A fit of the greatest likelihood is no less likely than what the values were drawn from."""
    g = torch.Generator().manual_seed(0)
    drawn = Mixture(np.array([0.15, 0.5, 0.35]), np.array([-1.2, 0.0, 0.9]), np.array([1.1, 0.7, 1.3]))
    weights, means, deviations = (torch.tensor(each) for each in (drawn.weights, drawn.means, drawn.deviations))
    of = torch.multinomial(weights, 10_000, replacement=True, generator=g)
    values = means[of] + deviations[of] * torch.randn(10_000, generator=g, dtype=torch.float64)
    likely = [np.log(each.components(values.numpy()).sum(axis=0)).mean() for each in (fit_mixture(values, 3), drawn)]
    assert likely[0] >= likely[1]


def test_components_are_normal_densities_times_their_weights():
    mixture = Mixture(np.array([0.25, 0.75]), np.array([-1.0, 2.0]), np.array([0.5, 3.0]))
    x = np.linspace(-30, 30, 6001)
    parts = mixture.components(x)
    np.testing.assert_allclose(parts.sum(1) * 0.01, [0.25, 0.75], rtol=1e-6)
    at = [np.argmax(part) for part in parts]
    np.testing.assert_allclose(x[at], [-1, 2], atol=1e-9)
    np.testing.assert_allclose(
        parts.max(1), [0.25 / (0.5 * math.sqrt(2 * math.pi)), 0.75 / (3 * math.sqrt(2 * math.pi))]
    )


def test_each_sample_has_its_panel_with_components_whole_and_numbers(tmp_path):
    def sample(title: str, place: str) -> Sample:
        return Sample(normal_quantiles(600).view(200, 3), title, place)

    samples = [sample(title, place) for place in ("conv2", "norm3") for title in ("BN", "UCB")]
    png, svg = densities(tmp_path / "d", samples, columns=2, components=2)
    text = svg.read_text()
    words = [line.strip() for line in re.findall(r"<!--(.*?)-->", text)]
    assert (words.count("BN"), words.count("UCB")) == (2, 2)
    assert (words.count("density at conv2"), words.count("density at norm3")) == (1, 1)
    for name in ("mixture fitted to the activations", "its components"):
        assert words.count(name) == 1
    assert len(re.findall(r"skewness -?0\.00", text)) == 4
    assert len(re.findall(r"stroke-dasharray[^\"]*; stroke: #(?:0072b2|d55e00)", text)) == 4 * 2 + 1
    assert len(re.findall(r"stroke: #009e73; stroke-width: 1.8; stroke-linecap", text)) == 4 + 1
    densities(tmp_path / "again", samples, columns=2, components=2)
    assert (tmp_path / "again.png").read_bytes() == png.read_bytes()


def test_a_constant_sample_is_drawn(tmp_path):
    densities(tmp_path / "d", [Sample(torch.zeros(50, 2), "dead", "norm3")], columns=1)
