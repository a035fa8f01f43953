"""What keeps components alive: re-seeding, one variance for all, the floor of the weights."""

import math

import numpy as np
import pytest
import torch
from norm_cases import batch, mixture_case
from torch import Tensor

from common.norms import MixtureNorm, UCBNorm, mixture, seeding
from common.norms.mixture import Components

CENTRES = torch.tensor([[0.0, 0.0], [8.0, 8.0], [-8.0, 8.0]])


def clouds(step: int, count: int = 600) -> Tensor:
    """Points (count, 2) of three separate clouds of equal size and unit variance."""
    rng = torch.Generator().manual_seed(step)
    return CENTRES[torch.arange(count) % 3] + torch.randn(count, 2, generator=rng)


def two_clouds(step: int, count: int = 600) -> Tensor:
    """Points (count, 3) whose every channel has clouds at 0 and 10, independently."""
    rng = torch.Generator().manual_seed(step)
    return 10.0 * torch.randint(0, 2, (count, 3), generator=rng) + torch.randn(count, 3, generator=rng)


def train(layer: UCBNorm, draw, steps: int = 120) -> None:
    with torch.no_grad():
        for step in range(steps):
            layer(draw(step))


def test_a_component_dead_in_one_channel_comes_back_there_alone():
    """The weights are shared over channels and tell nothing: each component holds a third of the rest at least."""

    def start(reseed: float) -> UCBNorm:
        layer = UCBNorm(3, 2, reseed=reseed)
        layer.mean.copy_(torch.tensor([[0.0, 0.0, 0.0], [10.0, -1e3, 10.0]]))
        return layer

    alive, dead = start(0.01), start(0.0)
    for layer in (alive, dead):
        train(layer, two_clouds, steps=250)
        torch.testing.assert_close(layer.mean[:, ::2], torch.tensor([[0.0, 0.0], [10.0, 10.0]]), atol=0.2, rtol=0)
    assert float(dead.mean[1, 1]) == -1e3
    assert alive.mean[:, 1].sort().values.tolist() == pytest.approx([0, 10], abs=0.2)
    torch.testing.assert_close(alive.usage, torch.full((2, 3), 0.5), atol=0.05, rtol=0)


def test_living_components_stay_as_they_are():
    """Nothing is dead: the mixture is bit for bit the one without re-seeding."""
    with_, without = UCBNorm(3, 2, reseed=0.01), UCBNorm(3, 2)
    for layer in (with_, without):
        layer.mean.copy_(torch.tensor([0.0, 10.0])[:, None].expand(2, 3))
        train(layer, two_clouds, steps=5)
    for name, tensor in without.state_dict().items():
        assert torch.equal(with_.state_dict()[name], tensor), name
    share = torch.stack([(two_clouds(step) > 5).float().mean(0) for step in range(5)])
    want = 0.5 + sum(0.1 * 0.9 ** (4 - step) * (share[step] - 0.5) for step in range(5))
    torch.testing.assert_close(with_.usage[1], want, atol=1e-4, rtol=0)


def test_a_moved_component_starts_with_the_variance_of_the_living_and_an_even_share():
    layer = UCBNorm(2, 3, groups=1, momentum=1.0, reseed=0.1)
    layer.mean.copy_(torch.cat([CENTRES[:2], torch.full((1, 2), 1e3)]))
    few = 1e3 + 5 * torch.randn(12, 2, generator=torch.Generator().manual_seed(1))  # it holds, wide apart
    x = torch.cat([clouds(0), few])
    plain = UCBNorm(2, 3, groups=1, momentum=1.0)
    plain.load_state_dict({name: layer.state_dict()[name] for name in plain.state_dict()})
    share = plain.posterior(x).mean((1, 3))[:2, 0].numpy()
    plain(x)
    layer(x)
    assert (layer.mean[2] == x).all(1).any()
    # The first and the third cloud are held by one component between them.
    assert float((CENTRES[[0, 2]] - layer.mean[2]).norm(dim=1).min()) < 4
    assert torch.equal(layer.mean[:2], plain.mean[:2])
    want = (share[:, None] * plain.log_var[:2].exp().numpy()).sum(0) / share.sum()
    np.testing.assert_allclose(layer.log_var[2].exp(), want, rtol=1e-4)
    usage = np.append(share, 1 / 3) / (share.sum() + 1 / 3)
    np.testing.assert_allclose(layer.usage[:, 0], usage, rtol=1e-4)
    np.testing.assert_allclose(layer.logits.softmax(0), usage, rtol=1e-4)


