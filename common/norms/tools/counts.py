"""Count what a step of each layer launches and moves on a GPU, without one: ``python -m common.norms.counts``."""

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from common.cli.arguments import parse
from common.errors import UsageError
from common.norms import MixtureNorm, SCBNorm, SCBNormBase, UCBNorm, bench
from common.norms.kernels import launch
from common.norms.tools.recording import Launch, recording

COMPONENTS = 3
SHAPES = ((64, 256, 8, 8), (64, 64, 112, 112))
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
SLACK = 0.1
"""Of an activation: partial sums, tables and pilots together, in one pass."""
MULTIPROCESSORS = 132
"""Of an H100."""
BUSY = 0.9
"""The share of the multiprocessors that must have a program of each kernel that reads an activation."""
LOCATIONS = 8
"""The least in a tile of channels that share a posterior, where neighbours in memory are positions: else most of each
sector that is read is thrown away."""


class Goal(NamedTuple):
    """What one pass of a layer may cost at most; None where no goal is set."""

    launches: int | None = None
    activations: int | None = None
    """Times that an activation is read or written, together."""
    tables: int = 0
    """(K, C) in float32 that a program leaves of a posterior which all channels share. They stand beside ``SLACK``, for
    a program of each multiprocessor: it takes all channels of its locations, so that no fewer programs would do."""


NO_GOAL = Goal()


Build = Callable[[int, int, str], nn.Module]
"""Of a layer, with so many channels and components, on a device."""


@dataclass(frozen=True)
class Subject:
    """A layer in a mode."""

    name: str
    build: Build
    forward: Goal = NO_GOAL
    backward: Goal = NO_GOAL
    training: bool = True
    cluster: str = "none"
    """none: the layer takes no ids; ids; unknown: None in their place."""


def _layer(kind: Any, **options: Any) -> Build:
    return lambda channels, num, device: kind(channels, num, backend="triton", device=device, **options)


def _mn(channels: int, num: int, device: str) -> nn.Module:
    layer = MixtureNorm(channels, num, backend="triton", device=device)
    layer.set_initialized(True)  # no step but the first seeds
    return layer


def _bn(channels: int, num: int, device: str) -> nn.Module:
    return nn.BatchNorm2d(channels, device=device)


BATCH = 2 + 1, 4 + 1
"""BatchNorm's own traffic: forward and backward."""
MASS_MEAN_SQUARES, DIRECT = 3, 2
"""Tables that the passes for moments and for gradients leave."""
GIVEN = 1 + 1, 2 + 1
"""Where the statistics are given."""
SUBJECTS = (
    Subject("BatchNorm2d", _bn),
    Subject("UCBNorm", _layer(UCBNorm), Goal(4, BATCH[0]), Goal(4, BATCH[1])),
    Subject(
        "UCBNorm, groups=1",
        _layer(UCBNorm, groups=1),
        Goal(4, BATCH[0], tables=MASS_MEAN_SQUARES),
        Goal(4, BATCH[1], tables=DIRECT),
    ),
    Subject("UCBNorm, update=weight", _layer(UCBNorm, update="weight"), Goal(4, BATCH[0]), Goal(5, BATCH[1])),
    Subject(
        "UCBNorm, statistics=learned",
        _layer(UCBNorm, update="weight", statistics="learned"),
        Goal(4, GIVEN[0]),
        Goal(5, GIVEN[1]),
    ),
    Subject("UCBNorm, evaluation", _layer(UCBNorm), Goal(1, GIVEN[0]), Goal(3, GIVEN[1]), training=False),
    Subject(
        "UCBNorm, groups=1, evaluation",
        _layer(UCBNorm, groups=1),
        Goal(1, GIVEN[0]),
        Goal(3, GIVEN[1], tables=DIRECT),
        training=False,
    ),
    Subject("SCBNorm", _layer(SCBNorm), Goal(1, GIVEN[0]), Goal(2, GIVEN[1]), cluster="ids"),
    Subject("SCBNorm, affine", _layer(SCBNorm, affine=True), Goal(1, GIVEN[0]), Goal(2, GIVEN[1]), cluster="ids"),
    Subject(
        "SCBNorm, evaluation, ids",  # one launch more each way, for samples that may be unknown
        _layer(SCBNorm),
        Goal(2, GIVEN[0]),
        Goal(3, GIVEN[1]),
        training=False,
        cluster="ids",
    ),
    Subject("SCBNorm, evaluation, unknown", _layer(SCBNorm), training=False, cluster="unknown"),
    Subject("SCBNormBase", _layer(SCBNormBase), Goal(3, GIVEN[0]), Goal(4, GIVEN[1]), cluster="ids"),
    Subject("MixtureNorm", _mn, Goal(40)),
    Subject("MixtureNorm, evaluation", _mn, Goal(1, GIVEN[0]), Goal(3, GIVEN[1], tables=DIRECT), training=False),
)
GOALS_KEPT = 1.05
"""Activations that a layer with goals may keep for the backward pass: x alone, and tables."""


