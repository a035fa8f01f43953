"""The passes written for torch.compile: the ``compiled`` backend, but for what ``native`` computes on a CPU.

Forward and backward are a graph each. It is compiled once for a number of components, a dtype and a layout,
and serves all batch sizes. Components are unrolled, so that one loop over memory serves many sums; sums go
over positions first and samples afterwards, since the first step runs through memory in order and joins the
loop that writes the gradient.

Inductor computes a value again in every loop that uses it, unless it is a sum or a stack: so parameters, and
posteriors that many channels share, are stacked. Posteriors of single channels are K times as large as the
activation and are found again in each pass.
"""

import functools
import importlib.util
import math
import os
import shutil
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.fx.experimental import _config as shape_config

from .passes import DensitySums, Mixture, least_posterior

OPTIONS: dict[str, Any] = {
    "max_fusion_size": 512,  # else a loop for several components is cut in two
    "cpp.max_horizontal_fusion_size": 64,
    "max_pointwise_cat_inputs": 0,  # a stack is stored
    "cpp.enable_floating_point_contract_flag": "fast",  # fused multiply-add: half the instructions
    "realize_reads_threshold": 10**6,  # nothing else is
    "realize_opcount_threshold": 10**6,
}
LOG2_E = 1.4426950408889634
KEEP_SINGLE: bool = False
_graphs: dict[object, Callable[..., Any]] = {}


def compiler() -> str:
    """Return the command that compiles C++, whether or not there is one."""
    return os.environ.get("CXX", "g++")


def refusal(device: torch.device) -> str | None:
    """Say why this backend cannot run, or return None if it can."""
    if device.type == "cpu":
        if not _on_path(compiler()):
            return f"needs a C++ compiler, but {compiler()!r} is not on the PATH; install one or set CXX"
    elif device.type == "cuda" and not importlib.util.find_spec("triton"):
        return "needs the package triton on a GPU, which is not installed"
    return None


@functools.cache  # every batch asks, and looking takes longer than a small batch
def _on_path(program: str) -> bool:
    return shutil.which(program) is not None


def run(function: Callable[..., Any], options: tuple[Any, ...], *tensors: Tensor | None) -> Any:
    """Call function(these passes, options, *tensors), compiled for each new kind of input."""
    tensors = tuple(t if t is None else t.detach() for t in tensors)
    key = function, options, tuple(t if t is None else _kind(t) for t in tensors)
    if key in _graphs:
        return _graphs[key](*tensors)
    _graphs[key] = _graph(function, options)
    # Sizes that happen to be equal now may differ in the next batch.
    with shape_config.patch(use_duck_shape=False):  # pyright: ignore[reportAttributeAccessIssue]
        return _graphs[key](*tensors)


def _kind(t: Tensor) -> object:
    """Describe what a graph is specific to: dtype, device, layout, which sizes are 1, and components."""
    layout = None if t.is_contiguous() else tuple(sorted(range(t.ndim), key=lambda d: (-t.stride(d), d)))
    components = t.shape[0] if t.ndim in (2, 4) else None  # those of three dimensions are activations
    return t.dtype, t.device.type, tuple(n == 1 for n in t.shape), layout, components


def _graph(function: Callable[..., Any], options: tuple[Any, ...]) -> Callable[..., Any]:
    passes = sys.modules[__name__]

    def graph(*tensors: Tensor | None) -> Any:
        return function(passes, options, *tensors)

    # A code object of its own, since torch.compile limits the recompilations of each.
    graph.__code__ = graph.__code__.replace()
    return torch.compile(graph, dynamic=True, fullgraph=True, options=OPTIONS)


def store(t: Tensor) -> Tensor:
    """Stack t (K, ...) of its rows."""
    return torch.stack(list(t.unbind()))


def _sum(parts: list[Tensor]) -> Tensor:
    return functools.reduce(torch.add, parts)


def _power_of_two(t: Tensor) -> Tensor:
    """Return 2^t for t <= 0, and zero where that is below the least posterior.

    Powers of two, because Inductor would store those of e; and float32 in operations of its own, because a call to
    a function makes a CPU put all registers aside, which takes longer than the series. That is Taylor's about the
    nearest integer, cut after the seventh power: relative error (ln 2 / 2)^8 / 8! = 5e-9 beside rounding.
    """
    least = math.log2(least_posterior(t.dtype))
    if t.dtype != torch.float32:
        return torch.where(t < least, 0.0, t.exp2())
    whole = t.clamp(min=least).round()
    rest = t - whole
    series = torch.full_like(rest, math.log(2) ** 7 / math.factorial(7))
    for n in range(6, -1, -1):
        series = series * rest + math.log(2) ** n / math.factorial(n)
    power = ((whole + 127).to(torch.int32) << 23).view(torch.float32)  # the exponent's bits
    return torch.where(t < least, 0.0, series * power)


