import numpy as np
import pytest
import torch
from scipy import stats

from common.metrics import Statistics, frechet_distance, statistics
from common.metrics.features.uncertainty import distance_interval, distance_limit, enough
from common.runtime.seeding import generator, permutation

DIM, SHIFT = 8, 0.3
SCALES = torch.linspace(0.5, 1.5, DIM, dtype=torch.float64)
TRUTH = DIM * SHIFT**2 + float(((SCALES - 1) ** 2).sum())
"""Distance of N(0.3, diag(scales^2)) from N(0, 1): |m|^2 and the squared differences of deviations."""
STANDARD = Statistics(torch.zeros(DIM, dtype=torch.float64), torch.eye(DIM, dtype=torch.float64))


def drawn(count: int, seed: int) -> torch.Tensor:
    noise = torch.randn(count, DIM, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return noise * SCALES + SHIFT


def test_intervals_hold_the_distance_of_the_distributions_as_often_as_they_say():
    found = [distance_interval(drawn(500, seed), STANDARD, seed=seed) for seed in range(200)]
    covered = sum(each.low <= TRUTH <= each.high for each in found) / 200
    assert 0.9 <= covered <= 0.99
    assert np.mean([each.half_width for each in found]) < 0.25  # a sixth of the distance: not wide for safety


def test_an_interval_is_the_distance_less_its_bias_and_students_quantile_of_resampled_ones():
    for both in (False, True):
        fake, real = drawn(60, 0).float(), torch.randn(50, DIM, generator=torch.Generator().manual_seed(1))
        whole, distances = frechet_distance(statistics(fake), statistics(real)), []
        for number in range(20):
            rows, others = (
                torch.randint(len(x), (len(x),), generator=generator(3, "bootstrap", what, number))
                for x, what in ((fake, "generated"), (real, "real"))
            )
            reference = statistics(real[others] if both else real)
            distances.append(frechet_distance(statistics(fake[rows]), reference))
        got = distance_interval(fake, real if both else statistics(real), seed=3)
        assert got.centre == pytest.approx(2 * whole - np.mean(distances), rel=1e-9)
        assert got.half_width == pytest.approx(stats.t.ppf(0.975, 19) * np.std(distances, ddof=1), rel=1e-9)
        assert (got.low, got.high) == (got.centre - got.half_width, got.centre + got.half_width)
        assert distance_interval(fake, statistics(real), seed=4).centre != got.centre


def test_the_limit_is_nearer_to_the_truth_than_the_distance_of_a_few_samples():
    for count in (100, 4 * DIM):
        pairs = [(frechet_distance(statistics(x), STANDARD), distance_limit(x, STANDARD, seed=0))
                 for x in (drawn(count, seed) for seed in range(60))]  # fmt: skip
        few, limits = np.mean(pairs, axis=0)
        assert few - TRUTH > 10 / count  # of 100 samples it is too large by a tenth
        assert abs(limits - TRUTH) < (few - TRUTH) / 2


def test_the_limit_is_where_the_line_through_fifteen_subsets_meets_infinity():
    """From a tenth of the samples, or twice the dimensions, on."""
    for count, first in ((400, 40), (100, 16), (32, 16)):
        fake = drawn(count, 5)
        sizes = np.round(np.linspace(first, count, 15)).astype(int)
        subsets = [fake[permutation(count, 7, "subset", number)[:size]] for number, size in enumerate(sizes)]
        distances = [frechet_distance(statistics(subset), STANDARD) for subset in subsets]
        want = np.polyfit(1 / sizes, distances, 1)[1]
        assert distance_limit(fake, STANDARD, seed=7) == pytest.approx(want, rel=1e-8)


def test_too_few_samples_are_refused():
    assert enough(16, 8)
    assert not enough(15, 8)
    for measure, fewest in ((distance_interval, 16), (distance_limit, 32)):
        with pytest.raises(ValueError, match=f"expected at least {fewest} samples of 8 dimensions, got {fewest - 1}"):
            measure(drawn(fewest - 1, 0), STANDARD, seed=0)
    with pytest.raises(ValueError, match="got 15"):
        distance_interval(drawn(16, 0), drawn(15, 0), seed=0)
