"""The ``triton`` backend of mixtures: custom operators over the kernels, with fakes and gradients.

To torch.compile, torch.export and autocast each operator is one opaque step; its gradients are a second
operator, which refuses to be differentiated. Triton is imported when a kernel first runs.
"""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.library import custom_op

from .. import checkpointing, graphs
from ..graphs import NAMESPACE
from . import launch, tile_configs


@functools.cache
def _kernels() -> dict[str, Any]:
    from . import mixture_kernels, parameter_kernels  # noqa: PLC0415

    return {**parameter_kernels.__dict__, **mixture_kernels.__dict__}


class Plan(NamedTuple):
    """How a mixture kernel is launched over activations."""

    kernel: str
    grid: tuple[int, ...]
    sizes: tuple[int, ...]
    """N, C, D, L and strides; without D for a kernel whose programs are channels."""
    constants: dict[str, int]

    def run(self, tensors: Sequence[Tensor | None], numbers: Sequence[float], **constants: bool) -> None:
        """Launch the kernel on tensors, in its order."""
        numbers = (*self.sizes, *numbers)
        launch.start(_kernels()[self.kernel], self.grid, tensors, numbers, **self.constants, **constants)


def _plan(kernel: str, activations: Sequence[Tensor], groups: int, num_components: int, planes: int = 0) -> Plan:
    """Return how a mixture kernel is launched over activations (N, C, L), with planes of sums that its pass leaves."""
    strides = tuple([t.stride() for t in activations])
    x = activations[0]
    return planned(kernel, x.shape, strides, groups, num_components, planes, x.element_size())


@functools.lru_cache(maxsize=1024)
def planned(
    kernel: str, shape: torch.Size, strides: tuple[tuple[int, ...], ...], groups: int, num_components: int,
    planes: int, itemsize: int,
) -> Plan:  # fmt: skip
    """Compute ``_plan``, cached: for small activations it takes the host longer than the launch."""
    layout = tile_configs.strided_layout(shape, strides, merge=True)
    tiling = tile_configs.mixture_tiling(kernel, layout, groups, num_components, planes=planes, itemsize=itemsize)
    sizes = layout.samples, layout.channels, layout.channels // groups, layout.positions
    constants = {
        "K": num_components,
        "JOINT": tiling.joint,
        "FLAT": layout.flat,
        "BLOCK_L": tiling.block_l,
        "BLOCK_C": tiling.block_c,
        "num_warps": tiling.num_warps,
    }
    grid = tiling.programs, tiling.columns
    return Plan(kernel, grid, (*sizes, *(s for each in layout.strides for s in each)), constants)


def _channel_plan(kernel: str, activations: Sequence[Tensor], groups: int, num_components: int) -> Plan | None:
    """Return how a kernel with a program for each channel is launched over them; None where it would not pay."""
    x = activations[0]
    if (
        groups != x.shape[1]
        or groups < tile_configs.FEWEST_CHANNELS
        or x.shape[0] * x.shape[2] > tile_configs.RESIDENT_LOCATIONS
    ):
        return None
    return channel_planned(kernel, x.shape, tuple([t.stride() for t in activations]), num_components, x.element_size())


@functools.lru_cache(maxsize=1024)
def channel_planned(
    kernel: str, shape: torch.Size, strides: tuple[tuple[int, ...], ...], num_components: int, itemsize: int
) -> Plan | None:
    """Compute ``_channel_plan``, cached."""
    layout = tile_configs.strided_layout(shape, strides, merge=False)
    tile = tile_configs.channel_tile(layout, num_components, itemsize)
    if tile is None:
        return None
    constants = {"K": num_components, **tile, "num_warps": tile_configs.CHANNEL.num_warps}
    if kernel == "mixture_channel_kernel":
        constants |= tile_configs.channel_limits(num_components)
    sizes = layout.samples, layout.channels, layout.positions
    return Plan(kernel, (layout.channels,), (*sizes, *(s for each in layout.strides for s in each)), constants)


