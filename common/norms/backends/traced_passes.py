"""The passes that a graph of torch.compile holds: functions of tensors that write to none.

Components are unrolled, so that one loop over memory serves many sums; sums go over positions first and samples
afterwards, since the first step runs through memory in order and joins the loop that writes the gradient.

Posteriors that many channels share are stacked for several passes; those of single channels are K times as large as
the activation, and on a GPU each pass finds them again.
"""

import functools
import math

import torch
from torch import Tensor

from .passes import Densities, DensitySums, least_posterior

LOG2_E = 1.4426950408889634
KEEP_SINGLE: bool = False


def _sum(parts: list[Tensor]) -> Tensor:
    return functools.reduce(torch.add, parts)


def _posterior(x: Tensor, mix: Densities) -> list[Tensor]:
    """Eq. 6, (N, G, 1, L) for each component; by powers of two, since Inductor would store those of e."""
    scales, offsets = -0.5 * LOG2_E * mix.precision, LOG2_E * mix.constant
    logs = [((x - m).square() * a).sum(2) + b for m, a, b in zip(mix.mean, scales, offsets, strict=True)]
    largest = functools.reduce(torch.maximum, logs)
    least = math.log2(least_posterior(x.dtype))
    raw = [torch.where(log - largest < least, 0.0, (log - largest).exp2()) for log in logs]
    share = 1 / _sum(raw)  # once: a division takes a CPU longer than all else here
    return [(p * share).unsqueeze(2) for p in raw]


def posterior(x: Tensor, mix: Densities) -> Tensor | None:
    """Store the posteriors, but on a GPU those of single channels.

    These are K times x, which a GPU finds again sooner than it reads it; a CPU does not.
    """
    if x.is_cuda and x.shape[2] == 1:
        return None
    return torch.stack(_posterior(x.to(mix.mean.dtype), mix)).squeeze(3)


def _each(x: Tensor, tau: Tensor | None, mix: Densities) -> list[Tensor]:
    """Return the posteriors of each component, (N, G, 1, L)."""
    return _posterior(x, mix) if tau is None else list(tau.unsqueeze(3).unbind())


def _totals(parts: list[Tensor]) -> Tensor:
    """Sum each (N, G, D, L) over the locations: (K, G, D, 1)."""
    return torch.stack([t.sum(3, keepdim=True).sum(0) for t in parts])


def moments(x: Tensor, mix: Densities) -> tuple[Tensor | None, Tensor, Tensor, Tensor]:
    """Two loops, and one more for the posteriors of groups of channels."""
    tau, x = posterior(x, mix), x.to(mix.mean.dtype)
    mass = _totals(_each(x, tau, mix))
    count = mass.clamp(min=torch.finfo(x.dtype).tiny)
    mean = _totals([t * x for t in _each(x, tau, mix)]) / count
    first, second = [], []
    for k, t in enumerate(_each(x, tau, mix)):
        u = x - mean[k]
        first.append(t * u)
        second.append(t * u * u)
    shift = _totals(first) / count  # what rounding left of the first mean's error, under a large offset
    var = (_totals(second) / count - shift.square()).clamp(min=0)
    return tau, mass[:, :, 0, 0], mean + shift, var


def transform(x: Tensor, tau: Tensor | None, mean: Tensor, rstd: Tensor, bias: Tensor | None, mix: Densities) -> Tensor:
    """One loop; two where posteriors of groups have to be found first."""
    dtype, x = x.dtype, x.to(mean.dtype)
    y = _sum([(x - mean[k]) * rstd[k] * t for k, t in enumerate(_each(x, tau, mix))])
    return (y if bias is None else y + bias).to(dtype)


def gradient_sums(x: Tensor, g: Tensor, tau: Tensor | None, mean: Tensor, mix: Densities) -> tuple[Tensor, Tensor]:
    """One loop."""
    x, g = x.to(mean.dtype), g.to(mean.dtype)
    weighted = [t * g for t in _each(x, tau, mix)]
    return _totals(weighted), _totals([h * (x - mean[k]) for k, h in enumerate(weighted)])


def _through_posterior(
    x: Tensor, tau: list[Tensor], dtau: list[Tensor], mix: Densities, wanted: bool
) -> tuple[Tensor, DensitySums | None]:
    """Take the posteriors' gradients (N, G, 1, L) to x, negated, and to the sums, if wanted."""
    average = _sum([t * d for t, d in zip(tau, dtau, strict=True)])
    z = [t * (d - average) for t, d in zip(tau, dtau, strict=True)]
    u = [(x - mean) * precision for mean, precision in zip(mix.mean, mix.precision, strict=True)]
    zu = [a * b for a, b in zip(z, u, strict=True)]
    if not wanted:
        return _sum(zu), None
    zuu = [a * b for a, b in zip(zu, u, strict=True)]
    return _sum(zu), DensitySums(_totals(z)[:, :, 0, 0], _totals(zu), _totals(zuu))


def batch_gradients(
    x: Tensor,
    g: Tensor,
    tau: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    dm: Tensor,
    dv: Tensor,
    constant: Tensor,
    mix: Densities,
    wanted: bool,
) -> tuple[Tensor, DensitySums | None]:
    """One loop for single channels, two for groups of them."""
    dtype, x, g = x.dtype, x.to(mean.dtype), g.to(mean.dtype)
    taus, dtau, direct = _each(x, tau, mix), [], []
    for k, t in enumerate(taus):
        u = x - mean[k]
        q = g * rstd[k] + dm[k] + u * dv[k]
        dtau.append((u * q).sum(2, keepdim=True) - constant[k].unsqueeze(1))
        direct.append(t * (q + u * dv[k]))
    through, sums = _through_posterior(x, taus, dtau, mix, wanted)
    return (_sum(direct) - through).to(dtype), sums


def learned_gradients(
    x: Tensor, g: Tensor, rstd: Tensor, mix: Densities, wanted: bool
) -> tuple[Tensor, tuple[DensitySums, Tensor, Tensor] | None]:
    """One loop for single channels, three for groups of them."""
    dtype, x, g = x.dtype, x.to(rstd.dtype), g.to(rstd.dtype)
    taus, dtau, direct, gu = _each(x, posterior(x, mix), mix), [], [], []
    for k, t in enumerate(taus):
        gu.append(g * (x - mix.mean[k]))
        dtau.append((gu[k] * rstd[k]).sum(2, keepdim=True))
        direct.append(t * g * rstd[k])
    through, sums = _through_posterior(x, taus, dtau, mix, wanted)
    dx = (_sum(direct) - through).to(dtype)
    if sums is None:
        return dx, None
    return dx, (sums, _totals([t * g for t in taus]), _totals([t * q for t, q in zip(taus, gu, strict=True)]))


def cluster_transform(x: Tensor, centre: Tensor, rho: Tensor) -> Tensor:
    """One loop."""
    return ((x.to(rho.dtype) - centre) * rho).to(x.dtype)


def cluster_gradients(x: Tensor, g: Tensor, centre: Tensor, rho: Tensor, need_dx: bool) -> tuple[Tensor | None, Tensor]:
    """One loop."""
    dtype, x, g = x.dtype, x.to(rho.dtype), g.to(rho.dtype)
    return (g * rho).to(dtype) if need_dx else None, torch.stack([g.sum(2), (g * (x - centre)).sum(2)])
