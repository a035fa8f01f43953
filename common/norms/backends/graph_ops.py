"""Seeding and EM as a graph of torch.compile or torch.export holds them: operators, which may look at values.

Each calls the function of ``mixture`` that a layer calls outside a graph. They write to nothing: a layer stores the
results, in its graph. What a layer knows on the host it passes as tensors on the CPU, since a number would be compiled
into the graph; None means unknown, and the device is asked.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.library import custom_op

from .. import mixture
from ..mixture import Components
from . import checkpointing, distributed, graphs, reference
from .graphs import NAMESPACE


class Gate(NamedTuple):
    """What a graph decides by, when it runs, whether a batch is fitted."""

    ready: Tensor | None
    """Whether the layer is seeded, on the CPU; None where it is for certain."""
    before: Tensor
    """Training batches before this one, on the CPU."""
    every: int
    """Batches from one fit to the next."""


def _is_ready(initialized: Tensor, ready: Tensor | None, refusal: str | None) -> bool:
    if ready is not None and bool(ready):
        return True
    graphs.refuse(initialized, graphs.WARM_UP)
    before = bool(initialized.all())
    if refusal and not before:
        raise RuntimeError(refusal)
    return before


def _said(value: bool) -> Tensor:
    return torch.tensor(value, device="cpu")


@custom_op(f"{NAMESPACE}::snapshot", mutates_args=())
def snapshot(logits: Tensor, mean: Tensor, log_var: Tensor, training: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Copy a mixture that is read from buffers which the same graph moves afterwards, if in training.

    A backward graph may compute clones again, of the buffers as they are by then: torch 2.14 gave wrong gradients
    in silence. What an operator returns it keeps.
    """
    if training and checkpointing.running():
        raise RuntimeError(
            "activation checkpointing: a checkpoint around a compiled layer would run it again with statistics that "
            "have moved; compile what holds the checkpoint, as in torch.compile(lambda x: checkpoint(block, x))"
        )
    return logits.clone(), mean.clone(), log_var.clone()


@snapshot.register_fake
def _(logits: Tensor, mean: Tensor, log_var: Tensor, training: bool) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(logits), torch.empty_like(mean), torch.empty_like(log_var)


@custom_op(f"{NAMESPACE}::seed_mixture", mutates_args=())
def seed_mixture(
    x: Tensor,
    initialized: Tensor,
    ready: Tensor | None,
    refusal: str | None,
    num: int,
    groups: int,
    seed: int,
    eps: float,
    steps: int,
    joined: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    r"""Seed a mixture from x (N, C, \*), unless ``initialized`` or ``ready`` says that it is; joined: of all ranks.

    Refusal says why it cannot be.

    Returns:
        weight (K,), mean and var (K, C); whether to take them, on the device; and whether the mixture was seeded
        before, on the CPU.
    """
    before = _is_ready(initialized, ready, refusal)
    if not before:
        points, finite = mixture.seeding_points(x, seed, distributed.active("world" if joined else None))
        if len(points):
            fit = mixture.seed_and_fit(points, num, groups, seed, eps, steps)
            return fit.weight, fit.mean, fit.var, finite & fit.is_finite(), _said(before)
    weight, mean, var = _zeros(x, num)
    return weight, mean, var, torch.zeros((), dtype=torch.bool, device=x.device), _said(before)


def _zeros(x: Tensor, num: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return what has the shape of a mixture's weight, mean and var for x (N, C, *)."""
    rows = x.new_zeros(num, x.shape[1], dtype=reference.compute_dtype(x))
    return rows.new_zeros(num), rows, torch.zeros_like(rows)


@seed_mixture.register_fake
def _(
    x: Tensor, initialized: Tensor, ready: Tensor | None, refusal: str | None, num: int, *_: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    weight, mean, var = _zeros(x, num)
    return weight, mean, var, x.new_empty((), dtype=torch.bool), torch.empty((), dtype=torch.bool, device="cpu")


@custom_op(f"{NAMESPACE}::refit_mixture", mutates_args=())
def refit_mixture(
    x: Tensor,
    weight: Tensor,
    mean: Tensor,
    var: Tensor,
    ready: Tensor | None,
    before: Tensor,
    every: int,
    groups: int,
    eps: float,
    steps: int,
    high: int,
    low: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    r"""Fit a mixture to x (N, C, \*) from where it is, in every ``every``-th step and only once it is seeded.

    Returns:
        weight, mean and var like the given ones; and whether to take them, on the device.
    """
    graphs.refuse(x, graphs.DRAWN)
    if (ready is not None and not bool(ready)) or int(before) % every:
        return weight.clone(), mean.clone(), var.clone(), torch.zeros((), dtype=torch.bool, device=x.device)
    points = mixture.sample_points(x, (high, low), int(before) + 1)
    fit = mixture.expectation_maximisation(points, Components(weight, mean, var), groups, eps, steps)
    return fit.weight, fit.mean, fit.var, torch.ones((), dtype=torch.bool, device=x.device)


@refit_mixture.register_fake
def _(x: Tensor, weight: Tensor, mean: Tensor, var: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return torch.empty_like(weight), torch.empty_like(mean), torch.empty_like(var), x.new_empty((), dtype=torch.bool)


@custom_op(f"{NAMESPACE}::seed_clusters", mutates_args=())
def seed_clusters(
    x: Tensor, cluster: Tensor, initialized: Tensor, ready: Tensor | None, refusal: str | None, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    r"""Take the moments of x (N, C, \*) in each cluster, unless all of them are seeded, or raise a refusal.

    Returns:
        mean and log_var (K, C); which of them to take (K,), on the device; and whether all were seeded before, on the
        CPU.
    """
    num, before = len(initialized), _is_ready(initialized, ready, refusal)
    if before:
        _, mean, log_var = _zeros(x, num)
        return mean, log_var, torch.zeros_like(initialized, dtype=torch.bool), _said(before)
    mean, log_var, found = mixture.cluster_moments(x, cluster, num, eps)
    return mean, log_var, found & (initialized == 0), _said(before)


@seed_clusters.register_fake
def _(x: Tensor, cluster: Tensor, initialized: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    _, mean, log_var = _zeros(x, len(initialized))
    fresh = torch.empty_like(initialized, dtype=torch.bool)
    return mean, log_var, fresh, torch.empty((), dtype=torch.bool, device="cpu")


for _operator in (snapshot, seed_mixture, refit_mixture, seed_clusters):
    checkpointing.save_in_graphs(_operator)
