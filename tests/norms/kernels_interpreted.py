"""The kernels under Triton's interpreter; run by test_kernels.py in a process of its own."""

import os

import pytest
import torch
from norm_cases import assert_within_budget, mixture_case

from common.norms import cluster_norm, launch

assert os.environ.get("TRITON_INTERPRET") == "1"

NAMES = ("y", "dx", "dmean", "dvar")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(autouse=True)
def nan_filled_memory():
    """Fill fresh memory with NaN, so that an element which no kernel writes shows."""
    torch.use_deterministic_algorithms(True)
    assert torch.empty(1).isnan()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True, params=["small tiles"])
def tiles(request, monkeypatch):
    """Cut tiles down, so that small inputs have many, unless a test asks for the real ones."""
    if request.param == "small tiles":
        for name in ("SCB_FORWARD", "SCB_BACKWARD", "SCB_ROWS"):
            monkeypatch.setattr(launch, name, launch.Launch(elements=64, num_warps=1))
        monkeypatch.setattr(launch, "CHANNEL_BLOCK", 16)


def layout(t, memory):
    if memory == "channels_last":
        return t.movedim(1, -1).contiguous().movedim(-1, 1)
    if memory == "strided":  # every second position, of every second channel
        out = t.new_zeros(t.shape[0], 2 * t.shape[1], *t.shape[2:-1], 2 * t.shape[-1])[:, ::2, ..., ::2]
        return out.copy_(t)
    return t


def case(shape, num, dtype, memory="contiguous", offset=0.0):
    """As mixture_case, x and g rounded to dtype and laid out; parameters in float32."""
    x, log_lambda, mean, var, g = mixture_case(shape, num, dtype=torch.float32)
    x, g = (layout(t.to(dtype), memory) for t in (x + offset, g))
    return x, log_lambda, mean + offset, var, g


def cluster_gradients(values, cluster, dtype, backend, **options):
    """Output and gradients of cluster_norm; dtype None keeps each input's."""
    x, _, mean, var, g = (t if dtype is None else t.to(dtype) for t in values)
    inputs = [t.detach().requires_grad_() for t in (x, mean, var)]
    y = cluster_norm(inputs[0], cluster, *inputs[1:], backend=backend, **options)
    return dict(zip(list[str](NAMES), (y, *torch.autograd.grad(y, inputs, g)), strict=True))


@pytest.mark.parametrize("memory", ["contiguous", "channels_last", "strided"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(3, 1, 1), (9, 4), (3, 19, 5), (2, 3, 13, 11)], ids=str)
def test_scb_errs_at_most_twice_as_much_as_eager(shape, dtype, memory):
    """The last shape has several blocks of positions, the third several of channels."""
    values = case(shape, 3, dtype, memory if len(shape) > 2 else "contiguous")
    cluster = torch.arange(shape[0]) % 2  # cluster 2 is absent
    exact = cluster_gradients(values, cluster, torch.float64, "reference")
    eager, kernel = (cluster_gradients(values, cluster, None, backend) for backend in ("eager", "triton"))
    assert_within_budget(exact, kernel, eager)
    assert not kernel["dmean"][2].any()
    assert not kernel["dvar"][2].any()
    assert kernel["y"].stride() == values[0].stride() or memory == "strided"
    for name, value in eager.items():
        assert (kernel[name].dtype, kernel[name].shape) == (value.dtype, value.shape)


@pytest.mark.parametrize("num", [1, 9])
def test_scb_takes_any_number_of_clusters(num):
    values = case((12, 5, 6), num, torch.float32)
    cluster = torch.arange(12).flip(0) % num
    exact = cluster_gradients(values, cluster, torch.float64, "reference")
    eager, kernel = (cluster_gradients(values, cluster, None, backend) for backend in ("eager", "triton"))
    assert_within_budget(exact, kernel, eager)


def test_scb_survives_an_offset():
    values = case((6, 4, 8), 3, torch.float32, offset=1e3)
    cluster = torch.arange(6) % 3
    exact = cluster_gradients(values, cluster, torch.float64, "reference")
    kernel = cluster_gradients(values, cluster, None, "triton")
    assert float((kernel["y"] - exact["y"]).detach().abs().max()) < 1e-5  # x - mean is exact near 1e3


def test_scb_uses_eps():
    values = case((6, 4, 8), 3, torch.float32)
    cluster = torch.arange(6) % 3
    exact, eager, kernel = (
        cluster_gradients(values, cluster, dtype, backend, eps=0.5)
        for dtype, backend in ((torch.float64, "reference"), (None, "eager"), (None, "triton"))
    )
    assert_within_budget(exact, kernel, eager)


def test_scb_sums_over_an_expanded_gradient():
    """The gradient of a sum has strides of zero."""
    x, _, mean, var, _ = case((6, 4, 8), 3, torch.float32)
    mean.requires_grad_()
    cluster_norm(x, torch.arange(6) % 3, mean, var, backend="triton").sum().backward()
    want = -2 * 8 * (var + 1e-5).rsqrt()  # two samples a cluster, eight positions
    torch.testing.assert_close(mean.grad, want)
