"""How much a loss's gradient varies within each weight tensor (section IV-E, Figure 12 of the paper)."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn


def gradient_variance(loss: Tensor, parameters: Iterable[nn.Parameter]) -> tuple[Tensor, Tensor]:
    """Return mean and maximum over weight tensors of the variance of the entries of the loss's gradient.

    The graph stays as it is, for the update's own backward pass, and no ``grad`` is written. Tensors of one entry have
    no variance and are left out, as are those that the loss does not depend on. The variance is that of the entries
    themselves (divided by their number).

    Args:
        loss: a scalar.
        parameters: weight tensors.

    Raises:
        ValueError: if the loss depends on none of them.
    """
    weights = [p for p in parameters if p.requires_grad and p.numel() > 1]
    gradients = torch.autograd.grad(loss, weights, retain_graph=True, allow_unused=True) if weights else ()
    each = variances(g for g in gradients if g is not None)
    if not len(each):
        raise ValueError("parameters: expected some that the loss depends on, got none")
    return each.mean(), each.max()


def variances(gradients: Iterable[Tensor]) -> Tensor:
    """Return the variance of the entries of each gradient that has more than one, float32 (as many,)."""
    found = [g.detach().float().var(correction=0) for g in gradients if g.numel() > 1]
    return torch.stack(found) if found else torch.zeros(0)
