"""The checks of arguments, the choice of a backend, and the two primitives of the family as functions."""

import math
from collections.abc import Sequence
from numbers import Integral, Real
from typing import TypeGuard, get_args

import torch
from torch import Tensor

from .backends import graphs
from .backends.backend import Backend, ClusterOptions, ClusterParams, Options, Reference
from .backends.cpu import library
from .backends.cpu.library import Cpu
from .backends.eager import Eager
from .backends.reference import MixtureParams, Moments, Scale, Statistics, UnknownPosterior, UnknownScale
from .backends.triton import launch
from .backends.triton.backend import Triton

GIVE_IDS = "call the layer with its samples' cluster ids: layer(x, ids)"


def check_choice(name: str, value: object, choices: tuple[object, ...]) -> None:
    """Raise ValueError unless value is one of the choices."""
    if value not in choices:
        raise ValueError(f"{name}: expected one of {', '.join(map(repr, choices))}, got {value!r}")


def is_integer(value: object) -> TypeGuard[int]:
    """Return whether value is a whole number of an integer type; True and False are none."""
    return isinstance(value, Integral) and not isinstance(value, bool)


def _is_number(value: object) -> TypeGuard[float]:
    return isinstance(value, Real) and not isinstance(value, bool)


def check_whole(name: str, value: object) -> int:
    """Raise ValueError unless value is a whole number."""
    if not is_integer(value):
        raise ValueError(f"{name}: expected a whole number, got {value!r}")
    return int(value)


def check_size(name: str, value: object) -> int:
    """Raise ValueError unless value is a whole number of at least 1."""
    size = check_whole(name, value)
    if size < 1:
        raise ValueError(f"{name}: expected at least 1, got {size}")
    return size


def check_groups(groups: object, channels: int) -> int:
    """Raise ValueError unless groups is a positive divisor of channels."""
    if not is_integer(groups) or groups < 1 or channels % groups:
        raise ValueError(f"groups: expected a divisor of {channels}, got {groups!r}")
    return int(groups)


def check_eps(eps: object) -> float:
    """Raise ValueError unless eps is a positive, finite number."""
    if not _is_number(eps) or not 0 < eps < math.inf:
        raise ValueError(f"eps: expected a positive, finite number, got {eps!r}")
    return float(eps)


def check_momentum(momentum: object) -> float:
    """Raise ValueError unless momentum is a number from 0 to 1."""
    if not _is_number(momentum) or not 0 <= momentum <= 1:
        raise ValueError(f"momentum: expected 0 to 1, got {momentum!r}")
    return float(momentum)


def check_dtype(dtype: object) -> None:
    """Raise ValueError unless dtype is None or a real floating-point one."""
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise ValueError(f"dtype: expected a floating-point torch.dtype or None, got {dtype!r}")


def describe(value: object) -> str:
    """Return a tensor's dtype and shape, or the type of anything else."""
    return f"{value.dtype} {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__


def check_input(x: object, channels: int, dim: int = 1) -> None:
    """Raise ValueError unless x is a floating-point tensor with a batch, and so many channels in dimension dim."""
    if not isinstance(x, Tensor) or not x.is_floating_point():
        raise ValueError(f"x: expected a floating-point tensor, got {describe(x)}")
    if x.ndim < 2 or not -x.ndim < dim < x.ndim or x.shape[dim] != channels:
        raise ValueError(f"x: expected {channels} channels in dimension {dim}, got {tuple(x.shape)}")


def check_training_batch(x: Tensor, channels: int) -> None:
    """Raise ValueError if x holds one value per channel, which has no variance."""
    if x.numel() == channels:
        raise ValueError(f"x: expected more than one value per channel in training, got {tuple(x.shape)}")


def check_positions(x: Tensor) -> None:
    r"""Raise ValueError if a sample of x (N, C, \*) holds one value per channel, which has no variance."""
    if math.prod(x.shape[2:]) == 1:
        raise ValueError(f"x: expected more than one position to take statistics of, got {tuple(x.shape)}")


