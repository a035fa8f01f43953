"""A fit by EM on the device: an operator over the kernels, which asks the device for nothing."""

import torch
from torch import Tensor
from torch.library import custom_op

from .. import checkpointing, graphs
from ..graphs import NAMESPACE
from . import launch, ops


def drawn_locations(x: Tensor, step: Tensor, limit: int, high: int, low: int) -> Tensor:
    """Return locations of x (N, C, L): all of them, or the limit of them that a step draws, (P, C, 1)."""
    from . import em_kernels  # noqa: PLC0415 - triton may be absent, and takes long to import

    samples, channels, length = x.shape
    if samples * length <= limit:
        return x
    points = x.new_empty(limit, channels, 1)
    block_p, block_c = launch.draw_tile(channels)
    launch.start(
        em_kernels.draw_kernel, (launch.divide(limit, block_p), launch.divide(channels, block_c)),
        (x, step, points), (samples, channels, length, *x.stride(), high, low),
        COUNT=limit, BLOCK_P=block_p, BLOCK_C=block_c, num_warps=launch.SUMS.num_warps,
    )  # fmt: skip
    return points


def _tables(logits: Tensor, mean: Tensor, log_var: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return room for a mixture like a stored one."""
    return (
        torch.empty_like(logits, dtype=torch.float32),
        torch.empty_like(mean, dtype=torch.float32),
        torch.empty_like(log_var, dtype=torch.float32),
    )


def launch_fit_mixture(
    x: Tensor, logits: Tensor, mean: Tensor, log_var: Tensor, step: Tensor, ready: Tensor | None, before: Tensor,
    every: int, groups: int, eps: float, steps: int, limit: int, high: int, low: int, min_weight: float, least: float,
    empty: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Take EM steps from a stored mixture, contiguous, on locations of x (N, C, L): logits, mean and log-variance.

    As ``estimation.em.refit``, of which limit, least and empty are constants; high and low are the key of the draws
    and step, on the device, their position. Unless this batch, of whose number before is a copy on the CPU, is one to
    be fitted, and the mixture is ready, it stays.
    """
    if every > 1:
        graphs.refuse(x, graphs.COUNTED)
    if ready is not None and not bool(ready):
        graphs.refuse(x, graphs.WARM_UP)
    if (ready is not None and not bool(ready)) or (every > 1 and int(before) % every):
        return logits.float().clone(), mean.float().clone(), log_var.float().clone()
    from . import em_kernels  # noqa: PLC0415 - triton may be absent, and takes long to import

    points = drawn_locations(x, step, limit, high, low)
    num, channels = mean.shape
    count, state = points.shape[0] * points.shape[2], ops.new_state(x, mean)
    new, other = _tables(logits, mean, log_var), _tables(logits, mean, log_var)
    block_p, block_c = launch.sums_tile()
    mixture = logits, mean, log_var
    for i in range(steps):
        first = i == 0
        sums = ops.moment_sums(points, mixture, state, groups, eps, launch.NO_FLOOR, first)
        launch.start(
            em_kernels.em_step_kernel, (launch.divide(channels, block_c) + 1,),
            (sums, points, *mixture[1:], *new),
            (sums.shape[1], channels, channels // groups, count, points.stride(1), least, empty, min_weight),
            K=num, STORED=first, LAST=i == steps - 1, BLOCK_P=block_p, BLOCK_C=block_c,
            num_warps=launch.SUMS.num_warps,
        )  # fmt: skip
        mixture, new, other = new, other, new
    return other


fit_mixture = custom_op(f"{NAMESPACE}::fit_mixture", launch_fit_mixture, mutates_args=())


@fit_mixture.register_fake
def _(
    x: Tensor, logits: Tensor, mean: Tensor, log_var: Tensor, step: Tensor, ready: Tensor | None, before: Tensor,
    every: int, groups: int, eps: float, steps: int, limit: int, high: int, low: int, min_weight: float, least: float,
    empty: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    return _tables(logits, mean, log_var)


checkpointing.save_in_graphs(fit_mixture)
