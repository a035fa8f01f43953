"""Bound the time of a layer's step on GPUs from below, beside BatchNorm's, by what it counts; nothing is measured."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch

from common.cli.arguments import parse
from common.norms import bench
from common.norms.tools import counts
from common.norms.tools.machine_code import Code, compile_launch, disassembled, specialise
from common.norms.tools.recording import TIMES, Launch

LANES = 128
"""Instructions of threads that a multiprocessor issues in a cycle: four warps'."""
SPECIAL = 16
"""Of these, exponentials, reciprocals and their like (MUFU)."""
LATENCY = 2e-6
"""Seconds from the start of one kernel to that of the next, at the least, if neither does much: assumed."""


class Device(NamedTuple):
    """A GPU, by its maker's data sheet."""

    arch: int
    multiprocessors: int
    clock: float
    """Hz, at most."""
    bandwidth: float
    """Of its memory, bytes a second."""


DEVICES = {
    "A100": Device(80, 108, 1.41e9, 2.04e12),  # SXM, 80 GB
    "H100": Device(90, 132, 1.98e9, 3.35e12),  # SXM
    "B200": Device(100, 148, 1.965e9, 8.0e12),
}
LAYERS = ("UCBNorm", "UCBNorm, groups=1", "UCBNorm, update=weight", "UCBNorm, evaluation", "SCBNorm")
AIMS = {("UCBNorm", "float32"): 1.1, ("UCBNorm", "bfloat16"): 1.6}
"""A step of a layer at 64x64x112x112 on an H100, in BatchNorm's."""


class Work(NamedTuple):
    """Instructions an element of the activation that a kernel takes, and those of them that are special."""

    instructions: float
    special: float


class Bound(NamedTuple):
    """The least time of a launch in seconds, by what bounds it."""

    issue: float
    special: float
    memory: float
    latency: float = LATENCY

    @property
    def time(self) -> float:
        """Return the least time."""
        return max(self)

    @property
    def by(self) -> str:
        """Name what bounds it."""
        return ("issue", "MUFU", "memory", "launch")[self.index(self.time)]


def bound(launched: Launch, work: Work | None, size: int, device: Device) -> Bound:
    """Return the least time of a launch, whose kernel does some work on each of so many elements.

    No cache is taken to hold anything from one kernel to the next. Where a grid is smaller than the device, the
    multiprocessors without a program do nothing.
    """
    memory = (launched.reads + launched.writes) / device.bandwidth
    latency = LATENCY * TIMES.get(launched.name, 1)
    if work is None:
        return Bound(0.0, 0.0, memory, latency)
    cycles = size / (min(device.multiprocessors, launched.programs) * device.clock)
    return Bound(work.instructions * cycles / LANES, work.special * cycles / SPECIAL, memory, latency)


@dataclass
class Compiler:
    """What kernels do an element, each compiled once."""

    known: dict[tuple[str, int], Work] = field(default_factory=dict)

    def work(self, launched: Launch, size: int, arch: int) -> Work | None:
        """Return what a launch does an element, or None if it reads no activation of so many, or is torch's."""
        if launched.function is None or not launched.reads_activation(size):
            return None
        key = specialise(launched, arch).key, arch
        if key not in self.known:
            code = Code(launched, disassembled(compile_launch(launched, arch)), size)
            self.known[key] = Work(code.per_element(), code.per_element("MUFU"))
        return self.known[key]


class Row(NamedTuple):
    """The bounds of a layer's step on a device."""

    layer: str
    shape: tuple[int, ...]
    dtype: str
    device: str
    launches: list[tuple[str, Bound]]

    @property
    def time(self) -> float:
        """Of all launches, which follow one another."""
        return sum(each.time for _, each in self.launches)


def rows(devices: Sequence[str], compiler: Compiler) -> Iterator[Row]:
    """Yield the steps of BatchNorm and of the layers, at every shape, in every precision, on every device."""
    subjects = {subject.name: subject for subject in counts.SUBJECTS}
    for shape in counts.SHAPES:
        size = torch.Size(shape).numel()
        for dtype, kind in counts.DTYPES.items():
            for layer in ("BatchNorm2d", *LAYERS):
                step = counts.record(subjects[layer], shape, kind)
                for name in devices:
                    device = DEVICES[name]
                    bounds = [
                        (each.name, bound(each, compiler.work(each, size, device.arch), size, device))
                        for each in (*step.forward.launches, *step.backward.launches)
                    ]
                    yield Row(layer, shape, dtype, name, bounds)


def missed(row: Row, base: Row) -> str:
    """Say what of a row misses its aim, or nothing."""
    aim = AIMS.get((row.layer, row.dtype))
    if aim is None or (row.shape, row.device) != ((64, 64, 112, 112), "H100") or row.time <= aim * base.time:
        return ""
    return f"{row.layer}, {row.dtype} on {row.device}: {row.time / base.time:.2f} of BatchNorm2d's, aim {aim}"


@dataclass(frozen=True, kw_only=True)
class RooflineConfig:
    """Print the least time that a step of each layer can take on a GPU, and in BatchNorm's, by what bounds it.

    These are no measurements. A launch takes as long as issuing its instructions, its exponentials and reciprocals
    (MUFU), moving its bytes, or 2 microseconds, whichever is longest; launches follow one another. Instructions are
    counted in the code that is compiled for the device, bytes as `common.norms.counts` does. BatchNorm2d is taken to be
    bound by memory. The exit status is 1 if an aim is missed.
    """

    devices: list[str] = field(default_factory=lambda: list(DEVICES))
    """Of A100 H100 B200."""
    kernels: bool = True
    """Print every kernel that reads an activation, too."""

    def __post_init__(self) -> None:
        for device in self.devices:
            if device not in DEVICES:
                raise ValueError(f"devices: expected some of {', '.join(DEVICES)}, got {device}")


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command.

    Raises:
        UsageError: kernels would be interpreted, or Triton is not installed.
        SystemExit: with status 1 if an aim is missed.
    """
    cfg = parse(RooflineConfig, argv, prog="python -m common.norms.roofline")
    bench.check_triton("cannot be compiled", "it is what compiles the kernels")
    base: dict[str, Row] = {}
    found: list[Row] = []
    wrong: list[str] = []
    titles = ["step", "shape", "type", "GPU", "launches", "least time, us", "in BatchNorm2d's", "most of it"]
    print(bench.head(titles))
    for row in rows(cfg.devices, Compiler()):
        if row.layer == "BatchNorm2d":
            base[row.device] = row
        name, most = max(row.launches, key=lambda each: each[1].time)
        cells = [row.layer, "x".join(map(str, row.shape)), row.dtype, row.device, str(len(row.launches))]
        cells += [f"{row.time * 1e6:.0f}", f"{row.time / base[row.device].time:.2f}", f"{name}: {most.by}"]
        print(bench.line(cells), flush=True)
        found.append(row)
        wrong += filter(None, [missed(row, base[row.device])])
    if cfg.kernels:
        titles = ["kernel", "layer", "shape", "type", "GPU", "issue, us", "MUFU, us", "memory, us", "bound by"]
        print("\n" + bench.head(titles))
        for row in found:
            for name, each in row.launches:
                if each.issue:
                    times = [f"{part * 1e6:.0f}" for part in each[:3]]
                    place = [row.layer, "x".join(map(str, row.shape)), row.dtype, row.device]
                    print(bench.line([name, *place, *times, each.by]))
    bench.end(wrong, f"{len(wrong)} aims missed")
