"""The forward and backward passes in closed form, in plain torch: the ``eager`` backend.

Each pass walks over the samples in parts small enough to stay in cache, writes into buffers it allocated
once, and takes differences ``x - mean`` rather than expanded squares, which lose all digits under a common
offset. The derivatives are those of the equations in ``reference``, exactly; tests compare the two in
float64.

Inside, a part of x is (n, G, D, L): n samples, G groups of D channels, L positions. Parameters are (K, G, D,
1) and posteriors (K, n, G, L). ``a`` is tau times ``w = lambda^(-1/2)``, times 1 / sqrt(K) under
scale="sqrt_k".
"""

import functools
import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function

from common.norms import reference, sync
from common.norms.reference import Moments, Scale, Statistics, UnknownPosterior, UnknownScale

PART_ELEMENTS = 1 << 18
"""Elements of x in a part: a megabyte of float32, so that the few buffers of a pass share an L2
cache."""


class _Refuse(Function):
    """Pass a gradient through; raise when it is differentiated in turn."""

    @staticmethod
    def forward(ctx: Any, grad: Tensor) -> Tensor:
        return grad.view_as(grad)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        raise RuntimeError(
            'backend: the closed forms have no second derivative; build the layer with backend="reference"'
        )


def _first_derivative_only(backward: Callable[..., tuple]) -> Callable[..., tuple]:
    """Compute a backward pass outside autograd and autocast, and refuse to differentiate its result.

    torch.autograd.function.once_differentiable would give an error that names no remedy, and none at all
    where the incoming gradient is a constant.
    """

    @functools.wraps(backward)
    def wrapped(ctx: Any, *grads: Tensor) -> tuple:
        second = torch.is_grad_enabled()  # true only under create_graph=True
        with torch.no_grad(), torch.autocast(grads[0].device.type, enabled=False):
            results = backward(ctx, *grads)
        if not second:
            return results
        return tuple(r if r is None else _Refuse.apply(r.detach().requires_grad_()) for r in results)

    return wrapped