def check_device(name: str, tensor: Tensor, device: torch.device, whose: str) -> None:
    """Raise ValueError unless the tensor is on the device, which is that of ``whose``."""
    if tensor.device != device:
        raise ValueError(f"{name}: expected a tensor on {device}, as {whose}, got one on {tensor.device}")


def check_parameter(name: str, tensor: object, shape: tuple[int, ...], x: Tensor) -> None:
    """Raise ValueError unless tensor is floating-point, of the shape, and on x's device."""
    if not isinstance(tensor, Tensor) or not tensor.is_floating_point() or tensor.shape != shape:
        raise ValueError(f"{name}: expected a floating-point {tuple(shape)}, got {describe(tensor)}")
    check_device(name, tensor, x.device, "x")


def check_mean(mean: object) -> None:
    """Raise ValueError unless mean is a floating-point (K, C) with at least one row."""
    if not isinstance(mean, Tensor) or not mean.is_floating_point() or mean.ndim != 2 or len(mean) < 1:
        raise ValueError(f"mean: expected a floating-point (K, C) with K of at least 1, got {describe(mean)}")


def check_cluster(cluster: object, x: Tensor, num_clusters: int, lowest: int, remedy: str | None = None) -> None:
    """Raise ValueError unless cluster is int64 (N,) on x's device, IndexError (CPU only) for an id beyond range.

    ``remedy`` says how ids are given, where there are none.
    """
    if not isinstance(cluster, Tensor) or cluster.dtype != torch.int64 or cluster.shape != x.shape[:1]:
        message = f"cluster: expected an int64 tensor ({len(x)},), got {describe(cluster)}"
        raise ValueError(f"{message}; {remedy}" if remedy and cluster is None else message)
    check_device("cluster", cluster, x.device, "x")
    if not graphs.unseen() and cluster.device.type == "cpu" and len(cluster):
        low, high = (int(v) for v in cluster.aminmax())
        if low < lowest or high >= num_clusters:
            wrong = low if low < lowest else high
            raise IndexError(f"cluster: expected ids from {lowest} to {num_clusters - 1}, got {wrong}")


def check_cluster_or_unknown(
    cluster: object, x: Tensor, num_clusters: int, allow_unknown: bool, remedy: str | None = None
) -> None:
    """Check as ``check_cluster``; -1 and None stand for unknown clusters where these are allowed, as in evaluation."""
    if cluster is not None:
        check_cluster(cluster, x, num_clusters, lowest=-1 if allow_unknown else 0)
    elif not allow_unknown:
        message = f"cluster: expected an int64 tensor ({len(x)},) in training, got None"
        raise ValueError(f"{message}; {remedy}" if remedy else message)


IMPLEMENTED: dict[str, Backend] = {"reference": Reference(), "eager": Eager(), "compiled": Cpu(), "triton": Triton()}
BACKENDS = ("auto", *IMPLEMENTED)
LEAST_VALUES = 1 << 14
"""Values of an activation from which "auto" takes compiled loops on a CPU.

Measured at commit 7c56381 on a core of an AMD EPYC: they save 2 ms of a training step there, and 30 ms at a million
values (docs/benchmarks.md). Below they are faster too, but rarely make up for the 2 s of their compiler."""


def check_backend(backend: str, num_components: int = 0) -> None:
    """Raise ValueError unless the backend exists, for mixtures of K components or, where K is 0, for clusters."""
    check_choice("backend", backend, BACKENDS)
    if backend == "compiled" and (reason := library.refusal_of_components(num_components)):
        raise ValueError(f"backend: 'compiled' {reason}")


