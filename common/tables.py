"""Print a table of what runs logged in the end: ``python -m common.tables``."""

import csv
import io
import itertools
import math
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from common.reports.records import LoggedRun, differing, group_by_seed, read_run, refuse_unlike
from common.runtime.atomic import write_text_atomic
from common.runtime.cli import parse, shown
from common.runtime.command import run_command
from common.runtime.errors import UsageError
from common.runtime.paths import refuse_overwriting


@dataclass(frozen=True, kw_only=True)
class TablesConfig:
    """Print a Markdown table of what runs logged; runs that differ by their seed alone share a row."""

    runs: list[Path] = field(default_factory=list)
    """Folders of runs, unfinished ones left out, such as runs/cbgan/digits-ucb-seed0 runs/cbgan/digits-ucb-seed1."""
    settings: list[str] = field(default_factory=lambda: ["norm.kind"])
    """Settings that tell the rows apart, for instance norm.kind norm.groups; of those that mean something to a run."""
    tags: list[str] = field(default_factory=list)
    """Logged values, a column each, for instance metric/accuracy loss/test."""
    last: int = 1
    """Take the mean of so many last logged values of each run: more steady where they jump from epoch to epoch."""
    at: list[int] = field(default_factory=list)
    """Epochs, for instance 25 50: of each value the last at the end of that epoch, and the best by then, if any."""
    chosen: bool = False
    """Add a column for each measured value: that of the epoch that best.by chose."""
    out: Path | None = None
    """Write the table to this file too, as its ending says: .csv, .tex (LaTeX) or .md."""
    force: bool = False
    """Replace a file that exists."""

    def __post_init__(self) -> None:
        if not self.runs:
            raise ValueError("runs: name at least one run's folder, --runs runs/cbgan/NAME")
        if not self.tags:
            raise ValueError("tags: name at least one logged value, --tags loss/test")
        if self.last < 1:
            raise ValueError(f"last: expected at least 1, got {self.last}")
        if min(self.at, default=0) < 0:
            raise ValueError(f"at: expected epochs from 0 on, got {min(self.at)}")
        if self.out is not None and self.out.suffix not in _FORMATS:
            raise ValueError(f"out: expected a file that ends in {', '.join(_FORMATS)}, got {self.out}")


@dataclass(frozen=True)
class Cell:
    """A value over seeds.

    Attributes:
        mean: over the runs of a row.
        deviation: the standard deviation over them (divisor n - 1); None of a single run, or where one is not finite.
    """

    mean: float
    deviation: float | None

    def text(self, sign: str = "±") -> str:
        """Return "0.6167 ± 0.13"."""
        if self.deviation is None:
            return f"{self.mean:.4g}"
        return f"{self.mean:.4g} {sign} {self.deviation:.2g}"


def over_seeds(values: Sequence[float]) -> Cell:
    """Return mean and deviation of the values of a row's runs."""
    mean = fmean(values)
    return Cell(mean, None if len(values) == 1 or math.isnan(mean) else stdev(values))


@dataclass(frozen=True)
class Table:
    """What is printed or written.

    Attributes:
        settings: names of the columns that tell rows apart.
        columns: names of those with values.
        rows: the settings' values and the seeds, and a cell for each column, None where no run of the row has it.
        notes: what a cell is, and where the numbers come from.
    """

    settings: list[str]
    columns: list[str]
    rows: list[tuple[list[str], list[Cell | None]]]
    notes: list[str]

    def markdown(self) -> str:
        """Return the table and its notes in Markdown."""
        head = [*self.settings, "seeds", *self.columns]
        rows = [[*names, *("-" if cell is None else cell.text() for cell in cells)] for names, cells in self.rows]
        return "\n".join([*map(markdown_row, [head, ["---"] * len(head), *rows]), "", *self.notes]) + "\n"

    def csv(self) -> str:
        """Return the table as comma-separated values, mean and deviation as columns of their own, unrounded."""
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        columns = [f"{column} {what}" for column in self.columns for what in ("mean", "deviation")]
        writer.writerow([*self.settings, "seeds", *columns])
        for names, cells in self.rows:
            pairs = [(None, None) if cell is None else (cell.mean, cell.deviation) for cell in cells]
            writer.writerow([*names, *itertools.chain(*pairs)])
        return text.getvalue()

    def latex(self) -> str:
        """Return the table as a LaTeX tabular, which needs no package; the notes are comments."""
        head = map(_latex, [*self.settings, "seeds", *self.columns])
        rows = [[*map(_latex, names), *("--" if cell is None else _latex_number(cell) for cell in cells)]
                for names, cells in self.rows]  # fmt: skip
        head, *rows = [" & ".join(cells) + r" \\" for cells in (head, *rows)]
        lines = [f"\\begin{{tabular}}{{{'l' * (len(self.settings) + 1)}{'r' * len(self.columns)}}}"]
        lines += ["\\hline", head, "\\hline", *rows, "\\hline", "\\end{tabular}"]
        return "\n".join([*lines, *(f"% {note}" for note in self.notes)]) + "\n"


