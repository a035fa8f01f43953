"""A Gaussian mixture with diagonal covariances: moving averages over batches, k-means++, one Lloyd step, EM.

Points are (P, C) in the compute dtype. With G groups each group of C / G channels is clustered on its own and
only the weights are shared, as in the layers. Nothing here asks the device for an answer, and every draw
comes from a generator or a seed that is given.
"""

import math
from collections.abc import Iterable
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from . import seeding
from .backends import distributed, graphs, passes, reference
from .backends.passes import Densities
from .backends.reference import MixtureParams, Moments
from .seeding import generator

Average = Literal["em", "paper"]


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


def all_finite(tensors: Iterable[Tensor]) -> Tensor:
    """Return, on the device, whether every number is finite: of moments, whether the batch behind them is."""
    return torch.stack([part.isfinite().all() for part in tensors]).all()


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
    over_ranks: bool = False
    """The batch is that of several ranks, and may hold nothing."""


def moved(old: MixtureParams, moments: Moments, rule: Rule) -> MixtureParams:
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
    old = MixtureParams(*(part.to(moments.mean.dtype) for part in old))
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
    new = MixtureParams(weight.log(), old.mean + step * difference, log_of(var))
    finite = all_finite(moments)
    if rule.over_ranks:
        finite = finite & (moments.mass.sum() > 0)
    return MixtureParams(*(torch.where(finite, a, b) for a, b in zip(new, old, strict=True)))


def write(params: MixtureParams, new: MixtureParams, where: Tensor | None = None) -> None:
    """Write new values into a stored mixture, all of them or where a condition () holds."""
    for old, value in zip(params, new, strict=True):
        old.copy_(value if where is None else torch.where(where, value.to(old), old))


def store_fit(fit: tuple[MixtureParams | None, MixtureParams] | None, moments: Moments) -> None:
    """Write a new fit over the last one, if there is one, unless it or the batch behind the moments is not finite."""
    if fit is not None and fit[0] is not None:
        write(fit[1], fit[0], all_finite(moments) & all_finite(fit[0]))


MAX_POINTS = 4096
VARIANCE_FLOOR = 1e-3
"""Of a component's variance, relative to the variance of all points."""
EMPTY = 1e-6
"""Mass below which a component holds nothing, of points."""


class Components(NamedTuple):
    """A mixture as EM works on it: a logarithm and its exponential would round in each step."""

    weight: Tensor
    """(K,)."""
    mean: Tensor
    """(K, C)."""
    var: Tensor
    """(K, C)."""

    @classmethod
    def of(cls, params: MixtureParams, dtype: torch.dtype) -> "Components":
        """Return a stored mixture in dtype."""
        logits, mean, log_var = (t.to(dtype) for t in params)
        return cls(logits.softmax(0), mean, log_var.exp())

    def params(self, min_weight: float) -> MixtureParams:
        """Return the mixture as layers store it, with weights of at least min_weight."""
        weight = self.weight.clamp(min=min_weight)
        return MixtureParams(weight.log().log_softmax(0), self.mean, log_of(self.var))

    def is_finite(self) -> Tensor:
        """Return, on the device, whether every number is finite: squares of finite points may not be."""
        return all_finite(self)


class FitRule(NamedTuple):
    """How a layer fits a mixture to each batch."""

    groups: int
    """Of channels, each with posteriors of its own."""
    eps: float
    steps: int
    """Of EM."""
    high: int
    """With low the key of the locations that are drawn, see ``seeding``."""
    low: int
    min_weight: float
    """Floor of the weights."""


def points_key(seed: int, name: str) -> tuple[int, int]:
    """Return the key of a layer's draws of locations for a purpose."""
    return seeding.key(seed, "points", name)


def sample_points(x: Tensor, key: tuple[int, int], step: Tensor | int = 0) -> Tensor:
    r"""Draw up to 4,096 locations of x (N, C, \*) without repetition, as points (P, C).

    Which ones follows from a key of ``seeding`` and the step alone, on every device; no copy of x is made to find them.
    """
    flat = reference.flatten(x.detach())
    total = flat.shape[0] * flat.shape[2]
    if total > MAX_POINTS:
        points = _locations(flat, seeding.scattered(MAX_POINTS, total, key, _on(flat, step)))
    else:
        points = flat.movedim(1, 2).flatten(0, 1)
    return points.to(reference.compute_dtype(x))


def draw_locations(x: Tensor, count: int, words: tuple[int, int], step: Tensor) -> Tensor:
    r"""Draw locations of x (N, C, \*) with repetition, as points (count, C); x holds at least one.

    Which ones follows from a key of ``draws`` and the step, on the device of x, alone.
    """
    flat = reference.flatten(x.detach())
    found = seeding.hashes(count, words, step)
    return _locations(flat, seeding.below(flat.shape[0] * flat.shape[2], found)).to(reference.compute_dtype(x))


