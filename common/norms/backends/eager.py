"""The forward and backward passes in closed form: the ``eager`` backend, alone and within a graph of torch.compile.

The derivatives are those of the equations in ``reference``, exactly; tests compare the two in float64. What
loops over the activation is in ``passes``, and in ``traced_passes`` for graphs; what stands here works on parameters.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from . import distributed, passes, reference, traced_passes
from .backend import Affine, Backend, ClusterOptions, Options
from .passes import Densities, DensitySums
from .reference import MixtureParams, Moments, Scale


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


def _passes() -> Any:
    """Return the passes to run: those of ``passes`` write into buffers, which no graph can hold."""
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


def unknown_cluster(
    norm: Callable[[Tensor, MixtureParams, Affine, Options], tuple[Tensor, Any]],
    x: Tensor,
    mean: Tensor,
    var: Tensor,
    options: ClusterOptions,
) -> Tensor:
    """Eqs. 12 and 13 for x (N, C, L) by a backend's norm, since they are Eq. 15 under equal weights."""
    whole = options.unknown_posterior == "sample"
    # One posterior a sample is one over all its values: each is a channel, at a single location.
    given = x.flatten(1).unsqueeze(2) if whole else x
    rows = [t.repeat_interleave(x.shape[2], dim=1) if whole else t for t in (mean, var)]
    equal = mean.new_full((len(mean),), -math.log(len(mean)))
    scale: Scale = "paper" if options.unknown_scale == "paper" else "sqrt_k"
    y, _ = norm(given, MixtureParams(equal, *rows), (None, None), Options(1, options.eps, scale, "learned"))
    return y.view(x.shape)


class _Work:
    """A mixture and the affine map after it, in the shapes that passes use."""

    def __init__(
        self,
        options: Options,
        log_lambda: Tensor,
        mean: Tensor,
        s: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
    ) -> None:
        self.passes, self.eps = _passes(), options.eps
        self.split = options.groups, mean.shape[1] // options.groups
        self.mix = Densities.of(log_lambda, mean, s, self.split)
        shape = (*self.split, 1)
        self.weight, self.bias = (t if t is None else t.view(shape) for t in (weight, bias))
        self.lambdas = ((-0.5 * log_lambda).exp() * options.kappa(len(mean))).view(-1, 1, 1, 1)
        """lambda^(-1/2), times 1 / sqrt(K) under scale="sqrt_k"."""
        self.scale = self.lambdas if self.weight is None else self.lambdas * self.weight

    def grouped(self, t: Tensor) -> Tensor:
        """View (N, C, L) as (N, G, D, L)."""
        return t.unflatten(1, self.split)

    def ungrouped(self, t: Tensor) -> Tensor:
        """Shape (N, G, D, L) as (N, C, L), hidden from autograd: a view that a Function returns is read-only."""
        return torch.ops.aten._unsafe_view(t, (t.shape[0], t.shape[1] * t.shape[2], t.shape[3]))

    def moments(self, x: Tensor) -> tuple[Tensor | None, Tensor, Tensor, Tensor]:
        return self.passes.moments(self.grouped(x), self.mix)

    def output(self, x: Tensor, tau: Tensor | None, m: Tensor, v: Tensor) -> Tensor:
        rstd = self.scale * (v + self.eps).rsqrt()
        return self.ungrouped(self.passes.transform(self.grouped(x), tau, m, rstd, self.bias, self.mix))

    def gradient_sums(self, x: Tensor, g: Tensor, tau: Tensor | None, m: Tensor) -> tuple[Tensor, Tensor]:
        return self.passes.gradient_sums(self.grouped(x), self.grouped(g), tau, m, self.mix)

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
        """Return the gradients from the sums of this rank and of all ranks; those of the mixture only if wanted."""
        r = (v + self.eps).rsqrt()
        count = mass.clamp(min=torch.finfo(mass.dtype).tiny)[:, :, None, None]
        dm = -r * self.scale * all_g / count  # gradients of the moments, a unit of mass each
        dv = -0.5 * r**3 * self.scale * all_gu / count
        arguments = self.grouped(x), self.grouped(g), tau, m, self.scale * r, dm, dv, (dv * v).sum(2)
        dx, sums = self.passes.batch_gradients(*arguments, self.mix, wanted)
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
        tau = work.passes.posterior(work.grouped(x), work.mix) if tau is None else tau
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
        return work.ungrouped(work.passes.transform(work.grouped(x), None, work.mix.mean, rstd, work.bias, work.mix))

    @staticmethod
    @first_derivative_only
    def backward(ctx: Any, g: Tensor) -> tuple:
        x, *mixture = ctx.saved_tensors
        work = _Work(ctx.options, *mixture)
        rho = work.mix.precision.sqrt()
        rstd = work.scale * rho
        wanted = any(ctx.needs_input_grad[1:6])
        dx, found = work.passes.learned_gradients(work.grouped(x), work.grouped(g), rstd, work.mix, wanted)
        if found is None:
            return dx.flatten(1, 2), *[None] * 6
        sums, sum_g, sum_gu = found
        # The parameters that give the posteriors normalise too.
        zu = sums.zu - rstd * sum_g
        zuu = sums.zuu - rstd * sum_gu * work.mix.precision
        return *work.gradients(dx, DensitySums(sums.z, zu, zuu), sum_g, sum_gu, rho), None


class Eager(Backend):
    """The closed forms in plain torch, anywhere."""

    def normalise(
        self, x: Tensor, params: MixtureParams, affine: Affine, options: Options
    ) -> tuple[Tensor, Moments | None]:
        """See ``Backend``; with a process group the batch is that of all its ranks together."""
        log_weight, mean, var = params.plain(options.min_weight) if options.stored else params
        dtype = reference.compute_dtype(x)
        with torch.autocast(x.device.type, enabled=False):
            maps = [t if t is None else t.to(dtype) for t in affine]
            inputs = reference.flatten(x), log_weight.to(dtype), mean.to(dtype), var.to(dtype) + options.eps, *maps
            group, options = options.process_group, options._replace(process_group=None)
            if options.statistics == "learned":
                y: Tensor = _LearnedMixture.apply(*inputs, options)  # pyright: ignore[reportAssignmentType]
                return y.reshape(x.shape), None
            found: tuple[Tensor, ...] = _BatchMixture.apply(*inputs, options, group)  # pyright: ignore[reportAssignmentType]
            return found[0].reshape(x.shape), Moments(*found[1:])

    def _normalise_clusters(
        self, x: Tensor, cluster: Tensor | None, mean: Tensor, var: Tensor, any_unknown: bool, options: ClusterOptions
    ) -> Tensor:
        dtype = reference.compute_dtype(x)
        flat, mean, var = reference.flatten(x), mean.to(dtype), var.to(dtype)
        if cluster is None:
            return unknown_cluster(self.normalise, flat, mean, var, options).reshape(x.shape)
        y: Tensor = _ClusterNorm.apply(flat, cluster, mean, var + options.eps)  # pyright: ignore[reportAssignmentType]
        if any_unknown:
            other = unknown_cluster(self.normalise, flat, mean, var, options)
            y = torch.where((cluster == -1)[:, None, None], other, y)
        return y.reshape(x.shape)
