"""The forward and backward passes in closed form: the ``eager`` backend, alone and within a graph of torch.compile.

The derivatives are those of the equations in ``reference``, exactly; tests compare the two in float64. What
loops over the activation is in ``passes``, and in ``traced_passes`` for graphs; what stands here works on parameters.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function

from . import distributed, passes, reference, traced_passes
from .passes import DensitySums, Mixture, Passes
from .reference import Moments, Scale, Statistics, UnknownPosterior, UnknownScale


class _Refuse(Function):
    """Pass on a gradient that follows from sources; raise when it is differentiated by them."""

    @staticmethod
    def forward(ctx: Any, grad: Tensor, *sources: Tensor | None) -> Tensor:
        return grad.view_as(grad)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        raise RuntimeError(
            'backend: the closed forms have no second derivative; build the layer with backend="reference"'
        )


def first_derivative_only(backward: Callable[..., tuple]) -> Callable[..., tuple]:
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
        return tuple(r if r is None else _Refuse.apply(r, *grads, *ctx.saved_tensors) for r in results)

    return wrapped


def _passes() -> Passes:
    """Return the passes that run here: those of ``passes`` write into buffers, which no graph can hold."""
    return traced_passes if torch.compiler.is_compiling() else passes


class _ClusterNorm(Function):
    """Eq. 10; s is the variance plus eps."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cluster: Tensor, mean: Tensor, s: Tensor) -> Tensor:
        ctx.save_for_backward(x, cluster, mean, s)
        centre, rho = (reference.gather_rows(table, cluster)[..., None] for table in (mean, s.rsqrt()))
        return _passes().cluster_transform(x, centre, rho)

    @staticmethod
    @first_derivative_only
    def backward(ctx: Any, g: Tensor) -> tuple:
        x, cluster, mean, s = ctx.saved_tensors
        rho = s.rsqrt()
        centre, rho_n = (reference.gather_rows(table, cluster)[..., None] for table in (mean, rho))
        dx, sums = _passes().cluster_gradients(x, g, centre, rho_n, ctx.needs_input_grad[0])
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
        mixture = functools.partial(mixture_norm, eps=eps)
        return unknown_cluster(mixture, flat, mean, var, unknown_scale, unknown_posterior)

    if cluster is None:
        return unknown().reshape(x.shape)
    y: Tensor = _ClusterNorm.apply(flat, cluster, mean, var + eps)  # pyright: ignore[reportAssignmentType]
    if any_unknown:
        y = torch.where((cluster == -1)[:, None, None], unknown(), y)
    return y.reshape(x.shape)


def unknown_cluster(
    mixture_norm: Callable[..., tuple[Tensor, Moments | None]],
    x: Tensor,
    mean: Tensor,
    var: Tensor,
    scale: UnknownScale,
    over: UnknownPosterior,
) -> Tensor:
    """Eqs. 12 and 13 for x (N, C, L) by a mixture_norm, since they are Eq. 15 under equal weights."""
    whole = over == "sample"
    # One posterior a sample is one over all its values: each is a channel, at a single location.
    given = x.flatten(1).unsqueeze(2) if whole else x
    rows = [t.repeat_interleave(x.shape[2], dim=1) if whole else t for t in (mean, var)]
    equal = mean.new_full((len(mean),), -math.log(len(mean)))
    factor: Scale = "paper" if scale == "paper" else "sqrt_k"
    return mixture_norm(given, equal, *rows, groups=1, scale=factor, statistics="learned")[0].view(x.shape)


class _Options(NamedTuple):
    """What is the same for all batches of a layer."""

    split: tuple[int, int]
    """Groups, and channels of a group."""
    eps: float
    kappa: float
    """A factor of the output: 1, or 1 / sqrt(K)."""


