"""Seeding, EM and the moving averages, against scikit-learn and sums written out."""

import itertools
import math
import warnings
from typing import Any

import numpy as np
import pytest
import torch
from norm_cases import assert_state, batch, mixture_case, state
from sklearn.exceptions import ConvergenceWarning
from sklearn.mixture import GaussianMixture

from common.norms import MixtureNorm, Moments, UCBNorm, mixture, seeding
from common.norms.backends.reference import MixtureParams
from common.norms.mixture import points_key
from common.runtime.seeding import generator


def clouds(count: int = 400, seed: int = 0, apart: float = 1.0) -> torch.Tensor:
    """Points (P, 3) of three clouds of unequal size, which overlap unless they are moved apart."""
    rng = torch.Generator().manual_seed(seed)
    centres = apart * torch.tensor([[0.0, 0, 0], [3, 1, 0], [-2, 3, 5]], dtype=torch.float64)
    member = torch.randint(0, 6, (count,), generator=rng).clamp(max=2)
    return centres[member] + torch.randn(count, 3, generator=rng, dtype=torch.float64)


def around(centres: torch.Tensor, member: torch.Tensor) -> torch.Tensor:
    """Points (P, C) of unit variance around the centres (K, C) of their members (P,)."""
    return centres[member] + torch.randn(len(member), centres.shape[1], generator=torch.Generator().manual_seed(0))


