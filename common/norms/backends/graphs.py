"""Graphs of a step (torch.compile, torch.export, CUDA graphs): they replay the host's decisions, not its look-ups."""

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

NAMESPACE: str = __name__.rsplit(".", 2)[0].replace(".", "_")
"""The namespace of this package's operators in torch: the package's own name, so that a renamed copy has its own."""

WARM_UP = "expected two training steps before the capture, since the second still asks the device what is seeded"
COUNTED = "expected refit_every=1 in what is captured, since the host counts the batches from one fit to the next"
DRAWN = 'expected backend="triton" of a compiled MixtureNorm that is captured, since the host hands others their step'
"""Why one cannot be captured."""


def exported() -> bool:
    """Return whether torch.export or torch.jit.trace is making a graph for inputs of its own."""
    return torch.compiler.is_exporting() or torch.jit.is_tracing()  # pyright: ignore[reportPrivateImportUsage]


def traced() -> bool:
    """Return whether a graph is being made that cannot look at values, by torch.compile or as ``exported``."""
    return torch.compiler.is_compiling() or exported()


def refuse_traced() -> None:
    """Raise RuntimeError in torch.jit.trace, which would keep draws and decisions of the host as constants."""
    if torch.jit.is_tracing():  # pyright: ignore[reportPrivateImportUsage]
        raise RuntimeError(
            "torch.jit.trace: expected evaluation mode, since a trace keeps what a layer draws while it is seeded or "
            "fitted; torch.export takes a layer in training"
        )


def transformed() -> bool:
    """Return whether torch.func (grad, jvp, vmap) or forward-mode AD is at work; torch has no public way to ask."""
    active = torch._C._are_functorch_transforms_active()  # pyright: ignore[reportAttributeAccessIssue]
    return active or forward_ad._current_level >= 0


def unseen() -> bool:
    """Return whether values cannot be looked at: in a graph, or under torch.func, whose vmap has many at once."""
    return traced() or transformed()


def capturing(t: Tensor) -> bool:
    """Return whether a CUDA graph is being captured of what happens to t."""
    return t.is_cuda and torch.cuda.is_current_stream_capturing()


def refuse(t: Tensor, what: str) -> None:
    """Raise RuntimeError if a graph is being captured, which would replay what the host looks up now."""
    if not torch.compiler.is_compiling() and capturing(t):
        raise RuntimeError(f"CUDA graph: {what}")


def watched(x: Tensor) -> bool:
    """Return whether a graph, a dispatch mode or a subclass has to see the operators that are called on x."""
    return (
        torch.compiler.is_compiling()
        or type(x) not in (Tensor, nn.Parameter)
        or is_in_torch_dispatch_mode()
        or torch.jit.is_tracing()  # pyright: ignore[reportPrivateImportUsage]
    )
