"""What the layers launch on a GPU, recorded and compiled without one.

Nothing is computed: activations are on the meta device, and kernels are recorded instead of launched. Layers run with
the bodies of their custom operators; the kernels that these launch are found by recording, not from a list of names.
"""

import contextlib
import os
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType, SimpleNamespace
from typing import Any, NamedTuple
from unittest import mock

import numpy as np
import torch
from norm_cases import any_norm
from torch import Tensor
from torch._library.custom_ops import OPDEFS
from torch.autograd.graph import saved_tensors_hooks
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from common.norms.backends import checkpointing
from common.norms.backends.graphs import NAMESPACE
from common.norms.backends.triton import launch

COMPONENTS = 3
LAYOUTS = {"NCHW": torch.contiguous_format, "NHWC": torch.channels_last}
FREE = ("empty", "new_empty", "_unsafe_view", "detach", "alias", "lift", "_reshape_alias", "sym_", "is_same_size")
"""Beginnings of the names of operators that launch nothing, besides views."""
FEW = {"scb_unknown_fwd_kernel", "scb_unknown_bwd_kernel", "mixture_merge_kernel", "draw_kernel", "em_step_kernel"}
"""Kernels that take an activation and touch few of its locations: of unknown samples, those drawn, or the first one."""


class Layer(NamedTuple):
    """A layer in a mode."""

    kind: str
    options: Mapping[str, Any] = MappingProxyType({})
    training: bool = True
    known: bool = True
    """Whether the layer is given the clusters of the samples, if it takes any."""

    def build(self, channels: int, device: str = "meta") -> Any:
        """Return the layer, past its initialization."""
        layer = any_norm(self.kind, channels, COMPONENTS, backend="triton", device=device, **self.options)
        if self.kind == "mn":
            layer.set_initialized(True)
        return layer.train(self.training)

    def arguments(self, x: Tensor) -> tuple[Tensor | None, ...]:
        """Return what a forward pass takes: x (N, C, *), and the samples' clusters if the layer takes them."""
        if not self.kind.startswith("scb"):
            return (x,)
        return x, torch.arange(len(x), device=x.device) % COMPONENTS if self.known else None


LAYERS = {
    "UCBNorm": Layer("ucb"),
    "UCBNorm, groups=1": Layer("ucb", {"groups": 1}),
    "UCBNorm, update=weight": Layer("ucb", {"update": "weight"}),
    "UCBNorm, statistics=learned": Layer("ucb", {"update": "weight", "statistics": "learned"}),
    "UCBNorm, evaluation": Layer("ucb", training=False),
    "UCBNorm, groups=1, evaluation": Layer("ucb", {"groups": 1}, training=False),
    "SCBNorm": Layer("scb"),
    "SCBNorm, affine": Layer("scb", {"affine": True}),
    "SCBNorm, evaluation, ids": Layer("scb", training=False),
    "SCBNorm, evaluation, unknown": Layer("scb", training=False, known=False),
    "SCBNormBase": Layer("scb_base"),
    "MixtureNorm": Layer("mn"),
    "MixtureNorm, evaluation": Layer("mn", training=False),
}


class Launch(NamedTuple):
    """A kernel of Triton's, or an operator of torch's, that is launched."""

    name: str
    tensors: list[Tensor]
    """That it reads and writes; those that torch's operators do both with stand twice."""
    kernel: Any = None
    grid: tuple[int, ...] = ()
    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = MappingProxyType({})

    def passes(self, size: int) -> int:
        """Return how many tensors of so many elements or more it reads or writes."""
        return 0 if self.name in FEW else sum(t.numel() >= size for t in self.tensors)


def distinct(values: Any) -> list[Tensor]:
    """Return the tensors in a tree, one of those that are in the same place."""
    tensors = [t for t in pytree.tree_leaves(values) if isinstance(t, Tensor)]
    return list({(t.untyped_storage()._cdata, t.storage_offset(), t.shape): t for t in tensors}.values())


