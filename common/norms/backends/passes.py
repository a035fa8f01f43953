"""The loops of the closed forms over an activation, in plain torch.

A pass is one loop that serves as many sums as it can; ``eager`` combines them to layers and their gradients. Each
visits the samples in chunks small enough to stay in cache, and writes into buffers that are allocated once.
``traced_passes`` has the same functions for graphs of torch.compile, which cannot write. Where tau is None a pass
recomputes the posteriors. All take differences ``x - mean`` rather than expanded squares, which lose all digits under
an offset.

Shapes: x and g (N, G, D, L), G groups of D channels at L positions of N samples; parameters (K, G, D, 1);
posteriors (K, N, G, L), in the compute dtype like all sums.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor


class Densities(NamedTuple):
    """The terms of the components' log densities, as passes use them."""

    mean: Tensor
    """(K, G, D, 1)."""
    precision: Tensor
    """1 / (variance + eps), (K, G, D, 1)."""
    constant: Tensor
    """Log weight less half the log determinant, (K, G, 1); the term in 2 pi is common to all and cancels."""

    @classmethod
    def of(cls, log_lambda: Tensor, mean: Tensor, s: Tensor, split: tuple[int, int]) -> "Densities":
        """Shape log weights (K,), means and variances plus eps, (K, C) each; split is of C into (G, D)."""
        shape = (len(mean), *split, 1)
        constant = log_lambda[:, None, None] - 0.5 * s.log().view(shape).sum(2)
        return cls(mean.reshape(shape), s.reciprocal().view(shape), constant)


class DensitySums(NamedTuple):
    """Sums over locations of z, the gradient of a component's log density, for the mixture's own gradients."""

    z: Tensor
    """(K, G)."""
    zu: Tensor
    """Of z (x - mean) / s, (K, G, D, 1)."""
    zuu: Tensor
    """Of z (x - mean)^2 / s^2, (K, G, D, 1)."""


def least_posterior(dtype: torch.dtype) -> float:
    """Return the posterior below which one counts as zero, 2^-100 in float32.

    It changes nothing that a sum could show, and keeps products with it out of the denormal numbers, which cost
    a CPU a hundred times as much as others.
    """
    return torch.finfo(dtype).tiny * 2.0**26


KEEP_SINGLE: bool = True
"""Whether to keep the posteriors of single channels for the backward pass: they are K times x."""
CHUNK_ELEMENTS = 1 << 18
"""Elements of x in a chunk: a megabyte of float32, so that the few buffers of a pass share an L2
cache."""


