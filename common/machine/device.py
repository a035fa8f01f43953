"""Device, precision, memory layout and determinism, decided once at the start of a run."""

import os
import re
from contextlib import AbstractContextManager
from typing import Literal

import torch

from common.errors import UsageError

Precision = Literal["fp32", "bf16", "fp16"]


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
    """Set torch's number of CPU threads; 0 keeps torch's own choice."""
    if threads:
        torch.set_num_threads(threads)


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
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    return torch.autocast(device.type, dtype, enabled=precision != "fp32")


def memory_format(channels_last: bool) -> torch.memory_format:
    """Return the layout of 4-d tensors."""
    return torch.channels_last if channels_last else torch.contiguous_format
