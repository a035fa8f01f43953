"""Steps that a CUDA graph captures: it repeats what the host has decided, and nothing that the host looks up."""

import torch
from torch import Tensor

WARM_UP = "expected two training steps before the capture, since the second still asks the device what is seeded"
COUNTED = "expected refit_every=1 in what is captured, since the host counts the batches from one fit to the next"
DRAWN = 'expected backend="triton" of a compiled MixtureNorm that is captured, since the host hands others their step'
"""Why one cannot be captured."""


def transformed() -> bool:
    """Say whether torch.func transforms what is called (grad, jvp, vmap); torch has no public way to ask."""
    return torch._C._are_functorch_transforms_active()  # pyright: ignore[reportAttributeAccessIssue]


def capturing(t: Tensor) -> bool:
    """Say whether a CUDA graph is being captured of what happens to t."""
    return t.is_cuda and torch.cuda.is_current_stream_capturing()


def refuse(t: Tensor, what: str) -> None:
    """Raise RuntimeError if a graph is being captured, which would repeat for ever what the host looks up now."""
    if not torch.compiler.is_compiling() and capturing(t):
        raise RuntimeError(f"CUDA graph: {what}")
