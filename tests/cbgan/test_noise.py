import math
from dataclasses import replace
from statistics import NormalDist

import pytest
import torch

from cbgan.config import GanConfig
from cbgan.noise import between, fixed_labels, fixed_noise, noise, numbered_noise, recalibration_noise, spread_labels
from common.norms.config import NormConfig
from common.train.config import RecalibrateConfig

CPU = torch.device("cpu")


def test_an_images_noise_follows_from_the_seed_and_its_number():
    many = numbered_noise(0, 30, 8, seed=5)
    assert torch.equal(numbered_noise(7, 3, 8, seed=5), many[7:10])
    assert not torch.equal(numbered_noise(0, 30, 8, seed=6), many)
    assert len(many.unique(dim=0)) == 30
    big = numbered_noise(0, 300, 100, seed=0)  # standard errors 0.0058 and 0.0041
    assert abs(float(big.mean())) < 0.02
    assert abs(float(big.std()) - 1) < 0.015


def test_other_steps_ranks_and_attempts_draw_other_noise():
    cfg = GanConfig(latent_dim=5)
    others = (noise(cfg, 1, 8, CPU), noise(cfg, 0, 8, CPU, rank=1), noise(cfg, 0, 8, CPU, seed=5))
    assert not any(torch.equal(noise(cfg, 0, 8, CPU), other) for other in others)


def test_truncation_moves_each_value_to_the_same_quantile_of_the_truncated_normal():
    plain, cut = numbered_noise(0, 20, 10, 3), numbered_noise(0, 20, 10, 3, limit=0.7)
    normal = NormalDist()
    low, high = normal.cdf(-0.7), normal.cdf(0.7)
    for was, now in zip(plain.flatten().tolist(), cut.flatten().tolist(), strict=True):
        assert now == pytest.approx(normal.inv_cdf(low + normal.cdf(was) * (high - low)), abs=1e-5)
    assert float(numbered_noise(0, 50, 10, 3, limit=1e-3).abs().max()) <= 1e-3
    torch.testing.assert_close(numbered_noise(0, 9, 9, 3, limit=9.0), numbered_noise(0, 9, 9, 3), atol=1e-4, rtol=1e-4)


def test_a_walk_passes_its_points_on_great_circles_and_comes_back():
    z = torch.tensor([[2.0, 0.0], [0.0, 4.0], [-1.0, 0.0]])
    walk = between(z, 2)
    half = 3 * math.sqrt(0.5)  # half way from length 2 to 4, at 45 degrees
    want = torch.tensor([[[2.0, 0.0], [half, half]], [[0.0, 4.0], [-2.5 * math.sqrt(0.5), 2.5 * math.sqrt(0.5)]]])
    torch.testing.assert_close(walk[:2], want, atol=1e-5, rtol=1e-5)
    assert walk.shape == (3, 2, 2)
    again = between(torch.tensor([[1.0, 2.0], [1.0, 2.0]]), 3)  # nowhere to go
    torch.testing.assert_close(again, torch.tensor([1.0, 2.0]).expand(2, 3, 2))
    there = between(z[:2], 4)  # from the last to the first
    torch.testing.assert_close(there[1, 0], z[1])
    angles = torch.atan2(there[1, :, 1], there[1, :, 0])
    torch.testing.assert_close(angles, torch.tensor([4.0, 3.0, 2.0, 1.0]) * math.pi / 8)


def test_classes_are_as_frequent_as_asked_and_follow_from_their_position():
    labels = fixed_labels([100, 0, 300, 600], 20_000, CPU)
    shares = torch.bincount(labels, minlength=4) / 20_000
    torch.testing.assert_close(shares, torch.tensor([0.1, 0.0, 0.3, 0.6]), atol=0.015, rtol=0)
    assert torch.equal(fixed_labels([100, 0, 300, 600], 50, CPU), labels[:50])
    assert spread_labels(3, 7, CPU).tolist() == [0, 0, 0, 1, 1, 2, 2]


def test_statistics_are_estimated_from_noise_that_nothing_else_sees():
    cfg = GanConfig(latent_dim=5, recalibrate=RecalibrateConfig(images=20, batch_size=6))
    batches = recalibration_noise(cfg, [], CPU)
    assert [part.shape for (part,) in batches] == [(6, 5)] * 3
    z = torch.cat([part for (part,) in batches])
    for other in (fixed_noise(18, 5, CPU), noise(cfg, 0, 18, CPU)):
        assert not torch.isin(z, other).any()
    again = recalibration_noise(replace(cfg, seed=9, norm=NormConfig(kind="scb", num_components=2)), [1, 3], CPU)
    assert torch.equal(again[1][0], batches[1][0])  # whatever the run's seed, and with classes
    assert torch.cat([labels for _, labels in again]).tolist() == fixed_labels([1, 3], 18, CPU).tolist()
