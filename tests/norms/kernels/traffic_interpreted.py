"""Loads and stores of the kernels, counted under Triton's interpreter; run by test_kernels.py."""

import numpy as np
import pytest
import torch
from norm_cases import mixture_case
from triton.runtime.interpreter import InterpreterBuilder

from common.norms import cluster_norm, mixture_norm
from common.norms.kernels import launch

SHAPE = (4, 6, 48)


@pytest.fixture
def traffic(monkeypatch):
    """Count the elements that kernels read from and write to each 2-byte tensor: x, y and their gradients.

    Everything else, parameters and sums, is float32 or int64; those are counted apart.
    """
    counts = {"reads": 0, "writes": 0, "other reads": 0, "other writes": 0}

    def counted(method, name, mask_at):
        def run(self, ptrs, *arguments):
            wide = ptrs.dtype.scalar.element_ty.primitive_bitwidth > 16
            counts[f"other {name}" if wide else name] += int(np.sum(arguments[mask_at].data))
            return method(self, ptrs, *arguments)

        return run

    load, store = InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store
    monkeypatch.setattr(InterpreterBuilder, "create_masked_load", counted(load, "reads", 0))
    monkeypatch.setattr(InterpreterBuilder, "create_masked_store", counted(store, "writes", 1))
    return counts


def taken(traffic, size):
    """Return reads and writes an element of x since the last call, and start anew."""
    result = traffic["reads"] / size, traffic["writes"] / size
    traffic.update(dict.fromkeys(traffic, 0))
    return result


@pytest.mark.parametrize("memory", ["contiguous", "channels_last"])
def test_scb_reads_and_writes_no_more_than_it_must(traffic, memory):
    x, _, mean, var, g = mixture_case(SHAPE, 3, dtype=torch.float32)
    x, g = x.half(), g.half()
    if memory == "channels_last":
        x, g = (t.mT.contiguous().mT for t in (x, g))
    inputs = [t.requires_grad_() for t in (x, mean, var)]
    y = cluster_norm(x, torch.arange(4) % 3, mean, var, backend="triton")
    assert taken(traffic, x.numel()) == (1, 1)
    torch.autograd.grad(y, inputs, g)
    assert taken(traffic, x.numel()) == (2, 1)


@pytest.mark.parametrize("memory", ["contiguous", "channels_last"])
@pytest.mark.parametrize("groups", [1, 2, 6])
@pytest.mark.parametrize(
    ("statistics", "forward", "backward"), [("batch", (2, 1), (4, 1)), ("learned", (1, 1), (2, 1))]
)
def test_mixture_reads_and_writes_no_more_than_it_must(traffic, statistics, forward, backward, groups, memory):
    """BatchNorm's traffic with batch statistics, a single pass each way without; the affine map costs nothing.

    Moments are relative to the first location, which up to two programs (192 locations, at least 32 K each) and
    then one for each of the K = 3 components read again.
    """
    x, log_lambda, mean, var, g = mixture_case(SHAPE, 3, dtype=torch.float32)
    x, g = x.half(), g.half()
    if memory == "channels_last":
        x, g = (t.mT.contiguous().mT for t in (x, g))
    affine = torch.linspace(0.5, 1.5, 6), torch.linspace(-1, 1, 6)
    inputs = [t.requires_grad_() for t in (x, log_lambda, mean, var, *affine)]
    y, _ = mixture_norm(
        *inputs[:4], weight=inputs[4], bias=inputs[5], groups=groups, statistics=statistics, backend="triton"
    )
    other_writes = traffic["other writes"]
    reads, writes = taken(traffic, x.numel())
    again = (2 + 3) / 192 if statistics == "batch" else 0
    programs = {
        kernel: launch.mixture_tiling(kernel, launch.walk((x,), merge=True), groups, 3, sums=True).programs
        for kernel in launch.MIXTURE
    }
    left = {"batch": 3 * programs["mixture_moments_kernel"] + 8, "learned": 0}  # tables (K, C), and no channel twice
    assert other_writes == left[statistics] * 18
    assert forward[0] <= reads <= forward[0] + again + 1e-9
    assert writes == forward[1]
    torch.autograd.grad(y, inputs, g)
    first, last = programs["mixture_sums_kernel"], programs["mixture_bwd_kernel"]
    left = {"batch": 2 * first + 4 + 3 * last + 3, "learned": 5 * last + 3}
    assert traffic["other writes"] == left[statistics] * 18 + 2 * 6 + 3  # of the affine map, and of log lambda
    assert taken(traffic, x.numel()) == backward