class Recorder(TorchDispatchMode):
    """Record every launch on the meta device in ``launches``, in order, while it is entered."""

    def __init__(self) -> None:
        super().__init__()
        self.launches: list[Launch] = []
        self.bodies = {name: op._init_fn for name, op in OPDEFS.items() if name.startswith(f"{NAMESPACE}::")}

    def take(self) -> list[Launch]:
        """Return what was recorded since the last call."""
        taken, self.launches = self.launches, []
        return taken

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        if body := self.bodies.get(func.name()):
            with self:
                return body(*args, **kwargs)
        out = func(*args, **kwargs)
        name = func.overloadpacket.__name__
        tensors = distinct((args, kwargs)) + distinct(out)
        if any(t.is_meta and t.numel() for t in tensors) and not func.is_view and not name.startswith(FREE):
            self.launches.append(Launch(name, tensors))
        return out

    def kernel(self, function: Any, grid: tuple[int, ...], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Record the launch of a kernel of Triton's."""
        self.launches.append(Launch(function.__name__, distinct((args, kwargs)), function, grid, args, kwargs))


@contextlib.contextmanager
def replaced_kernels(run: Callable[..., Any]) -> Iterator[None]:
    """Call run(kernel, grid, args, kwargs) in place of launching a kernel of Triton's, on any device."""
    from triton.runtime.interpreter import InterpretedFunction  # noqa: PLC0415 - an optional dependency
    from triton.runtime.jit import JITFunction  # noqa: PLC0415

    def replaced(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        return run(self, grid, args, kwargs)

    with (
        mock.patch.object(launch, "refusal", return_value=None),
        mock.patch.object(JITFunction, "run", replaced),
        mock.patch.object(InterpretedFunction, "run", replaced),
    ):
        yield


class Step(NamedTuple):
    """A forward and a backward pass of a layer."""

    forward: list[Launch]
    backward: list[Launch]
    kept: int
    """Bytes that autograd keeps for the backward pass."""


def record(layer: Layer, shape: tuple[int, ...], dtype: torch.dtype, layout: str) -> Step:
    """Return what a layer launches for an activation of a shape (N, C, H, W)."""
    module, kept = layer.build(shape[1]), []
    x, g = (torch.empty(shape, dtype=dtype, device="meta").to(memory_format=LAYOUTS[layout]) for _ in range(2))
    inputs = [x.requires_grad_(), *(p for p in module.parameters() if p.requires_grad)]
    arguments = layer.arguments(x)
    recorder = Recorder()
    no_autocast = mock.patch.object(torch, "autocast", return_value=contextlib.nullcontext())  # it takes no meta device
    unchecked = mock.patch.object(checkpointing, "_may_follow", return_value=False)  # whatever hooks count here
    with replaced_kernels(recorder.kernel), no_autocast, unchecked, recorder:
        with saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
            y = module(*arguments)
        forward = recorder.take()
        torch.autograd.grad(y, inputs, g, allow_unused=True)
    return Step(forward, recorder.take(), sum(t.nbytes for t in distinct(kept)))


@contextlib.contextmanager
def gpu(arch: int, run: Callable[..., None] | None = None) -> Iterator[SimpleNamespace]:
    """Let Triton compile for compute capability ``arch`` (90 is sm_90) and call run in place of a kernel's launcher.

    Yields:
        What stands in for Triton's driver.
    """
    from triton.backends.compiler import GPUTarget  # noqa: PLC0415 - an optional dependency
    from triton.runtime.driver import driver  # noqa: PLC0415

    own = SimpleNamespace(
        get_current_device=lambda: arch,
        get_current_stream=lambda device: 0,
        get_current_target=lambda: GPUTarget("cuda", arch, 32),
        launcher_cls=lambda source, metadata: run,
        utils=SimpleNamespace(
            load_binary=lambda *_: (None, 1, 0, 0, 1024),
            get_device_properties=lambda device: {"max_shared_mem": 227 << 10},
        ),
    )
    with (
        tempfile.TemporaryDirectory() as cache,
        mock.patch.dict(os.environ, TRITON_CACHE_DIR=cache),
        mock.patch.object(driver, "_active", own),
    ):
        yield own


def compiled(launched: Launch, arch: int) -> Any:
    """Return what Triton compiles for a launch on compute capability ``arch``."""
    with gpu(arch):
        return launched.kernel.run(*launched.args, grid=launched.grid, warmup=True, **launched.kwargs)


def resources(kernel: Any) -> tuple[int, int]:
    """Return the registers of a thread of a compiled kernel, and the bytes for which they did not suffice."""
    import triton.backends.nvidia  # noqa: PLC0415 - an optional dependency

    tool = Path(triton.backends.nvidia.__file__).parent / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(kernel.asm["cubin"])
        said = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", said)
    assert found, said
    return int(found[1]), int(found[2]) + int(found[3])


@contextlib.contextmanager
def as_accurate_as_a_gpu() -> Iterator[None]:
    """Let Triton's interpreter be off by as much as NVIDIA documents, up or down as a result's bits have it.

    The PTX ISA allows div.full.f32 and ex2.approx.f32 2 ulp (2 to the power of 0 is 1), and rsqrt.approx.f32 2^-22.9 of
    the result; the CUDA C++ Programming Guide allows logf and log2f 1 ulp (the logarithm of 1 is 0).
    """
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle  # noqa: PLC0415 - an optional dependency

    def off(handle: Any, ulps: int, share: float = 0.0) -> Any:
        value = handle.data
        if value.dtype != np.float32:
            return handle
        up = (value.view(np.int32).astype(np.uint32) * np.uint32(2654435761)) >> np.uint32(31) == 0
        wrong = value * np.float32(1 - share) if share else value
        wrong = np.where(up & (share > 0), value * np.float32(1 + share), wrong)
        for _ in range(ulps):
            wrong = np.nextafter(wrong, np.where(up, np.float32(np.inf), np.float32(-np.inf)))
        exact = ~np.isfinite(value) | (value == 0)
        return TensorHandle(np.where(exact, value, wrong).astype(np.float32), handle.dtype)

    def divide(self: Any, a: Any, b: Any) -> Any:
        return off(self.create_precise_divf(a, b), 2)

    def exp2(self: Any, a: Any) -> Any:
        result = self.unary_op(a, np.exp2)
        return TensorHandle(np.where(a.data == 0, result.data, off(result, 2).data), result.dtype)

    def exp(self: Any, a: Any) -> Any:
        return exp2(self, TensorHandle(a.data * a.data.dtype.type(np.log2(np.e)), a.dtype))

    builder = mock.patch.multiple(
        InterpreterBuilder,
        create_fdiv=divide,
        create_exp2=exp2,
        create_exp=exp,
        create_log=lambda self, a: off(self.unary_op(a, np.log), 1),
        create_log2=lambda self, a: off(self.unary_op(a, np.log2), 1),
        create_rsqrt=lambda self, a: off(self.unary_op(a, lambda x: 1 / np.sqrt(x)), 0, 2**-22.9),
    )
    with builder:
        yield
