"""Runs as reports read them: settings, seed, logged values and where they ran."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from common.cli.arguments import flatten
from common.errors import UsageError
from common.runs.log import read_metrics


@dataclass(frozen=True)
class LoggedRun:
    """What a run's folder holds.

    Attributes:
        path: the folder.
        settings: values by dotted name ("norm.kind"), without the seed.
        seed: the run's seed.
        lines: of metrics.jsonl, a dict a line.
        sessions: of environment.json, a dict for each start and resumption; empty without that file.
    """

    path: Path
    settings: dict[str, Any]
    seed: object
    lines: list[dict[str, Any]]
    sessions: list[dict[str, Any]]

    def require(self, tag: str) -> None:
        """Raise UsageError if the run never logged a tag."""
        known = sorted({name for line in self.lines for name in line} - {"step", "epoch"})
        if tag not in known:
            raise UsageError(f"tag: {self.path} has no {tag}; it has {', '.join(known) or 'nothing yet'}")


def read_run(path: Path) -> LoggedRun:
    """Read a run's folder.

    Raises:
        UsageError: if it is none, or cannot be read.
    """
    try:
        settings = yaml.safe_load((path / "config.yaml").read_text(encoding="utf-8"))
        lines = read_metrics(path)
        environment = path / "environment.json"
        sessions = json.loads(environment.read_text(encoding="utf-8"))["sessions"] if environment.exists() else []
    except FileNotFoundError as error:
        raise UsageError(f"runs: {path} is not a run's folder (it holds no {Path(error.filename).name})") from None
    except (OSError, ValueError, KeyError, TypeError, yaml.YAMLError, RecursionError) as error:
        raise UsageError(f"runs: {path} cannot be read ({' '.join(str(error).split())})") from None
    numbers = all(
        isinstance(line, dict) and all(isinstance(value, int | float | None) for value in line.values())
        for line in lines
    )
    if not isinstance(settings, dict) or not numbers or not all(isinstance(session, dict) for session in sessions):
        raise UsageError(
            f"runs: {path} is not a run's folder (config.yaml, metrics.jsonl or environment.json holds something else)"
        )
    named = dict(flatten(settings))
    return LoggedRun(path, named, named.pop("seed", None), lines, sessions)


def group_by_seed(runs: Sequence[LoggedRun]) -> list[list[LoggedRun]]:
    """Collect runs that differ by their seed alone, in the order given.

    Raises:
        UsageError: if two runs have the same settings and seed.
    """
    groups: list[list[LoggedRun]] = []
    for run in runs:
        group = next((group for group in groups if group[0].settings == run.settings), None)
        if group is None:
            groups.append([run])
            continue
        twin = next((other for other in group if other.seed == run.seed), None)
        if twin is not None:
            raise UsageError(f"runs: {twin.path} and {run.path} have the same settings and seed; name one of them")
        group.append(run)
    return groups
