"""The kernels whose programs are channels, under Triton's interpreter; run by test_kernels.py."""

import pytest
import torch
from kernels_interpreted import assert_mixture_within_budget, case, mixture_gradients
from launches import replaced_kernels
from layers_interpreted import assert_near, pair, step
from norm_cases import in_full, mixture_case

from common.norms.backends.triton import tile_configs

LAYERS = {
    "paper's averages, one variance": ("ucb", {"average": "paper", "variance": "shared", "scale": "sqrt_k"}),
    "learned by gradients, with a floor": ("ucb", {"update": "weight", "min_weight": 0.3}),
    "re-seeded, without an affine map": ("ucb", {"reseed": 0.2, "affine": False}),
    "mixture normalization": ("mn", {"groups": None, "em_steps": 2, "eps": 1.0}),
}


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Cut tiles down, so that a program has several, and fill fresh memory with NaN."""
    monkeypatch.setattr(tile_configs, "CHANNEL", tile_configs.TileConfig(elements=16, num_warps=1))
    monkeypatch.setattr(tile_configs, "FEWEST_CHANNELS", 1)
    monkeypatch.setattr(tile_configs, "PARAMETER_CHANNELS", 2)
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def runs_by_channel(run):
    """Say which kernels a function launches."""
    names = []
    with replaced_kernels(lambda kernel, *_: names.append(kernel.__name__)):
        run()
    return names


@pytest.mark.parametrize(
    ("shape", "memory"),
    [
        ((3, 4, 5), "strided"),
        ((2, 3, 37), "contiguous"),
        *in_full(((9, 2, 3), "contiguous"), ((5, 2, 4, 4), "strided")),
    ],
    ids=str,
)
def test_a_program_of_a_channel_errs_at_most_twice_as_much_as_eager(shape, memory):
    """In tiles of several samples, of one, and of a part of one."""
    assert_mixture_within_budget(case(shape, 3, torch.float32, memory), groups=shape[1], statistics="batch")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_program_of_a_channel_takes_half_precision(dtype):
    assert_mixture_within_budget(case((3, 4, 2, 5), 3, dtype), groups=4, statistics="batch")


def test_a_backward_of_many_programs_takes_the_state_that_one_program_left(monkeypatch):
    """As at 16,384 locations in float32: x fits into the cache, and x and its gradient do not."""
    monkeypatch.setattr(tile_configs, "RESIDENT_BYTES", 3 * 5 * 4)
    values = case((3, 4, 5), 3, torch.float32)
    names = runs_by_channel(lambda: mixture_gradients(values, None, "triton", groups=4))
    assert "mixture_channel_kernel" in names
    assert "mixture_channel_bwd_kernel" not in names
    assert_mixture_within_budget(values, groups=4, statistics="batch")


@pytest.mark.parametrize(("num", "scale"), [(4, "sqrt_k"), *in_full((1, "sqrt_k"), (2, "paper"))])
def test_a_program_of_a_channel_takes_components_and_eps(num, scale):
    values = case((3, 4, 5), num, torch.float32)
    assert_mixture_within_budget(values, affine=False, groups=4, statistics="batch", scale=scale, eps=0.3)


@pytest.mark.parametrize("name", ["learned by gradients, with a floor", *in_full(*(n for n in LAYERS if n[0] != "l"))])
def test_a_layer_of_such_programs_steps_and_moves_its_averages_as_in_float64(name):
    rtol = 1e-4 if LAYERS[name][0] == "mn" else 2e-5
    kernel, exact = pair(*LAYERS[name])
    x, *_, g = mixture_case((4, 6, 5), 3, dtype=torch.float32)
    names = runs_by_channel(lambda: step(pair(*LAYERS[name])[0], x, g))
    assert {"mixture_channel_kernel", "mixture_channel_bwd_kernel"} <= set(names)
    for shift in (1, -1):
        x = 2 * x + shift
        assert_near(step(kernel, x, g), step(exact, x.double(), g.double()), rtol=rtol)
        assert_near(kernel.state_dict().values(), exact.state_dict().values(), rtol=rtol)
