"""How a batch's moments enter stored mixture parameters: norms' moving averages, as pure functions."""

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from ..backends.reference import Moments

Average = Literal["em", "paper"]


class Stored(NamedTuple):
    """A mixture as the layers store it."""

    logits: Tensor
    """log_softmax of these are the log weights, (K,)."""
    mean: Tensor
    """(K, C)."""
    log_var: Tensor
    """(K, C)."""


def log_of(var: Tensor) -> Tensor:
    """Return log(var), with a variance of zero kept finite."""
    return var.clamp(min=torch.finfo(torch.float32).tiny).log()


def unbiased(moments: Moments) -> Tensor:
    """Return the variance (K, C) times S / (S - 1), as BatchNorm's buffers hold it.

    Below S = 2 the factor stays 2: a component that holds less than one location has no spread to correct.
    """
    factor = moments.mass / torch.maximum(moments.mass - 1, moments.mass / 2).clamp(min=1e-12)
    return moments.var * _per_channel(factor, moments.var)


def pooled(var: Tensor, weight: Tensor) -> Tensor:
    """Return the mean variance (1, C) over components of var (K, C), by weights (K, G) of any sum."""
    share = weight / weight.sum(0, keepdim=True)
    return (_per_channel(share, var) * var).sum(0, keepdim=True)


def _per_channel(per_group: Tensor, like: Tensor) -> Tensor:
    return per_group.repeat_interleave(like.shape[1] // per_group.shape[1], dim=1)


def is_finite(moments: Moments) -> Tensor:
    """Say, on the device, whether the batch behind the moments was finite throughout."""
    return torch.stack([part.isfinite().all() for part in moments]).all()


def shares(moments: Moments) -> Tensor:
    """Return the share of each group's locations that a component holds, (K, G)."""
    return moments.mass / moments.mass.sum(0, keepdim=True).clamp(min=1e-12)


class Rule(NamedTuple):
    """How a layer averages."""

    momentum: float
    """The share of the new value, as in torch.nn.BatchNorm2d."""
    average: Average
    min_weight: float
    """Floor of the weights."""
    shared_variance: bool = False
    """Give every component the mean variance by weight: under "em", stepwise EM for components of one variance."""


def moved(old: Stored, moments: Moments, rule: Rule) -> Stored:
    """Return the stored mixture after one batch.

    "em" is stepwise EM: each component moves by the share of the batch it holds, so that an almost empty one
    stays where it is. Under grouped posteriors the share is the group's own, and a step goes at most all the
    way to the batch. "paper" is the plain rule of Algorithm 2, on the batch's moments: the printed one
    averages already normalised values, whose moments are 0 and 1 by construction. With K = 1 both are
    BatchNorm's rule, which leaves the spread of the batch means out of the variance.

    Args:
        old: the mixture before.
        moments: of the batch; a mass of S per component and group.
        rule: how.

    Returns:
        New tensors; old itself if the batch held a value that is not finite.
    """
    old = Stored(*(part.to(moments.mean.dtype) for part in old))
    momentum, share = rule.momentum, shares(moments)
    weight = old.logits.softmax(0)
    weight = (weight + momentum * (share.mean(1) - weight)).clamp(min=rule.min_weight)
    old_var, difference = old.log_var.exp(), moments.mean - old.mean
    if rule.average == "paper" or len(weight) == 1:
        step, spread = torch.full_like(old.mean, momentum), 0.0
    else:
        step = _per_channel((momentum * share / weight[:, None]).clamp(max=1), old.mean)
        spread = step * (1 - step) * difference.square()
    var = old_var + step * (unbiased(moments) - old_var) + spread
    if rule.shared_variance:
        var = pooled(var, weight[:, None]).expand_as(var)
    new = Stored(weight.log(), old.mean + step * difference, log_of(var))
    finite = is_finite(moments)
    return Stored(*(torch.where(finite, a, b) for a, b in zip(new, old, strict=True)))
