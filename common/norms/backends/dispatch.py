"""Launch kernels directly in eager mode, and through custom operators where something has to see them.

A custom operator takes the host longer than the launches of small activations, so in eager mode a function of autograd
around its body stands in for it.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.graph import increment_version
from torch.utils._python_dispatch import is_in_torch_dispatch_mode


def watched(x: Tensor) -> bool:
    """Say whether a graph, a dispatch mode or a subclass has to see the operators that are called on x."""
    return (
        torch.compiler.is_compiling()
        or type(x) not in (Tensor, nn.Parameter)
        or is_in_torch_dispatch_mode()
        or torch.jit.is_tracing()  # pyright: ignore[reportPrivateImportUsage]
    )


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
        return operator(*inputs) if watched(inputs[0]) else Eager.apply(*inputs)

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
    if torch.is_grad_enabled() or watched(inputs[0]):  # a gradient of a gradient is the operator's to refuse
        return operator(*inputs)
    result = body(*inputs)
    increment_version([t for t in changed if t is not None])
    return result