def _on(x: Tensor, step: Tensor | int) -> Tensor:
    """Return a step on the device of x, which is not asked; a number is written there, not copied."""
    if isinstance(step, Tensor):
        return step
    return torch.full((), step, dtype=torch.int64, device=x.device)


def _locations(x: Tensor, index: Tensor) -> Tensor:
    """Return locations (P, C) of x (N, C, L)."""
    return x[index // x.shape[2], :, index % x.shape[2]]


def variance_floor(points: Tensor) -> Tensor:
    """Return the least variance a component may have, (C,)."""
    return VARIANCE_FLOOR * points.var(0, correction=0)


def kmeans_plus_plus(points: Tensor, num: int, rng: torch.Generator) -> Tensor:
    """Choose num of the points as centres, far ones more likely, by greedy k-means++.

    Each centre is the best of 2 + log(num) draws in proportion to the squared distance to the nearest centre so
    far: the one that leaves the least sum of squared distances. With single draws EM ended with two of three
    clouds in one component in up to 7 % of the seeds, with several in less than 1 % (measured).

    Args:
        points: (G, P, D), each of the G sets seeded on its own.
        num: centres K.
        rng: a generator on the CPU.

    Returns:
        (K, G, D).

    Source: Arthur and Vassilvitskii, "k-means++: the advantages of careful seeding", 2007; the number of draws
    is scikit-learn's.
    """
    sets, count, _ = points.shape
    shares = torch.rand(num, sets, 2 + int(math.log(num)), generator=rng, device="cpu").to(points, non_blocking=True)
    rows = torch.arange(sets, device=points.device)
    centres = [points[rows, (shares[0, :, 0] * count).long().clamp(max=count - 1)]]
    distance = (points - centres[0][:, None]).square().sum(2)
    for draw in shares[1:]:
        total = distance.cumsum(1)
        # Right of the draw: a point at distance zero, which is a centre already, is never chosen.
        index = torch.searchsorted(total, draw * total[:, -1:], right=True).clamp(max=count - 1)
        candidates = points[rows[:, None], index].unbind(1)
        left = torch.stack([torch.minimum(distance, (points - c[:, None]).square().sum(2)) for c in candidates])
        best = left.sum(2).argmin(0)  # (G,)
        distance = left[best, rows]
        centres.append(points[rows, index[rows, best]])
    return torch.stack(centres)


def seed_mixture(points: Tensor, num: int, groups: int, rng: torch.Generator) -> Components:
    """Seed by greedy k-means++ and take one Lloyd step.

    Distances are in standard deviations of each channel, so that the result follows when channels are scaled.

    Args:
        points: (P, C).
        num: components K.
        groups: of channels, each seeded on its own.
        rng: a generator on the CPU.
    """
    offset, spread = points.mean(0), points.std(0, correction=0)
    scaled = (points - offset) / torch.where(spread > 0, spread, 1)
    sets = scaled.unflatten(1, (groups, -1)).movedim(1, 0)  # (G, P, D)
    centres = kmeans_plus_plus(sets, num, rng)
    nearest = torch.stack([(sets - c[:, None]).square().sum(2) for c in centres]).argmin(0)  # (G, P)
    members = (nearest == torch.arange(num, device=points.device)[:, None, None]).to(points.dtype)
    tau = members[:, None]  # (K, 1, G, P): all points are one sample
    mass, mean, var = reference.batch_moments(points.T[None], tau)
    empty = (mass == 0).repeat_interleave(points.shape[1] // groups, dim=1)
    own = centres.flatten(1) * spread + offset
    mean, var = torch.where(empty, own, mean), torch.where(empty, spread.square(), var)
    return Components(mass.mean(1) / len(points), mean, torch.maximum(var, variance_floor(points)))


def seed_and_fit(points: Tensor, num: int, groups: int, seed: int, eps: float, steps: int) -> Components:
    """Seed a mixture of num components from points (P, C) by ``seed_mixture``, and take EM steps from there."""
    fit = seed_mixture(points, num, groups, generator(seed, "kmeans++"))
    return expectation_maximisation(points, fit, groups, eps, steps)


def seeding_points(x: Tensor, seed: int, process_group: Any) -> tuple[Tensor, Tensor]:
    r"""Draw locations of x (N, C, \*), or of the joined batch of a group's ranks; say whether all of it is finite."""
    points, finite = sample_points(x, points_key(seed, "seed")), x.isfinite().all()
    if process_group is None:
        return points, finite
    points, finite = distributed.join_points(points, finite, process_group)
    return sample_points(points, points_key(seed, "seed joined")), finite


def cluster_moments(x: Tensor, cluster: Tensor, num: int, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    r"""Return each cluster's mean and log variance (K, C) in x (N, C, \*), and which clusters x tells them of, (K,).

    With several ranks, whose parameters have to be the same, x is the joined batch. A variance is at least eps: no
    gradient could leave log(0).
    """
    flat = reference.flatten(x).to(reference.compute_dtype(x))
    tau = (cluster == torch.arange(num, device=x.device)[:, None]).to(flat.dtype)
    mass, mean, var = reference.batch_moments(flat, tau[:, :, None, None].expand(-1, -1, 1, flat.shape[2]))
    if (group := distributed.active("world")) is not None:
        mass, *joined = distributed.combine(mass, mean[:, None, :, None], var[:, None, :, None], group)
        mean, var = (t[:, 0, :, 0] for t in joined)
    return mean, var.clamp(min=eps).log(), (mass[:, 0] > 0) & mean.isfinite().all() & var.isfinite().all()


def best_additions(candidates: Tensor, fit: Components, var: Tensor, groups: int, eps: float) -> Tensor:
    """Return, for each component, the candidate that one more component there would raise the likelihood most at.

    The likelihood is that of all candidates, and each group of channels has a choice of its own, (K, C).

    Args:
        candidates: points (K, B, C), B for each component.
        fit: the mixture.
        var: of the new component, (1, C); its weight is 1 / K.
        groups: of channels.
        eps: added to every variance.
    """
    num, points = len(candidates), candidates.flatten(0, 1)  # (P, C), P = K * B
    x = points.T[None]
    log_p = reference.log_density(x, fit.mean, fit.var + eps, groups) + fit.weight.log()[:, None, None, None]
    log_new = reference.log_density(x, points, (var + eps).expand_as(points), groups) - math.log(num)  # (P, 1, G, P)
    gain = functional.softplus(log_new - log_p.logsumexp(0)).sum((1, 3))  # (P, G)
    best = gain.unflatten(0, (num, -1)).argmax(1)  # (K, G)
    component, group = (torch.arange(n, device=points.device) for n in best.shape)
    return candidates.unflatten(2, (groups, -1))[component[:, None], best, group].flatten(1)


def _moments(points: Tensor, fit: Components, groups: int, eps: float) -> Moments:
    """Return the moments of points (P, C) under a mixture, part by part: what it takes is K times a part."""
    if graphs.transformed():  # torch.func takes no results that are written to given tensors
        x = points.T[None]
        tau = reference.posterior(x, fit.weight.log(), fit.mean, fit.var + eps, groups)
        return reference.batch_moments(x, tau)
    split = groups, points.shape[1] // groups
    mix = Densities.of(fit.weight.log(), fit.mean, fit.var + eps, split)
    found = []
    for part in points.split(MAX_POINTS):
        _, mass, mean, var = passes.moments(part.T[None].unflatten(1, split), mix)
        found.append((mass, mean.flatten(1), var.flatten(1)))
    if len(found) == 1:
        return Moments(*found[0])
    mass, mean, var = (torch.stack(values) for values in zip(*found, strict=True))
    total = mass.sum(0)
    share = mass / total.clamp(min=torch.finfo(mass.dtype).tiny)
    share = share.repeat_interleave(split[1], dim=2)
    joined = (share * mean).sum(0)
    joined = joined + (share * (mean - joined)).sum(0)  # of small differences, whatever the offset
    return Moments(total, joined, (share * (var + (mean - joined).square())).sum(0))


def em_step(points: Tensor, fit: Components, groups: int, eps: float, floor: Tensor | None = None) -> Components:
    """One step of expectation maximisation; a component that holds nothing stays as it is.

    Args:
        points: (P, C).
        fit: the mixture before.
        groups: of channels, each with posteriors of its own.
        eps: added to every variance in the posteriors.
        floor: ``variance_floor`` of the points, if it is known.
    """
    mass, mean, var = _moments(points, fit, groups, eps)
    empty = (mass < EMPTY).repeat_interleave(points.shape[1] // groups, dim=1)
    weight = (mass.mean(1) / len(points)).clamp(min=torch.finfo(points.dtype).tiny)
    var = torch.maximum(var, variance_floor(points) if floor is None else floor)
    return Components(weight, torch.where(empty, fit.mean, mean), torch.where(empty, fit.var, var))


def component_shares(points: Tensor, fit: Components, groups: int, eps: float) -> Tensor:
    """Return the share of points (P, C) that each component holds in each group, (K, G)."""
    return _moments(points, fit, groups, eps).mass / len(points)


def moved_onto(points: Tensor, fit: Components) -> Components:
    """Shift and scale a mixture, channel by channel, to the mean and the variance of points (P, C).

    So that EM starts in the right place after the inputs have moved as a whole, as when weights were averaged.
    """
    share = (fit.weight / fit.weight.sum())[:, None]
    centre = (share * fit.mean).sum(0)
    total = (share * (fit.var + (fit.mean - centre).square())).sum(0)
    scale = points.var(0, correction=0) / total
    return Components(fit.weight, points.mean(0) + scale.sqrt() * (fit.mean - centre), scale * fit.var)


def expectation_maximisation(points: Tensor, fit: Components, groups: int, eps: float, steps: int) -> Components:
    """Take EM steps from fit on points (P, C)."""
    floor = variance_floor(points)
    for _ in range(steps):
        fit = em_step(points, fit, groups, eps, floor)
    return fit
