r"""The equations of arXiv:2403.16798 in plain PyTorch: written to be read, and the oracle of every test.

Any float dtype and device; autograd supplies the gradients, second derivatives included. Where the paper
contradicts itself the corrected form stands here: Eq. 8 is a sum, because the weights of Eq. 9 already sum to
one; Eq. 13 has no K in its denominator, because posteriors sum to one; and eps is added to every variance,
the one inside a posterior included, because a constant channel would otherwise drive the log density to
-1e17.

Shapes: x (N, C, \*), L positions a sample, M = N * L locations; K components; G groups of D = C / G channels.
"""

import math
from typing import Literal, NamedTuple

import torch
from torch import Tensor

Scale = Literal["paper", "sqrt_k"]
Statistics = Literal["batch", "learned"]
UnknownScale = Literal["match", "paper"]
UnknownPosterior = Literal["location", "sample"]


class MixtureParams(NamedTuple):
    """A mixture of K components with diagonal covariances, as layers store it.

    Where ``Options.stored`` is False, as in ``functional.mixture_norm``, log weights and variances stand in the places
    of logits and log-variances: a logarithm and its exponential would round.
    """

    logits: Tensor
    """log_softmax of these are the log weights, (K,)."""
    mean: Tensor
    """(K, C)."""
    log_var: Tensor
    """(K, C)."""

    def log_weights(self, min_weight: float) -> Tensor:
        """Return the log weights (K,), at least log(min_weight) each."""
        logits = self.logits.to(torch.promote_types(self.logits.dtype, torch.float32))
        log_weights = logits.log_softmax(0)
        return log_weights.clamp(min=math.log(min_weight)) if min_weight else log_weights

    def plain(self, min_weight: float) -> tuple[Tensor, Tensor, Tensor]:
        """Return log weights, means and variances, as the equations take them."""
        return self.log_weights(min_weight), self.mean, self.log_var.exp()


class Moments(NamedTuple):
    """The mass, mean and variance of each component in a batch; without gradient."""

    mass: Tensor
    """Sum of the posteriors over the locations, (K, G)."""
    mean: Tensor
    """Posterior-weighted mean (Eq. 8), (K, C)."""
    var: Tensor
    """Posterior-weighted variance (Eq. 8), biased like the variance BatchNorm normalises with, (K, C)."""


def flatten(x: Tensor) -> Tensor:
    r"""View x (N, C, \*) as (N, C, L)."""
    return x.flatten(2) if x.ndim > 2 else x.unsqueeze(2)


def compute_dtype(x: Tensor) -> torch.dtype:
    """Return the dtype the layers accumulate in: float64 for float64 input, float32 for all else."""
    return torch.promote_types(x.dtype, torch.float32)


