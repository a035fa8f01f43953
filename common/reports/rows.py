"""Rows of results: what one run reached, on which images, by which code and where, as a line of JSON."""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from common.reports.records import LoggedRun, read_run
from common.runtime.errors import UsageError


@dataclass(frozen=True)
class Row:
    """One finished run of a study.

    Attributes:
        experiment: of the study.
        arm: the choice of settings that is compared with others.
        seed: the run's seed, which pairs it with runs of other arms.
        settings: values by dotted name, without the seed.
        last: the last value by tag; None where it was not finite.
        chosen: by tag, the value of the epoch that ``best.by`` chose; empty if nothing chose.
        series: of some tags, pairs of epoch and value in order.
        health: by ``LAYER/VALUE``, the last health of mixture layers.
        protocol: what values are comparable by.
        images: by split, count and content hash.
        epochs: done.
        collapsed: step and cause, if the run was found collapsed.
        commit: of the code; ends in ``+changes`` where files differed from it.
        versions: of Python packages.
        hardware: processor, cores, memory, GPU.
        device: "cpu" or "cuda:0".
        threads: of the process.
        seconds: of training and of evaluation.
        peak_memory_mib: of the process on a CPU, of tensors on a GPU.
    """

    experiment: str
    arm: str
    seed: int
    settings: dict[str, Any]
    last: dict[str, float | None]
    chosen: dict[str, float | None]
    series: dict[str, list[tuple[int, float | None]]]
    health: dict[str, float | None]
    protocol: dict[str, Any]
    images: dict[str, dict[str, Any]]
    epochs: int
    collapsed: dict[str, Any] | None
    commit: str
    versions: dict[str, str | None]
    hardware: dict[str, Any]
    device: str
    threads: int
    seconds: dict[str, float]
    peak_memory_mib: float

    @property
    def name(self) -> str:
        """EXPERIMENT/ARM-seedN, which is unique in a study."""
        return f"{self.experiment}/{self.arm}-seed{self.seed}"


def row_of(folder: Path, experiment: str, arm: str, seed: int, series: Iterable[str] = ()) -> Row | None:
    """Read the row of a run, None of one that is not finished.

    Args:
        folder: the run's.
        experiment: of the study.
        arm: of the experiment.
        seed: the run's.
        series: tags whose values at every epoch are wanted; those that the run never logged are left out.

    Raises:
        UsageError: if it cannot be read, has another seed, or does not say by which code it was made.
    """
    run = read_run(folder)
    if run.summary.get("state") != "finished":
        return None
    if run.seed != seed:
        raise UsageError(f"runs: expected seed {seed} in {folder}, got {run.seed}")
    session = run.sessions[-1] if run.sessions else {}
    if not session.get("commit"):
        raise UsageError(f"runs: {folder} does not say its commit; train it from a clone with git")
    best = run.summary.get("best") or {}
    evaluated = _evaluated(folder)
    last = {tag: found["value"] for tag, found in run.summary["last"].items()}
    return Row(
        experiment=experiment,
        arm=arm,
        seed=seed,
        settings=run.settings,
        last=last | _last(run, ("audit/", "gradient/", "time/")) | evaluated,
        chosen=best.get("with", {}),
        series={tag: found for tag in series if (found := _series(run, tag))},
        health={tag.removeprefix("health/"): value for tag, value in _last(run, ("health/",)).items()},
        protocol=run.protocol,
        images=run.summary["images"],
        epochs=run.summary["epochs"]["done"],
        collapsed=run.summary["collapsed"],
        commit=session["commit"],
        versions=session["versions"],
        hardware=session["hardware"],
        device=session["device"],
        threads=session["threads"],
        seconds=run.summary["seconds"],
        peak_memory_mib=run.summary["peak_memory_mib"],
    )


def _last(run: LoggedRun, groups: tuple[str, ...]) -> dict[str, float | None]:
    return {tag: value for line in run.lines for tag, value in line.items() if tag.startswith(groups)}


def _series(run: LoggedRun, tag: str) -> list[tuple[int, float | None]]:
    return list({line["epoch"]: line[tag] for line in run.lines if tag in line}.items())


def _evaluated(folder: Path) -> dict[str, float | None]:
    """Return the values that an evaluation after training left, by tag."""
    file = folder / "evaluation" / "evaluation.json"
    return json.loads(file.read_text(encoding="utf-8")).get("values", {}) if file.exists() else {}


def read_rows(path: Path) -> list[Row]:
    """Read a file of rows.

    Raises:
        UsageError: if it cannot be read, is empty, a line is no row, or a run is there twice.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"results: cannot read {path} ({error})") from None
    rows: list[Row] = []
    for number, line in enumerate(lines, 1):
        try:
            rows.append(Row(**json.loads(line)))
        except (ValueError, TypeError):
            names = ", ".join(field.name for field in fields(Row))
            raise UsageError(f"results: {path} line {number}: expected a row with {names}") from None
    if not rows:
        raise UsageError(f"results: {path} holds no rows; collect some by python -m common.report collect")
    refuse_twice(rows)
    return rows


def refuse_twice(rows: Sequence[Row]) -> None:
    """Raise UsageError if two rows are of the same experiment, arm and seed."""
    seen: dict[str, Row] = {}
    for row in rows:
        if (other := seen.setdefault(row.name, row)) is not row:
            raise UsageError(
                f"results: {row.name} is there twice, of commit {other.commit[:12]} and of commit {row.commit[:12]}; "
                "leave one out"
            )


def merged(old: Sequence[Row], new: Sequence[Row], *, replace: bool) -> list[Row]:
    """Return old rows and new ones, in the order of their names.

    Raises:
        UsageError: if a new row differs from an old one of the same name, and may not replace it.
    """
    found = {row.name: row for row in old}
    for row in new:
        if row.name in found and as_line(found[row.name]) != as_line(row) and not replace:
            raise UsageError(
                f"results: {row.name} is there already with other values, of commit {found[row.name].commit[:12]}; "
                "add --force to replace it"
            )
        found[row.name] = row
    return sorted(found.values(), key=lambda row: (row.experiment, row.arm, row.seed))


def as_line(row: Row) -> str:
    """Return a row as a line of JSON."""
    return json.dumps(asdict(row), sort_keys=True)


def by_seed(rows: Iterable[Row], experiment: str, arm: str) -> Mapping[int, Row]:
    """Return the runs of an arm, by seed."""
    return {row.seed: row for row in rows if (row.experiment, row.arm) == (experiment, arm)}