def test_em_agrees_with_scikit_learn():
    points = clouds()
    start = mixture.Components(
        torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64),
        points[[1, 7, 30]].clone(),
        torch.tensor([[1.0, 2, 3], [2, 1, 1], [0.5, 1, 2]], dtype=torch.float64),
    )
    given: Any = {"weights_init": start.weight, "means_init": start.mean, "precisions_init": 1 / (start.var + 1e-5)}
    options: Any = {"covariance_type": "diag", "tol": 0, "reg_covar": 1e-5, "max_iter": 12}
    model = GaussianMixture(3, **options, **{name: t.numpy() for name, t in given.items()})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        model.fit(points.numpy())
    fit = mixture.expectation_maximisation(points, start, groups=1, eps=1e-5, steps=model.n_iter_)
    torch.testing.assert_close(fit.weight, torch.from_numpy(model.weights_), rtol=1e-9, atol=0)
    torch.testing.assert_close(fit.mean, torch.from_numpy(model.means_), rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(fit.var + 1e-5, torch.from_numpy(model.covariances_), rtol=1e-8, atol=1e-8)


def test_em_of_grouped_channels_shares_only_the_weights():
    points = clouds()
    start = mixture.seed_mixture(points, 2, 3, generator(0))
    step = mixture.em_step(points, start, groups=3, eps=1e-5)
    shares = []
    for c in range(3):
        alone = mixture.Components(start.weight, start.mean[:, c : c + 1], start.var[:, c : c + 1])
        own = mixture.em_step(points[:, c : c + 1], alone, groups=1, eps=1e-5)
        torch.testing.assert_close(step.mean[:, c : c + 1], own.mean)
        torch.testing.assert_close(step.var[:, c : c + 1], own.var)
        shares.append(own.weight)
    torch.testing.assert_close(step.weight, torch.stack(shares).mean(0))


def test_kmeans_plus_plus_takes_the_better_of_two_draws_by_squared_distance():
    """Points at 0, 1, 3. From 0 or 1, only two draws of the near point lose to 3 or 0; from 3 both do as well."""
    points = torch.tensor([0.0, 1.0, 3.0]).repeat(1, 1)[..., None]
    counts = dict.fromkeys(itertools.permutations([0.0, 1.0, 3.0], 2), 0)
    for seed in range(3000):
        first, second = mixture.kmeans_plus_plus(points, 2, generator(seed)).flatten().tolist()
        counts[first, second] += 1
    want = {(0, 1): 1e-2, (0, 3): 1 - 1e-2, (1, 0): 4e-2, (1, 3): 1 - 4e-2, (3, 0): 9 / 13, (3, 1): 4 / 13}
    for pair, share in want.items():
        # A centre comes first with probability 1/3; five standard deviations of a binomial share.
        deviation = math.sqrt(share / 3 * (1 - share / 3) / 3000)
        assert counts[pair] / 3000 == pytest.approx(share / 3, abs=5 * deviation), pair


def test_a_component_that_seeding_leaves_empty_stays_at_its_centre_with_the_variance_of_all():
    points = torch.tensor([0.0, 10.0]).repeat(5)[:, None] + 3
    fit = mixture.seed_mixture(points, 3, 1, generator(0))
    empty = int(fit.weight.argmin())
    assert sorted(fit.weight.tolist()) == pytest.approx([0, 0.5, 0.5])
    assert fit.mean[empty].item() in (3, 13)
    assert fit.var[empty].item() == pytest.approx(25)


def test_seeding_finds_separate_clouds():
    centres = torch.tensor([0.0, 12, -12])[:, None].expand(3, 3)
    points = around(centres, torch.arange(300) % 3)
    for groups in (1, 3):
        fit = mixture.seed_mixture(points, 3, groups, generator(1))
        torch.testing.assert_close(fit.mean.sort(0).values, centres.sort(0).values, atol=0.5, rtol=0)
        torch.testing.assert_close(fit.weight, torch.full((3,), 1 / 3))
        torch.testing.assert_close(fit.var, torch.ones_like(fit.var), atol=0.4, rtol=0)


def test_seeding_follows_when_channels_are_scaled():
    points, stretch = clouds(), torch.tensor([1.0, 1e3, 1e-3], dtype=torch.float64)
    fit = mixture.seed_mixture(points, 3, 1, generator(1))
    stretched = mixture.seed_mixture(points * stretch, 3, 1, generator(1))
    torch.testing.assert_close(stretched.mean, fit.mean * stretch)
    torch.testing.assert_close(stretched.var, fit.var * stretch**2)


def test_em_leaves_an_empty_component_as_it_is():
    points = clouds()
    start = mixture.seed_mixture(points, 2, 1, generator(0))
    start.mean[1], start.var[1] = 1e4, 2.0
    fit = mixture.em_step(points, start, groups=1, eps=1e-5)
    assert torch.equal(fit.mean[1], start.mean[1])
    assert torch.equal(fit.var[1], start.var[1])
    torch.testing.assert_close(fit.mean[0], points.mean(0))


def test_component_variances_have_a_floor():
    spread = torch.randn(50, 1, generator=torch.Generator().manual_seed(0))
    points = torch.cat([torch.zeros(50, 1), spread + 99])
    fit = mixture.seed_mixture(points, 2, 1, generator(0))
    assert float(fit.var.min()) == pytest.approx(1e-3 * float(points.var(correction=0)))
    fit = mixture.expectation_maximisation(points, fit, 1, 1e-5, 5)
    assert float(fit.var.min()) == pytest.approx(1e-3 * float(points.var(correction=0)))


def test_sampled_points_follow_from_seed_and_position():
    x = torch.arange(5000.0).view(50, 1, 100).expand(-1, 2, -1)
    a, b, c = (mixture.sample_points(x, points_key(0, "fit"), step) for step in (1, 1, 2))
    assert a.shape == (4096, 2)
    assert torch.equal(a, b)
    assert not torch.equal(a, c)
    assert not torch.equal(a, mixture.sample_points(x, points_key(1, "fit"), 1))
    assert len(a[:, 0].unique()) == 4096
    assert torch.equal(a[:, 0], a[:, 1])
    assert not torch.equal(a, mixture.sample_points(x, points_key(0, "seed"), 1))
    few = mixture.sample_points(x[:3], points_key(0, "fit"))
    assert torch.equal(few[:, 0], x[:3, 0].flatten())


def test_each_location_is_drawn_as_often_as_any_other_and_once_at_most():
    """Of 60 locations, 41 by each of 4,000 steps; five standard deviations of a binomial share are allowed."""
    words, found = seeding.key(0, "points", "fit"), torch.zeros(60)
    for step in range(4000):
        index = seeding.scattered(41, 60, words, torch.tensor(step))
        assert len(index.unique()) == 41
        found[index] += 1
    share = 41 / 60
    assert float((found / 4000 - share).abs().max()) < 5 * math.sqrt(share * (1 - share) / 4000)


def test_draws_of_locations_reach_the_last_of_two_to_the_31():
    """Run j of 4,096 begins at location (offset + j 2^31 / 4,096) mod 2^31, whatever the offset."""
    total = 2**31 - 1
    index = seeding.scattered(4096, total, seeding.key(0, "points", "fit"), torch.tensor(2**40)).sort().values
    assert 0 <= int(index[0]) <= int(index[-1]) < total
    assert int(index.diff().max()) < 2 * (total // 4096 + 1)


def test_draws_are_spread_as_independent_ones():
    """The least of four bits of 16,384 draws, each bit and each pair of neighbours: chi-squared, five deviations."""
    drawn = seeding.hashes(2**14, seeding.key(3, "reseed"), torch.tensor(7))
    assert int(drawn.min()) >= 0
    assert int(drawn.max()) < 2**32
    for bits in (drawn >> 28, drawn & 15, (drawn[:-1] >> 28) ^ (drawn[1:] >> 28)):
        expected = len(bits) / 16
        chi = float((torch.bincount(bits, minlength=16) - expected).square().sum() / expected)
        assert abs(chi - 15) < 5 * math.sqrt(30)


def test_stepwise_em_keeps_pooled_moments():
    """Each component's mean and variance are those of all its mass so far, older mass discounted by 0.9."""
    rng = torch.Generator().manual_seed(0)
    old = MixtureParams(torch.zeros(3), torch.randn(3, 4, generator=rng), torch.randn(3, 4, generator=rng))
    old = MixtureParams(*(t.double() for t in old))
    s0 = np.full((3, 1), 1 / 3)
    s1 = s0 * old.mean.numpy()
    s2 = s0 * (old.log_var.exp().numpy() + old.mean.numpy() ** 2)
    for step in range(6):
        _, log_lambda, mean, var, _ = mixture_case((20, 4, 3), num=3, seed=step)
        share = log_lambda.exp()
        moments = Moments(60 * share[:, None], mean, var)
        old = mixture.moved(old, moments, mixture.Rule(0.1, "em", 1e-6))
        corrected = (var * (60 * share / (60 * share - 1))[:, None]).numpy()
        t = 0.1 * share.numpy()[:, None]
        s0 = 0.9 * s0 + t
        s1 = 0.9 * s1 + t * mean.numpy()
        s2 = 0.9 * s2 + t * (corrected + mean.numpy() ** 2)
    np.testing.assert_allclose(old.logits.softmax(0), s0[:, 0], rtol=1e-12)
    np.testing.assert_allclose(old.mean, s1 / s0, rtol=1e-10)
    np.testing.assert_allclose(old.log_var.exp(), s2 / s0 - (s1 / s0) ** 2, rtol=1e-10)


def test_a_step_goes_at_most_all_the_way():
    """Component 1 weighs 1 % but holds all of the first of two channels: a step of 0.1 / 0.059 would overshoot."""
    old = MixtureParams(torch.tensor([0.99, 0.01]).log(), torch.zeros(2, 2), torch.zeros(2, 2))
    moments = Moments(torch.tensor([[0.0, 100.0], [100.0, 0.0]]), torch.full((2, 2), 3.0), torch.full((2, 2), 2.0))
    new = mixture.moved(old, moments, mixture.Rule(0.1, "em", 1e-3))
    torch.testing.assert_close(new.mean[:, 0], torch.tensor([0.0, 3.0]))
    torch.testing.assert_close(new.log_var[:, 0].exp(), torch.tensor([1.0, 200 / 99]))


def test_the_variance_is_corrected_for_small_masses_but_never_more_than_doubled():
    mass = torch.tensor([[100.0, 3.0], [2.0, 1.0001], [0.5, 0.0]])
    var = torch.full((3, 4), 7.0)  # two channels a group
    want = 7 * torch.tensor([[100 / 99, 3 / 2], [2, 2], [2, 0]]).repeat_interleave(2, dim=1)
    torch.testing.assert_close(mixture.unbiased(Moments(mass, var, var)), want)


@pytest.mark.parametrize(("average", "groups"), [("em", 1), ("em", 2), ("paper", 4)])
def test_a_layers_averages_are_the_sums_written_out(average, groups):
    layer = UCBNorm(4, 3, groups=groups, average=average).double()
    lam = np.full(3, 1 / 3)
    mu, var = layer.mean.numpy().copy(), np.ones((3, 4))
    for step in range(4):
        x = batch(step, (5, 4, 6), torch.float64)
        layer(x)
        points = x.movedim(1, 2).flatten(0, 1).numpy()  # (M, C)
        log_p = -0.5 * ((points - mu[:, None]) ** 2 / (var[:, None] + 1e-5) + np.log(var[:, None] + 1e-5))
        log_p = log_p.reshape(3, len(points), groups, -1).sum(3) + np.log(lam)[:, None, None]
        tau = np.exp(log_p) / np.exp(log_p).sum(0)  # (K, M, G)
        mass = tau.sum(1)
        tau = tau.repeat(4 // groups, axis=2)
        m = (tau * points).sum(1) / tau.sum(1)
        v = (tau * (points - m[:, None]) ** 2).sum(1) / tau.sum(1)
        big = mass.repeat(4 // groups, axis=1)
        v = v * big / np.maximum(big - 1, big / 2)
        lam = lam + 0.1 * (mass.mean(1) / len(points) - lam)
        if average == "paper":
            rho, spread = 0.1, 0.0
        else:
            rho = np.minimum(0.1 * big / len(points) / lam[:, None], 1)
            spread = rho * (1 - rho) * (m - mu) ** 2
        mu, var = mu + rho * (m - mu), (1 - rho) * var + rho * v + spread
    np.testing.assert_allclose(layer.logits.softmax(0), lam, rtol=1e-9)
    np.testing.assert_allclose(layer.mean, mu, rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(layer.log_var.exp(), var, rtol=1e-9)


@pytest.mark.parametrize("average", ["em", "paper"])
def test_a_nearly_empty_component_jumps_under_the_papers_rule_alone(average):
    layer = UCBNorm(2, 2, average=average).double()
    layer.mean[1, 0] = 6.0  # six deviations from what the first channel holds; in the second both are alive
    x = torch.randn(64, 2, 8, 8, generator=generator(0, "x"), dtype=torch.float64)
    mu, values = layer.mean[:, 0].numpy().copy(), x[:, 0].flatten().numpy()
    log_p = -0.5 * (values - mu[:, None]) ** 2 / (1 + 1e-5)
    tau = np.exp(log_p[1]) / np.exp(log_p).sum(0)
    share, held = tau.mean(), (tau * values).sum() / tau.sum()
    spread = (tau * (values - held) ** 2).sum() / tau.sum()
    assert share < 3e-3
    layer(x)
    mean, var = layer.mean[1, 0].item(), layer.log_var[1, 0].exp().item()
    if average == "paper":  # a tenth of the way to what a few locations are like, in mean and variance
        assert mean == pytest.approx(6 - 0.1 * (6 - held), rel=1e-9)
        mass = tau.sum()
        assert var == pytest.approx(1 - 0.1 * (1 - spread * mass / max(mass - 1, mass / 2)), rel=1e-9)
        assert mean < 5.8
    else:  # by its share of them, of a weight that is a half or little less
        assert 0 < 6 - mean < 0.1 * share / 0.45 * (6 - held)
        assert var == pytest.approx(1, abs=0.02)


@pytest.mark.parametrize(("update", "groups"), [("moving_average", None), ("weight", 1)])
def test_kmeans_init_finds_separate_clouds_in_the_first_training_batch(update, groups):
    centres = torch.tensor([-40.0, 0.0, 40.0])[:, None].expand(3, 2)
    x = around(centres, torch.arange(90) % 3)
    layer = UCBNorm(2, 3, init="kmeans++", update=update, groups=groups, momentum=0.0)
    layer.eval()(x)
    assert not layer.is_initialized()
    layer.train()(x)
    assert layer.is_initialized()
    found = layer.mean.detach().sort(0).values
    torch.testing.assert_close(found, centres, atol=1, rtol=0)
    torch.testing.assert_close(layer.log_weights().detach(), torch.full((3,), -math.log(3)))
    layer(x + 100)
    assert torch.equal(layer.mean.detach().sort(0).values, found)


@pytest.mark.parametrize(("make", "groups"), [(UCBNorm, 2), (MixtureNorm, 1)])
def test_a_constant_channel_keeps_no_mixture_from_being_seeded(make, groups):
    centres = torch.tensor([-40.0, 0.0, 40.0])
    x = around(centres[:, None].expand(3, 2), torch.arange(90) % 3)
    x[:, 1] = 5.0
    layer = make(2, 3, groups=groups, init="kmeans++", momentum=0.0)
    layer(x)
    assert layer.is_initialized()
    torch.testing.assert_close(layer.mean[:, 0].sort().values, centres, atol=1, rtol=0)
    torch.testing.assert_close(layer.mean[:, 1], torch.full((3,), 5.0))
    if make is UCBNorm:  # not log(0), which no gradient could leave
        torch.testing.assert_close(layer.log_var[:, 1], torch.full((3,), math.log(1e-5)))


@pytest.mark.parametrize("make", [UCBNorm, MixtureNorm])
def test_the_seed_option_decides_where_components_start(make):
    x = batch(0, (200, 2))
    a, b, c = (make(2, 3, groups=1, init="kmeans++", momentum=0.0, seed=seed) for seed in (0, 0, 1))
    for layer in (a, b, c):
        layer(x)
    assert torch.equal(a.mean, b.mean)
    assert not torch.equal(a.mean, c.mean)


@pytest.mark.parametrize("make", [UCBNorm, MixtureNorm])
def test_a_layer_is_seeded_with_even_weights_if_they_move_and_with_the_fits_if_em_goes_on(make):
    x = around(torch.tensor([[-40.0], [40.0]]), (torch.arange(100) < 20).long())
    layer = make(1, 2, init="kmeans++", momentum=0.0)
    layer(x)
    want = [0.5, 0.5] if make is UCBNorm else [0.8, 0.2]
    assert layer.logits.softmax(0)[layer.mean[:, 0].argsort()].tolist() == pytest.approx(want, abs=1e-6)


def test_mixture_norm_fits_the_batch_it_normalises():
    member = torch.tensor([0, 1, 1, 1]).repeat(100)
    x = around(torch.tensor([[-9.0, 5.0], [9.0, 9.0]]), member)
    layer = MixtureNorm(2, 2, affine=False)
    y = layer(x)
    order = layer.fit_mean[:, 0].argsort()
    for k, row in enumerate(order.tolist()):
        own = x[member == k]
        torch.testing.assert_close(layer.fit_mean[row], own.mean(0))
        torch.testing.assert_close(layer.fit_log_var[row].exp(), own.var(0, correction=0))
        share = len(own) / 400
        assert float(layer.fit_logits.softmax(0)[row]) == pytest.approx(share, rel=1e-5)
        want = (own - own.mean(0)) / (own.var(0, correction=0) + 1e-5).sqrt() / math.sqrt(share)
        torch.testing.assert_close(y[member == k], want, rtol=1e-4, atol=1e-4)


def test_a_fit_takes_em_steps_from_the_seeding_and_then_from_the_fit_before():
    layer = MixtureNorm(2, 3, em_steps=2)
    batches = [batch(seed, (200, 2)) for seed in (0, 1)]
    fit = mixture.seed_mixture(batches[0], 3, 1, generator(0, "kmeans++"))
    for x in batches:
        layer(x)
        fit = mixture.expectation_maximisation(x, fit, 1, 1e-5, 2)
        torch.testing.assert_close(layer.fit_mean, fit.mean)
        torch.testing.assert_close(layer.fit_log_var.exp(), fit.var)
        torch.testing.assert_close(layer.fit_logits.softmax(0), fit.weight)


def test_a_value_that_no_fit_drew_keeps_a_batch_from_being_fitted():
    x = batch(0, (9000, 2))
    layer = MixtureNorm(2, 2, backend="eager")
    layer(x)
    before = layer.fit_mean.clone()
    drawn = mixture.sample_points(torch.arange(9000.0)[:, None], points_key(0, "fit"), 2).long()
    bad = x + 1
    bad[next(i for i in range(9000) if i not in drawn)] = math.nan
    layer(bad)
    assert torch.equal(layer.fit_mean, before)


def test_mixture_norm_refits_every_so_many_batches():
    layer = MixtureNorm(2, 2, refit_every=2)
    fits = []
    for step in range(5):
        layer(batch(step, (20, 2, 3)))
        fits.append(layer.fit_mean.clone())
    changed = [not torch.equal(a, b) for a, b in itertools.pairwise(fits)]
    assert changed == [False, True, False, True]
    assert int(layer.step) == 5


@pytest.mark.parametrize(("count", "same"), [(4096, True), (5000, False)])
def test_each_fit_samples_locations_of_its_own(count, same):
    x = batch(0, (count, 2))
    layer, later, other = MixtureNorm(2, 2), MixtureNorm(2, 2), MixtureNorm(2, 2, seed=1)
    layer(x[:100])
    for each in (later, other):
        each.load_state_dict(layer.state_dict())
    later.step.fill_(7)
    layer(x)
    for each in (later, other):
        each(x)
        assert torch.equal(layer.fit_mean, each.fit_mean) is same


def test_calibration_fits_the_pooled_batches():
    points = clouds(600, apart=2).float()  # overlapping ones have several optima
    layer = MixtureNorm(3, 3, em_steps=40)
    before = layer.eval()(points)
    layer.calibrate(points.split(100))
    options: Any = {"covariance_type": "diag", "tol": 1e-9, "reg_covar": 1e-5, "max_iter": 500}
    model = GaussianMixture(3, means_init=[[0.0, 0, 0], [6, 2, 0], [-4, 6, 10]], **options).fit(points.numpy())
    rows = layer.mean[:, 2].argsort(), torch.from_numpy(model.means_)[:, 2].argsort()
    weights = torch.as_tensor(model.weights_)[rows[1]].tolist()
    assert layer.logits.softmax(0)[rows[0]].tolist() == pytest.approx(weights, abs=0.02)
    want = torch.as_tensor(model.means_, dtype=torch.float32)[rows[1]]
    torch.testing.assert_close(layer.mean[rows[0]], want, atol=0.1, rtol=0)
    assert not torch.equal(layer(points), before)
    assert layer.is_initialized()
    for name in ("logits", "mean", "log_var"):
        assert torch.equal(layer.get_buffer(name), layer.get_buffer(f"fit_{name}"))


def test_calibration_goes_on_from_the_last_fit():
    """A new seeding would give the components another order in five of six draws."""
    for seed in range(5):
        layer = MixtureNorm(3, 3, seed=seed)
        layer(clouds(100, apart=5).float())
        before = layer.mean.clone()
        layer.calibrate([clouds(100, seed=step, apart=5).float() for step in (1, 2)])
        torch.testing.assert_close(layer.mean, before, atol=1.5, rtol=0)


def test_calibration_names_what_is_wrong():
    layer = MixtureNorm(3, 2)
    before = state(layer)
    for wrong in ([], [torch.tensor([[0.0, 1, 2], [0, math.inf, 2]])], [torch.randn(5, 4)]):
        with pytest.raises(ValueError, match=r"(batches|x): expected"):
            layer.calibrate(wrong)
    assert_state(layer, before)


@pytest.mark.full
def test_a_known_mixture_is_found_in_nine_of_ten_seeds():
    """With k-means++, because the truth lies outside the reach of U(-1, 1) means, and the default momentum of 0.1.

    A moving average of batches of 1,024 keeps a noise of deviation sqrt(0.1 / 1.9 / (0.2 * 1024)) = 0.016 in the
    mean of the rarest component and sqrt(0.1 / 1.9 * 0.25 / 1024) = 0.004 in the weights; both bounds are five or
    six of these. 200 batches, because components that overlap separate slowly after a poor seeding.
    """
    weight = torch.tensor([0.5, 0.3, 0.2])
    centres = torch.tensor([[0.0, 0.0, 0.0, 0.0], [2.5, 2.5, -2.5, 1.0], [-2.5, 2.5, 2.5, -2.0]])
    deviation = torch.tensor([[1.0, 0.5, 2.0, 1.0], [0.5, 1.0, 1.0, 1.5], [2.0, 1.0, 0.5, 1.0]])
    right = 0
    for seed in range(10):
        rng = torch.Generator().manual_seed(seed)
        layer = UCBNorm(4, 3, groups=1, init="kmeans++", seed=seed)
        for _ in range(200):
            member = torch.multinomial(weight, 1024, replacement=True, generator=rng)
            with torch.no_grad():
                layer(centres[member] + deviation[member] * torch.randn(1024, 4, generator=rng))
        errors = []
        for rows in map(list, itertools.permutations(range(3))):
            mean = ((layer.mean[rows] - centres) / deviation).abs().max()
            errors.append((float(mean), float((layer.logits.softmax(0)[rows] - weight).abs().max())))
        mean, share = min(errors)
        right += mean < 0.1 and share < 0.02
    assert right >= 9
