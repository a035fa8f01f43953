import pytest
import torch

from common.metrics.features import neighbours
from common.metrics.features.neighbours import copying, nearest


def points(count: int, seed: int) -> torch.Tensor:
    return torch.randn(count, 6, generator=torch.Generator().manual_seed(seed))


def test_the_nearest_of_others_and_how_near(monkeypatch):
    for batch in (3, 2000):
        monkeypatch.setattr(neighbours, "_BATCH", batch)
        few, many = points(10, 0), points(50, 1)
        every = (few[:, None].double() - many[None].double()).square().sum(2).sqrt()
        found = nearest(few, many)
        assert torch.equal(found.index, every.argmin(1))
        assert torch.allclose(found.distance, every.min(1).values, rtol=1e-12, atol=0)
        own = (many[:, None].double() - many[None].double()).square().sum(2).sqrt().fill_diagonal_(9e9)
        apart = nearest(many, many, apart=True)
        assert torch.equal(apart.index, own.argmin(1))
        assert (apart.distance > 0).all()


def test_a_copy_is_at_no_distance():
    """Though products of matrices leave some between equal rows far from the origin."""
    many = points(50, 1) + 1000
    found = nearest(many[20:30], many)
    assert torch.equal(found.index, torch.arange(20, 30))
    assert found.distance.tolist() == [0.0] * 10


def test_the_share_counts_what_is_nearer_than_all_but_one_in_a_hundred():
    unseen = torch.arange(1, 401).double()  # the four nearest of them at 1, 2, 3, 4
    found = copying(torch.tensor([0.0, 4.0, 4.99, 5.0, 400.0, 401.0] * 10), unseen)
    assert found.share == pytest.approx(3 / 6)
    # chance to be nearer than an unseen one: all; 396 and half of one; 396; 395.5; 0.5; none
    assert found.gap == pytest.approx((400 + 396.5 + 396 + 395.5 + 0.5 + 0) / 6 / 400)
    assert found.alarm


def test_more_than_chance_is_five_in_a_hundred_and_three_deviations():
    """Of 1,000 samples 50 are expected at most, with a deviation of 6.9."""
    for copies, alarm in ((70, False), (71, True)):
        distances = torch.cat([torch.zeros(copies), torch.full((1000 - copies,), 9.0)])
        assert copying(distances, torch.arange(1, 101).double()).alarm is alarm


def test_a_copied_training_set_trips_the_alarm_and_fresh_real_images_do_not():
    train, test, fresh = points(800, 0), points(300, 1), points(300, 2)
    unseen = nearest(test, train).distance
    copied = copying(nearest(train, train).distance, unseen)
    assert (copied.share, copied.gap, copied.alarm) == (1.0, 1.0, True)
    real = copying(nearest(fresh, train).distance, unseen)
    assert not real.alarm
    assert real.gap == pytest.approx(0.5, abs=0.1)
    some = torch.cat([fresh[:250], train[:50]])  # one in six
    assert copying(nearest(some, train).distance, unseen).alarm
