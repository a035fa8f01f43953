"""Where the Triton backend can run, and how its operators and kernels are called."""

import functools
import importlib.util
import os
import subprocess
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.graph import increment_version

from .. import graphs

INSTALLED = importlib.util.find_spec("triton") is not None
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MAX_GROUP_CHANNELS = {2: 1024, 4: 512, 8: 256}
"""Channels that may share a posterior, by the most components: a tile holds them all, and must not spill."""
STATE_PLANES = 8
"""Tables (K, C) of a mixture and its moments that kernels hand on, see ``tiles``."""
NO_FLOOR = -1e30
"""Of a log weight."""
MOST_LOCATIONS = 2**31 - 2**22
"""Counted in 32 bits, including the tile after the last: up to 1,024 programs of 2,048 locations each."""
MOST_CHANNELS = 65_535
"""The largest second dimension of a grid, whose programs have at least one channel each."""


@functools.cache
def failure(device: torch.device) -> str | None:
    """Return why Triton cannot compile and launch a kernel on a CUDA device, or None if it can.

    Each device is tried once in a process, without a tensor, which a mode might replace; a failure warns once.
    """
    from . import cluster_kernels  # noqa: PLC0415 - triton may be absent, and takes long to import

    kernel: Any = cluster_kernels.nothing
    try:
        with torch.cuda.device(device):
            kernel[(1,)](enable_fp_fusion=FP_FUSION)
        return None
    except subprocess.CalledProcessError as error:  # its text is a long command, and why stands on the terminal
        reason = f"{error.cmd[0]} compiles nothing: are there Python's headers?"
    except Exception as error:  # whatever Triton may miss
        reason = (str(error) or type(error).__name__).splitlines()[0]
    warnings.warn(f"backend: Triton cannot start on {device} ({reason}); 'auto' takes eager", stacklevel=2)
    return reason


def refusal(x: Tensor) -> str | None:
    """Return why the kernels cannot run on x, or None if they can."""
    if x.dtype not in DTYPES:
        return f"computes float32, bfloat16 and float16, got {x.dtype}"
    if not INSTALLED:
        return "needs the package triton, which is not installed"
    if not x.is_cuda and not (x.device.type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1"):
        return f"needs a CUDA tensor, or TRITON_INTERPRET=1 and a CPU tensor, got one on {x.device.type}"
    if x.ndim > 1 and x.shape[1] > MOST_CHANNELS:
        return f"takes up to {MOST_CHANNELS} channels, got {x.shape[1]}"
    if x.ndim > 1 and x.numel() // max(1, x.shape[1]) >= MOST_LOCATIONS:
        return f"counts fewer than {MOST_LOCATIONS} locations, got {x.numel() // x.shape[1]}"
    if x.is_cuda and not torch.compiler.is_compiling() and (reason := failure(x.device)):  # Inductor needs Triton too
        return f"cannot start: {reason}"
    return None


def refuse(ctx: Any, *grads: Tensor) -> None:
    """Refuse a second derivative."""
    raise RuntimeError('backend: the kernels have no second derivative; build the layer with backend="reference"')


FP_FUSION = True
"""Whether the compiler may fuse a product and a sum, which rounds once and not twice: said at every launch, since
Triton 3.9 is the last in which this is the default."""


def start(
    kernel: Any, grid: tuple[int, ...], tensors: Sequence[Tensor | None], numbers: tuple[float, ...], **constants: Any
) -> None:
    """Launch a kernel on the device of its first tensor, whichever is current.

    The kernel's arguments are tensors, numbers and constants, in this order.
    """
    with torch.cuda.device_of(tensors[0]):
        kernel[grid](*tensors, *numbers, enable_fp_fusion=FP_FUSION, **constants)


def differentiable(
    operator: Callable[..., Any],
    body: Callable[..., Any],
    setup: Callable[[Any, tuple, Any], None],
    gradients: Callable[..., tuple],
) -> Callable[..., Any]:
    """Return a function that calls an operator where something watches, and in eager mode its body, with gradients.

    Args:
        operator: a custom operator, whose first argument is a tensor.
        body: what it was made from.
        setup: its ``setup_context``.
        gradients: its backward.
    """

    class Eager(Function):
        @staticmethod
        def forward(ctx: Any, *inputs: Any) -> Any:
            output = body(*inputs)
            setup(ctx, inputs, output)
            return output

        @staticmethod
        def backward(ctx: Any, *grads: Tensor | None) -> tuple:
            return gradients(ctx, *grads)

    def call(*inputs: Any) -> Any:
        return operator(*inputs) if graphs.watched(inputs[0]) else Eager.apply(*inputs)

    return call


def call(
    operator: Callable[..., Any], body: Callable[..., Any], *inputs: Any, changed: Sequence[Tensor | None] = ()
) -> Any:
    """Call an operator that has no gradient, or in eager mode its body.

    Args:
        operator: a custom operator, which refuses to be differentiated.
        body: what it was made from.
        inputs: its arguments, the first of them a tensor.
        changed: those that it writes to.
    """
    if torch.is_grad_enabled() or graphs.watched(inputs[0]):  # a gradient of a gradient is the operator's to refuse
        return operator(*inputs)
    result = body(*inputs)
    increment_version([t for t in changed if t is not None])
    return result


def mixture_refusal(num_components: int, group_channels: int) -> str | None:
    """Return why the kernels cannot take such a mixture, or None if they can."""
    width = next((width for limit, width in MAX_GROUP_CHANNELS.items() if num_components <= limit), 0)
    if not width:
        return f"takes up to {max(MAX_GROUP_CHANNELS)} components, got {num_components}"
    if group_channels > width:
        return f"takes up to {width} channels that share one of {num_components} posteriors, got {group_channels}"
    return None
