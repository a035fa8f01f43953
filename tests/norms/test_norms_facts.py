"""What is known of the transforms: output variances, special cases, symmetries, printed equations.

Of the reference, with which every backend agrees within a budget of its own.
"""

import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
from norm_cases import batch, mixture_case, step
from torch import nn

from common.norms import MixtureNorm, SCBNorm, SCBNormBase, UCBNorm, mixture_norm
from common.norms.backends.reference import posterior


def density(x: np.ndarray, centres: np.ndarray) -> np.ndarray:
    """Density of each unit normal, (K, P)."""
    return np.exp(-0.5 * (x - centres[:, None]) ** 2) / math.sqrt(2 * math.pi)


def integrated_variance(distance: float, num: int = 3) -> float:
    """Variance of Eq. 7 under num equal unit normals, by the trapezoid rule over the density."""
    centres = distance * np.arange(num)
    x = np.linspace(-10, centres[-1] + 10, 40_001)
    p_k = density(x, centres) / num
    p = p_k.sum(0)
    tau = p_k / p
    dx = x[1] - x[0]
    mass = (tau * p).sum(1) * dx
    m = (tau * p * x).sum(1) * dx / mass
    v = (tau * p * (x - m[:, None]) ** 2).sum(1) * dx / mass
    y = (tau * math.sqrt(num) * (x - m[:, None]) / np.sqrt(v)[:, None]).sum(0)
    return float((p * y**2).sum() * dx)


def quantile_sample(distance: float, num: int = 3, count: int = 30_000) -> torch.Tensor:
    """Evenly spread quantiles of the same mixture: a sample without noise, (count, 1)."""
    centres = distance * np.arange(num)
    x = np.linspace(-10, centres[-1] + 10, 400_001)
    cdf = np.cumsum(density(x, centres).mean(0)) * (x[1] - x[0])
    return torch.from_numpy(np.interp((np.arange(count) + 0.5) / count, cdf, x))[:, None]


def test_output_variance_between_identical_and_separate_components():
    for distance, published in ((0, 3.00), (1, 1.83), (2, 1.10), (3, 1.22), (6, 2.85)):
        want = integrated_variance(distance)
        assert want == pytest.approx(published, abs=0.006)  # published to two digits
        x = quantile_sample(distance)
        mean = distance * torch.arange(3.0, dtype=torch.float64)[:, None]
        log_lambda = torch.full((3,), -math.log(3), dtype=torch.float64)
        y, _ = mixture_norm(x, log_lambda, mean, torch.ones_like(mean), eps=1e-12, backend="reference")
        assert float(y.var()) == pytest.approx(want, rel=2e-3)  # 30,000 quantiles cut the outer tails


def test_output_variance_is_k_where_components_are_far_apart():
    rng = torch.Generator().manual_seed(0)
    member = torch.tensor([0, 1, 1, 2, 2, 2, 2, 2]).repeat(50)  # weights 1/8, 2/8, 5/8
    mean = torch.tensor([[0.0], [1e3], [-1e3]], dtype=torch.float64)
    x = mean[member] + torch.randn(400, 1, generator=rng, dtype=torch.float64)
    log_lambda = torch.tensor([1 / 8, 2 / 8, 5 / 8], dtype=torch.float64).log()
    y, _ = mixture_norm(x, log_lambda, mean, torch.ones_like(mean), eps=1e-12, backend="reference")
    assert float(y.mean()) == pytest.approx(0, abs=1e-9)
    assert float(y.var(correction=0)) == pytest.approx(3, rel=1e-9)


def test_output_variance_of_identical_components():
    x, log_lambda, mean, var, _ = mixture_case((50, 2, 3), num=3)
    mean, var = mean[:1].expand(3, -1), var[:1].expand(3, -1)
    y, _ = mixture_norm(x, log_lambda, mean, var, eps=1e-12, backend="reference")
    want = float((0.5 * log_lambda).exp().sum() ** 2)
    assert y.var((0, 2), correction=0).tolist() == pytest.approx([want, want], rel=1e-9)