def _parts(x: Tensor) -> Iterator[slice]:
    """Cut the samples of x into slices of about PART_ELEMENTS elements."""
    step = max(1, PART_ELEMENTS // max(1, x[:1].numel()))
    return (slice(start, start + step) for start in range(0, len(x), step))


class _ClusterNorm(Function):
    """Eq. 10; s is the variance plus eps."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cluster: Tensor, mean: Tensor, s: Tensor) -> Tensor:
        ctx.save_for_backward(x, cluster, mean, s)
        centre, rho = (reference.gather_rows(table, cluster)[..., None] for table in (mean, s.rsqrt()))
        y = torch.empty_like(x)
        for part in _parts(x):
            if x.dtype == mean.dtype:
                torch.sub(x[part], centre[part], out=y[part]).mul_(rho[part])
            else:
                y[part] = (x[part] - centre[part]).mul_(rho[part])
        return y

    @staticmethod
    @_first_derivative_only
    def backward(ctx: Any, g: Tensor) -> tuple:
        x, cluster, mean, s = ctx.saved_tensors
        rho = s.rsqrt()
        centre, rho_n = (reference.gather_rows(table, cluster)[..., None] for table in (mean, rho))
        dx = torch.empty_like(x) if ctx.needs_input_grad[0] else None
        sums = mean.new_zeros(2, *x.shape[:2])  # of g and of g * (x - mean), a sample and channel
        for part in _parts(x):
            gp = g[part].to(mean.dtype)
            torch.sum(gp, 2, out=sums[0, part])
            torch.sum((x[part] - centre[part]).mul_(gp), 2, out=sums[1, part])
            if dx is not None:
                dx[part] = gp * rho_n[part]
        member = (cluster == torch.arange(len(mean), device=x.device)[:, None]).to(mean.dtype)
        sum_g, sum_gu = member @ sums  # (K, N) @ (N, C): repeatable, no atomics
        return dx, None, -rho * sum_g, -0.5 * rho**3 * sum_gu


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
    """As ``reference.cluster_norm``; ``any_unknown`` says whether ids of -1 have to be expected."""
    dtype = reference.compute_dtype(x)
    flat, mean, var = reference.flatten(x), mean.to(dtype), var.to(dtype)

    def unknown() -> Tensor:
        if unknown_posterior == "sample":
            return reference.cluster_norm(
                flat, None, mean, var, eps=eps, unknown_scale=unknown_scale, unknown_posterior="sample"
            )
        equal = mean.new_full((len(mean),), -math.log(len(mean)))
        scale = "paper" if unknown_scale == "paper" else "sqrt_k"  # Eq. 12 is Eq. 15 under equal weights
        return mixture_norm(flat, equal, mean, var, groups=1, eps=eps, scale=scale, statistics="learned")[0]

    if cluster is None:
        return unknown().reshape(x.shape)
    y: Tensor = _ClusterNorm.apply(flat, cluster, mean, var + eps)  # pyright: ignore[reportAssignmentType]
    if any_unknown:
        y = torch.where((cluster == -1)[:, None, None], unknown(), y)
    return y.reshape(x.shape)


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


class _Options(NamedTuple):
    groups: int
    eps: float
    kappa: float  # a factor of the output: 1, or 1 / sqrt(K)
    process_group: Any = None  # ranks that share the batch's moments


class _Mixture(NamedTuple):
    """The mixture in the shapes the passes use."""

    log_lambda: Tensor  # (K,)
    mean: Tensor  # (K, G, D, 1)
    s: Tensor  # (K, G, D, 1): variance + eps
    w: Tensor  # (K, 1, 1, 1): lambda^(-1/2), scaled

    @classmethod
    def of(cls, log_lambda: Tensor, mean: Tensor, var: Tensor, options: _Options) -> "_Mixture":
        shape = (len(mean), options.groups, -1, 1)
        w = (-0.5 * log_lambda).exp().mul(options.kappa).view(-1, 1, 1, 1)
        return cls(log_lambda, mean.reshape(shape), var.reshape(shape) + options.eps, w)

    def posterior(self, x: Tensor, out: Tensor | None = None) -> Tensor:
        """Eq. 6 for a part of x: (K, n, G, L)."""
        tau = self.mean.new_empty(len(self.mean), *x.shape[:2], x.shape[3]) if out is None else out
        constant = self.log_lambda[:, None, None] - 0.5 * self.s.log().sum(2)  # (K, G, 1); 2 pi cancels
        buffer = torch.empty_like(x)
        for k, tau_k in enumerate(tau):
            u = torch.sub(x, self.mean[k], out=buffer)
            u.mul_(u)
            _sum_channels(u, -0.5 / self.s[k], out=tau_k).add_(constant[k])
        return torch.softmax(tau, 0, out=tau)


def _combine(x: Tensor, tau: Tensor, mean: Tensor, rstd: Tensor, y: Tensor) -> None:
    """Eqs. 7 and 15 for a part: y = sum_k tau_k rstd_k (x - mean_k); rstd holds lambda^(-1/2) too."""
    buffer = torch.empty_like(x)
    for k, tau_k in enumerate(tau):
        u = torch.sub(x, mean[k], out=buffer).mul_(rstd[k])
        if k == 0:
            torch.mul(u, tau_k.unsqueeze(2), out=y)
        else:
            y.addcmul_(u, tau_k.unsqueeze(2))


def _transform(x: Tensor, tau: Tensor | None, mean: Tensor, rstd: Tensor, mix: _Mixture) -> Tensor:
    """Eqs. 7 and 15 for all of x (N, G, D, L); tau None stands for the posteriors under mix."""
    y = torch.empty_like(x)
    for part in _parts(x):
        xp = x[part].to(mean.dtype)
        tau_p = mix.posterior(xp) if tau is None else tau[:, part]
        if x.dtype == mean.dtype:
            _combine(xp, tau_p, mean, rstd, y[part])
        else:
            out = torch.empty_like(xp)
            _combine(xp, tau_p, mean, rstd, out)
            y[part] = out
    return y


def _batch_moments(x: Tensor, tau: Tensor, mix: _Mixture) -> tuple[Tensor, Tensor, Tensor]:
    """Fill tau (Eq. 6) and return mass (K, G), mean and variance (K, G, D, 1) of Eqs. 8 and 9."""
    shape, dtype = mix.mean.shape, mix.mean.dtype
    mass, first, second = (
        mix.mean.new_zeros(shape[:2]),
        torch.zeros_like(mix.mean),
        torch.zeros_like(mix.mean),
    )
    for part in _parts(x):
        xp, tau_p = x[part].to(dtype), tau[:, part]
        mix.posterior(xp, out=tau_p)
        mass += tau_p.sum((1, 3))
        for k, tau_k in enumerate(tau_p):
            first[k] += _sum_locations(xp, tau_k)
    count = mass.clamp(min=torch.finfo(dtype).tiny)[:, :, None, None]
    mean = first / count
    first.zero_()
    for part in _parts(x):
        xp, tau_p = x[part].to(dtype), tau[:, part]
        buffer = torch.empty_like(xp)
        for k, tau_k in enumerate(tau_p):
            u = torch.sub(xp, mean[k], out=buffer)
            first[k] += _sum_locations(u, tau_k)
            second[k] += _sum_locations(u.mul_(u), tau_k)
    shift = first / count  # what rounding left of the first mean's error, under a large offset
    return mass, mean + shift, (second / count - shift.square()).clamp_(min=0)


class _DensitySums:
    """Carries gradients of posteriors to x, and sums up what those of the mixture need, if they are wanted."""

    def __init__(self, mix: _Mixture, wanted: bool) -> None:
        self.mix, self.wanted = mix, wanted
        self.precision = 1 / mix.s
        self.z = mix.mean.new_zeros(mix.mean.shape[:2])  # (K, G)
        self.zu = torch.zeros_like(mix.mean)  # z (x - mean) / s
        self.zuu = torch.zeros_like(mix.mean)  # z (x - mean)^2 / s^2

    def add(self, x: Tensor, tau: Tensor, dtau: Tensor, dx: Tensor) -> None:
        """Take dtau (overwritten) of a part through the softmax and the densities, into dx and the sums."""
        dtau -= (tau * dtau).sum(0)
        z = dtau.mul_(tau)
        buffer = torch.empty_like(x)
        for k, z_k in enumerate(z):
            u = torch.sub(x, self.mix.mean[k], out=buffer).mul_(self.precision[k])
            dx.addcmul_(u, z_k.unsqueeze(2), value=-1)
            if self.wanted:
                self.z[k] += z_k.sum((0, 2))
                self.zu[k] += _sum_locations(u, z_k)
                self.zuu[k] += _sum_locations(u.mul_(u), z_k)


class _BatchMixture(Function):
    """Eqs. 6-9: y, and the moments (mass, mean, var), which carry no gradient."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, log_lambda: Tensor, mean: Tensor, var: Tensor, options: _Options
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        mix = _Mixture.of(log_lambda, mean, var, options)
        parts = x.unflatten(1, (options.groups, -1))
        tau = mean.new_empty(len(mean), len(x), options.groups, x.shape[2])
        mass, m, v = _batch_moments(parts, tau, mix)
        if options.process_group is not None:
            mass, m, v = sync.combine(mass, m, v, options.process_group)
        y = _transform(parts, tau, m, mix.w * (v + options.eps).rsqrt(), mix)
        ctx.save_for_backward(x, log_lambda, mean, var, tau, mass, m, v)
        ctx.options = options
        m, v = m.view_as(mean), v.view_as(mean)
        ctx.mark_non_differentiable(mass, m, v)
        return y.flatten(1, 2), mass, m, v

    @staticmethod
    @_first_derivative_only
    def backward(ctx: Any, g: Tensor, *_: Tensor) -> tuple:
        x, log_lambda, mean, var, tau, mass, m, v = ctx.saved_tensors
        mix = _Mixture.of(log_lambda, mean, var, ctx.options)
        x, g = (t.unflatten(1, (ctx.options.groups, -1)) for t in (x, g))
        r = (v + ctx.options.eps).rsqrt()
        sum_g, sum_gu = _gradient_sums(x, g, tau, m)
        sum_gu *= mix.w
        all_g, all_gu = sum_g, sum_gu
        if ctx.options.process_group is not None:
            all_g, all_gu = sync.total(sum_g, sum_gu, ctx.options.process_group)
        count = mass.clamp(min=torch.finfo(mass.dtype).tiny)[:, :, None, None]
        dm = -r * mix.w * all_g / count  # gradients of the batch's mean and variance, a unit of mass each
        dv = -0.5 * r**3 * all_gu / count
        constant = (dv * v).sum(2)  # (K, G, 1)
        dx, sums = torch.empty_like(x), _DensitySums(mix, wanted=any(ctx.needs_input_grad[1:4]))
        for part in _parts(x):
            xp, gp, tau_p = x[part].to(m.dtype), g[part].to(m.dtype), tau[:, part]
            u, q, product, dxp = (torch.empty_like(xp) for _ in range(4))
            dxp.zero_()
            dtau = torch.empty_like(tau_p)
            for k, tau_k in enumerate(tau_p):
                torch.sub(xp, m[k], out=u)
                torch.mul(gp, mix.w[k] * r[k], out=q).add_(dm[k]).addcmul_(u, dv[k])
                _sum_products(u, q, product, out=dtau[k]).sub_(constant[k])
                dxp.addcmul_(q.addcmul_(u, dv[k]), tau_k.unsqueeze(2))
            sums.add(xp, tau_p, dtau, dxp)
            dx[part] = dxp
        dvar = 0.5 * (sums.zuu - sums.z[:, :, None, None] / mix.s)
        dlog_lambda = sums.z.sum(1) - 0.5 * (r * sum_gu).sum((1, 2, 3))
        return dx.flatten(1, 2), dlog_lambda, sums.zu.view_as(mean), dvar.view_as(mean), None


def _gradient_sums(x: Tensor, g: Tensor, tau: Tensor, m: Tensor) -> tuple[Tensor, Tensor]:
    """Sum tau g and tau g (x - m) over the locations, each (K, G, D, 1)."""
    sum_g, sum_gu = torch.zeros_like(m), torch.zeros_like(m)
    for part in _parts(x):
        xp, gp = x[part].to(m.dtype), g[part].to(m.dtype)
        buffer = torch.empty_like(xp)
        for k, tau_k in enumerate(tau[:, part]):
            sum_g[k] += _sum_locations(gp, tau_k)
            sum_gu[k] += _sum_locations(torch.sub(xp, m[k], out=buffer).mul_(gp), tau_k)
    return sum_g, sum_gu


class _LearnedMixture(Function):
    """Eq. 15."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, log_lambda: Tensor, mean: Tensor, var: Tensor, options: _Options) -> Tensor:
        mix = _Mixture.of(log_lambda, mean, var, options)
        ctx.save_for_backward(x, log_lambda, mean, var)
        ctx.options = options
        parts = x.unflatten(1, (options.groups, -1))
        return _transform(parts, None, mix.mean, mix.w * mix.s.rsqrt(), mix).flatten(1, 2)

    @staticmethod
    @_first_derivative_only
    def backward(ctx: Any, g: Tensor) -> tuple:
        x, log_lambda, mean, var = ctx.saved_tensors
        mix = _Mixture.of(log_lambda, mean, var, ctx.options)
        x, g = (t.unflatten(1, (ctx.options.groups, -1)) for t in (x, g))
        rstd = mix.w * mix.s.rsqrt()
        direct, direct_u = torch.zeros_like(mix.mean), torch.zeros_like(mix.mean)
        dx, sums = torch.empty_like(x), _DensitySums(mix, wanted=any(ctx.needs_input_grad[1:4]))
        for part in _parts(x):
            xp, gp = x[part].to(mean.dtype), g[part].to(mean.dtype)
            u, h, dxp = torch.empty_like(xp), torch.empty_like(xp), torch.zeros_like(xp)
            tau = mix.posterior(xp)
            dtau = torch.empty_like(tau)
            for k, tau_k in enumerate(tau):
                torch.mul(gp, rstd[k], out=h)
                direct[k] += _sum_locations(h, tau_k)
                dxp.addcmul_(h, tau_k.unsqueeze(2))
                torch.sub(xp, mix.mean[k], out=u)
                _sum_products(u, h, h, out=dtau[k])
                direct_u[k] += _sum_locations(h, tau_k)
            sums.add(xp, tau, dtau, dxp)
            dx[part] = dxp
        dmean = sums.zu - direct
        dvar = 0.5 * (sums.zuu - (sums.z[:, :, None, None] + direct_u) / mix.s)
        dlog_lambda = sums.z.sum(1) - 0.5 * direct_u.sum((1, 2, 3))
        return dx.flatten(1, 2), dlog_lambda, dmean.view_as(mean), dvar.view_as(mean), None


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
    process_group: Any = None,
) -> tuple[Tensor, Moments | None]:
    """As ``reference.mixture_norm``; with a process group the batch is that of all its ranks together."""
    dtype = reference.compute_dtype(x)
    kappa = 1 / math.sqrt(len(mean)) if scale == "sqrt_k" else 1.0
    options = _Options(groups, eps, kappa, process_group)
    inputs = reference.flatten(x), log_lambda.to(dtype), mean.to(dtype), var.to(dtype), options
    if statistics == "learned":
        y: Tensor = _LearnedMixture.apply(*inputs)  # pyright: ignore[reportAssignmentType]
        return y.reshape(x.shape), None
    outputs: tuple[Tensor, ...] = _BatchMixture.apply(*inputs)  # pyright: ignore[reportAssignmentType]
    return outputs[0].reshape(x.shape), Moments(*outputs[1:])
