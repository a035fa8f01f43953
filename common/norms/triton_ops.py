"""The ``triton`` backend: custom operators over the kernels, with fakes and gradients.

To torch.compile, torch.export and autocast each operator is one opaque step; its gradients are a second
operator, which refuses to be differentiated. Triton is imported when a kernel first runs.
"""

import math
from typing import Any

import torch
from torch import Tensor
from torch.library import custom_op

from common.norms import closed_form, launch, reference
from common.norms.reference import Moments, Scale, Statistics, UnknownPosterior, UnknownScale


def _refuse(ctx: Any, *grads: Tensor) -> None:
    raise RuntimeError('backend: the kernels have no second derivative; build the layer with backend="reference"')


def _kernels() -> Any:
    from common.norms import kernels  # noqa: PLC0415 - triton may be absent, and takes long to import

    return kernels


@custom_op("cbnorm::scb_forward", mutates_args=())
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


@custom_op("cbnorm::scb_backward", mutates_args=())
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
        BLOCK_N=block_n, BLOCK_C=block_c, num_warps=launch.SCB_ROWS.num_warps,
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

    def unknown() -> Tensor:
        if unknown_posterior == "sample" or launch.mixture_refusal(len(mean), x.shape[1]):
            return closed_form.cluster_norm(
                flat, None, mean, var, eps=eps, unknown_scale=unknown_scale,
                unknown_posterior=unknown_posterior, any_unknown=True,
            )  # fmt: skip
        equal = mean.new_full((len(mean),), -math.log(len(mean)))
        scale = "paper" if unknown_scale == "paper" else "sqrt_k"  # Eq. 12 is Eq. 15 under equal weights
        return mixture_norm(flat, equal, mean, var, groups=1, eps=eps, scale=scale, statistics="learned")[0]

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
    return closed_form.mixture_norm(
        x, log_lambda, mean, var, groups=groups, eps=eps, scale=scale, statistics=statistics
    )