def choose_backend(
    backend: str,
    x: Tensor,
    num_components: int = 0,
    group_channels: int = 1,
    parameters: Sequence[Tensor | None] = (),
) -> str:
    """Return the backend that computes x with these parameters.

    "auto" is triton on a GPU where its kernels can run; compiled on a CPU for mixtures of K components, where the loops
    of ``backends.cpu`` can and x is large enough; else eager. Under torch.func and in exported graphs the answer is
    reference, whatever was asked for.

    Raises:
        ValueError: an unknown backend, or one that cannot run here, with the reason.
    """
    check_backend(backend, num_components)
    if graphs.exported() and (backend != "triton" or torch.onnx.is_in_onnx_export()):
        return "reference"  # the equations themselves: operators of torch alone
    if graphs.transformed():
        return "reference"  # torch takes any derivative of it
    if backend == "compiled":
        if torch.compiler.is_compiling():
            return "eager"  # no graph can hold the loops
        if reason := library.refusal(x, num_components, *parameters):
            raise ValueError(f"backend: 'compiled' {reason}")
    if backend not in ("auto", "triton"):
        return backend
    if backend == "auto" and not x.is_cuda:
        pays = num_components > 0 and x.numel() >= LEAST_VALUES
        return "compiled" if pays and library.refusal(x, num_components, *parameters) is None else "eager"
    reason = launch.refusal(x) or launch.mixture_refusal(max(num_components, 1), group_channels)
    if backend == "triton" and reason:
        raise ValueError(f"backend: 'triton' {reason}")
    return "eager" if reason else "triton"


def settled_backend(backend: str, device: torch.device, dtype: torch.dtype, num_components: int) -> str:
    """Return what ``choose_backend`` makes of a backend for a large activation; no components stand for clusters."""
    return choose_backend(backend, torch.empty(LEAST_VALUES, device=device, dtype=dtype), num_components)


def _check_tensors(x: Tensor, mean: Tensor, var: Tensor) -> None:
    check_mean(mean)
    check_input(x, mean.shape[1])
    check_device("mean", mean, x.device, "x")
    check_parameter("var", var, mean.shape, x)


def empty(x: Tensor, *parameters: Tensor) -> Tensor:
    """Return x, which holds nothing, in a graph that gives every parameter a gradient of zero."""
    return x + sum(p.sum() for p in parameters) * 0


def cluster_norm(
    x: Tensor,
    cluster: Tensor | None,
    mean: Tensor,
    var: Tensor,
    *,
    eps: float = 1e-5,
    unknown_scale: UnknownScale = "match",
    unknown_posterior: UnknownPosterior = "location",
    allow_unknown: bool = True,
    backend: str = "auto",
) -> Tensor:
    r"""Normalise each sample by the mean and variance of its cluster.

    .. math:: y_i = (x_i - \mu_k) / \sqrt{\sigma_k^2 + \epsilon}

    An unknown cluster is replaced by all of them, weighed by the posteriors under equal priors (Eq. 12); one
    batch may hold known and unknown ids.

    Args:
        x: activation (N, C, \*), float16, bfloat16, float32 or float64.
        cluster: ids int64 (N,) from 0 to K - 1, -1 for an unknown one; None if none is known.
        mean: (K, C).
        var: (K, C), positive.
        eps: added to var, in squared units of x.
        unknown_scale: "paper" keeps Eq. 12's factor sqrt(K), which makes a certain cluster sqrt(K) times
            larger than a known one; "match" drops it.
        unknown_posterior: take the posterior at each "location", or once for the whole "sample".
        allow_unknown: whether -1 and None are allowed, as in evaluation.
        backend: "reference", "eager", "triton" or "auto".

    Returns:
        Like x, computed in float32 (float64 for float64).

    Raises:
        ValueError: x has not C channels or is not floating-point, mean and var are not both (K, C), cluster is not
            int64 (N,), a tensor is on another device than x, an option is none of those above, or the backend
            cannot run here.
        IndexError: an id beyond range, on the CPU. On a GPU, and in a graph, its row is NaN, since a check would
            synchronise.

    Source: arXiv:2403.16798, Eqs. 10, 12 and 13 (without K in the denominator, which is a misprint).
    """
    _check_tensors(x, mean, var)
    eps = check_eps(eps)
    check_choice("unknown_scale", unknown_scale, get_args(UnknownScale))
    check_choice("unknown_posterior", unknown_posterior, get_args(UnknownPosterior))
    check_cluster_or_unknown(cluster, x, len(mean), allow_unknown)
    chosen = IMPLEMENTED[choose_backend(backend, x)]
    if x.numel() == 0:
        return empty(x, mean, var)
    options = ClusterOptions(eps, unknown_scale, unknown_posterior, allow_unknown)
    return chosen.normalise_clusters(x, cluster, ClusterParams(mean, var), (None, None), options)


