"""Run the bodies of custom operators without the operators, which cost the host more than the kernels' launches.

An operator is for what looks at operators: graphs, modes, transforms. Where nothing does, a function of autograd around
its body does the same.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import increment_version
from torch.utils._python_dispatch import _get_current_dispatch_mode

from . import capture


def watched(x: Tensor) -> bool:
    """Say whether something looks at the operators that are called on x, or may: it has to see them."""
    return (
        torch.compiler.is_compiling()
        or type(x) not in (Tensor, nn.Parameter)
        or _get_current_dispatch_mode() is not None
        or capture.transformed()
        or torch.jit.is_tracing()  # pyright: ignore[reportPrivateImportUsage]
    )


def body(operator: Any) -> Callable[..., Any]:
    """Return the function that an operator of ``custom_op`` was made from, to which no public way leads."""
    return operator._init_fn


def differentiable(
    forward: Any, setup: Callable[[Any, tuple, Any], None], gradients: Callable[..., tuple]
) -> Callable[..., Any]:
    """Return a function that does what an operator does, with its gradients, at a lower cost where nothing watches.

    Args:
        forward: of ``custom_op``, whose first argument is a tensor.
        setup: as the operator's ``setup_context``.
        gradients: as its backward.
    """
    run = body(forward)

    class Direct(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *inputs: Any) -> Any:
            output = run(*inputs)
            setup(ctx, inputs, output)
            return output

        @staticmethod
        def backward(ctx: Any, *grads: Tensor | None) -> tuple:
            return gradients(ctx, *grads)

    def call(*inputs: Any) -> Any:
        return forward(*inputs) if watched(inputs[0]) else Direct.apply(*inputs)

    return call


def call(operator: Any, *inputs: Any, changed: Sequence[Tensor | None] = ()) -> Any:
    """Call an operator, of which nothing is differentiated but in error, by its body where nothing watches.

    Args:
        operator: of ``custom_op``.
        inputs: its arguments, the first of them a tensor.
        changed: those that it writes to.
    """
    if torch.is_grad_enabled() or watched(inputs[0]):  # a gradient of a gradient is the operator's to refuse
        return operator(*inputs)
    result = body(operator)(*inputs)
    if changed:
        increment_version([t for t in changed if t is not None])
    return result
