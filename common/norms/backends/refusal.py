"""A backward pass that is computed outside autograd, and refuses to be differentiated."""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function


class _Refuse(Function):
    """Pass a gradient through; raise when it is differentiated in turn."""

    @staticmethod
    def forward(ctx: Any, grad: Tensor) -> Tensor:
        return grad.view_as(grad)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        raise RuntimeError(
            'backend: the closed forms have no second derivative; build the layer with backend="reference"'
        )


def first_derivative_only(backward: Callable[..., tuple]) -> Callable[..., tuple]:
    """Compute a backward pass outside autograd and autocast, and refuse to differentiate its result.

    torch.autograd.function.once_differentiable would give an error that names no remedy, and none at all
    where the incoming gradient is a constant.
    """

    @functools.wraps(backward)
    def wrapped(ctx: Any, *grads: Tensor) -> tuple:
        second = torch.is_grad_enabled()  # true only under create_graph=True
        with torch.no_grad(), torch.autocast(grads[0].device.type, enabled=False):
            results = backward(ctx, *grads)
        if not second:
            return results
        return tuple(r if r is None else _Refuse.apply(r.detach().requires_grad_()) for r in results)

    return wrapped