def test_the_best_additions_are_chosen_group_by_group():
    def density(at: Tensor, centre: Tensor, s: Tensor) -> Tensor:
        return torch.exp(-0.5 * ((at - centre) ** 2 / s).sum(-1)) / (2 * math.pi * s.prod(-1).sqrt())

    for seed in range(4):
        candidates = batch(seed, (3, 5, 4), torch.float64)  # (K, B, C), K = 3
        _, log_lambda, mean, var, _ = mixture_case((1, 4), num=3, seed=seed + 1)
        new_var, eps = var[:1] / 10, 0.3
        got = mixture.best_additions(candidates, Components(log_lambda.exp(), mean, var), new_var, groups=2, eps=eps)
        for group in (slice(0, 2), slice(2, 4)):
            points = candidates[..., group].reshape(15, 2)
            old = density(points[:, None], mean[:, group], var[:, group] + eps) @ log_lambda.exp()
            new = density(points[:, None], points, new_var[:, group] + eps) / 3  # (point, candidate)
            gain = ((old[:, None] + new).log() - old[:, None].log()).sum(0).view(3, 5)
            for k, best in enumerate(gain.argmax(1).tolist()):
                assert torch.equal(got[k, group], candidates[k, best, group])


def test_drawn_locations_are_those_of_x():
    x = torch.arange(24.0).view(2, 3, 4)  # location (n, l) is (12 n + l, 12 n + l + 4, 12 n + l + 8)
    cases = ((0, 1), (0, 1), (0, 2), (1, 1))
    keys = ((seeding.key(seed, "reseed"), torch.tensor(step)) for seed, step in cases)
    a, b, *others = (mixture.draw_locations(x, 500, *key) for key in keys)
    assert torch.equal(a, b)
    assert not any(torch.equal(a, other) for other in others)
    assert sorted({tuple(row) for row in a.tolist()}) == [
        (12 * n + i, 12 * n + i + 4, 12 * n + i + 8) for n in range(2) for i in range(4)
    ]


def test_the_floor_of_the_weights_holds_where_a_component_starts_anew():
    member = torch.tensor([0] * 16 + [1] * 3 + [2]).repeat(20)
    x = CENTRES[member] * 10 + torch.randn(400, 2, generator=torch.Generator().manual_seed(0))
    layer = UCBNorm(2, 3, groups=1, momentum=1.0, reseed=0.1, min_weight=0.2)
    layer.mean.copy_(10 * CENTRES)
    layer(x)
    usage = torch.tensor([0.8, 0.15, 1 / 3]) / (0.95 + 1 / 3)  # the last held a twentieth
    torch.testing.assert_close(layer.usage[:, 0], usage)
    want = usage.clamp(min=0.2)
    torch.testing.assert_close(layer.logits.softmax(0), want / want.sum())


def test_each_batch_draws_locations_of_its_own():
    moved = []
    for step in range(4):
        layer = UCBNorm(2, 3, groups=1, reseed=0.1)
        layer.mean[2] = 1e3
        layer.usage[2] = layer.step.fill_(step) * 0
        layer.forget_initialized()
        layer(clouds(0))
        moved.append(layer.mean[2].tolist())
    assert len({tuple(mean) for mean in moved}) > 1


@pytest.mark.parametrize(("average", "groups"), [("em", 4), ("paper", 1)])
def test_a_shared_variance_is_the_mean_by_weight(average, groups):
    options = {"groups": groups, "average": average}
    layer, plain = (UCBNorm(4, 3, variance=v, **options).double() for v in ("shared", "component"))
    for step in range(4):
        x = batch(step, (5, 4, 6), torch.float64)
        plain.load_state_dict(layer.state_dict())
        layer(x)
        plain(x)
        weight, var = plain.logits.softmax(0).numpy(), plain.log_var.exp().numpy()
        np.testing.assert_allclose(layer.log_var.exp(), np.tile(weight @ var, (3, 1)), rtol=1e-12)
        assert torch.equal(layer.mean, plain.mean)
        assert torch.equal(layer.logits, plain.logits)


def test_a_shared_variance_is_seeded_as_one():
    x = clouds(0)[(torch.arange(600) % 3 > 0) | (torch.arange(600) < 60)]  # of unequal size
    layer = UCBNorm(2, 3, groups=1, init="kmeans++", variance="shared", momentum=0.0)
    layer(x)
    member = torch.cdist(x, layer.mean).argmin(1).numpy()
    within = sum(((x.numpy() - x.numpy()[member == k].mean(0)) ** 2 * (member == k)[:, None]).sum(0) for k in range(3))
    np.testing.assert_allclose(layer.log_var.exp(), np.tile(within / len(x), (3, 1)), rtol=1e-4)


@pytest.mark.parametrize(
    ("make", "options"),
    [(UCBNorm, {"min_weight": 0.1}), (UCBNorm, {"average": "paper"}), (MixtureNorm, {"min_weight": 0.1})],
    ids=str,
)
def test_stored_weights_keep_to_the_floor(make, options):
    layer = make(2, 3, groups=1, init="uniform", momentum=1.0, **options)
    layer.mean[2] = 1e3
    if make is MixtureNorm:
        layer.fit_mean[2] = 1e3
    layer(clouds(0))
    # Floored and divided by the sum, which the floor has raised by as much; not so where it is read.
    floor = options.get("min_weight", 1e-3 / 3)
    for logits in (layer.logits, layer.fit_logits) if make is MixtureNorm else (layer.logits,):
        assert float(logits.softmax(0)[2]) == pytest.approx(floor / (1 + floor), rel=1e-3)
    assert float(layer.log_weights()[2].exp()) == pytest.approx(floor, rel=1e-6)