def markdown_row(cells: Iterable[str]) -> str:
    """Return a line of a Markdown table."""
    return f"| {' | '.join(cells)} |"


_LATEX = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"} | {
    sign: f"\\{sign}" for sign in "&%$#_{}"
}


def _latex(text: str) -> str:
    """Escape what LaTeX would take for a command."""
    return "".join(_LATEX.get(sign, sign) for sign in text)


def _latex_number(cell: Cell) -> str:
    powers = re.sub(r"e([+-][0-9]+)", lambda match: rf" \cdot 10^{{{int(match[1])}}}", cell.text(r"\pm"))
    return f"${powers}$"


_FORMATS: dict[str, Callable[[Table], str]] = {".csv": Table.csv, ".tex": Table.latex, ".md": Table.markdown}


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command.

    Raises:
        UsageError: if a folder is no finished run, settings and tags do not fit the runs, their values do not
            compare, or a file is in the way.
    """
    cfg = parse(TablesConfig, argv, prog="python -m common.tables")
    if cfg.out is not None:
        refuse_overwriting(cfg.out, force=cfg.force)
    made = _table([read_run(path) for path in cfg.runs], cfg)
    if cfg.out is not None:
        try:
            write_text_atomic(cfg.out, _FORMATS[cfg.out.suffix](made))
        except OSError as error:
            raise UsageError(f"out: cannot write {cfg.out} ({error.strerror})") from None
    print(made.markdown(), end="")
    if cfg.out is not None:
        print(f"written: {cfg.out}")


def _table(runs: Sequence[LoggedRun], cfg: TablesConfig) -> Table:
    """Return a table with a row for each choice of settings.

    A setting that means nothing to any run's layer has no column, and "-" in the rows of those it means nothing to.
    Runs that are unfinished, or did not come to the last epoch of ``at``, are left out and named.
    """
    settings, at = cfg.settings, cfg.at
    behind = [run for run in runs if not _came_so_far(run, at)]
    progress = "; ".join(map(_progress, behind))
    if len(behind) == len(runs):
        if at:
            raise UsageError(f"at: no run is past epoch {max(at)}: {progress}")
        raise UsageError(f"runs: none is finished: {progress}; wait, or take epochs by --at")
    runs = [run for run in runs if run not in behind]
    for name in settings:
        if not any(name in run.settings or name in run.unused for run in runs):
            raise UsageError(f"settings: {runs[0].path} has no {name}; it has {', '.join(runs[0].settings)}")
    for tag in cfg.tags:
        if not any(_has(run, tag) for run in runs):
            runs[0].require(tag)
    settings = [name for name in settings if not all(name in run.unused for run in runs)]
    rows: dict[tuple[str, ...], list[LoggedRun]] = {}
    for group in group_by_seed(runs):
        first = group[0]
        names = tuple("-" if each in first.unused else shown(first.settings.get(each)) for each in settings)
        if names in rows:
            one = rows[names][0]
            differ = ", ".join(differing([one, first]))
            raise UsageError(f"settings: {one.path} and {first.path} differ in {differ}; name it too")
        rows[names] = group
    refuse_unlike(runs, cfg.tags, settings)
    columns = [column for tag in cfg.tags for column in _columns(runs, tag, cfg)]
    filled = [
        ([*names, " ".join(str(run.seed) for run in group)], [_cell(group, tag, take) for _, tag, take in columns])
        for names, group in rows.items()
    ]
    taken = "its last value" if cfg.last == 1 else f"the mean of its {cfg.last} last values"
    until = f" by the end of epoch {' or '.join(map(str, at))} and its best so far" if at else ""
    notes = [f"{len(runs)} runs, each with {taken}{until}; a cell is mean ± standard deviation over seeds."]
    notes += [_origin(runs), *(_choices(runs) if cfg.chosen else [])]
    if unnamed := [name for name in differing(runs) if name not in settings]:
        notes.append(f"The rows differ in {', '.join(unnamed)} too.")
    if behind:
        notes.append(f"Left out: {progress}.")
    return Table(settings, [title for title, _, _ in columns], filled, notes)


def _came_so_far(run: LoggedRun, at: Sequence[int]) -> bool:
    """Say whether a run came to the last of these epochs, or without any to its end, and measured it."""
    finished = run.summary.get("state") == "finished"
    return run.epochs > max(at) or (finished and run.epochs == max(at)) if at else finished


def _progress(run: LoggedRun) -> str:
    return f"{run.path} has {run.epochs} of {run.settings.get('epochs')} epochs, {run.summary.get('state')}"


_Take = Callable[[LoggedRun], float]


def _columns(runs: Sequence[LoggedRun], tag: str, cfg: TablesConfig) -> list[tuple[str, str, _Take]]:
    """Return title, tag and the value of a run of each of a tag's columns."""
    columns: list[tuple[str, str, _Take]] = []
    if not cfg.at:
        columns.append((tag, tag, lambda run: fmean(run.values(tag)[-cfg.last :])))
    best = best_of(runs, tag)
    for epoch in cfg.at:
        columns.append((f"{tag} at {epoch}", tag, lambda run, e=epoch: fmean(run.values(tag, e)[-cfg.last :])))
        if best is not None:
            columns.append((f"{tag} best to {epoch}", tag, lambda run, e=epoch: _best_finite(best, run.values(tag, e))))
    if cfg.chosen:
        columns.append((f"{tag} at the chosen epoch", tag, lambda run: _at_the_chosen_epoch(run, tag)))
    return columns


