"""Loads and stores of the kernels, counted under Triton's interpreter; run by test_kernels.py.

Traffic is counted without running a kernel, by how often each is said to touch its arguments: here every layer runs,
and what its kernels touch is compared with that.
"""

import functools
from unittest import mock

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import _disable_current_modes
from triton.runtime.interpreter import GridExecutor, InterpretedFunction, InterpreterBuilder

from common.norms.estimation import em
from common.norms.tools import counts
from common.norms.tools.recording import AGAIN, Recorder, replaced_kernels

SHAPE = (4, 6, 48)
LOCATIONS = 4 * 48
PILOTS = 0.03
"""Of an activation, that kernels may read again: the first location, by each program."""
RUN = InterpretedFunction.run


class Touched(Recorder):
    """Run the kernels, and count the elements of each argument that they load and store."""

    def __init__(self):
        super().__init__("cpu")
        self.found = []

    def kernel(self, function, grid, args, kwargs):
        super().kernel(function, grid, args, kwargs)
        launched, copies, copy = self.launches[-1], {}, GridExecutor._init_args_hst

        def kept(self, *given):
            positional, by_name = copy(self, *given)
            copies.update(dict(zip(self.arg_names, positional, strict=False)) | by_name)
            return positional, by_name

        loads, stores = [], []
        with (
            mock.patch.object(GridExecutor, "_init_args_hst", kept),  # the interpreter runs on copies
            mock.patch.object(*self.counted("load", 0, loads)),
            mock.patch.object(*self.counted("store", 1, stores)),
            _disable_current_modes(),
        ):
            RUN(function, *args, grid=grid, warmup=False, **kwargs)
        reads, writes = (np.concatenate(found or [np.empty(0, np.uint64)]) for found in (loads, stores))
        tensors = {name: t for name, t in copies.items() if isinstance(t, torch.Tensor)}
        touched = {name: (self.within(reads, t), self.within(writes, t)) for name, t in tensors.items()}
        assert len(writes) == sum({tensors[name].data_ptr(): n for name, (_, n) in touched.items()}.values())
        self.found.append((launched, touched))

    @staticmethod
    def counted(method, mask_at, kept):
        name = f"create_masked_{method}"
        original = getattr(InterpreterBuilder, name)

        def run(self, ptrs, *arguments):
            kept.append(ptrs.data[arguments[mask_at].data.astype(bool)].ravel())
            return original(self, ptrs, *arguments)

        return InterpreterBuilder, name, run

    @staticmethod
    def within(addresses, t):
        size = (sum((n - 1) * s for n, s in zip(t.shape, t.stride(), strict=True)) + 1) * t.element_size()
        return int(((addresses >= t.data_ptr()) & (addresses < t.data_ptr() + size)).sum()) if t.numel() else 0


@functools.cache
def steps(subject, memory):
    torch.manual_seed(0)
    layer = subject.build(SHAPE[1], counts.COMPONENTS, "cpu").train(subject.training)
    x, g = torch.randn(2, *SHAPE).half()
    if memory == "channels_last":
        x, g = (t.mT.contiguous().mT for t in (x, g))
    ids = torch.arange(len(x)) % counts.COMPONENTS
    arguments = {"none": (), "ids": (ids,), "unknown": (None,)}[subject.cluster]
    x.requires_grad_()
    recorder = Touched()
    with replaced_kernels(recorder.kernel), recorder:
        y = layer(x, *arguments)
        forward = list(recorder.found)
        torch.autograd.grad(y, [x, *(p for p in layer.parameters() if p.requires_grad)], g, allow_unused=True)
    return x, forward, recorder.found[len(forward) :]


CASES = [
    pytest.param(subject, memory, id=f"{subject.name}, {memory}")
    for subject in counts.SUBJECTS
    if subject.name != "BatchNorm2d"
    # One layer of each family in the second layout
    for memory in ("contiguous", "channels_last")[: 1 + (subject.name in ("UCBNorm", "UCBNorm, groups=1", "SCBNorm"))]
]


@pytest.mark.parametrize(("subject", "memory"), CASES)
def test_kernels_touch_their_arguments_as_often_as_they_are_said_to(subject, memory):
    """Tables are read by every program of a kernel that reads an activation, from a cache."""
    x, *passes = steps(subject, memory)
    size, table = x.numel(), counts.COMPONENTS * x.shape[1]
    for launched, touched in (each for found in passes for each in found):
        assert touched.keys() == launched.touched.keys()
        sizes = {argument: launched.arguments[argument].numel() for argument in touched}
        for argument, (loads, stores) in touched.items():
            reads, writes = launched.touched[argument]
            where = f"{launched.name} {argument} of {sizes[argument]}: {loads} loads, {stores} stores"
            assert stores == writes * sizes[argument], where
            if sizes[argument] >= size:
                again = 2 if launched.name in AGAIN else 1
                assert 0 <= loads - again * reads * size <= PILOTS * size, where
            elif sizes[argument] > table and not launched.reads_activation(size):  # sums
                assert 0 <= loads - round(reads * sizes[argument]) <= counts.COMPONENTS, where  # a total of each
            else:
                assert reads or not loads, where


@pytest.mark.parametrize("memory", ["contiguous", "channels_last"])
def test_locations_are_drawn_without_a_copy_of_the_others(monkeypatch, memory):
    monkeypatch.setattr(em, "MAX_POINTS", 20)
    subject = next(each for each in counts.SUBJECTS if each.name == "MixtureNorm")
    _, forward, _ = steps.__wrapped__(subject, memory)
    ((launched, touched),) = [each for each in forward if each[0].name == "draw_kernel"]
    assert touched["x_ptr"] == touched["out_ptr"][::-1] == (20 * SHAPE[1], 0)
    assert launched.touched["x_ptr"][0] == 20 / LOCATIONS


@pytest.mark.parametrize(("subject", "memory"), CASES)
def test_kernels_read_and_write_activations_no_more_than_they_must(subject, memory):
    """BatchNorm's traffic with batch statistics; a single pass each way where they are given."""
    x, *passes = steps(subject, memory)
    for found, goal in zip(passes, (subject.forward, subject.backward), strict=True):
        if goal.activations is not None:
            moved = sum(
                touched[name][0] / (2 if launched.name in AGAIN else 1) + touched[name][1]
                for launched, touched in found
                for name, t in launched.arguments.items()
                if isinstance(t, torch.Tensor) and t.dtype == torch.half
            )
            assert moved <= (goal.activations + 2 * PILOTS) * x.numel()
