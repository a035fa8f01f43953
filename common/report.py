"""Collect results of a study and write a page of verdicts: ``python -m common.report collect`` and ``page``."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from common.reports.claims import Claim, findings, read_claims
from common.reports.page import write_page
from common.reports.rows import Row, as_line, merged, read_rows, row_of
from common.reports.study import Study, read_study
from common.runtime.atomic import write_text_atomic
from common.runtime.cli import parse
from common.runtime.command import run_command
from common.runtime.errors import UsageError
from common.runtime.paths import refuse_overwriting


@dataclass(frozen=True, kw_only=True)
class CollectConfig:
    """Add a row for each finished run of a study to its file of results, which only this command writes."""

    study: Path = Path("workflow/small.yaml")
    """The study; rows of runs whose folders are gone stay."""
    force: bool = False
    """Replace rows of runs that have other values now."""


@dataclass(frozen=True, kw_only=True)
class PageConfig:
    """Write index.html and page.md: a verdict on each claim, then a table for each experiment."""

    study: Path = Path("workflow/small.yaml")
    """The study, whose results and claims are read."""
    title: str = "Cluster-based normalization: what holds"
    """Heading of the page."""
    out: Path = Path("report")
    """The folder to write to."""
    force: bool = False
    """Replace a page that exists."""


def main(argv: Sequence[str] | None = None) -> None:
    """Run one of the two commands.

    Raises:
        UsageError: for what is wrong in flags, study, runs, rows or claims.
    """
    given = list(sys.argv[1:] if argv is None else argv)
    commands = {"collect": collect, "page": page}
    if not given or given[0] not in commands:
        raise UsageError(f"report: expected collect or page, got {given[0] if given else 'neither'}")
    commands[given[0]](given[1:])


def collect(argv: Sequence[str]) -> None:
    """Collect rows.

    Raises:
        UsageError: as `main`.
    """
    cfg = parse(CollectConfig, argv, prog="python -m common.report collect")
    study = read_study(cfg.study)
    series = sorted({tag for claim in _claims(study) if claim.take in ("mean", "quarter") for tag in claim.tag})
    old = read_rows(study.results) if study.results.exists() else []
    new: list[Row] = []
    unfinished = 0
    for experiment, arm, seed in study.planned():
        folder = study.folder(experiment, arm, seed)
        row = row_of(folder, experiment.name, arm, seed, series) if folder.exists() else None
        if row is None:
            unfinished += 1
        else:
            new.append(row)
    rows = merged(old, new, replace=cfg.force)
    if not rows:
        raise UsageError(f"study: no run of {cfg.study} is finished in {study.runs}")
    try:
        write_text_atomic(study.results, "".join(f"{as_line(row)}\n" for row in rows))
    except OSError as error:
        raise UsageError(f"study: cannot write {study.results} ({error.strerror})") from None
    more = f"{len(rows) - len(old)} of them new; {unfinished} planned runs are not finished in {study.runs}"
    print(f"written: {study.results}, {len(rows)} rows, {more}")


def page(argv: Sequence[str]) -> None:
    """Write the page.

    Raises:
        UsageError: as `main`.
    """
    cfg = parse(PageConfig, argv, prog="python -m common.report page")
    refuse_overwriting(cfg.out / "index.html", cfg.out / "page.md", force=cfg.force)
    study = read_study(cfg.study)
    rows = read_rows(study.results)
    strange = [row.name for row in rows if row.experiment not in study.experiments]
    if strange:
        raise UsageError(f"study: {study.results} holds {strange[0]}, which {cfg.study} does not have")
    made = findings(_claims(study), rows, [*study.experiments, *study.untested])
    try:
        written = write_page(cfg.out, made, rows, study, cfg.title)
    except OSError as error:
        raise UsageError(f"out: cannot write to {cfg.out} ({error.strerror})") from None
    for finding in made:
        print(f"{finding.claim.id:12} {finding.verdict}")
    print(f"written: {', '.join(map(str, written))}")


def _claims(study: Study) -> list[Claim]:
    return [] if study.claims is None else read_claims(study.claims)


if __name__ == "__main__":
    run_command(main)