def mixture_norm(
    x: Tensor,
    log_lambda: Tensor,
    mean: Tensor,
    var: Tensor,
    *,
    groups: int = 1,
    eps: float = 1e-5,
    scale: Scale = "paper",
    statistics: Statistics = "batch",
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Moments | None]:
    r"""Normalise under a Gaussian mixture with diagonal covariances.

    .. math:: y_i = \sum_k \frac{\tau_{ik}}{\sqrt{\lambda_k}} \frac{x_i - m_k}{\sqrt{v_k + \epsilon}}

    where tau are the posteriors under the given mixture, and m and v either the batch's posterior-weighted
    moments (statistics="batch", Eqs. 6-9) or the given ones (statistics="learned", Eq. 15). The output
    variance is not 1: it is K for well separated components, (sum_k sqrt(lambda_k))^2 for identical ones.

    Args:
        x: activation (N, C, \*), float16, bfloat16, float32 or float64.
        log_lambda: log of the mixture weights, (K,).
        mean: (K, C).
        var: (K, C), positive.
        groups: a divisor of C; each group of channels has a posterior of its own. 1 is the paper's.
        eps: added to every variance, in squared units of x.
        scale: "paper", or "sqrt_k" to divide the output by sqrt(K).
        statistics: "batch" or "learned".
        weight: scale of each channel of the output, (C,); given together with bias, or not at all.
        bias: shift of each channel, (C,).
        backend: "reference", "eager", "compiled", "triton" or "auto".

    Returns:
        The output, like x, computed in float32 (float64 for float64); and the batch's moments without
        gradient, or None with statistics="learned".

    Raises:
        ValueError: x has not C channels or is not floating-point, the mixture's shapes do not agree, a tensor is on
            another device than x, groups does not divide C, an option is none of those above, or
            the backend cannot run here.

    Source: arXiv:2403.16798, Eqs. 4-9 and 15; Eq. 8's expectations of weights that sum to one are sums.
    """
    _check_tensors(x, mean, var)
    check_parameter("log_lambda", log_lambda, mean.shape[:1], x)
    for name, value in (("weight", weight), ("bias", bias)):
        if value is not None:
            check_parameter(name, value, mean.shape[1:], x)
    if (weight is None) != (bias is None):
        raise ValueError(f"weight: expected together with bias, got only {'bias' if weight is None else 'weight'}")
    eps = check_eps(eps)
    check_choice("scale", scale, get_args(Scale))
    check_choice("statistics", statistics, get_args(Statistics))
    groups = check_groups(groups, mean.shape[1])
    params = MixtureParams(log_lambda, mean, var)
    given = [t for t in (*params, weight, bias) if t is not None]
    chosen = IMPLEMENTED[choose_backend(backend, x, len(mean), mean.shape[1] // groups, given)]
    if x.numel() == 0:
        moments = Moments(mean.new_zeros(len(mean), groups), torch.zeros_like(mean), torch.zeros_like(mean))
        return empty(x, *given), moments if statistics == "batch" else None
    y, state = chosen.normalise(x, params, (weight, bias), Options(groups, eps, scale, statistics))
    return y, None if state is None else chosen.moments(state, len(mean), groups)