class _Work:
    """A mixture and the affine map after it, in the shapes that passes use."""

    def __init__(
        self,
        options: _Options,
        log_lambda: Tensor,
        mean: Tensor,
        s: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
    ) -> None:
        self.passes, self.options = _passes(), options
        self.mix = Mixture.of(log_lambda, mean, s, options.split)
        shape = (*options.split, 1)
        self.weight, self.bias = (t if t is None else t.view(shape) for t in (weight, bias))
        self.lambdas = ((-0.5 * log_lambda).exp() * options.kappa).view(-1, 1, 1, 1)
        """lambda^(-1/2), times 1 / sqrt(K) under scale="sqrt_k"."""
        self.scale = self.lambdas if self.weight is None else self.lambdas * self.weight

    def parts(self, t: Tensor) -> Tensor:
        """View (N, C, L) as (N, G, D, L)."""
        return t.unflatten(1, self.options.split)

    def whole(self, t: Tensor) -> Tensor:
        """Shape (N, G, D, L) as (N, C, L), hidden from autograd: a view that a Function returns is read-only."""
        return torch.ops.aten._unsafe_view(t, (t.shape[0], t.shape[1] * t.shape[2], t.shape[3]))

    def moments(self, x: Tensor) -> tuple[Tensor | None, Tensor, Tensor, Tensor]:
        return self.passes.moments(self.parts(x), self.mix)

    def output(self, x: Tensor, tau: Tensor | None, m: Tensor, v: Tensor) -> Tensor:
        rstd = self.scale * (v + self.options.eps).rsqrt()
        return self.whole(self.passes.transform(self.parts(x), tau, m, rstd, self.bias, self.mix))

    def gradient_sums(self, x: Tensor, g: Tensor, tau: Tensor | None, m: Tensor) -> tuple[Tensor, Tensor]:
        return self.passes.gradient_sums(self.parts(x), self.parts(g), tau, m, self.mix)

    def batch_gradients(
        self,
        x: Tensor,
        g: Tensor,
        tau: Tensor | None,
        mass: Tensor,
        m: Tensor,
        v: Tensor,
        sum_g: Tensor,
        sum_gu: Tensor,
        all_g: Tensor,
        all_gu: Tensor,
        wanted: bool,
    ) -> tuple[Tensor | None, ...]:
        """Take the sums of this rank, and of all ranks together; the mixture's gradients if they are wanted."""
        r = (v + self.options.eps).rsqrt()
        count = mass.clamp(min=torch.finfo(mass.dtype).tiny)[:, :, None, None]
        dm = -r * self.scale * all_g / count  # gradients of the moments, a unit of mass each
        dv = -0.5 * r**3 * self.scale * all_gu / count
        parts = self.parts(x), self.parts(g), tau, m, self.scale * r, dm, dv, (dv * v).sum(2)
        dx, sums = self.passes.batch_gradients(*parts, self.mix, wanted)
        return self.gradients(dx, sums, sum_g, sum_gu, r)

    def gradients(
        self, dx: Tensor, sums: DensitySums | None, sum_g: Tensor, sum_gu: Tensor, rho: Tensor
    ) -> tuple[Tensor | None, ...]:
        """Return the gradients of x, log_lambda, mean, s, weight and bias.

        Args:
            dx: (N, G, D, L).
            sums: of z, if wanted.
            sum_g: of tau g; since posteriors sum to one, its sum over the components is that of g.
            sum_gu: of tau g (x - mean).
            rho: one over a component's standard deviation.
        """
        dweight = dbias = None
        normalised = rho * sum_gu * self.lambdas
        if self.weight is not None:
            dweight, dbias = normalised.sum(0).flatten(), sum_g.sum(0).flatten()
            normalised = normalised * self.weight
        if sums is None:
            return dx.flatten(1, 2), None, None, None, dweight, dbias
        dlog_lambda = sums.z.sum(1) - 0.5 * normalised.sum((1, 2, 3))
        ds = 0.5 * (sums.zuu - sums.z[:, :, None, None] * self.mix.precision)
        return dx.flatten(1, 2), dlog_lambda, sums.zu.flatten(1), ds.flatten(1), dweight, dbias


