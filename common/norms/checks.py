"""What layers and functions refuse, each in one line that names the argument; nothing asks a GPU for an answer.

Checks of numbers return them as Python's own, since Triton takes none of NumPy's.
"""

import math
from numbers import Integral, Real
from typing import TypeGuard

import torch
from torch import Tensor

from .backends import capture

GIVE_IDS = "call the layer with its samples' cluster ids: layer(x, ids)"


def check_choice(name: str, value: object, choices: tuple[object, ...]) -> None:
    """Raise ValueError unless value is one of the choices."""
    if value not in choices:
        raise ValueError(f"{name}: expected one of {', '.join(map(repr, choices))}, got {value!r}")


def is_integer(value: object) -> TypeGuard[int]:
    """Say whether value is a whole number of an integer type; True and False are none."""
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
    """Raise ValueError if x holds one value per channel, of which there is no variance."""
    if x.numel() == channels:
        raise ValueError(f"x: expected more than one value per channel in training, got {tuple(x.shape)}")


def check_positions(x: Tensor) -> None:
    r"""Raise ValueError if a sample of x (N, C, \*) holds one value per channel, of which there is no variance."""
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
    if not capture.unseen() and cluster.device.type == "cpu" and len(cluster):
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
