"""How much gradients vary: within each weight tensor (section IV-E, Figure 12 of the paper), and between batches.

On several ranks gradients are averaged first, so that of losses that are means over equal shares of a batch, they are
those of one process on the joined batch.
"""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from common.machine.dist import mean_over_ranks


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
    return _mean_and_largest(variances(g for g in _gradients(loss, weights) if g is not None))


def gradient_noise(losses: Sequence[Tensor], parameters: Iterable[nn.Parameter]) -> tuple[Tensor, Tensor]:
    """Return mean and maximum over weight tensors of the variance of the gradient between several losses.

    Of each entry it is the unbiased variance over the losses, parts of a batch say, and of a tensor the mean over its
    entries. As in `gradient_variance` the graph stays, and weights that no loss depends on are left out.

    Args:
        losses: at least two scalars.
        parameters: weight tensors.

    Raises:
        ValueError: if there are fewer losses, or they depend on none of the weights.
    """
    if len(losses) < 2:
        raise ValueError(f"losses: expected at least 2, got {len(losses)}")
    weights = [p for p in parameters if p.requires_grad]
    by_weight = zip(*(_gradients(loss, weights) for loss in losses), strict=True)
    return _mean_and_largest(
        [torch.stack(found).var(0).mean() for each in by_weight if len(found := [g for g in each if g is not None]) > 1]
    )


def _gradients(loss: Tensor, weights: Sequence[nn.Parameter]) -> list[Tensor | None]:
    if not weights or not loss.requires_grad:
        return [None] * len(weights)
    gradients = torch.autograd.grad(loss, weights, retain_graph=True, allow_unused=True)
    return [None if g is None else mean_over_ranks(g.detach().float()) for g in gradients]


def variances(gradients: Iterable[Tensor]) -> list[Tensor]:
    """Return the variance of the entries of each gradient that has more than one."""
    return [g.detach().float().var(correction=0) for g in gradients if g.numel() > 1]


def _mean_and_largest(variances: list[Tensor]) -> tuple[Tensor, Tensor]:
    if not variances:
        raise ValueError("parameters: expected some that the loss depends on, got none")
    stacked = torch.stack(variances)
    return stacked.mean(), stacked.max()
