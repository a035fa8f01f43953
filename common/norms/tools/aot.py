"""Compile the kernels for GPUs that need not be there, and hold them to budgets: ``python -m common.norms.aot``."""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch

from common.cli.arguments import parse
from common.norms import bench
from common.norms.tools import counts
from common.norms.tools.machine_code import Code, compile_launch, disassembled, specialise
from common.norms.tools.recording import Launch

ARCHS = (80, 90, 100)
MEASURED = (64, 64, 112, 112)
"""The shape of the budgets, in either precision, K = 3, on sm_90."""
SHAPES = (
    MEASURED,
    (64, 256, 8, 8),
    (64, 256, 14, 14),  # no multiples of 16 from here
    (64, 2048, 7, 7),
    (64, 255, 7, 7),
    (64, 512, 1, 1),
    (128, 3, 32, 32),
)
COMPONENTS = (2, 3, 8)
"""Of each entry of the launch table the most, and the benchmark's."""
BUDGETS = {
    "mixture_moments_kernel": {"NCHW": 50, "NHWC": 55},
    "mixture_apply_kernel": {"NCHW": 42, "NHWC": 48},
    "mixture_sums_kernel": {"NCHW": 45, "NHWC": 52},
    "mixture_bwd_kernel": {"NCHW": 72, "NHWC": 80},
    "scb_fwd_kernel": {"NCHW": 5, "NHWC": 8},
    "scb_bwd_kernel": {"NCHW": 12, "NHWC": 14},
}
"""Instructions an element of the default layer."""
JOINT = 1.3
"""Of these, where all channels share a posterior."""
BUDGETED = {"UCBNorm": 1.0, "UCBNorm, groups=1": JOINT, "SCBNorm": 1.0}
"""The layers that have budgets."""
WIDE = 0.99
"""The least share of an activation that arrives by loads of 128 bits, where its layout allows them."""


@dataclass(frozen=True)
class Case:
    """A launch, and where it was met first."""

    launch: Launch
    subject: str
    shape: tuple[int, ...]
    layout: str
    dtype: str
    num: int

    def __str__(self) -> str:
        return f"{self.subject}, K={self.num}, {'x'.join(map(str, self.shape))} {self.layout} {self.dtype}"

    @property
    def size(self) -> int:
        """Elements of an activation."""
        return torch.Size(self.shape).numel()

    @property
    def budget(self) -> float | None:
        """Instructions an element that it may take on sm_90; None if there is no budget."""
        share = BUDGETED.get(self.subject)
        if share is None or (self.shape, self.num) != (MEASURED, counts.COMPONENTS):
            return None
        return share * BUDGETS[self.launch.name][self.layout] if self.launch.name in BUDGETS else 0.0

    @property
    def may_be_wide(self) -> bool:
        """Whether neighbours in memory come in runs that Triton knows to be a multiple of 16."""
        _, channels, *spatial = self.shape
        return (torch.Size(spatial).numel() if self.layout == "NCHW" else channels) % 16 == 0


def cases(quick: bool = False) -> list[Case]:
    """Return a case of each code that the layers make Triton compile at these shapes; no two differ on one GPU alone.

    Quick: of the default layer, what has a budget in NCHW, and what is most likely to spill.
    """
    found: dict[str, Case] = {}
    for subject, shape, layout, dtype, num in _wanted(quick):
        try:
            step = counts.record(subject, shape, counts.DTYPES[dtype], layout, num)
        except ValueError:  # more channels share a posterior than the kernels take
            continue
        for each in (*step.forward.kernels, *step.backward.kernels):
            found.setdefault(specialise(each, ARCHS[0]).key, Case(each, subject.name, shape, layout, dtype, num))
    return list(found.values())


def _wanted(quick: bool) -> Iterator[tuple[counts.Subject, tuple[int, ...], str, str, int]]:
    subjects = {subject.name: subject for subject in counts.SUBJECTS if subject.name != "BatchNorm2d"}
    if quick:
        for name in BUDGETED:
            yield subjects[name], MEASURED, "NCHW", "float32", counts.COMPONENTS
        yield subjects["UCBNorm, update=weight"], (64, 255, 7, 7), "NCHW", "float32", min(COMPONENTS)
        return
    yield from itertools.product(subjects.values(), SHAPES, bench.LAYOUTS, counts.DTYPES, [counts.COMPONENTS])
    few = [subjects[name] for name in ("UCBNorm", "UCBNorm, groups=1", "UCBNorm, update=weight")]
    rest = [num for num in COMPONENTS if num != counts.COMPONENTS]
    yield from itertools.product(few, SHAPES, bench.LAYOUTS, ["float32"], rest)


class Finding(NamedTuple):
    """What a case takes of a GPU."""

    row: list[str]
    missed: list[str]


def examine(case: Case, arch: int) -> Finding:
    """Compile a case and hold it to the budgets."""
    code = Code(case.launch, disassembled(compile_launch(case.launch, arch)), case.size)
    reads = case.launch.reads_activation(case.size)
    taken = [str(value) for value in code.resources]
    missed = [f"{code.resources.stack} bytes of stack, {code.resources.local} of local memory"] * code.resources.spills
    cells = ["-"] * 4
    if reads:
        count, budget = code.per_element(), case.budget if arch == 90 else None
        cells = [f"{count:.0f}", "-" if budget is None else f"{budget:.0f}"]
        cells += [f"{code.per_element('MUFU'):.1f}", f"{code.wide:.0%}"]
        if budget is not None and round(count) > round(budget):
            missed.append(f"{count:.0f} instructions an element, budget {budget:.0f}")
        if case.may_be_wide and code.wide < WIDE:
            missed.append(f"{code.wide:.0%} by loads of 128 bits")
    return Finding([f"sm_{arch}", case.launch.name, *taken, *cells, str(case)], missed)


@dataclass(frozen=True, kw_only=True)
class AotConfig:
    """Compile every kernel as launches of the layers would, and print what it takes of a GPU, which need not be there.

    Instructions are those of the loops that touch an activation, by element of it. The exit status is 1 if a kernel
    spills registers, takes more instructions than its budget, or reads an activation by narrow loads where its layout
    allows wide ones.
    """

    archs: list[int] = field(default_factory=lambda: list(ARCHS))
    """Compute capabilities to compile for."""
    quick: bool = False
    """Take the default layer only, at one shape of few channels and one that is likely to spill."""
    kernel: str = ""
    """Take the kernels with this in their name only."""


TITLES = (
    "arch", "kernel", "registers", "stack", "shared", "local",
    "instructions", "budget", "MUFU", "128 bits", "of",
)  # fmt: skip


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command.

    Raises:
        UsageError: if kernels would be interpreted, or Triton is not installed.
        SystemExit: with status 1 if a budget is missed.
    """
    cfg = parse(AotConfig, argv, prog="python -m common.norms.aot")
    bench.check_triton("cannot be compiled", "it is what compiles the kernels")
    chosen = [case for case in cases(cfg.quick) if cfg.kernel in case.launch.name]
    missed: list[str] = []
    spills = 0
    print(bench.head(TITLES))
    for arch, case in itertools.product(cfg.archs, chosen):
        finding = examine(case, arch)
        print(bench.line(finding.row), flush=True)
        missed += [f"sm_{arch} {case.launch.name}, {case}: {what}" for what in finding.missed]
        spills += any("stack" in what for what in finding.missed)
    bench.end(missed, f"{len(cfg.archs) * len(chosen)} compiled, {spills} spill, {len(missed)} budgets missed")
