"""Tables for reports: what runs logged in the end, over seeds: ``python -m common.tables``."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any

from common.cli.arguments import parse
from common.errors import UsageError
from common.reports.records import LoggedRun, group_by_seed, read_run


@dataclass(frozen=True, kw_only=True)
class TablesConfig:
    """Print a Markdown table of what runs logged in the end; runs that differ by their seed alone share a row."""

    runs: list[Path] = field(default_factory=list)
    """Folders of finished runs, for instance runs/cbgan/digits-ucb-seed0 runs/cbgan/digits-ucb-seed1."""
    settings: list[str] = field(default_factory=lambda: ["norm.kind"])
    """Settings that tell the rows apart, for instance norm.kind norm.groups."""
    tags: list[str] = field(default_factory=list)
    """Logged values, a column each, for instance metric/accuracy loss/test."""
    last: int = 1
    """Take the mean of so many last logged values of each run: more steady where they jump from epoch to epoch."""

    def __post_init__(self) -> None:
        if not self.runs:
            raise ValueError("runs: name at least one run's folder, --runs runs/cbgan/NAME")
        if not self.tags:
            raise ValueError("tags: name at least one logged value, --tags loss/test")
        if self.last < 1:
            raise ValueError(f"last: expected at least 1, got {self.last}")


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command.

    Raises:
        UsageError: if a folder is no finished run, or settings and tags do not fit the runs.
    """
    cfg = parse(TablesConfig, argv, prog="python -m common.tables")
    print(table([read_run(path) for path in cfg.runs], cfg.settings, cfg.tags, cfg.last))


def table(runs: Sequence[LoggedRun], settings: Sequence[str], tags: Sequence[str], last: int = 1) -> str:
    """Return a Markdown table with a row for each choice of settings and a column for each tag, and its origin below.

    A run counts with the mean of its ``last`` last values of a tag. A cell is the mean over seeds, with the least and
    the largest run in brackets; "-" where none of the row's runs logged the tag, nan where a value was not finite.

    Raises:
        UsageError: if a run is unfinished, no run knows a setting or tag, runs of a row do not all have a tag, or
            rows differ in a setting that is not named.
    """
    for run in runs:
        _check_finished(run)
    for name in settings:
        if not any(name in run.settings for run in runs):
            raise UsageError(f"settings: {runs[0].path} has no {name}; it has {', '.join(runs[0].settings)}")
    for tag in tags:
        if not any(_has(run, tag) for run in runs):
            runs[0].require(tag)
    rows: dict[tuple[str, ...], list[LoggedRun]] = {}
    for group in group_by_seed(runs):
        name = tuple(_shown(group[0].settings.get(setting)) for setting in settings)
        if name in rows:
            one, other = rows[name][0], group[0]
            differ = ", ".join(_differing([one, other]))
            raise UsageError(f"settings: {one.path} and {other.path} differ in {differ}; name it too")
        rows[name] = group
    lines = [_row([*settings, "seeds", *tags]), _row(["---"] * (len(settings) + 1 + len(tags)))]
    lines += [
        _row([*name, " ".join(str(run.seed) for run in group), *(_cell(group, tag, last) for tag in tags)])
        for name, group in rows.items()
    ]
    unnamed = [name for name in _differing(runs) if name not in settings]
    also = [f"The rows differ in {', '.join(unnamed)} too."] if unnamed else []
    return "\n".join([*lines, "", *_origin(runs, last), *also])


def _differing(runs: Sequence[LoggedRun]) -> list[str]:
    """Return the settings in which any of the runs differ."""
    names = dict.fromkeys(name for run in runs for name in run.settings)
    return [name for name in names if any(run.settings.get(name) != runs[0].settings.get(name) for run in runs)]


def _check_finished(run: LoggedRun) -> None:
    wanted, done = run.settings.get("epochs"), max((line.get("epoch") or 0 for line in run.lines), default=0)
    if isinstance(wanted, int) and done < wanted:
        raise UsageError(f"runs: {run.path} is not finished, it has {done} of {wanted} epochs")


def _has(run: LoggedRun, tag: str) -> bool:
    return any(tag in line for line in run.lines)


def _cell(group: Sequence[LoggedRun], tag: str, last: int) -> str:
    if not any(_has(run, tag) for run in group):
        return "-"
    values = []
    for run in group:
        run.require(tag)
        logged = [math.nan if line[tag] is None else line[tag] for line in run.lines if tag in line]
        values.append(fmean(logged[-last:]))
    mean = fmean(values)
    if len(values) == 1 or math.isnan(mean):
        return f"{mean:.3g}"
    return f"{mean:.3g} ({min(values):.3g} to {max(values):.3g})"


def _origin(runs: Sequence[LoggedRun], last: int) -> list[str]:
    """Say what a cell is, and from which code and machine it comes."""
    sessions = [session for run in runs for session in run.sessions]
    hardware = [session.get("hardware") or {} for session in sessions]
    machines = [
        f"{each.get('gpu') or each.get('cpu')}, {session.get('threads')} of {each.get('cores')} cores"
        for session, each in zip(sessions, hardware, strict=True)
    ]
    facts = {
        "epochs": (run.settings.get("epochs") for run in runs),
        "data": (run.settings.get("data.name") for run in runs),
        "commit": (session.get("commit") for session in sessions),
        "torch": ((session.get("versions") or {}).get("torch") for session in sessions),
        "hardware": machines,
    }
    return [
        f"{len(runs)} runs, each with {'its last value' if last == 1 else f'the mean of its {last} last values'}; "
        "a cell is the mean over seeds (least to largest).",
        "; ".join(f"{name}: {_distinct(values)}" for name, values in facts.items()) + ".",
    ]


def _distinct(values: Iterable[Any]) -> str:
    return ", ".join(dict.fromkeys("unknown" if value is None else str(value) for value in values)) or "unknown"


def _shown(value: Any) -> str:
    return "null" if value is None else str(value)


def _row(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"
