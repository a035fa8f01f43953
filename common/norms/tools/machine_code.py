"""A launch compiled for a GPU that need not be there, as the launch itself would be, and what its instructions are."""

import functools
import re
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from common.norms.tools.recording import Launch

USAGE = re.compile(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)")
INSTRUCTION = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(?:@!?U?PT?\d*\s+)?([A-Z][A-Z0-9_]*)((?:\.[\w.]+)?)([^;]*);")
WIDTHS = {"128": 16, "64": 8, "U16": 2, "S16": 2, "U8": 1, "S8": 1}
"""Bytes of a load or store, by what its name has; 4 if none of these."""
LOADS, STORES = ("LDG", "LDGSTS"), ("STG",)
WARP = 32


class Pointer:
    """What Triton asks of a tensor before it compiles: its type, and whether its address is a multiple of 16."""

    def __init__(self, t: Tensor) -> None:
        self.dtype = t.dtype
        self._offset = int(t.storage_offset()) * t.element_size()

    def data_ptr(self) -> int:
        """Return an address; memory itself is aligned."""
        return self._offset


class Specialised(NamedTuple):
    """What Triton compiles for a launch: two launches with the same ``key`` share it."""

    key: str
    source: Any
    options: Any


@functools.cache
def _binder(function: Any, arch: int) -> tuple[Any, Any]:
    """Return what a kernel is compiled by for compute capability ``arch``, and what binds arguments to it."""
    from triton.backends.compiler import GPUTarget  # noqa: PLC0415 - an optional dependency
    from triton.compiler import make_backend  # noqa: PLC0415
    from triton.runtime.jit import create_function_from_signature  # noqa: PLC0415

    backend = make_backend(GPUTarget("cuda", arch, WARP))
    return backend, create_function_from_signature(function.signature, function.params, backend)


def specialise(launch: Launch, arch: int) -> Specialised:
    """Specialise a launch's kernel, as the launch does, for compute capability ``arch`` (90 is sm_90)."""
    from triton.compiler import ASTSource  # noqa: PLC0415 - an optional dependency

    function, (backend, bind) = launch.function, _binder(launch.function, arch)
    given = {name: Pointer(value) if isinstance(value, Tensor) else value for name, value in launch.arguments.items()}
    bound, specialization, options = bind(**given, **launch.options)
    key = f"{function.__name__} {specialization} {options}"
    parsed, signature, constants, attributes = function._pack_args(
        backend, dict(launch.options), bound, specialization, options
    )
    return Specialised(key, ASTSource(function, signature, constants, attributes), parsed)


def compile_launch(launch: Launch, arch: int) -> bytes:
    """Return the cubin that a launch would load on compute capability ``arch``."""
    import triton  # noqa: PLC0415 - an optional dependency
    from triton.backends.compiler import GPUTarget  # noqa: PLC0415

    special = specialise(launch, arch)
    target = GPUTarget("cuda", arch, WARP)
    return triton.compile(special.source, target=target, options=vars(special.options)).asm["cubin"]


def disassembled(cubin: bytes) -> str:
    """Return what cuobjdump says of a kernel: its resources and its instructions."""
    import triton.backends.nvidia  # noqa: PLC0415 - an optional dependency

    tool = Path(triton.backends.nvidia.__file__).parent / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run(
            [tool, "-res-usage", "-sass", file.name], capture_output=True, text=True, check=True
        ).stdout


class Resources(NamedTuple):
    """Registers, and bytes of stack, shared and local memory, a thread or a block."""

    registers: int
    stack: int
    shared: int
    local: int

    @property
    def spills(self) -> bool:
        """Whether registers did not suffice."""
        return self.stack + self.local > 0


def resources(text: str) -> Resources:
    """Return what a kernel takes, from what cuobjdump says."""
    found = USAGE.search(text)
    if found is None:
        raise RuntimeError(f"cuobjdump: expected REG, STACK, SHARED and LOCAL, got {text!r}")
    return Resources(*map(int, found.groups()))


class Instruction(NamedTuple):
    """An instruction of SASS."""

    address: int
    name: str
    modifiers: frozenset[str]
    operands: str

    @property
    def width(self) -> int:
        """Bytes that a thread loads or stores."""
        return next((size for name, size in WIDTHS.items() if name in self.modifiers), 4)


def instructions(text: str) -> list[Instruction]:
    """Return the instructions of a kernel, from what cuobjdump says."""
    return [
        Instruction(int(address, 16), name, frozenset(modifiers.split(".")[1:]), operands)
        for address, name, modifiers, operands in INSTRUCTION.findall(text)
    ]


def loops(code: list[Instruction]) -> Iterator[list[Instruction]]:
    """Yield the innermost loops that touch global memory; all of the code if there is none."""
    spans = []
    for each in code:
        if each.name == "BRA" and (target := re.search(r"0x([0-9a-f]+)", each.operands)):
            start = int(target[1], 16)
            if start < each.address:
                spans.append((start, each.address))
    bodies = [[each for each in code if start <= each.address <= end] for start, end in sorted(set(spans))]
    touching = [body for body in bodies if any(each.name in (*LOADS, *STORES) for each in body)]
    inner = [body for body in touching if not any(other is not body and set(other) < set(body) for other in touching)]
    yield from inner or [code]


@dataclass(frozen=True)
class Code:
    """The machine code of a launch."""

    launch: Launch
    text: str
    """As cuobjdump says."""
    size: int
    """Elements of an activation."""

    @cached_property
    def resources(self) -> Resources:
        """What it takes."""
        return resources(self.text)

    @cached_property
    def loops(self) -> list[list[Instruction]]:
        """The loops that count."""
        return list(loops(instructions(self.text)))

    def _activations(self, touch: int) -> list[Tensor]:
        """Return the activations that it reads (0) or writes (1)."""
        return [
            value
            for name, value in self.launch.arguments.items()
            if isinstance(value, Tensor) and value.numel() >= self.size and self.launch.touched[name][touch] >= 0.5
        ]

    @property
    def threads(self) -> int:
        """Of a block."""
        return WARP * int(self.launch.options.get("num_warps", 4))

    @property
    def tile(self) -> int:
        """Elements of an activation that a block takes at once."""
        return prod(int(value) for name, value in self.launch.arguments.items() if name.startswith("BLOCK_"))

    def unrolled(self, loop: list[Instruction]) -> int:
        """Return how many tiles an iteration takes, from what it stores, or loads if it stores nothing."""
        share = max(1.0, self.tile / self.threads)  # of a thread; several may hold the same element
        stored = sum(each.width for each in loop if each.name in STORES)
        moved, activations = stored, self._activations(1)
        if not stored or not activations:
            moved, activations = sum(each.width for each in loop if each.name in LOADS), self._activations(0)
        bytes_each = sum(t.element_size() for t in activations)
        return max(1, round(moved / (share * bytes_each))) if bytes_each else 1

    def per_element(self, *names: str) -> float:
        """Return instructions an element of an activation, of all kinds or of those named."""
        return sum(
            sum(not names or each.name in names for each in loop) * self.threads / (self.tile * self.unrolled(loop))
            for loop in self.loops
        )

    @property
    def wide(self) -> float:
        """The share of an activation's bytes that arrive by loads of 128 bits."""
        wanted = found = 0.0
        bytes_each = sum(t.element_size() for t in self._activations(0))
        for loop in self.loops:
            loaded = [each.width for each in loop if each.name in LOADS]
            if loaded:
                wanted += bytes_each * max(1.0, self.tile / self.threads) * self.unrolled(loop)
                found += sum(width for width in loaded if width == 16)
        return min(1.0, found / wanted) if wanted else 1.0
