"""The ``triton`` backend: custom operators over the kernels, with fakes and gradients.

To torch.compile, torch.export and autocast each operator is one opaque step; its gradients are a second
operator, which refuses to be differentiated. Triton is imported when a kernel first runs.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.library import custom_op

from ..backends import closed_form, reference
from ..backends.namespace import NAMESPACE
from ..backends.reference import Moments, Scale, Statistics, UnknownPosterior, UnknownScale
from . import launch


def _refuse(ctx: Any, *grads: Tensor) -> None:
    raise RuntimeError('backend: the kernels have no second derivative; build the layer with backend="reference"')


def _kernels() -> Any:
    from . import cluster_kernels  # noqa: PLC0415 - triton may be absent, and takes long to import

    return cluster_kernels


def _mixture_kernels() -> Any:
    from . import mixture_kernels  # noqa: PLC0415

    return mixture_kernels


@custom_op(f"{NAMESPACE}::scb_forward", mutates_args=())
def scb_forward(x: Tensor, cluster: Tensor, mean: Tensor, var: Tensor, eps: float) -> Tensor:
    """Eq. 10 for x (N, C, L), cluster (N,), mean and var (K, C) in float32."""
    y = torch.empty_like(x)
    walk = launch.walk((x, y), merge=False)
    block_l, block_c = launch.tile(launch.SCB_FORWARD, walk)
    grid = launch.scb_grid(walk, block_l, block_c)
    _kernels().scb_fwd_kernel[grid](
        x, cluster, mean, var, y,
        len(mean), walk.channels, walk.positions, *walk.strides[0], *walk.strides[1], eps,
        BLOCK_L=block_l, BLOCK_C=block_c, num_warps=launch.SCB_FORWARD.num_warps,
    )  # fmt: skip
    return y


@scb_forward.register_fake
def _(x: Tensor, cluster: Tensor, mean: Tensor, var: Tensor, eps: float) -> Tensor:
    return torch.empty_like(x)


@custom_op(f"{NAMESPACE}::scb_backward", mutates_args=())
def scb_backward(
    x: Tensor, g: Tensor, cluster: Tensor, mean: Tensor, var: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, mean and var."""
    dx, dmean, dvar = torch.empty_like(x), torch.empty_like(mean), torch.empty_like(var)
    walk = launch.walk((x, g, dx), merge=False)
    block_l, block_c = launch.tile(launch.SCB_BACKWARD, walk)
    grid = launch.scb_grid(walk, block_l, block_c)
    sums = x.new_empty(2, grid[2], walk.samples, walk.channels, dtype=torch.float32)
    kernels = _kernels()
    kernels.scb_bwd_kernel[grid](
        x, g, cluster, mean, var, dx, sums,
        walk.samples, len(mean), walk.channels, walk.positions, *(s for strides in walk.strides for s in strides), eps,
        BLOCK_L=block_l, BLOCK_C=block_c, num_warps=launch.SCB_BACKWARD.num_warps,
    )  # fmt: skip
    block_n, block_c = launch.rows_tile(grid[2] * walk.samples, walk.channels)
    kernels.scb_rows_kernel[len(mean), launch.divide(walk.channels, block_c)](
        sums, cluster, var, dmean, dvar, walk.samples, walk.channels, grid[2], eps,
        BLOCK_N=block_n, BLOCK_C=block_c, num_warps=launch.SUMS.num_warps,
    )  # fmt: skip
    return dx, dmean, dvar


