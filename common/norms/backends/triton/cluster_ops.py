"""The ``triton`` backend of samples with clusters: custom operators over the kernels, with fakes and gradients.

As ``ops``.
"""

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.library import custom_op

from ..graphs import NAMESPACE
from ..reference import UnknownPosterior
from . import launch, tile_configs


def _kernels() -> Any:
    from . import cluster_kernels  # noqa: PLC0415 - triton may be absent, and takes long to import

    return cluster_kernels


class Plan(NamedTuple):
    """How the kernels are launched over activations."""

    grid: tuple[int, int, int]
    sizes: tuple[int, int, int, int]
    """N, K, C, L."""
    strides: tuple[int, ...]
    """Of the activations."""
    blocks: dict[str, int]
    by_sample: bool
    rows: int
    """Of sums."""
    unknown: dict[str, int]
    """The blocks of the kernels that take samples of unknown clusters."""
    shares: int
    """Programs of such a sample."""
    unknown_programs: tuple[int, int]
    """Over (samples, shares), of the kernel that leaves sums of such samples."""


def _plan(activations: Sequence[Tensor], num: int, *, sums: bool) -> Plan:
    """Return how the kernels layout over activations (N, C, L), with or without sums."""
    x = activations[0]
    return planned(x.shape, tuple([t.stride() for t in activations]), num, x.element_size(), sums)


@functools.lru_cache(maxsize=1024)
def planned(shape: torch.Size, strides: tuple[tuple[int, ...], ...], num: int, itemsize: int, sums: bool) -> Plan:
    """Compute ``_plan``, cached: for small activations it takes the host longer than the launch."""
    layout = tile_configs.strided_layout(shape, strides, merge=False)
    entry = tile_configs.SCB_BACKWARD if sums else tile_configs.SCB_FORWARD
    tiling = tile_configs.cluster_tiling(entry, layout, num, itemsize, sums=sums)
    length, channels = tile_configs.unknown_tile(layout)
    return Plan(
        tiling.grid,
        (layout.samples, num, layout.channels, layout.positions),
        tuple(s for each in layout.strides for s in each),
        {**tiling.blocks, "num_warps": tiling.num_warps},
        tiling.by_sample,
        tiling.rows * (1 if tiling.by_sample else num),
        {"UNKNOWN_L": length, "UNKNOWN_C": channels},
        tile_configs.unknown_shares(layout),
        tile_configs.unknown_programs(layout, num),
    )


def launch_scb_forward(
    x: Tensor, cluster: Tensor, mean: Tensor, var: Tensor, mean_row: Tensor | None, var_row: Tensor | None,
    weight: Tensor | None, bias: Tensor | None, eps: float, kappa: float, lowest: int, stored: bool, unknown: bool,
) -> Tensor:  # fmt: skip
    """Eq. 10 and an affine map for x (N, C, L), cluster (N,), mean and var (K, C) of the same strides.

    Mean_row and var_row (C,) are added to each row; stored says that var is its logarithm. If unknown, samples of the
    id -1 have Eq. 12 times kappa, otherwise, if lowest is -1, the first row.
    """
    y = torch.empty_like(x)
    plan = _plan((x, y), len(mean), sums=False)
    kernels, pointers = _kernels(), (x, cluster, mean, var, mean_row, var_row, weight, bias, y)
    sizes = *plan.sizes, *mean.stride(), *plan.strides
    launch.start(
        kernels.scb_fwd_kernel, plan.grid, pointers, (*sizes, eps, -1 if unknown else lowest),
        STORED=stored, UNKNOWN=unknown, **plan.blocks,
    )  # fmt: skip
    if unknown:
        launch.start(
            kernels.scb_unknown_fwd_kernel, (len(x), plan.shares), pointers, (*sizes[1:], eps, kappa),
            STORED=stored, num_warps=tile_configs.UNKNOWN_WARPS["scb_unknown_fwd_kernel"], **plan.unknown,
        )  # fmt: skip
    return y


scb_forward = custom_op(f"{NAMESPACE}::scb_forward", launch_scb_forward, mutates_args=())


