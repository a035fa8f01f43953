"""Loads and stores of the kernels, counted under Triton's interpreter; run by test_kernels.py.

``Launch.passes`` counts tensors that a kernel is given: here every layer runs, and its kernels must load and store each
of them once.
"""

from unittest import mock

import numpy as np
import pytest
import torch
from launches import LAYERS, Recorder, replaced_kernels
from norm_cases import in_full
from torch.utils._python_dispatch import _disable_current_modes
from triton.runtime.interpreter import GridExecutor, InterpretedFunction, InterpreterBuilder

from common.norms import mixture
from common.norms.backends.triton import tile_configs

ON_EVERY_PUSH = ("UCBNorm", "UCBNorm, groups=1", "UCBNorm, statistics=learned", "SCBNorm, evaluation, ids")
SHAPE = (4, 6, 48)
PILOTS = 0.03
"""Of an activation, that kernels may read again: the first location, by each program."""
TWICE = ("mixture_channel_kernel", "mixture_channel_bwd_kernel")
"""Kernels that read activations twice, the second time from the cache of a multiprocessor, which holds them."""
RUN = InterpretedFunction.run


class Touched(Recorder):
    """Run the kernels, and count the elements of activations that each loads and stores."""

    def __init__(self, size):
        super().__init__()
        self.size, self.moved = size, []

    def kernel(self, function, grid, args, kwargs):
        super().kernel(function, grid, args, kwargs)
        copies, copy = [], GridExecutor._init_args_hst

        def kept(self, *given):
            found = copy(self, *given)
            copies.extend([*found[0], *found[1].values()])
            return found

        loads, stores = [], []
        with (
            mock.patch.object(GridExecutor, "_init_args_hst", kept),  # the interpreter runs on copies
            mock.patch.object(*self.counted("load", 0, loads)),
            mock.patch.object(*self.counted("store", 1, stores)),
            _disable_current_modes(),
        ):
            RUN(function, *args, grid=grid, warmup=False, **kwargs)
        activations = [t for t in copies if isinstance(t, torch.Tensor) and t.numel() >= self.size]
        reads, writes = (sum(self.within(found, t) for t in activations) for found in (loads, stores))
        self.moved.append((self.launches[-1], reads / (1 + (function.__name__ in TWICE)), writes))

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
        found = np.concatenate([np.empty(0, np.uint64), *addresses])
        return int(((found >= t.data_ptr()) & (found < t.data_ptr() + size)).sum())


@pytest.mark.parametrize(
    ("name", "memory"),
    [
        *((name, "contiguous") for name in ON_EVERY_PUSH),
        *in_full(*((name, "contiguous") for name in LAYERS if name not in ON_EVERY_PUSH)),
        *in_full(*((name, "channels last") for name in ("UCBNorm", "UCBNorm, groups=1", "SCBNorm", "MixtureNorm"))),
    ],
)
def test_kernels_touch_an_activation_once_in_each_pass(monkeypatch, name, memory):
    monkeypatch.setattr(mixture, "MAX_POINTS", 4)  # of 192 locations
    monkeypatch.setattr(tile_configs, "FEWEST_CHANNELS", 1)
    layer = LAYERS[name].build(SHAPE[1], "cpu")
    x, g = torch.randn(2, *SHAPE).half()
    if memory == "channels last":
        x, g = (t.mT.contiguous().mT for t in (x, g))
    x.requires_grad_()
    recorder = Touched(x.numel())
    with replaced_kernels(recorder.kernel), recorder:
        y = layer(*LAYERS[name].arguments(x))
        torch.autograd.grad(y, [x, *(p for p in layer.parameters() if p.requires_grad)], g, allow_unused=True)
    assert recorder.moved
    for launched, reads, writes in recorder.moved:
        passes = (reads + writes) / x.numel()
        assert 0 <= passes - launched.passes(x.numel()) <= PILOTS, (launched.name, reads, writes)
        assert writes in (0, x.numel())
