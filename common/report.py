"""Write what runs reached beside the paper's numbers: ``python -m common.report``."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean, stdev

from common.reports.published import PUBLISHED, Published
from common.reports.records import LoggedRun, differing, group_by_seed, measured_by, read_run, refuse_unlike
from common.runtime.atomic import write_text_atomic
from common.runtime.cli import parse, shown
from common.runtime.command import run_command
from common.runtime.errors import UsageError
from common.runtime.paths import refuse_overwriting
from common.tables import Cell, origin


@dataclass(frozen=True, kw_only=True)
class ReportConfig:
    """Print what runs reached beside the paper's numbers, as Markdown: Tables V to VIII, Figures 8 and 10.

    Each number with its seeds, in what its runs differ from what the paper states, on which images they were measured,
    and what has to be known to read the paper's. Unfinished runs count as far as they came.
    """

    runs: list[Path] = field(default_factory=list)
    """Folders of runs of all applications, in any order; those of no experiment of the paper are listed at the end."""
    out: Path | None = None
    """Write the page to this file too, which ends in .md."""
    force: bool = False
    """Replace a file that exists."""

    def __post_init__(self) -> None:
        if not self.runs:
            raise ValueError("runs: name at least one run's folder, --runs runs/cbcls/NAME")
        if self.out is not None and self.out.suffix != ".md":
            raise ValueError(f"out: expected a file that ends in .md, got {self.out}")


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command.

    Raises:
        UsageError: if a folder is no run, two have the same settings and seed, or those of one table were measured on
            different images.
    """
    cfg = parse(ReportConfig, argv, prog="python -m common.report")
    if cfg.out is not None:
        refuse_overwriting(cfg.out, force=cfg.force)
    text = page([read_run(path) for path in cfg.runs])
    if cfg.out is not None:
        try:
            write_text_atomic(cfg.out, text)
        except OSError as error:
            raise UsageError(f"out: cannot write {cfg.out} ({error.strerror})") from None
    print(text, end="")
    if cfg.out is not None:
        print(f"written: {cfg.out}")


def page(runs: Sequence[LoggedRun]) -> str:
    """Return the page of some runs, as Markdown.

    Raises:
        UsageError: as `main` says.
    """
    lines = ["# Runs beside the paper's numbers", ""]
    lines.append(
        "Of each value the last, mean ± standard deviation over seeds. The paper does not say of how many runs its are."
    )
    placed: set[Path] = set()
    for published in PUBLISHED:
        here = [run for run in runs if belongs(run, published)]
        if here:
            lines += ["", *section(published, here)]
            placed |= {run.path for run in here}
    others = [run for run in runs if run.path not in placed]
    if others:
        lines += ["", "## Other runs", "", "Of no experiment with numbers in the paper:", ""]
        lines += [f"- {run.path}" for run in others]
    return "\n".join(lines) + "\n"


def belongs(run: LoggedRun, published: Published) -> bool:
    """Say whether a run is one of an experiment, with a layer that the paper has a number for."""
    wanted = published.settings.items()
    fits = all(name in run.settings and (value is ... or run.settings[name] == value) for name, value in wanted)
    return fits and run.settings.get("norm.kind") in {kind for kind, _ in published.values}


def section(published: Published, runs: Sequence[LoggedRun]) -> Iterator[str]:
    """Yield the lines of one experiment: a table of its runs, then what has to be known.

    Raises:
        UsageError: if its runs were measured on different images.
    """
    groups = group_by_seed(runs)
    tags = [tag for tags in published.tags.values() for tag in tags]
    refuse_unlike(runs, tags)
    columns = [name for column in published.tags for name in (f"{column}, paper", column, f"{column}, best so far")]
    yield f"## {published.place}"
    yield ""
    yield _row(["layer", "seeds", "epoch", *columns])
    yield _row(["---"] * (3 + len(columns)))
    for group in groups:
        kind = group[0].settings["norm.kind"]
        for (of, epoch), values in published.values.items():
            if of == kind:
                seeds = " ".join(str(run.seed) for run in group)
                cells = [cell for column, value in zip(published.tags, values, strict=True)
                         for cell in (f"{value:g}", *_ours(published, column, group, epoch))]  # fmt: skip
                yield _row([_name(group, groups), seeds, _epoch(group, epoch), *cells])
    yield ""
    for group in groups:
        first = group[0]
        found = {name: first.settings.get(name) for name in published.stated if name not in first.unused}
        unlike = [f"{name} {shown(value)} instead of {shown(published.stated[name])}"
                  for name, value in found.items() if value != published.stated[name]]  # fmt: skip
        if unlike:
            yield f"- {_name(group, groups)} differs from what the paper states: {', '.join(unlike)}."
    for note in published.notes:
        yield f"- {note}"
    known = {(name, str(value)) for run in runs for name, value in measured_by(run, tags).items()}
    images = sorted(f"{name} {value if name == 'recalibrated' else value[:12]}" for name, value in known)
    yield f"- Measured by: {', '.join(images) or 'not known'}."
    yield f"- {origin(runs)}"


def _name(group: Sequence[LoggedRun], groups: Sequence[Sequence[LoggedRun]]) -> str:
    """Return a group's layer, with the settings that tell it from others of that layer."""
    first = group[0]
    kind = first.settings["norm.kind"]
    alike = [each[0] for each in groups if each[0].settings["norm.kind"] == kind]
    return ", ".join([kind, *(f"{name} {shown(first.settings.get(name))}" for name in differing(alike))])


def _epoch(group: Sequence[LoggedRun], epoch: int | None) -> str:
    """Return the epoch, or the one that training ended with, of all the group's runs."""
    if epoch is not None:
        return str(epoch)
    return " ".join(dict.fromkeys(str(run.epochs) for run in group))


def _ours(published: Published, column: str, group: Sequence[LoggedRun], epoch: int | None) -> tuple[str, str]:
    """Return the last value by an epoch and the best so far, "-" where not all runs have come so far or log it."""
    series = [_values(run, published.tags[column], epoch) for run in group]
    if any(values is None for values in series):
        return "-", "-"
    known = [[value * published.scale for value in values] for values in series if values is not None]
    best = min if published.lower else max
    finite = [[value for value in values if not math.isnan(value)] or [math.nan] for values in known]
    return _cell([values[-1] for values in known]), _cell([best(values) for values in finite])


def _values(run: LoggedRun, tags: Sequence[str], epoch: int | None) -> list[float] | None:
    logged = {name for line in run.lines for name in line}
    tag = next((tag for tag in tags if tag in logged), None)
    if tag is None or (epoch is not None and run.epochs < epoch):
        return None
    try:
        return run.values(tag, epoch)
    except UsageError:  # first logged after that epoch
        return None


def _cell(values: Sequence[float]) -> str:
    mean = fmean(values)
    return Cell(mean, None if len(values) == 1 or math.isnan(mean) else stdev(values)).text()


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    run_command(main)