def _chunks(x: Tensor) -> Iterator[slice]:
    """Split the samples of x into slices of about CHUNK_ELEMENTS elements."""
    step = max(1, CHUNK_ELEMENTS // max(1, x[:1].numel()))
    return (slice(start, start + step) for start in range(0, len(x), step))


def _sum_channels(t: Tensor, weight: Tensor, out: Tensor) -> Tensor:
    """Sum t (n, G, D, L) times weight (G, D, 1) over a group's channels, into out (n, G, L)."""
    if t.shape[2] == 1:
        return torch.mul(t.squeeze(2), weight.squeeze(2), out=out)
    return torch.matmul(weight.mT, t, out=out.unsqueeze(2)).squeeze(2)


def _sum_products(a: Tensor, b: Tensor, product: Tensor, out: Tensor) -> Tensor:
    """Put a b, each (n, G, D, L), into product, and its sum over a group's channels into out (n, G, L)."""
    torch.mul(a, b, out=product)
    return out.copy_(product.squeeze(2)) if a.shape[2] == 1 else torch.sum(product, 2, out=out)


def _sum_locations(t: Tensor, weight: Tensor) -> Tensor:
    """Sum t (n, G, D, L) times weight (n, G, L) over samples and positions: (G, D, 1)."""
    if t.shape[2] == 1:
        return (t.squeeze(2) * weight).sum(2).sum(0).view(-1, 1, 1)  # twice as fast as sum((0, 2))
    return torch.matmul(t, weight[..., None]).sum(0)


def _posterior(x: Tensor, mix: Densities, out: Tensor | None = None) -> Tensor:
    """Eq. 6 for a chunk of x: (K, n, G, L)."""
    tau = mix.mean.new_empty(len(mix.mean), *x.shape[:2], x.shape[3]) if out is None else out
    buffer = torch.empty_like(x)
    for k, tau_k in enumerate(tau):
        u = torch.sub(x, mix.mean[k], out=buffer)
        u.mul_(u)
        _sum_channels(u, -0.5 * mix.precision[k], out=tau_k).add_(mix.constant[k])
    torch.softmax(tau, 0, out=tau)
    return torch.threshold_(tau, least_posterior(tau.dtype), 0.0)


def posterior(x: Tensor, mix: Densities) -> Tensor | None:
    """Return tau (Eq. 6) for several passes to share, or None where each pass recomputes it."""
    return None


def moments(x: Tensor, mix: Densities) -> tuple[Tensor | None, Tensor, Tensor, Tensor]:
    """Return tau (Eq. 6), or None if it is not kept; mass (K, G), mean and variance (K, G, D, 1) of Eqs. 8 and 9."""
    dtype = mix.mean.dtype
    tau = mix.mean.new_empty(len(mix.mean), x.shape[0], x.shape[1], x.shape[3])
    mass = mix.mean.new_zeros(mix.mean.shape[:2])
    first, second = torch.zeros_like(mix.mean), torch.zeros_like(mix.mean)
    for chunk in _chunks(x):
        xp, tau_p = x[chunk].to(dtype), tau[:, chunk]
        _posterior(xp, mix, out=tau_p)
        mass += tau_p.sum((1, 3))
        for k, tau_k in enumerate(tau_p):
            first[k] += _sum_locations(xp, tau_k)
    count = mass.clamp(min=torch.finfo(dtype).tiny)[:, :, None, None]
    mean = first / count
    first.zero_()
    for chunk in _chunks(x):
        xp, tau_p = x[chunk].to(dtype), tau[:, chunk]
        buffer = torch.empty_like(xp)
        for k, tau_k in enumerate(tau_p):
            u = torch.sub(xp, mean[k], out=buffer)
            first[k] += _sum_locations(u, tau_k)
            second[k] += _sum_locations(u.mul_(u), tau_k)
    shift = first / count  # what rounding left of the first mean's error, under a large offset
    return tau, mass, mean + shift, (second / count - shift.square()).clamp_(min=0)


def _combine(x: Tensor, tau: Tensor, mean: Tensor, rstd: Tensor, bias: Tensor | None, y: Tensor) -> None:
    """Write sum_k tau_k rstd_k (x - mean_k) + bias of a chunk into y."""
    buffer = torch.empty_like(x)
    for k, tau_k in enumerate(tau):
        u = torch.sub(x, mean[k], out=buffer).mul_(rstd[k])
        if k == 0:
            torch.mul(u, tau_k.unsqueeze(2), out=y)
        else:
            y.addcmul_(u, tau_k.unsqueeze(2))
    if bias is not None:
        y.add_(bias)


def transform(x: Tensor, tau: Tensor | None, mean: Tensor, rstd: Tensor, bias: Tensor | None, mix: Densities) -> Tensor:
    """Return y = sum_k tau_k rstd_k (x - mean_k) + bias, Eqs. 7 and 15.

    rstd (K, G, D, 1) holds lambda^(-1/2) and the channel's scale too; bias is (G, D, 1).
    """
    y = torch.empty_like(x)
    for chunk in _chunks(x):
        xp = x[chunk].to(mean.dtype)
        tau_p = _posterior(xp, mix) if tau is None else tau[:, chunk]
        if x.dtype == mean.dtype:
            _combine(xp, tau_p, mean, rstd, bias, y[chunk])
        else:
            out = torch.empty_like(xp)
            _combine(xp, tau_p, mean, rstd, bias, out)
            y[chunk] = out
    return y


def gradient_sums(x: Tensor, g: Tensor, tau: Tensor | None, mean: Tensor, mix: Densities) -> tuple[Tensor, Tensor]:
    """Return the sums of tau g and tau g (x - mean) over the locations, (K, G, D, 1)."""
    sum_g, sum_gu = torch.zeros_like(mean), torch.zeros_like(mean)
    for chunk in _chunks(x):
        xp, gp = x[chunk].to(mean.dtype), g[chunk].to(mean.dtype)
        buffer = torch.empty_like(xp)
        for k, tau_k in enumerate(_posterior(xp, mix) if tau is None else tau[:, chunk]):
            sum_g[k] += _sum_locations(gp, tau_k)
            sum_gu[k] += _sum_locations(torch.sub(xp, mean[k], out=buffer).mul_(gp), tau_k)
    return sum_g, sum_gu


def _through_posterior(
    x: Tensor, tau: Tensor, dtau: Tensor, mix: Densities, dx: Tensor, sums: DensitySums | None
) -> None:
    """Take dtau (overwritten) of a chunk through the softmax and the densities, into dx and the sums."""
    dtau -= (tau * dtau).sum(0)
    z = dtau.mul_(tau)
    buffer = torch.empty_like(x)
    for k, z_k in enumerate(z):
        u = torch.sub(x, mix.mean[k], out=buffer).mul_(mix.precision[k])
        dx.addcmul_(u, z_k.unsqueeze(2), value=-1)
        if sums is not None:
            sums.z[k] += z_k.sum((0, 2))
            sums.zu[k] += _sum_locations(u, z_k)
            sums.zuu[k] += _sum_locations(u.mul_(u), z_k)


def _no_sums(mix: Densities) -> DensitySums:
    return DensitySums(torch.zeros_like(mix.constant[:, :, 0]), torch.zeros_like(mix.mean), torch.zeros_like(mix.mean))


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
    """Return dx of Eqs. 6-9, and the sums if wanted; dm and dv are the moments' gradients over mass."""
    dx, sums = torch.empty_like(x), _no_sums(mix) if wanted else None
    for chunk in _chunks(x):
        xp, gp = x[chunk].to(mean.dtype), g[chunk].to(mean.dtype)
        tau_p = _posterior(xp, mix) if tau is None else tau[:, chunk]
        u, q, product, dxp = (torch.empty_like(xp) for _ in range(4))
        dxp.zero_()
        dtau = torch.empty_like(tau_p)
        for k, tau_k in enumerate(tau_p):
            torch.sub(xp, mean[k], out=u)
            torch.mul(gp, rstd[k], out=q).add_(dm[k]).addcmul_(u, dv[k])
            _sum_products(u, q, product, out=dtau[k]).sub_(constant[k])
            dxp.addcmul_(q.addcmul_(u, dv[k]), tau_k.unsqueeze(2))
        _through_posterior(xp, tau_p, dtau, mix, dxp, sums)
        dx[chunk] = dxp
    return dx, sums


def learned_gradients(
    x: Tensor, g: Tensor, rstd: Tensor, mix: Densities, wanted: bool
) -> tuple[Tensor, tuple[DensitySums, Tensor, Tensor] | None]:
    """Return dx of Eq. 15, and if wanted the sums, and those of tau g and tau g (x - mean), (K, G, D, 1)."""
    dx, sums = torch.empty_like(x), _no_sums(mix) if wanted else None
    direct, direct_u = torch.zeros_like(mix.mean), torch.zeros_like(mix.mean)
    for chunk in _chunks(x):
        xp, gp = x[chunk].to(rstd.dtype), g[chunk].to(rstd.dtype)
        u, h, dxp = torch.empty_like(xp), torch.empty_like(xp), torch.zeros_like(xp)
        tau = _posterior(xp, mix)
        dtau = torch.empty_like(tau)
        for k, tau_k in enumerate(tau):
            dxp.addcmul_(torch.mul(gp, rstd[k], out=h), tau_k.unsqueeze(2))
            torch.sub(xp, mix.mean[k], out=u).mul_(gp)
            _sum_channels(u, rstd[k], out=dtau[k])
            if wanted:
                direct[k] += _sum_locations(gp, tau_k)
                direct_u[k] += _sum_locations(u, tau_k)
        _through_posterior(xp, tau, dtau, mix, dxp, sums)
        dx[chunk] = dxp
    return dx, None if sums is None else (sums, direct, direct_u)


def cluster_transform(x: Tensor, centre: Tensor, rho: Tensor) -> Tensor:
    """Return (x - centre) rho, Eq. 10, for x (N, C, L) and rows (N, C, 1)."""
    y = torch.empty_like(x)
    for chunk in _chunks(x):
        if x.dtype == rho.dtype:
            torch.sub(x[chunk], centre[chunk], out=y[chunk]).mul_(rho[chunk])
        else:
            y[chunk] = (x[chunk] - centre[chunk]).mul_(rho[chunk])
    return y


def cluster_gradients(x: Tensor, g: Tensor, centre: Tensor, rho: Tensor, need_dx: bool) -> tuple[Tensor | None, Tensor]:
    """Return dx if it is needed, and the sums of g and g (x - centre) over positions, (2, N, C)."""
    dx, sums = torch.empty_like(x) if need_dx else None, rho.new_zeros(2, *x.shape[:2])
    for chunk in _chunks(x):
        gp = g[chunk].to(rho.dtype)
        torch.sum(gp, 2, out=sums[0, chunk])
        torch.sum((x[chunk] - centre[chunk]).mul_(gp), 2, out=sums[1, chunk])
        if dx is not None:
            dx[chunk] = gp * rho[chunk]
    return dx, sums
