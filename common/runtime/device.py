"""Device, precision, memory layout and determinism, decided once at the start of a run."""

import ctypes
import math
import os
import re
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Literal

import torch

from common.runtime.errors import UsageError

Precision = Literal["fp32", "bf16", "fp16"]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def resolve_device(name: str) -> torch.device:
    """Turn ``auto``, ``cpu``, ``cuda`` or ``cuda:n`` into a device that exists.

    Raises:
        UsageError: for another name, or a CUDA device that torch does not see.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if not re.fullmatch(r"cpu|cuda(:\d+)?", name):
        raise UsageError(f"device: expected auto, cpu, cuda or cuda:n, got {name}")
    device = torch.device(name)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UsageError(
            f"device: {name} asked for, but torch sees {torch.cuda.device_count()} CUDA devices; use cpu or auto"
        )
    return device


def set_threads(threads: int) -> None:
    """Set torch's number of CPU threads; 0 takes torch's own choice, or a container's CPU quota if that is less.

    Torch counts processors and knows no quotas; more threads than a quota feeds wait for each other.
    """
    quota = None if threads else cpu_quota()
    if quota is not None:
        threads = min(torch.get_num_threads(), max(1, math.floor(quota)))
    if threads:
        torch.set_num_threads(threads)


def keep_freed_memory() -> bool:
    """Keep what a step frees for the next one, which needs as much again; return whether the C library can.

    glibc returns freed memory at the end of every step and gets it again, each page zeroed, in the next: a tenth of a
    small network's step on a CPU. Blocks above 256 MiB, such as data sets, are still returned. Settings of glibc in the
    environment have precedence.
    """
    if os.environ.keys() & {"MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "GLIBC_TUNABLES"}:
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if os.name == "posix" else None
    if mallopt is None:  # no glibc
        return False
    trim_threshold, mmap_threshold = -1, -3  # malloc.h
    return bool(mallopt(mmap_threshold, 2**28) and mallopt(trim_threshold, 2**31 - 1))


def cpu_quota(root: Path = Path("/")) -> float | None:
    """Return how many CPUs this process's control groups allow it; None without a limit.

    Reads the process's group of version 2 and those above it, and the top group of version 1, which in a container is
    its own. ``root`` holds ``proc`` and ``sys``.
    """
    top, version_1 = root / "sys/fs/cgroup", root / "sys/fs/cgroup/cpu"
    group = top / _text(root / "proc/self/cgroup").rpartition("0::/")[2].removesuffix("\n")
    limits = [_text(folder / "cpu.max").split() for folder in (group, *group.parents)]
    limits.append([*_text(version_1 / "cpu.cfs_quota_us").split(), *_text(version_1 / "cpu.cfs_period_us").split()])
    quotas = [int(limit[0]) / int(limit[1]) for limit in limits if limit and limit[0] not in ("max", "-1")]
    return min(quotas, default=None)


def _text(file: Path) -> str:
    return file.read_text(encoding="utf-8") if file.exists() else ""


def set_determinism(deterministic: bool) -> None:
    """Ask for kernels whose results do not vary between runs; cuBLAS wants its variable set before first use."""
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.backends.cudnn.benchmark = False
        torch.use_deterministic_algorithms(True)
    elif torch.cuda.is_available():
        torch.backends.cudnn.benchmark = True  # shapes are constant: drop_last


def autocast(device: torch.device, precision: Precision) -> AbstractContextManager[object]:
    """Return the autocast context of a precision; float32 leaves everything as it is."""
    return torch.autocast(device.type, DTYPES[precision], enabled=precision != "fp32")


def memory_format(channels_last: bool | None) -> torch.memory_format:
    """Return the layout of 4-d tensors; None, of a configuration that no run has resolved, is False."""
    return torch.channels_last if channels_last else torch.contiguous_format