@pytest.mark.parametrize(
    ("kind", "options"), [(UCBNorm, {}), (UCBNorm, {"groups": 1, "average": "paper"}), (MixtureNorm, {})], ids=str
)
def test_one_component_is_batch_norm(kind, options):
    ours, theirs = kind(5, 1, affine=False, **options).double(), nn.BatchNorm2d(5, affine=False).double()
    for seed in range(4):
        x, *_, g = mixture_case((4, 5, 3, 2), num=1, seed=seed)
        torch.testing.assert_close(step(ours, x, g), step(theirs, x, g), rtol=1e-10, atol=1e-10)
    assert theirs.running_var is not None
    torch.testing.assert_close(ours.mean[0], theirs.running_mean)
    torch.testing.assert_close(ours.log_var[0].exp(), theirs.running_var)
    x = batch(9, (4, 5, 3, 2), torch.float64)
    torch.testing.assert_close(ours.eval()(x), theirs.eval()(x), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("update", ["weight", "moving_average"])
def test_identical_components_never_separate(update):
    layer = UCBNorm(4, 3, update=update)
    with torch.no_grad():
        layer.mean.copy_(layer.mean[:1].clone().expand(3, -1))
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    before = layer.mean.clone()
    for seed in range(5):
        x, *_, g = mixture_case((8, 4, 3), num=3, dtype=torch.float32, seed=seed)
        optimizer.zero_grad()
        (layer(x) * g).sum().backward()
        optimizer.step()
    assert not torch.equal(layer.mean, before)
    torch.testing.assert_close(layer.mean, layer.mean[:1].expand(3, -1), rtol=1e-4, atol=1e-5)


def test_scb_base_is_scb_in_other_coordinates():
    base, scb = SCBNormBase(6, 3).double(), SCBNorm(6, 3).double()
    with torch.no_grad():
        for parameter in base.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
        scb.mean.copy_((base.mean.weight + base.mean.bias[:, None]).T)
        scb.log_var.copy_((base.log_var.weight + base.log_var.bias[:, None]).T)
    x = mixture_case((6, 6, 4), num=3)[0]
    cluster = torch.tensor([0, 1, 2, 2, 1, 0])
    one_hot = nn.functional.one_hot(cluster, 3).double()
    by_hand = (x - base.mean(one_hot)[..., None]) / (base.log_var(one_hot).exp() + 1e-5).sqrt()[..., None]
    torch.testing.assert_close(base(x, cluster), by_hand)
    torch.testing.assert_close(scb(x, cluster), by_hand)
    torch.testing.assert_close(base.eval()(x), scb.eval()(x))


def test_sqrt_k_divides_by_the_root_of_the_number_of_components():
    for num, statistics in itertools.product((1, 2, 5), ("batch", "learned")):
        x, *mixture, _ = mixture_case((3, 4, 5), num=num)
        options: Any = {"statistics": statistics, "backend": "reference"}
        paper, scaled = (mixture_norm(x, *mixture, scale=scale, **options)[0] for scale in ("paper", "sqrt_k"))
        torch.testing.assert_close(scaled * math.sqrt(num), paper)


def test_posteriors_follow_bayes_and_sum_to_one():
    for groups in (1, 2, 4):
        x, log_lambda, mean, var, _ = mixture_case((3, 4, 5), num=3)
        tau = posterior(x, log_lambda, mean, var, groups)
        assert tau.shape == (3, 3, groups, 5)
        torch.testing.assert_close(tau.sum(0), torch.ones_like(tau[0]))
        p = torch.distributions.Normal(mean[:, None, :, None], var.sqrt()[:, None, :, None]).log_prob(x).exp()
        joint = p.unflatten(2, (groups, -1)).prod(3) * log_lambda.exp()[:, None, None, None]
        torch.testing.assert_close(tau, joint / joint.sum(0))


def test_samples_and_components_have_no_order():
    for groups, statistics in itertools.product((1, 2, 4), ("batch", "learned")):
        x, log_lambda, mean, var, _ = mixture_case((7, 4, 3), num=3)
        options: Any = {"groups": groups, "statistics": statistics, "backend": "reference"}
        y, moments = mixture_norm(x, log_lambda, mean, var, **options)
        samples, components = torch.randperm(7, generator=torch.Generator().manual_seed(1)), [2, 0, 1]
        moved, _ = mixture_norm(x[samples], log_lambda, mean, var, **options)
        torch.testing.assert_close(moved, y[samples])
        renamed, found = mixture_norm(x, log_lambda[components], mean[components], var[components], **options)
        torch.testing.assert_close(renamed, y)
        for ours, theirs in zip(found or (), moments or (), strict=True):
            torch.testing.assert_close(ours, theirs[components])


def test_a_posterior_group_is_a_mixture_norm_of_its_own_channels():
    x, log_lambda, mean, var, _ = mixture_case((5, 6, 4), num=3)
    y, moments = mixture_norm(x, log_lambda, mean, var, groups=3, backend="reference")
    assert moments is not None
    for group in range(3):
        own = slice(2 * group, 2 * group + 2)
        want, part = mixture_norm(x[:, own], log_lambda, mean[:, own], var[:, own], backend="reference")
        assert part is not None
        torch.testing.assert_close(y[:, own], want)
        torch.testing.assert_close(moments.mass[:, group], part.mass[:, 0])
        torch.testing.assert_close(moments.mean[:, own], part.mean)
        torch.testing.assert_close(moments.var[:, own], part.var)


def test_batch_output_follows_when_data_and_mixture_move_and_stretch():
    x, log_lambda, mean, var, _ = mixture_case((5, 4, 6), num=3)
    y, _ = mixture_norm(x, log_lambda, mean, var, eps=1e-12, backend="reference")
    moved, _ = mixture_norm(3 * x + 7, log_lambda, 3 * mean + 7, 9 * var, eps=1e-12, backend="reference")
    torch.testing.assert_close(moved, y, rtol=1e-7, atol=1e-8)


def test_evaluation_does_not_depend_on_the_rest_of_the_batch():
    layer = UCBNorm(4, 3, groups=1).eval()
    x = batch()
    torch.testing.assert_close(layer(x)[2:3], layer(x[2:3]))


def test_learned_statistics_close_the_gap_between_the_modes():
    """Trained with Eq. 15 the modes agree exactly; trained with Eqs. 6-9 they part."""
    x = batch()
    gaps = {}
    for statistics in ("learned", "batch"):
        layer = UCBNorm(4, 3, update="weight", statistics=statistics)
        trained = layer(x)
        gaps[statistics] = float((trained - layer.eval()(x)).detach().abs().max())
    assert gaps["learned"] == 0
    assert gaps["batch"] > 0.1