@scb_backward.register_fake
def _(x: Tensor, g: Tensor, cluster: Tensor, mean: Tensor, var: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(x), torch.empty_like(mean), torch.empty_like(var)


def _scb_setup(ctx: Any, inputs: tuple, output: Tensor) -> None:
    *tensors, ctx.eps = inputs
    ctx.save_for_backward(*tensors)


def _scb_gradients(ctx: Any, g: Tensor) -> tuple:
    x, *rest = ctx.saved_tensors
    dx, dmean, dvar = scb_backward(x, g, *rest, ctx.eps)
    return dx, None, dmean, dvar, None


scb_forward.register_autograd(_scb_gradients, setup_context=_scb_setup)
scb_backward.register_autograd(_refuse)


def _run(
    name: str,
    activations: Sequence[Tensor],
    tables: Sequence[Tensor],
    groups: int,
    num_components: int,
    numbers: Sequence[float],
    *,
    planes: int = 0,
    **constants: bool,
) -> Tensor:
    """Launch a mixture kernel on activations (N, C, L), the last one its output unless it only leaves sums.

    Returns the sums (planes, programs, K, C).
    """
    walk = launch.walk(activations, merge=True)
    tiling = launch.mixture_tiling(name, walk, groups, num_components, sums=planes > 0)
    sums = tables[0].new_empty(planes, tiling.programs, num_components, walk.channels)
    reads, writes = activations[:-1], activations[-1:]
    if name in ("mixture_moments_kernel", "mixture_sums_kernel"):
        reads, writes = activations, ()
    left = (sums,) if name != "mixture_apply_kernel" else ()
    _mixture_kernels().__dict__[name][tiling.programs, tiling.columns](
        *reads, *tables, *writes, *left,
        walk.samples, walk.channels, walk.channels // groups, walk.positions,
        *(s for strides in walk.strides for s in strides), *numbers,
        K=num_components, JOINT=tiling.joint, BLOCK_L=tiling.block_l, BLOCK_C=tiling.block_c,
        num_warps=tiling.num_warps, **constants,
    )  # fmt: skip
    return sums


def _gather(name: str, sums: Tensor, tables: Sequence[Tensor], numbers: Sequence[float], **constants: bool) -> None:
    """Launch a kernel that adds up sums (planes, programs, K, C) into the last of the tables."""
    _, programs, num_components, channels = sums.shape
    block_p, block_c = launch.rows_tile(programs, channels)
    _mixture_kernels().__dict__[name][num_components, launch.divide(channels, block_c)](
        sums, *tables, programs, num_components, channels, *numbers,
        BLOCK_P=block_p, BLOCK_C=block_c, num_warps=launch.SUMS.num_warps, **constants,
    )  # fmt: skip


@custom_op(f"{NAMESPACE}::mixture_forward", mutates_args=())
def mixture_forward(
    x: Tensor, log_lambda: Tensor, mean: Tensor, var: Tensor, groups: int, eps: float, kappa: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Eqs. 6-9 for x (N, C, L) and a mixture in float32: y, mass (K, C), m and v (K, C).

    The mass of a group stands at each of its channels.
    """
    sums = _run("mixture_moments_kernel", (x,), (log_lambda, mean, var), groups, len(mean), (eps,), planes=3)
    mass, m, v = (torch.empty_like(mean) for _ in range(3))
    _gather("mixture_merge_kernel", sums, (x, mass, m, v), (x.stride(1),))
    y = torch.empty_like(x)
    tables = log_lambda, mean, var, m, v
    _run("mixture_apply_kernel", (x, y), tables, groups, len(mean), (eps, kappa))
    return y, mass, m, v


@mixture_forward.register_fake
def _(
    x: Tensor, log_lambda: Tensor, mean: Tensor, var: Tensor, groups: int, eps: float, kappa: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return torch.empty_like(x), torch.empty_like(mean), torch.empty_like(mean), torch.empty_like(mean)


@custom_op(f"{NAMESPACE}::mixture_backward", mutates_args=())
def mixture_backward(
    x: Tensor, g: Tensor, log_lambda: Tensor, mean: Tensor, var: Tensor, mass: Tensor, m: Tensor, v: Tensor,
    groups: int, eps: float, kappa: float, parameters: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Gradients of x, and (3, K, C) of mean, var and, summed over C, log_lambda: (0,) unless parameters."""
    num = len(mean)
    sums = _run("mixture_sums_kernel", (x, g), (log_lambda, mean, var, m), groups, num, (eps,), planes=2)
    coefficients = mean.new_empty(3, *mean.shape)
    _gather("mixture_coefficients_kernel", sums, (log_lambda, mass, v, coefficients), (eps, kappa))
    dx, tables = torch.empty_like(x), (log_lambda, mean, var, m, v, coefficients)
    sums = _run(
        "mixture_bwd_kernel", (x, g, dx), tables, groups, num, (eps, kappa),
        planes=3 * parameters, BATCH=True, PARAMETERS=parameters,
    )  # fmt: skip
    return dx, _parameter_gradients(sums, var, coefficients, groups, eps, batch=True)


def _parameter_gradients(
    sums: Tensor, var: Tensor, coefficients: Tensor, groups: int, eps: float, *, batch: bool
) -> Tensor:
    """Return (3, K, C) as of mixture_backward, or (0,) if sums hold nothing."""
    if not len(sums):
        return var.new_empty(0)
    out, width = var.new_empty(3, *var.shape), var.shape[1] // groups
    _gather("mixture_gradients_kernel", sums, (var, coefficients, out), (width, eps), JOINT=width > 1, BATCH=batch)
    return out


@mixture_backward.register_fake
def _(
    x: Tensor, g: Tensor, log_lambda: Tensor, mean: Tensor, var: Tensor, mass: Tensor, m: Tensor, v: Tensor,
    groups: int, eps: float, kappa: float, parameters: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return torch.empty_like(x), mean.new_empty(3, *mean.shape) if parameters else mean.new_empty(0)


@custom_op(f"{NAMESPACE}::learned_forward", mutates_args=())
def learned_forward(
    x: Tensor, log_lambda: Tensor, mean: Tensor, var: Tensor, groups: int, eps: float, kappa: float
) -> Tensor:
    """Eq. 15 for x (N, C, L) and a mixture in float32."""
    y = torch.empty_like(x)
    _run("mixture_apply_kernel", (x, y), (log_lambda, mean, var, mean, var), groups, len(mean), (eps, kappa))
    return y


@learned_forward.register_fake
def _(x: Tensor, log_lambda: Tensor, mean: Tensor, var: Tensor, groups: int, eps: float, kappa: float) -> Tensor:
    return torch.empty_like(x)


@custom_op(f"{NAMESPACE}::learned_backward", mutates_args=())
def learned_backward(
    x: Tensor, g: Tensor, log_lambda: Tensor, mean: Tensor, var: Tensor,
    groups: int, eps: float, kappa: float, parameters: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """As mixture_backward."""
    dx, tables = torch.empty_like(x), (log_lambda, mean, var, mean, var, mean)
    sums = _run(
        "mixture_bwd_kernel", (x, g, dx), tables, groups, len(mean), (eps, kappa),
        planes=5 * parameters, BATCH=False, PARAMETERS=parameters,
    )  # fmt: skip
    return dx, _parameter_gradients(sums, var, mean, groups, eps, batch=False)


@learned_backward.register_fake
def _(
    x: Tensor, g: Tensor, log_lambda: Tensor, mean: Tensor, var: Tensor,
    groups: int, eps: float, kappa: float, parameters: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return torch.empty_like(x), mean.new_empty(3, *mean.shape) if parameters else mean.new_empty(0)


def _mixture_setup(ctx: Any, inputs: tuple, output: Any) -> None:
    *tensors, ctx.groups, ctx.eps, ctx.kappa = inputs
    moments = output[1:] if isinstance(output, tuple) else ()
    ctx.save_for_backward(*tensors, *moments)


def _mixture_gradients(ctx: Any, g: Tensor, *_: Tensor) -> tuple:
    """Of either forward; that of Eqs. 6-9 has saved its moments too, which carry no gradient."""
    x, *saved = ctx.saved_tensors
    backward = mixture_backward if len(saved) > 3 else learned_backward
    parameters = any(ctx.needs_input_grad[1:4])
    dx, rows = backward(x, g, *saved, ctx.groups, ctx.eps, ctx.kappa, parameters)
    if not parameters:
        return dx, None, None, None, None, None, None
    dmean, dvar, dlog_lambda = rows
    return dx, dlog_lambda.sum(1), dmean, dvar, None, None, None


for _forward, _backward in ((mixture_forward, mixture_backward), (learned_forward, learned_backward)):
    _forward.register_autograd(_mixture_gradients, setup_context=_mixture_setup)
    _backward.register_autograd(_refuse)


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
    """As ``closed_form.cluster_norm``; what the kernels cannot take of an unknown cluster goes there."""
    flat, mean, var = reference.flatten(x), mean.float().contiguous(), var.float().contiguous()

    def mixture(x: Tensor, *tables: Tensor, **options: Any) -> tuple[Tensor, Moments | None]:
        refused = launch.mixture_refusal(len(mean), x.shape[1])
        return (closed_form.mixture_norm if refused else mixture_norm)(x, *tables, eps=eps, **options)

    def unknown() -> Tensor:
        return closed_form.unknown_cluster(mixture, flat, mean, var, unknown_scale, unknown_posterior)

    if cluster is None:
        return unknown().reshape(x.shape)
    y: Tensor = scb_forward(flat, cluster.contiguous(), mean, var, eps)
    if any_unknown:
        y = torch.where((cluster == -1)[:, None, None], unknown(), y)
    return y.reshape(x.shape)


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
    """As ``reference.mixture_norm``."""
    inputs = (reference.flatten(x), *(t.float().contiguous() for t in (log_lambda, mean, var)))
    kappa = 1 / math.sqrt(len(mean)) if scale == "sqrt_k" else 1.0
    if statistics == "learned":
        return learned_forward(*inputs, groups, eps, kappa).reshape(x.shape), None
    y, mass, m, v = mixture_forward(*inputs, groups, eps, kappa)
    moments = Moments(mass[:, :: x.shape[1] // groups], m, v)
    return y.reshape(x.shape), Moments(*(t.detach() for t in moments))