@dataclass(frozen=True)
class Pass:
    """What one pass launches, and the bytes of an activation."""

    launches: list[Launch]
    size: int

    @property
    def reads(self) -> float:
        """In activations."""
        return sum(each.reads for each in self.launches) / self.size

    @property
    def writes(self) -> float:
        """In activations."""
        return sum(each.writes for each in self.launches) / self.size

    @property
    def kernels(self) -> list[Launch]:
        """Triton's among them."""
        return [each for each in self.launches if each.function is not None]

    @property
    def copies(self) -> list[str]:
        """Operators of torch that write as much as half an activation."""
        return [each.name for each in self.launches if each.function is None and each.writes >= self.size / 2]


@dataclass(frozen=True)
class Step:
    """A forward and a backward pass of a layer, and the activations kept between them."""

    forward: Pass
    backward: Pass
    kept: float
    channels: int


def record(
    subject: Subject, shape: Sequence[int], dtype: torch.dtype, layout: str = "NCHW", num: int = COMPONENTS
) -> Step:
    """Run a layer on an activation of a shape (N, C, H, W), of which there is nothing but the shape."""
    layer = subject.build(shape[1], num, "meta").train(subject.training)
    x, g = (
        torch.empty(*shape, dtype=dtype, device="meta").contiguous(memory_format=bench.LAYOUTS[layout])
        for _ in range(2)
    )
    ids = torch.empty(shape[0], dtype=torch.int64, device="meta")
    arguments = {"none": (), "ids": (ids,), "unknown": (None,)}[subject.cluster]
    x.requires_grad_()
    inputs = [x, *(p for p in layer.parameters() if p.requires_grad)]
    kept: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        kept[t.untyped_storage()._cdata] = t.untyped_storage().nbytes()
        return t

    with recording() as recorder:
        with saved_tensors_hooks(pack, lambda t: t):
            y = layer(x, *arguments)
        forward = recorder.take()
        torch.autograd.grad(y, inputs, g, allow_unused=True)
        backward = recorder.take()
    return Step(Pass(forward, x.nbytes), Pass(backward, x.nbytes), sum(kept.values()) / x.nbytes, shape[1])


def missed(subject: Subject, step: Step) -> Iterator[str]:
    """Yield each quantity that is beyond its goal."""
    for direction in ("forward", "backward"):
        goal: Goal = getattr(subject, direction)
        done: Pass = getattr(step, direction)
        if goal.launches is not None and len(done.launches) > goal.launches:
            yield f"{direction} launches {len(done.launches)}, goal {goal.launches}"
        left = 2 * 4 * goal.tables * COMPONENTS * step.channels * MULTIPROCESSORS / done.size  # written, and read
        if goal.activations is not None and done.reads + done.writes > goal.activations + SLACK + left:
            beside = f"{goal.activations} x + {SLACK + left:.2g} x"
            yield f"{direction} moves {done.reads + done.writes:.2f} x, goal {beside}"
    if subject.name.startswith("MixtureNorm") and step.forward.copies:
        yield f"forward copies x: {', '.join(step.forward.copies)}"
    if subject.forward.activations is not None and step.kept > GOALS_KEPT:
        yield f"kept {step.kept:.2f} x, goal {GOALS_KEPT} x"


