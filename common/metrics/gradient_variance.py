"""How much gradients vary: within each weight tensor (section IV-E, Figure 12 of the paper), and between batches.

On several ranks gradients are averaged first, so that of losses that are means over equal shares of a batch, they are
those of one process on the joined batch.
"""

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from common.runtime.distributed import mean_over_ranks


class OverTensors(NamedTuple):
    """Mean and maximum over weight tensors, and the mean over those that networks with another layer have too."""

    mean: Tensor
    max: Tensor
    shared: Tensor


def gradient_variance(
    loss: Tensor, parameters: Iterable[nn.Parameter], own: Collection[nn.Parameter] = ()
) -> OverTensors:
    """Return, over weight tensors, the variance of the entries of the loss's gradient (divided by their number).

    The graph stays as it is, for the update's own backward pass, and no ``grad`` is written. Tensors of one entry, and
    those that the loss does not depend on, are left out.

    Args:
        loss: a scalar.
        parameters: weight tensors.
        own: those of the layer under test, which ``shared`` leaves out.

    Raises:
        ValueError: if the loss depends on none of them.
    """
    weights = [p for p in parameters if p.requires_grad and p.numel() > 1]
    found = {p: g for p, g in zip(weights, _gradients(loss, weights), strict=True) if g is not None}
    return _over_tensors(dict(zip(found, variances(found.values()), strict=True)), own)


def gradient_noise(
    losses: Sequence[Tensor], parameters: Iterable[nn.Parameter], own: Collection[nn.Parameter] = ()
) -> OverTensors:
    """Return, over weight tensors, the variance of the gradient between several losses.

    Of each entry it is the unbiased variance over the losses, of parts of a batch for instance, and of a tensor the
    mean over its entries. As in `gradient_variance` the graph stays, and weights that no loss depends on are left out.

    Raises:
        ValueError: if there are fewer than two losses, or they depend on none of the weights.
    """
    if len(losses) < 2:
        raise ValueError(f"losses: expected at least 2, got {len(losses)}")
    weights = [p for p in parameters if p.requires_grad]
    by_weight = zip(*(_gradients(loss, weights) for loss in losses), strict=True)
    given = {p: [g for g in each if g is not None] for p, each in zip(weights, by_weight, strict=True)}
    return _over_tensors({p: torch.stack(found).var(0).mean() for p, found in given.items() if len(found) > 1}, own)


def _gradients(loss: Tensor, weights: Sequence[nn.Parameter]) -> list[Tensor | None]:
    if not weights or not loss.requires_grad:
        return [None] * len(weights)
    gradients = torch.autograd.grad(loss, weights, retain_graph=True, allow_unused=True)
    return [None if g is None else mean_over_ranks(g.detach().float()) for g in gradients]


def variances(gradients: Iterable[Tensor]) -> list[Tensor]:
    """Return the variance of the entries of each gradient that has more than one."""
    return [g.detach().float().var(correction=0) for g in gradients if g.numel() > 1]


def _over_tensors(variances: Mapping[nn.Parameter, Tensor], own: Collection[nn.Parameter]) -> OverTensors:
    if not variances:
        raise ValueError("parameters: expected some that the loss depends on, got none")
    stacked, left_out = torch.stack(list(variances.values())), set(own)
    shared = torch.stack([variance for p, variance in variances.items() if p not in left_out])
    return OverTensors(stacked.mean(), stacked.max(), shared.mean())