class _BatchMixture(Function):
    """Eqs. 6-9 and an affine map: y, and the moments (mass, mean, var), which carry no gradient.

    The arguments after x are those of ``_Work``; s is the variance plus eps. With a process group every rank
    takes part in an exchange between the moments and the output, and between the sums and the gradients.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        *mixture, options, process_group = arguments
        work = _Work(options, *mixture)
        tau, mass, m, v = work.moments(x)
        if process_group is not None:
            mass, m, v = distributed.combine(mass, m, v, process_group)
        y = work.output(x, tau, m, v)
        kept = tau if work.passes.KEEP_SINGLE or m.shape[2] > 1 else None
        ctx.save_for_backward(x, kept, mass, m, v, *mixture)
        ctx.options, ctx.process_group = options, process_group
        m, v = m.flatten(1), v.flatten(1)
        ctx.mark_non_differentiable(mass, m, v)
        return y, mass, m, v

    @staticmethod
    @first_derivative_only
    def backward(ctx: Any, g: Tensor, *_: Tensor) -> tuple:
        x, tau, mass, m, v, *mixture = ctx.saved_tensors
        work = _Work(ctx.options, *mixture)
        tau = work.passes.posterior(work.parts(x), work.mix) if tau is None else tau
        own = work.gradient_sums(x, g, tau, m)
        joined = own if ctx.process_group is None else distributed.total(*own, ctx.process_group)
        wanted = any(ctx.needs_input_grad[1:4])
        return *work.batch_gradients(x, g, tau, mass, m, v, *own, *joined, wanted), None, None


class _LearnedMixture(Function):
    """Eq. 15 and an affine map; the arguments after x are those of ``_Work``."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, *arguments: Any) -> Tensor:
        *mixture, options = arguments
        ctx.save_for_backward(x, *mixture)
        ctx.options = options
        work = _Work(options, *mixture)
        rstd = work.scale * work.mix.precision.sqrt()
        return work.whole(work.passes.transform(work.parts(x), None, work.mix.mean, rstd, work.bias, work.mix))

    @staticmethod
    @first_derivative_only
    def backward(ctx: Any, g: Tensor) -> tuple:
        x, *mixture = ctx.saved_tensors
        work = _Work(ctx.options, *mixture)
        rho = work.mix.precision.sqrt()
        rstd = work.scale * rho
        wanted = any(ctx.needs_input_grad[1:6])
        dx, found = work.passes.learned_gradients(work.parts(x), work.parts(g), rstd, work.mix, wanted)
        if found is None:
            return dx.flatten(1, 2), *[None] * 6
        sums, sum_g, sum_gu = found
        # The parameters that give the posteriors normalise too.
        zu = sums.zu - rstd * sum_g
        zuu = sums.zuu - rstd * sum_gu * work.mix.precision
        return *work.gradients(dx, DensitySums(sums.z, zu, zuu), sum_g, sum_gu, rho), None


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
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    process_group: Any = None,
) -> tuple[Tensor, Moments | None]:
    """As ``reference.mixture_norm``, then the affine map of weight and bias (C,), without a loop of its own.

    With a process group the batch is that of all its ranks together.
    """
    dtype = reference.compute_dtype(x)
    kappa = 1 / math.sqrt(len(mean)) if scale == "sqrt_k" else 1.0
    options = _Options((groups, mean.shape[1] // groups), eps, kappa)
    affine = [t if t is None else t.to(dtype) for t in (weight, bias)]
    inputs = reference.flatten(x), log_lambda.to(dtype), mean.to(dtype), var.to(dtype) + eps, *affine, options
    if statistics == "learned":
        y: Tensor = _LearnedMixture.apply(*inputs)  # pyright: ignore[reportAssignmentType]
        return y.reshape(x.shape), None
    outputs: tuple[Tensor, ...] = _BatchMixture.apply(*inputs, process_group)  # pyright: ignore[reportAssignmentType]
    return outputs[0].reshape(x.shape), Moments(*outputs[1:])