class Grid(NamedTuple):
    """The programs of a kernel that reads an activation."""

    shape: tuple[int, ...]
    layout: str
    kernel: str
    joint: bool
    programs: int
    locations: int
    """In a tile."""
    where: str
    """The layer and precision that it is of."""

    @property
    def busy(self) -> float:
        """Return the share of the multiprocessors that have a program."""
        return min(1.0, self.programs / MULTIPROCESSORS)

    def missed(self) -> str:
        """Say what of it misses its goal, or nothing."""
        if self.busy < BUSY:
            return f"{self.busy:.0%} of {MULTIPROCESSORS} multiprocessors busy, goal {BUSY:.0%}"
        least = min(LOCATIONS, self.shape[2] * self.shape[3])
        if self.joint and self.layout == "NCHW" and self.locations < least:
            return f"tiles of {self.locations} locations, goal {least}"
        return ""


def grids(shape: tuple[int, ...], layout: str) -> list[Grid]:
    """Return the smallest grid, or tile if that misses its goal, of each kernel that reads an activation."""
    found: dict[tuple[str, bool], Grid] = {}
    for name, dtype in DTYPES.items():
        for subject in SUBJECTS:
            step = record(subject, shape, dtype, layout)
            for each in (*step.forward.kernels, *step.backward.kernels):
                if each.reads_activation(torch.Size(shape).numel()):
                    joint, locations = bool(each.arguments.get("JOINT")), each.arguments.get("BLOCK_L", LOCATIONS)
                    where = f"{subject.name}, {name}"
                    grid = Grid(shape, layout, each.name, joint, each.programs, locations, where)
                    known = found.setdefault((each.name, joint), grid)
                    if (bool(grid.missed()), -grid.programs) > (bool(known.missed()), -known.programs):
                        found[each.name, joint] = grid
    return list(found.values())


@dataclass(frozen=True, kw_only=True)
class CountsConfig:
    """Print what each layer launches, moves and keeps on a GPU, and how many multiprocessors its kernels reach.

    No GPU is needed: kernels are recorded in place of being launched. Traffic is in sizes of the activation, reads +
    writes, as device memory sees it if no cache holds anything from one kernel to the next. The exit status is 1 if a
    goal is missed.
    """

    verbose: bool = False
    """Name what is launched, too."""
    grids: bool = True
    """Print the programs of every kernel that reads an activation, at every shape of the benchmark."""


def _row(subject: Subject, step: Step, shape: tuple[int, ...], dtype: str) -> str:
    cells = [subject.name, _times(shape), dtype]
    for done in (step.forward, step.backward):
        cells += [f"{len(done.launches)} ({len(done.kernels)})", f"{done.reads:.2f}+{done.writes:.2f}"]
    return bench.line([*cells, f"{step.kept:.2f}"])


def _times(shape: Sequence[int]) -> str:
    return "x".join(map(str, shape))


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command.

    Raises:
        UsageError: Triton is not installed.
        SystemExit: with status 1 if a goal is missed.
    """
    cfg = parse(CountsConfig, argv, prog="python -m common.norms.counts")
    if not launch.INSTALLED:
        raise UsageError("triton: expected it to be installed, since its kernels are what is counted")
    wrong: list[str] = []
    titles = ["layer", "shape", "type", "forward (Triton's)", "moved", "backward (Triton's)", "moved", "kept"]
    print(bench.head(titles))
    for shape in SHAPES:
        for name, dtype in DTYPES.items():
            for subject in SUBJECTS:
                step = record(subject, shape, dtype)
                print(_row(subject, step, shape, name), flush=True)
                wrong += [f"{subject.name} {_times(shape)} {name}: {what}" for what in missed(subject, step)]
                if cfg.verbose:
                    for done in (step.forward, step.backward):
                        print("  " + " ".join(each.name for each in done.launches))
    if cfg.grids:
        titles = ["shape", "layout", "kernel", "posterior", "programs", f"of {MULTIPROCESSORS} busy", "least in"]
        print("\n" + bench.head(titles))
        for shape, layout in itertools.product(bench.GPU_SHAPES, bench.LAYOUTS):
            for grid in grids(shape, layout):
                posterior = "joint" if grid.joint else "-"
                cells = [_times(shape), layout, grid.kernel, posterior, str(grid.programs), f"{grid.busy:.0%}"]
                print(bench.line([*cells, grid.where]), flush=True)
                if what := grid.missed():
                    wrong.append(f"{grid.kernel} {_times(shape)} {layout}, {grid.where}: {what}")
    bench.end(wrong, f"{len(wrong)} goals missed")