def _gather(
    kernel: str, ahead: tuple[int, ...], sums: Tensor, pointers: Sequence[Tensor | None], numbers: Sequence[float],
    **constants: bool,
) -> None:  # fmt: skip
    """Launch a kernel that adds up sums (planes, programs, K, C); ahead is of its grid, before blocks of channels."""
    _, programs, num_components, channels = sums.shape
    block_p, block_c = tile_configs.sums_tile()
    launch.start(
        _kernels()[kernel],
        (*ahead, tile_configs.divide(channels, block_c)),
        (sums, *pointers),
        (programs, channels, *numbers),
        K=num_components, BLOCK_P=block_p, BLOCK_C=block_c, num_warps=tile_configs.SUMS.num_warps, **constants,
    )  # fmt: skip


def launch_mixture_forward(
    x: Tensor, log: Tensor, mean: Tensor, var: Tensor, weight: Tensor | None, bias: Tensor | None,
    groups: int, eps: float, kappa: float, floor: float, stored: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Eqs. 6-9 and an affine map for x (N, C, L): y, and the state (planes, K, C) of the mixture and its moments.

    Parameters are contiguous; stored says that log and var are logits and log-variances.
    """
    num, state, y = len(mean), new_state(x, mean), torch.empty_like(x)
    if plan := _channel_plan("mixture_channel_kernel", (x, y), groups, num):
        plan.run((x, log, mean, var, state, weight, bias, y), (eps, floor, kappa), STORED=stored)
        return y, state
    _moments(x, (log, mean, var), state, groups, eps, kappa, floor, stored)
    pointers = (x, None, None, None, state, weight, bias, y)
    _plan("mixture_apply_kernel", (x, y), groups, num).run(pointers, (eps, floor, kappa), STORED=False)
    return y, state


mixture_forward = custom_op(f"{NAMESPACE}::mixture_forward", launch_mixture_forward, mutates_args=())


def new_state(x: Tensor, mean: Tensor) -> Tensor:
    """Return an empty state of x under a mixture."""
    return x.new_empty(launch.STATE_PLANES, *mean.shape, dtype=torch.float32)


def _moments(
    x: Tensor, mixture: Sequence[Tensor], state: Tensor, groups: int, eps: float, kappa: float, floor: float,
    stored: bool,
) -> None:  # fmt: skip
    """Find the state of x (N, C, L) under a mixture."""
    sums = moment_sums(x, mixture, state, groups, eps, floor, stored)
    _gather("mixture_merge_kernel", (state.shape[1],), sums, (x, state), (x.stride(1), eps, floor, kappa))


def moment_sums(
    x: Tensor, mixture: Sequence[Tensor], state: Tensor, groups: int, eps: float, floor: float, stored: bool
) -> Tensor:
    """Return each program's share of the moments of x (N, C, L), (3, programs, K, C), and put the mixture into a state.

    The mixture is contiguous: log weights, means and variances, or as layers store it.
    """
    num = state.shape[1]
    plan = _plan("mixture_moments_kernel", (x,), groups, num, 3)
    sums = state.new_empty(3, plan.grid[0], *state.shape[1:])
    plan.run((x, *mixture, sums, state), (eps, floor), STORED=stored)
    return sums


@mixture_forward.register_fake
def _(x: Tensor, log: Tensor, mean: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), new_state(x, mean)


FITS = ("fit_logits", "fit_mean", "fit_log_var")


def launch_move_averages(
    logits: Tensor, mean: Tensor, log_var: Tensor, before: Tensor | None, state: Tensor,
    new_logits: Tensor | None, new_mean: Tensor | None, new_log_var: Tensor | None,
    fit_logits: Tensor | None, fit_mean: Tensor | None, fit_log_var: Tensor | None,
    momentum: float, paper: bool, min_weight: float, shared: bool,
) -> None:  # fmt: skip
    """Move a stored mixture, contiguous, towards the moments of a state, as ``mixture.moved`` does.

    Before is a copy of the logits; without it the state is one under the stored mixture. A new fit, if there is one,
    is written over the last fit, unless it or the state is not finite.
    """
    num, channels = mean.shape
    launch.start(
        _kernels()["mixture_averages_kernel"],
        (tile_configs.divide(channels, tile_configs.PARAMETER_CHANNELS),),
        (state, before, logits, mean, log_var, new_logits, new_mean, new_log_var, fit_logits, fit_mean, fit_log_var),
        (channels, momentum, min_weight),
        K=num, PAPER=paper, SHARED=shared, BLOCK_ALL=tile_configs.ALL_CHANNELS, BLOCK_C=tile_configs.PARAMETER_CHANNELS,
        num_warps=tile_configs.SUMS.num_warps,
    )  # fmt: skip


move_averages = custom_op(
    f"{NAMESPACE}::move_averages", launch_move_averages, mutates_args=("logits", "mean", "log_var", *FITS)
)


def launch_mixture_backward(
    x: Tensor, g: Tensor, weight: Tensor | None, state: Tensor,
    groups: int, eps: float, floor: float, stored: bool, parameters: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of x; of weight and bias, (2, C); if parameters, of mean and var, (2, K, C), and of log, (K,).

    A gradient that does not exist has shape (0,).
    """
    num, dx, affine = state.shape[1], torch.empty_like(x), _affine_gradients(state, weight)
    if plan := _channel_plan("mixture_channel_bwd_kernel", (x, g, dx), groups, num):
        out = state.new_empty(3, *state.shape[1:]) if parameters else None
        plan.run((x, g, state, weight, dx, out, _some(affine)), (eps,), STORED=stored)
        if out is None:
            return dx, affine, state.new_empty(0), state.new_empty(0)
        return dx, affine, out[:2], _log_gradients(out[2], None, state, floor, stored=stored)
    planes = 3 if parameters else 0
    plan = _plan("mixture_sums_kernel", (x, g), groups, num, 2 + planes)
    sums = state.new_empty(2, plan.grid[0], *state.shape[1:])
    plan.run((x, g, state, sums), ())
    coefficients = state.new_empty(4, *state.shape[1:])
    _gather("mixture_coefficients_kernel", (), sums, (state, weight, coefficients, _some(affine)), (eps,))
    sources = (None, None, None, state, coefficients, weight)
    sums = _backward_pass(x, g, dx, sources, groups, (eps, floor, 1.0), planes, stored=False)
    rows, log = _parameter_gradients(sums, (None, None, state, coefficients, weight), None, groups,
                                     (eps, floor, 1.0), stored, parameters)  # fmt: skip
    return dx, affine, rows, log


mixture_backward = custom_op(f"{NAMESPACE}::mixture_backward", launch_mixture_backward, mutates_args=())


def _affine_gradients(like: Tensor, weight: Tensor | None) -> Tensor:
    return like.new_empty(0, dtype=torch.float32) if weight is None else like.new_empty(
        2, len(weight), dtype=torch.float32)  # fmt: skip


def _some(t: Tensor) -> Tensor | None:
    """Return t, or None if it holds nothing."""
    return t if t.numel() else None


def _backward_pass(
    x: Tensor, g: Tensor, dx: Tensor, sources: Sequence[Tensor | None], groups: int, numbers: Sequence[float],
    planes: int, *, stored: bool,
) -> Tensor:  # fmt: skip
    """Launch the pass that writes dx; return its sums (planes, programs, K, C): 3 of densities, 2 direct ones."""
    like = sources[3] if sources[3] is not None else sources[1]
    assert like is not None
    num, channels = like.shape[-2:]
    others = 2 if planes == 3 else 0  # of mixture_sums_kernel
    plan = _plan("mixture_bwd_kernel", (x, g, dx), groups, num, planes + others)
    sums = like.new_empty(planes, plan.grid[0], num, channels, dtype=torch.float32)
    pointers = (x, g, *sources, dx, _some(sums))
    plan.run(pointers, numbers, STORED=stored, DENSITY=planes in (3, 5), DIRECT=planes in (2, 5))
    return sums


def _parameter_gradients(
    sums: Tensor, sources: Sequence[Tensor | None], affine: Tensor | None, groups: int, numbers: Sequence[float],
    stored: bool, parameters: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Return (2, K, C) and (K,) as of mixture_backward, and fill affine."""
    planes, _, num, channels = sums.shape
    if not planes:
        return sums.new_empty(0), sums.new_empty(0)
    out = sums.new_empty(3 if parameters else 0, num, channels)
    width = channels // groups
    _gather(
        "mixture_gradients_kernel", (), sums, (*sources, _some(out), affine), (width, *numbers),
        JOINT=width > 1, STORED=stored, DENSITY=parameters,
    )  # fmt: skip
    if not parameters:
        return sums.new_empty(0), sums.new_empty(0)
    return out[:2], _log_gradients(out[2], sources[0], sources[2], numbers[1], stored=stored)


def _log_gradients(shares: Tensor, log: Tensor | None, state: Tensor | None, floor: float, *, stored: bool) -> Tensor:
    """Return gradients (K,) of log weights, or of logits, from the channels' shares in them, (K, C)."""
    num, channels = shares.shape
    out = shares.new_empty(num)
    launch.start(
        _kernels()["mixture_logits_kernel"], (1,), (shares, log, state, out), (channels, floor),
        K=num, STORED=stored, BLOCK_C=tile_configs.ALL_CHANNELS, num_warps=tile_configs.SUMS.num_warps,
    )  # fmt: skip
    return out


@mixture_backward.register_fake
def _(x: Tensor, g: Tensor, weight: Tensor | None, state: Tensor, *options: Any) -> tuple[Tensor, ...]:
    return torch.empty_like(x), _affine_gradients(state, weight), *_fake_rows(state, state[0], options[-1])


def _fake_rows(like: Tensor, mean: Tensor, parameters: bool) -> tuple[Tensor, Tensor]:
    if not parameters:
        return like.new_empty(0, dtype=torch.float32), like.new_empty(0, dtype=torch.float32)
    return like.new_empty(2, *mean.shape, dtype=torch.float32), like.new_empty(len(mean), dtype=torch.float32)


def launch_learned_forward(
    x: Tensor, log: Tensor | None, mean: Tensor, var: Tensor, weight: Tensor | None, bias: Tensor | None,
    groups: int, eps: float, kappa: float, floor: float, stored: bool,
) -> Tensor:  # fmt: skip
    """Eq. 15 and an affine map for x (N, C, L), as mixture_forward; without log, all log weights are floor."""
    y = torch.empty_like(x)
    pointers = (x, log, mean, var, None, weight, bias, y)
    _plan("mixture_apply_kernel", (x, y), groups, len(mean)).run(pointers, (eps, floor, kappa), STORED=stored)
    return y


learned_forward = custom_op(f"{NAMESPACE}::learned_forward", launch_learned_forward, mutates_args=())


@learned_forward.register_fake
def _(x: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(x)


def launch_learned_backward(
    x: Tensor, g: Tensor, log: Tensor | None, mean: Tensor, var: Tensor, weight: Tensor | None,
    groups: int, eps: float, kappa: float, floor: float, stored: bool, parameters: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """As mixture_backward."""
    dx, affine = torch.empty_like(x), _affine_gradients(mean, weight)
    planes, numbers = 5 if parameters else 0 if weight is None else 2, (eps, floor, kappa)
    sources = (log, mean, var, None, None, weight)
    sums = _backward_pass(x, g, dx, sources, groups, numbers, planes, stored=stored)
    sources = (log, var, None, None, weight)
    return dx, affine, *_parameter_gradients(sums, sources, _some(affine), groups, numbers, stored, parameters)


learned_backward = custom_op(f"{NAMESPACE}::learned_backward", launch_learned_backward, mutates_args=())


@learned_backward.register_fake
def _(
    x: Tensor, g: Tensor, log: Tensor | None, mean: Tensor, var: Tensor, weight: Tensor | None, *options: Any
) -> tuple[Tensor, ...]:
    return torch.empty_like(x), _affine_gradients(mean, weight), *_fake_rows(mean, mean, options[-1])


def _mixture_setup(ctx: Any, inputs: tuple, output: Any) -> None:
    x, *mixture, weight, bias = inputs[:6]
    ctx.set_materialize_grads(False)
    ctx.dtypes = [None if t is None else t.dtype for t in (*mixture, weight, bias)]
    ctx.groups, ctx.eps, ctx.kappa, ctx.floor, ctx.stored = inputs[6:]
    if isinstance(output, tuple):  # a state says all of the mixture, which may have moved by the time of a gradient
        ctx.save_for_backward(x, weight, output[1])
    else:
        ctx.save_for_backward(x, *mixture, weight)


def _mixture_gradients(ctx: Any, g: Tensor | None, *_: Tensor | None) -> tuple:
    """Of either forward; a state carries no gradient."""
    if g is None:
        return (None,) * 11
    x, *saved = ctx.saved_tensors
    parameters = any(ctx.needs_input_grad[1:4])
    if len(saved) == 2:
        options = (ctx.groups, ctx.eps, ctx.floor, ctx.stored, parameters)
        dx, affine, rows, log = launch.call(mixture_backward, launch_mixture_backward, x, g, *saved, *options)
    else:
        options = (ctx.groups, ctx.eps, ctx.kappa, ctx.floor, ctx.stored, parameters)
        dx, affine, rows, log = launch.call(learned_backward, launch_learned_backward, x, g, *saved, *options)
    found = [log, *rows] if parameters else [None, None, None]
    found += [affine[0], affine[1]] if affine.numel() else [None, None]
    cast = [
        t if t is None or dtype is None or t.dtype == dtype else t.to(dtype)
        for t, dtype in zip(found, ctx.dtypes, strict=True)
    ]
    return dx, *cast, None, None, None, None, None


for _forward, _backward in ((mixture_forward, mixture_backward), (learned_forward, learned_backward)):
    _forward.register_autograd(_mixture_gradients, setup_context=_mixture_setup)
    _backward.register_autograd(launch.refuse)
_of_both = _mixture_setup, _mixture_gradients
differentiable_mixture = launch.differentiable(mixture_forward, launch_mixture_forward, *_of_both)
differentiable_learned = launch.differentiable(learned_forward, launch_learned_forward, *_of_both)


def drawn_locations(x: Tensor, step: Tensor, limit: int, high: int, low: int) -> Tensor:
    """Return locations of x (N, C, L): all of them, or the limit of them that a step draws, (P, C, 1)."""
    from . import em_kernels  # noqa: PLC0415 - triton may be absent, and takes long to import

    samples, channels, length = x.shape
    if samples * length <= limit:
        return x
    points = x.new_empty(limit, channels, 1)
    block_p, block_c = tile_configs.draw_tile(channels)
    launch.start(
        em_kernels.draw_kernel, (tile_configs.divide(limit, block_p), tile_configs.divide(channels, block_c)),
        (x, step, points), (samples, channels, length, *x.stride(), high, low),
        COUNT=limit, BLOCK_P=block_p, BLOCK_C=block_c, num_warps=tile_configs.SUMS.num_warps,
    )  # fmt: skip
    return points


def _tables(logits: Tensor, mean: Tensor, log_var: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return an empty mixture like a stored one."""
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

    As ``Backend.fit`` in torch. Limit, least and empty are constants of ``mixture``; high and low are the key of the
    draws, and step, on the device, their position. The mixture stays as it is unless it is ready and this batch, whose
    number before is a copy on the CPU, is due.
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
    count, state = points.shape[0] * points.shape[2], new_state(x, mean)
    new, other = _tables(logits, mean, log_var), _tables(logits, mean, log_var)
    block_p, block_c = tile_configs.sums_tile()
    mixture = logits, mean, log_var
    for i in range(steps):
        first = i == 0
        sums = moment_sums(points, mixture, state, groups, eps, launch.NO_FLOOR, first)
        launch.start(
            em_kernels.em_step_kernel, (tile_configs.divide(channels, block_c) + 1,),
            (sums, points, *mixture[1:], *new),
            (sums.shape[1], channels, channels // groups, count, points.stride(1), least, empty, min_weight),
            K=num, STORED=first, LAST=i == steps - 1, BLOCK_P=block_p, BLOCK_C=block_c,
            num_warps=tile_configs.SUMS.num_warps,
        )  # fmt: skip
        mixture, new, other = new, other, new
    return other


fit_mixture = custom_op(f"{NAMESPACE}::fit_mixture", launch_fit_mixture, mutates_args=())


@fit_mixture.register_fake
def _(x: Tensor, logits: Tensor, mean: Tensor, log_var: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    return _tables(logits, mean, log_var)


checkpointing.save_in_graphs(fit_mixture)
