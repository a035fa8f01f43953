"""Write what runs reached beside the paper's numbers: ``python -m common.report``."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from common.reports.published import PUBLISHED, Published
from common.reports.records import LoggedRun, differing, group_by_seed, measured_by, read_run, refuse_unlike
from common.runtime.cli import parse, shown
from common.runtime.command import run_command
from common.runtime.errors import UsageError
from common.runtime.paths import refuse_overwriting
from common.tables import best_finite, markdown_row, origin, over_seeds, write_and_print


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
    text = "\n".join(_page([read_run(path) for path in cfg.runs])) + "\n"
    write_and_print(text, cfg.out, text)


def _page(runs: Sequence[LoggedRun]) -> Iterator[str]:
    yield "# Runs beside the paper's numbers"
    yield ""
    yield ("Of each value the last, mean ± standard deviation over seeds. The paper does not say of how many runs its "
           "are.")  # fmt: skip
    others = list(runs)
    for published in PUBLISHED:
        if here := [run for run in runs if _belongs(run, published)]:
            yield ""
            yield from _section(published, here)
            others = [run for run in others if run not in here]
    if others:
        yield from ("", "## Other runs", "", "Of no experiment with numbers in the paper:", "")
        yield from (f"- {run.path}" for run in others)


def _belongs(run: LoggedRun, published: Published) -> bool:
    """Say whether a run is one of an experiment, with a layer that the paper has a number for."""
    wanted = published.settings.items()
    fits = all(name in run.settings and (value is ... or run.settings[name] == value) for name, value in wanted)
    return fits and run.settings.get("norm.kind") in {kind for kind, _ in published.values}


def _section(published: Published, runs: Sequence[LoggedRun]) -> Iterator[str]:
    """Yield the lines of one experiment: a table of its runs, then what has to be known."""
    groups = group_by_seed(runs)
    tags = [tag for tags in published.tags.values() for tag in tags]
    refuse_unlike(runs, tags)
    columns = [name for column in published.tags for name in (f"{column}, paper", column, f"{column}, best so far")]
    yield f"## {published.place}"
    yield ""
    yield markdown_row(["layer", "seeds", "epoch", *columns])
    yield markdown_row(["---"] * (3 + len(columns)))
    for group in groups:
        kind = group[0].settings["norm.kind"]
        for (of, epoch), values in published.values.items():
            if of == kind:
                seeds = " ".join(str(run.seed) for run in group)
                cells = [cell for column, value in zip(published.tags, values, strict=True)
                         for cell in (f"{value:g}", *_cells(published, column, group, epoch))]  # fmt: skip
                ended = dict.fromkeys(str(run.epochs if epoch is None else epoch) for run in group)
                yield markdown_row([_name(group, groups), seeds, " ".join(ended), *cells])
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


def _cells(published: Published, column: str, group: Sequence[LoggedRun], epoch: int | None) -> tuple[str, str]:
    """Return the last value by an epoch and the best so far, "-" where not all runs have come so far or log it."""
    series = [_values(run, published.tags[column], epoch) for run in group]
    if not all(series):
        return "-", "-"
    known = [[value * published.scale for value in values] for values in series]
    best = min if published.lower else max
    last, so_far = [values[-1] for values in known], [best_finite(best, values) for values in known]
    return over_seeds(last).text(), over_seeds(so_far).text()


def _values(run: LoggedRun, tags: Sequence[str], epoch: int | None) -> list[float]:
    """Return the values of the first of some tags that a run logged, by the end of an epoch."""
    tag = next((tag for tag in tags if any(tag in line for line in run.lines)), None)
    try:
        return [] if tag is None else run.values(tag, epoch)
    except UsageError:  # it did not come to that epoch, or logged the first value after it
        return []


if __name__ == "__main__":
    run_command(main)