def affine(y: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    r"""Scale and shift each channel of y (N, C, \*), in its dtype, if there are a weight and a bias (C,)."""
    if weight is None or bias is None:
        return y
    shape = [-1] + [1] * (y.ndim - 2)
    return torch.addcmul(bias.view(shape), y, weight.view(shape)).to(y.dtype)


def gather_rows(table: Tensor, cluster: Tensor) -> Tensor:
    """Return table[cluster], (N, C), from (K, C): NaN for an id no table has, row 0 for -1.

    Nothing here reads out of bounds or asks the device for an answer, so a wrong id on a GPU costs no
    synchronisation and shows as NaN. On the CPU wrong ids never come this far.
    """
    rows = table[cluster.clamp(0, len(table) - 1)]
    wrong = (cluster >= len(table)) | (cluster < -1)
    return rows.masked_fill(wrong[:, None], math.nan)


def log_density(x: Tensor, mean: Tensor, s: Tensor, groups: int) -> Tensor:
    """Log of Eq. 5 with a diagonal covariance s (K, C), for x (N, C, L): one value a group, (K, N, G, L)."""
    u = x - mean[:, None, :, None]
    log_p = -0.5 * (u.square() / s[:, None, :, None] + (2 * math.pi * s)[:, None, :, None].log())
    return log_p.unflatten(2, (groups, -1)).sum(3)


def posterior(x: Tensor, log_lambda: Tensor, mean: Tensor, s: Tensor, groups: int) -> Tensor:
    """Eq. 6, tau_k = p(k | x), by log-sum-exp: (K, N, G, L) for x (N, C, L), sums to one over K."""
    log_p = log_density(x, mean, s, groups) + log_lambda[:, None, None, None]
    return log_p.softmax(0)


def batch_moments(x: Tensor, tau: Tensor) -> Moments:
    """Eqs. 8 and 9 for x (N, C, L) and tau (K, N, G, L), with gradients.

    The mean is taken about a pilot, which is the mean as first found: under a common offset that one has lost
    digits, and the second, of small differences, has not.
    """
    groups = tau.shape[2]
    mass = tau.sum((1, 3))
    weight = tau / mass.clamp(min=torch.finfo(tau.dtype).tiny)[:, None, :, None]  # Eq. 9
    weight = weight.repeat_interleave(x.shape[1] // groups, dim=2)  # (K, N, C, L)
    pilot = (weight * x).sum((1, 3), keepdim=True).detach()
    mean = pilot + (weight * (x - pilot)).sum((1, 3), keepdim=True)
    var = (weight * (x - mean).square()).sum((1, 3))
    return Moments(mass, mean[:, 0, :, 0], var)


def cluster_norm(
    x: Tensor,
    cluster: Tensor | None,
    mean: Tensor,
    var: Tensor,
    *,
    eps: float,
    unknown_scale: UnknownScale,
    unknown_posterior: UnknownPosterior,
    any_unknown: bool,
) -> Tensor:
    """Normalise each sample by its cluster (Eq. 10), or by all clusters where it is unknown (Eqs. 12, 13).

    Arguments as ``functional.cluster_norm``'s; any_unknown says whether ids of -1 have to be expected.
    """
    dtype = compute_dtype(x)
    flat, mean, s = flatten(x).to(dtype), mean.to(dtype), var.to(dtype) + eps
    if cluster is None:
        y = _unknown_cluster(flat, mean, s, unknown_scale, unknown_posterior)
    else:
        y = (flat - gather_rows(mean, cluster)[..., None]) * gather_rows(s.rsqrt(), cluster)[..., None]
        if any_unknown:
            other = _unknown_cluster(flat, mean, s, unknown_scale, unknown_posterior)
            y = torch.where((cluster == -1)[:, None, None], other, y)
    return y.to(x.dtype).reshape(x.shape)


def _unknown_cluster(x: Tensor, mean: Tensor, s: Tensor, scale: UnknownScale, over: UnknownPosterior) -> Tensor:
    """Eq. 12 for x (N, C, L)."""
    log_p = log_density(x, mean, s, groups=1)
    if over == "sample":
        log_p = log_p.sum(3, keepdim=True)
    tau = log_p.softmax(0)  # Eq. 13: equal priors cancel
    normalised = (x - mean[:, None, :, None]) * s.rsqrt()[:, None, :, None]
    y = (tau * normalised).sum(0)
    return y * math.sqrt(len(mean)) if scale == "paper" else y


def mixture_norm(
    x: Tensor,
    log_lambda: Tensor,
    mean: Tensor,
    var: Tensor,
    *,
    groups: int,
    eps: float,
    scale: Scale,
    statistics: Statistics,
) -> tuple[Tensor, Moments | None]:
    """Normalise under a mixture: Eqs. 4-9 with the batch's own moments, or Eq. 15 with the given ones.

    Arguments and results as ``functional.mixture_norm``'s.
    """
    dtype = compute_dtype(x)
    flat, log_lambda, mean, var = flatten(x).to(dtype), log_lambda.to(dtype), mean.to(dtype), var.to(dtype)
    tau = posterior(flat, log_lambda, mean, var + eps, groups)
    moments = batch_moments(flat, tau) if statistics == "batch" else None
    if moments is not None:
        mean, var = moments.mean, moments.var
    normalised = (flat - mean[:, None, :, None]) * (var + eps).rsqrt()[:, None, :, None]
    weight = tau * (-0.5 * log_lambda).exp()[:, None, None, None]
    y = (weight.repeat_interleave(flat.shape[1] // groups, dim=2) * normalised).sum(0)  # Eqs. 7, 15
    if scale == "sqrt_k":
        y = y / math.sqrt(len(mean))
    detached = None if moments is None else Moments(*(part.detach() for part in moments))
    return y.to(x.dtype).reshape(x.shape), detached