@scb_forward.register_fake
def _(x: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(x)


def _pair(like: Tensor | None, x: Tensor) -> Tensor:
    """Return an empty pair of gradients like a tensor (C,), or (0,) for none."""
    return x.new_empty(0, dtype=torch.float32) if like is None else like.new_empty(2, len(like))


def launch_scb_backward(
    x: Tensor, g: Tensor, cluster: Tensor, mean: Tensor, var: Tensor, mean_row: Tensor | None, var_row: Tensor | None,
    weight: Tensor | None, eps: float, kappa: float, lowest: int, stored: bool, unknown: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of x, mean and var; of mean_row and var_row, (2, C); of weight and bias, (2, C); (0,) of none."""
    dx, dmean, dvar = torch.empty_like(x), torch.empty_like(mean), torch.empty_like(var)
    added, affine = _pair(mean_row, x), _pair(weight, x)
    num, channels = mean.shape
    plan = _plan((x, g, dx), num, sums=True)
    programs = math.prod(plan.unknown_programs) if unknown else 0
    sums = x.new_empty(2, plan.rows, channels, dtype=torch.float32)
    left = found = None
    if unknown:
        left = x.new_empty(2, programs, num + 1, channels, dtype=torch.float32)
        found = x.new_empty(programs, dtype=torch.int32)
    kernels, pointers = _kernels(), (x, g, cluster, mean, var, mean_row, var_row, weight, dx)
    sizes = *plan.sizes, *mean.stride(), *plan.strides
    launch.start(
        kernels.scb_bwd_kernel, plan.grid, (*pointers, sums), (*sizes, eps, -1 if unknown else lowest),
        STORED=stored, UNKNOWN=unknown, BY_SAMPLE=plan.by_sample, **plan.blocks,
    )  # fmt: skip
    if unknown:
        launch.start(
            kernels.scb_unknown_bwd_kernel, plan.unknown_programs, (*pointers, left, found), (*sizes, eps, kappa),
            STORED=stored, num_warps=tile_configs.UNKNOWN_WARPS["scb_unknown_bwd_kernel"], **plan.unknown,
        )  # fmt: skip
    block_n, block_c = tile_configs.sums_tile()
    launch.start(
        kernels.scb_rows_kernel,
        (num + bool(added.numel() or affine.numel()), tile_configs.divide(channels, block_c)),
        (sums, left, found, cluster if plan.by_sample else None, var, var_row, weight, dmean, dvar,
         added if added.numel() else None, affine if affine.numel() else None),
        (len(x), plan.rows, programs, num, channels, *var.stride(), *dmean.stride(), eps),
        STORED=stored, BLOCK_N=block_n, BLOCK_C=block_c, num_warps=tile_configs.SUMS.num_warps,
    )  # fmt: skip
    return dx, dmean, dvar, added, affine


scb_backward = custom_op(f"{NAMESPACE}::scb_backward", launch_scb_backward, mutates_args=())


@scb_backward.register_fake
def _(
    x: Tensor, g: Tensor, cluster: Tensor, mean: Tensor, var: Tensor, mean_row: Tensor | None, var_row: Tensor | None,
    weight: Tensor | None, *_: Any,
) -> tuple[Tensor, ...]:  # fmt: skip
    return torch.empty_like(x), torch.empty_like(mean), torch.empty_like(var), _pair(mean_row, x), _pair(weight, x)


def _setup(ctx: Any, inputs: tuple, output: Tensor) -> None:
    *tensors, _ = inputs[:8]
    ctx.set_materialize_grads(False)
    ctx.options = inputs[8:]
    ctx.save_for_backward(*tensors)


def _gradients(ctx: Any, g: Tensor | None) -> tuple:
    if g is None:
        return (None,) * 13
    x, *rest = ctx.saved_tensors
    dx, dmean, dvar, *pairs = launch.call(scb_backward, launch_scb_backward, x, g, *rest, *ctx.options)
    more = [each for pair in pairs for each in (pair.unbind() if pair.numel() else (None, None))]
    return dx, None, dmean, dvar, *more, None, None, None, None, None


scb_forward.register_autograd(_gradients, setup_context=_setup)
scb_backward.register_autograd(launch.refuse)
differentiable_clusters = launch.differentiable(scb_forward, launch_scb_forward, _setup, _gradients)


def takes_unknown(channels: int, over: UnknownPosterior) -> bool:
    """Return whether the kernels can take a batch with unknown samples."""
    return over == "location" and channels <= tile_configs.MAX_UNKNOWN_CHANNELS