def _posterior(x: Tensor, mix: Mixture) -> list[Tensor]:
    """Eq. 6, (N, G, 1, L) for each component."""
    scales, offsets = store(-0.5 * LOG2_E * mix.precision), store(LOG2_E * mix.constant)
    logs = [((x - m).square() * a).sum(2) + b for m, a, b in zip(mix.mean, scales, offsets, strict=True)]
    largest = functools.reduce(torch.maximum, logs)
    raw = [_power_of_two(log - largest) for log in logs]
    share = 1 / _sum(raw)  # once: a division takes a CPU longer than all else here
    return [(p * share).unsqueeze(2) for p in raw]


def posterior(x: Tensor, mix: Mixture) -> Tensor | None:
    """Store the posteriors, but on a GPU those of single channels.

    These are K times x, which a GPU finds again sooner than it reads it; a CPU does not.
    """
    if x.is_cuda and x.shape[2] == 1:
        return None
    return torch.stack(_posterior(x.to(mix.mean.dtype), mix)).squeeze(3)


def _each(x: Tensor, tau: Tensor | None, mix: Mixture) -> list[Tensor]:
    """Return the posteriors of each component, (N, G, 1, L)."""
    return _posterior(x, mix) if tau is None else list(tau.unsqueeze(3).unbind())


def _totals(parts: list[Tensor]) -> Tensor:
    """Sum each (N, G, D, L) over the locations: (K, G, D, 1)."""
    return torch.stack([t.sum(3, keepdim=True).sum(0) for t in parts])


def moments(x: Tensor, mix: Mixture) -> tuple[Tensor | None, Tensor, Tensor, Tensor]:
    """Two loops, and one more for the posteriors of groups of channels."""
    tau, x = posterior(x, mix), x.to(mix.mean.dtype)
    mass = _totals(_each(x, tau, mix))
    count = mass.clamp(min=torch.finfo(x.dtype).tiny)
    mean = store(_totals([t * x for t in _each(x, tau, mix)]) / count)
    first, second = [], []
    for k, t in enumerate(_each(x, tau, mix)):
        u = x - mean[k]
        first.append(t * u)
        second.append(t * u * u)
    shift = store(_totals(first) / count)  # what rounding left of the first mean's error, under a large offset
    var = (_totals(second) / count - shift.square()).clamp(min=0)
    return tau, mass[:, :, 0, 0], store(mean + shift), store(var)


def transform(x: Tensor, tau: Tensor | None, mean: Tensor, rstd: Tensor, bias: Tensor | None, mix: Mixture) -> Tensor:
    """One loop; two where posteriors of groups have to be found first."""
    dtype, x = x.dtype, x.to(mean.dtype)
    y = _sum([(x - mean[k]) * rstd[k] * t for k, t in enumerate(_each(x, tau, mix))])
    return (y if bias is None else y + bias).to(dtype)


def gradient_sums(x: Tensor, g: Tensor, tau: Tensor | None, mean: Tensor, mix: Mixture) -> tuple[Tensor, Tensor]:
    """One loop."""
    x, g = x.to(mean.dtype), g.to(mean.dtype)
    weighted = [t * g for t in _each(x, tau, mix)]
    return _totals(weighted), _totals([h * (x - mean[k]) for k, h in enumerate(weighted)])


def _through_posterior(
    x: Tensor, tau: list[Tensor], dtau: list[Tensor], mix: Mixture, wanted: bool
) -> tuple[Tensor, DensitySums | None]:
    """Take the posteriors' gradients (N, G, 1, L) to x, negative, and to the sums, if they are wanted."""
    joint = x.shape[2] > 1
    dtau = list(torch.stack(dtau).unbind()) if joint else dtau
    average = _sum([t * d for t, d in zip(tau, dtau, strict=True)])
    z = [t * (d - average) for t, d in zip(tau, dtau, strict=True)]
    z = list(torch.stack(z).unbind()) if joint else z
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
    mix: Mixture,
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
    x: Tensor, g: Tensor, rstd: Tensor, mix: Mixture, wanted: bool
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
