import numpy as np
import pytest
import torch

from common.metrics import Statistics, frechet_distance, statistics
from common.metrics.features.frechet import Reference


def normal(n, dim, seed):
    return torch.randn(n, dim, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def covariance(dim, seed):
    a = normal(dim, dim, seed)
    return a @ a.T / dim + 0.1 * torch.eye(dim, dtype=torch.float64)


def root(c):
    values, vectors = torch.linalg.eigh(c)
    return vectors @ torch.diag(values.sqrt()) @ vectors.T


def test_equal_covariances_leave_the_squared_distance_of_the_means():
    m, eye = normal(1, 16, 0)[0], torch.eye(16, dtype=torch.float64)
    got = frechet_distance(Statistics(torch.zeros_like(m), eye), Statistics(m, eye))
    assert got == pytest.approx(float(m @ m), rel=1e-12)


def test_agrees_with_the_symmetric_form():
    for dim in (1, 2, 7):
        a, b = (Statistics(normal(1, dim, s)[0], covariance(dim, s)) for s in (1, 2))
        # tr (A B)^(1/2) = tr (A^(1/2) B A^(1/2))^(1/2), which is symmetric
        middle = root(root(a.covariance) @ b.covariance @ root(a.covariance)).trace()
        want = (a.mean - b.mean).square().sum() + (a.covariance + b.covariance).trace() - 2 * middle
        assert frechet_distance(a, b) == pytest.approx(float(want), rel=1e-9)
        assert frechet_distance(b, a) == pytest.approx(float(want), rel=1e-9)


def test_statistics_are_the_mean_and_the_unbiased_covariance_in_float64():
    x = (normal(50, 4, 3) + 1000).float()  # float32 sums of these would lose 4 digits
    got, wide = statistics(x), x.numpy().astype(np.float64)
    centred = wide - wide.sum(0) / 50
    np.testing.assert_allclose(got.mean.numpy(), wide.sum(0) / 50, rtol=1e-14)
    np.testing.assert_allclose(got.covariance.numpy(), centred.T @ centred / 49, rtol=1e-9, atol=1e-12)


def test_refuses_features_without_statistics():
    for features, message in (
        (torch.zeros(1, 3), "at least 2 samples, got 1"),
        (torch.zeros(3), r"expected \(N, D\)"),
        (torch.tensor([[0.0, 1.0], [float("nan"), 0.0], [1.0, float("inf")]]), "in 2 of 3 samples"),
    ):
        with pytest.raises(ValueError, match=message):
            statistics(features)
    with pytest.raises(ValueError, match="got 2 and 3"):
        frechet_distance(statistics(normal(5, 2, 0)), statistics(normal(5, 3, 0)))


def test_many_distances_to_one_reference_are_those_of_torch_fidelity():
    """Also where the reference has a covariance that cannot be inverted."""
    for rank in (9, 3):
        generator = torch.Generator().manual_seed(0)
        mixing = torch.randn(rank, 9, generator=generator, dtype=torch.float64)
        one = statistics(torch.randn(50, rank, generator=generator, dtype=torch.float64) @ mixing + 1)
        reference = Reference(one)
        for shift in (0.0, 2.0):
            other = statistics(torch.randn(40, 9, generator=generator, dtype=torch.float64) * 3 + shift)
            # the square root turns rounding of 1e-15 in eigenvalues that should be 0 into 1e-7
            assert reference.distance(other) == pytest.approx(frechet_distance(one, other), rel=1e-7)
        assert reference.distance(one) == pytest.approx(0, abs=1e-5)
