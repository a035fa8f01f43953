import numpy as np
import torch

from common.norms.seeding import generator as own_generator
from common.runtime.seeding import derive, drawing, generator, permutation, uniform_per_sample


def test_positions_are_told_apart():
    positions = [(0,), (1,), (0, "noise"), (0, "noise", 1), (0, "noise", 2), (0, "noise1"), (0, "noise", "1")]
    assert len({derive(*position) for position in positions}) == len(positions)
    assert all(0 <= derive(*position) < 2**63 for position in positions)


def test_a_stream_belongs_to_its_position_alone():
    first = torch.randn(4, generator=generator(3, "a"))
    torch.randn(100, generator=generator(3, "b"))
    torch.randn(100)
    assert torch.equal(first, torch.randn(4, generator=generator(3, "a")))


def test_permutation_holds_every_index_once():
    assert sorted(permutation(50, 0, "shuffle", 1).tolist()) == list(range(50))


def test_samples_draw_the_same_in_any_batch_and_uniformly():
    draws = uniform_per_sample(torch.arange(100_000), 0, "flip", 0)
    assert torch.equal(draws[[7, 3, 999]], uniform_per_sample(torch.tensor([7, 3, 999]), 0, "flip", 0))
    draws = draws.double().numpy()
    assert draws.min() >= 0
    assert draws.max() < 1
    # 10 cells of 10,000: chi-squared with 9 degrees of freedom stays below 27.9 with probability 0.999
    counts, _ = np.histogram(draws, bins=10, range=(0, 1))
    assert ((counts - 10_000) ** 2 / 10_000).sum() < 27.9
    other = uniform_per_sample(torch.arange(100_000), 0, "flip", 1).double().numpy()
    # the correlation of independent draws has a standard deviation of 1 / sqrt(100,000) = 0.0032
    assert abs(np.corrcoef(draws[:-1], draws[1:])[0, 1]) < 0.0127
    assert abs(np.corrcoef(draws, other)[0, 1]) < 0.0127


def test_splitmix64_agrees_with_its_published_first_outputs(monkeypatch):
    # The first outputs of SplitMix64 from state 1234567 (Rosetta Code's test vector for the generator).
    published = [6457827717110365317, 3203168211198807973, 9817491932198370423]
    monkeypatch.setattr("common.runtime.seeding.derive", lambda *_: 1234567)
    draws = uniform_per_sample(torch.arange(3), 0).double().tolist()
    assert draws == [(value >> 40) / 2**24 for value in published]


def test_the_layers_own_copy_draws_the_same():
    for position in [(0,), (3, "points", "fit", 12), (3, "points", "fit", "12")]:
        assert own_generator(*position).initial_seed() == generator(*position).initial_seed()


def test_global_draws_inside_a_block_follow_from_seed_and_position_and_leave_no_trace():
    torch.manual_seed(5)
    before = torch.get_rng_state()
    draws = []
    for seed, position in ((0, 1), (0, 1), (0, 2), (1, 1)):
        torch.rand(3)
        with drawing(seed, "dropout", position):
            draws.append(torch.rand(4))
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])
    assert not torch.equal(draws[0], draws[3])
    torch.set_rng_state(before)
    with drawing(3):
        torch.rand(1)
    assert torch.equal(torch.get_rng_state(), before)
