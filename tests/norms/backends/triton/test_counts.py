"""How much the layers launch, how often they pass over an activation, and what they keep; no kernel runs here."""

import itertools
from math import prod

import pytest
import torch
from launches import LAYERS, LAYOUTS, Launch, Recorder, record

pytest.importorskip("triton")

SMALL, LARGE = (64, 256, 8, 8), (64, 64, 112, 112)
LIMITS = {
    # forward: launches and passes, backward: launches and passes
    "UCBNorm": (4, 3, 4, 5),  # BatchNorm reads x twice and writes y; reads x and g twice and writes dx
    "UCBNorm, groups=1": (4, 3, 4, 5),
    "UCBNorm, update=weight": (4, 3, 5, 5),
    "UCBNorm, statistics=learned": (4, 2, 5, 3),  # where the statistics are given, everything is read once
    "UCBNorm, evaluation": (2, 2, 3, 3),  # under gradients it copies the mixture, which may move
    "UCBNorm, groups=1, evaluation": (2, 2, 3, 3),
    "SCBNorm": (1, 2, 2, 3),
    "SCBNorm, affine": (1, 2, 2, 3),
    "SCBNorm, evaluation, ids": (2, 2, 3, 3),  # one launch more each way, for samples that may be unknown
    "SCBNorm, evaluation, unknown": (3, 2, 4, 3),  # and one to make a mixture of the clusters
    "SCBNormBase": (3, 2, 4, 3),
    "MixtureNorm": (40, 3, 4, 5),  # ten steps of EM
    "MixtureNorm, evaluation": (2, 2, 3, 3),
}
REAL = {"eps", "kappa", "momentum", "min_weight", "floor", "bessel", "least", "empty"}
"""What kernels are given that is not a whole number."""
MULTIPROCESSORS = 132
"""Of an H100."""


def passes(launches: list[Launch], size: int) -> int:
    return sum(each.passes(size) for each in launches)


@pytest.mark.parametrize("name", LAYERS)
def test_a_step_launches_and_moves_no_more_than_its_limits(name):
    for shape, dtype, layout in itertools.product((SMALL, LARGE), (torch.float32, torch.bfloat16), LAYOUTS):
        if (name, shape) == ("MixtureNorm", SMALL):
            continue  # it is fitted to a small batch as it is, by many passes, and to few locations of a large one
        step, size = record(LAYERS[name], shape, dtype, layout), prod(shape)
        found = len(step.forward), passes(step.forward, size), len(step.backward), passes(step.backward, size)
        assert all(a <= b for a, b in zip(found, LIMITS[name], strict=True)), (found, shape, dtype, layout)
        assert step.kept <= 1.05 * size * dtype.itemsize  # x, and tables
        for each in (*step.forward, *step.backward):
            if each.kernel and each.passes(size):
                assert prod(each.grid) >= 0.9 * MULTIPROCESSORS, (each.name, shape, dtype, layout)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_channels_that_fit_into_a_cache_move_less_than_batch_norm(dtype):
    """A launch and one for the averages forward, one backward: x is read once, and so is the gradient."""
    step = record(LAYERS["UCBNorm"], SMALL, dtype, "NCHW")
    assert [each.name for each in step.forward] == ["mixture_channel_kernel", "mixture_averages_kernel"]
    assert [each.name for each in step.backward] == ["mixture_channel_bwd_kernel"]
    assert (passes(step.forward, prod(SMALL)), passes(step.backward, prod(SMALL))) == (2, 3)


@pytest.mark.parametrize("name", LAYERS)
def test_sizes_and_strides_are_whole_numbers(name):
    """A size that is handed over as 2.0 would be compiled as a float32, which does not count far."""
    step = record(LAYERS[name], (4, 6, 2, 2), torch.float32, "NCHW")
    for each in (*step.forward, *step.backward):
        names = getattr(each.kernel, "arg_names", ())
        arguments = {**dict(zip(names, each.args, strict=False)), **each.kwargs}
        assert {argument for argument, value in arguments.items() if isinstance(value, float)} <= REAL, each.name


def test_the_recorder_sees_every_operator_but_views():
    x, few = torch.empty(4, 6, device="meta"), torch.empty(6, device="meta")
    with Recorder() as recorder:
        x.t()[0].unsqueeze(0)
        torch.empty_like(x).detach()
        torch.zeros(3).add(1)  # on the host
        assert not recorder.take()
        x.t().reshape(2, 12)  # a copy
        x.add_(few)
        assert [each.passes(x.numel()) for each in recorder.take()] == [2, 2]