def best_of(runs: Sequence[LoggedRun], tag: str) -> Callable[[Iterable[float]], float] | None:
    """Return what finds the best of a tag's values, as the runs say; None where there is no best."""
    ways = {run.better.get(tag) for run in runs if _has(run, tag)}
    return min if ways == {"lower"} else max if ways == {"higher"} else None


def _best_finite(best: Callable[[Iterable[float]], float], values: Iterable[float]) -> float:
    finite = [value for value in values if not math.isnan(value)]
    return best(finite) if finite else math.nan


def _at_the_chosen_epoch(run: LoggedRun, tag: str) -> float:
    """Return the value that a run measured at the epoch it chose, nan where it was not finite."""
    best = _chosen(run)
    if tag not in best["with"]:
        raise UsageError(f"tags: {run.path} measured no {tag} in epoch {best['epoch']}, which it chose; leave it out")
    value = best["with"][tag]
    return math.nan if value is None else value


def _chosen(run: LoggedRun) -> dict[str, Any]:
    if not (best := run.summary.get("best")):
        raise UsageError(f"chosen: {run.path} chose no epoch (summary.json); train with --best.keep, or leave it out")
    return best


def _choices(runs: Sequence[LoggedRun]) -> list[str]:
    """Say by what epochs were chosen, a line for each way."""
    found: dict[str, list[str]] = {}
    for best in map(_chosen, runs):
        allowed = ", a test metric" if best["chosen_by_test"] else ""
        found.setdefault(f"{best['tag']} ({best['split']} images{allowed})", []).append(str(best["epoch"]))
    return [f"Epochs chosen by {how}: {', '.join(epochs)}." for how, epochs in found.items()]


def _has(run: LoggedRun, tag: str) -> bool:
    return any(tag in line for line in run.lines)


def _cell(group: Sequence[LoggedRun], tag: str, take: _Take) -> Cell | None:
    return over_seeds([take(run) for run in group]) if any(_has(run, tag) for run in group) else None


def _origin(runs: Sequence[LoggedRun]) -> str:
    """Say from which training, data, code and machine the numbers come."""
    sessions = [session for run in runs for session in run.sessions]
    hardware = [session.get("hardware") or {} for session in sessions]
    facts = {
        "epochs": [run.settings.get("epochs") for run in runs],
        "data": map(_data, runs),
        "commit": [session.get("commit") for session in sessions],
        "torch": [(session.get("versions") or {}).get("torch") for session in sessions],
        "hardware": [f"{each.get('gpu') or each.get('cpu')}, {session.get('threads')} of {each.get('cores')} cores"
                     for session, each in zip(sessions, hardware, strict=True)],
    }  # fmt: skip
    return "; ".join(f"{name}: {_distinct(values)}" for name, values in facts.items()) + "."


def _data(run: LoggedRun) -> str | None:
    """Return the data set with the folders where it was, "imagefolder in train and test", or "digits to digits_m"."""
    found = []
    for place in ("data", "source", "target"):
        name, *folders = (run.settings.get(f"{place}.{key}") for key in ("name", "root", "test_root"))
        there = " and ".join(str(folder) for folder in folders if folder is not None)
        found += [f"{name} in {there}" if there else str(name)] if name is not None else []
    return " to ".join(found) or None


def _distinct(values: Iterable[Any]) -> str:
    return ", ".join(dict.fromkeys("unknown" if value is None else str(value) for value in values)) or "unknown"


if __name__ == "__main__":
    run_command(main)
