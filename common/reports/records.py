"""Runs as reports read them: settings, seed, logged values and where they ran."""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Protocol

import yaml

from common.norms.config import NormConfig, settings_of
from common.norms.registry import BUILT_IN, default_options
from common.runtime.cli import flatten
from common.runtime.errors import UsageError
from common.train.logging import FINAL, read_metrics


@dataclass(frozen=True)
class LoggedRun:
    """What a run's folder holds.

    Attributes:
        path: the folder.
        settings: values by dotted name ("norm.kind"), without the seed and what the run's layer has no use for.
        seed: the run's seed.
        lines: of metrics.jsonl, a dict a line.
        sessions: of environment.json, a dict for each start and resumption.
        summary: of summary.json.
        unused: names of settings that mean nothing to the run's layer.
    """

    path: Path
    settings: dict[str, Any]
    seed: object
    lines: list[dict[str, Any]]
    sessions: list[dict[str, Any]]
    summary: dict[str, Any]
    unused: frozenset[str]

    @property
    def protocol(self) -> dict[str, Any]:
        """What values are comparable by."""
        return self.summary["protocol"]

    @property
    def better(self) -> dict[str, str]:
        """Whether "higher" or "lower" is better of each value that has a best, by tag."""
        return self.summary["better"]

    @property
    def epochs(self) -> int:
        """Epochs done."""
        return max((line.get("epoch") or 0 for line in self.lines), default=0)

    def values(self, tag: str, epoch: int | None = None) -> list[float]:
        """Return what was logged under a tag, nan where it was not finite; by the end of an epoch if one is given.

        Raises:
            UsageError: if the run never logged the tag, or not by then; it has to have come so far.
        """
        self.require(tag)
        lines = self.lines
        if epoch is not None:
            end = min(line["step"] for line in lines if line["epoch"] >= epoch)  # lines of the next one have its number
            lines = [line for line in lines if line["step"] <= end]
        values = [math.nan if line[tag] is None else line[tag] for line in lines if tag in line]
        if not values:
            raise UsageError(f"at: {self.path} has no {tag} by epoch {epoch}; expected a later one")
        return values

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

    def content(name: str, read: Callable[[str], Any]) -> dict[str, Any]:
        return dict(read((path / name).read_text(encoding="utf-8")))

    try:
        settings = dict(flatten(content("config.yaml", yaml.safe_load)))
        lines = read_metrics(path)
        sessions = [dict(session) for session in content("environment.json", json.loads)["sessions"]]
        summary = content("summary.json", json.loads)
        summary |= {"protocol": dict(summary["protocol"]), "better": dict(summary.get("better", {}))}
        if not all(isinstance(value, int | float | None) for line in lines for value in line.values()):
            raise ValueError("metrics.jsonl holds something else than numbers")
    except FileNotFoundError as error:
        raise UsageError(f"runs: {path} is not a run's folder (it holds no {Path(error.filename).name})") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, yaml.YAMLError, RecursionError) as error:
        raise UsageError(f"runs: {path} cannot be read ({' '.join(str(error).split())})") from None
    seed, unused = settings.pop("seed", None), _unused(settings)
    meant = {name: value for name, value in settings.items() if name not in unused}
    return LoggedRun(path, meant, seed, lines, sessions, summary, unused)


def _unused(settings: Mapping[str, Any]) -> frozenset[str]:
    try:
        known = settings_of(str(settings.get("norm.kind")))
    except ValueError:  # a layer of somebody's own, or none
        return frozenset()
    return frozenset(f"norm.{field.name}" for field in fields(NormConfig) if field.name not in known)


def differing(runs: Sequence[LoggedRun]) -> list[str]:
    """Return the settings in which any of the runs differ, of those that mean something to them.

    Settings that are the defaults of each run's kind of layer follow from the kind.
    """
    names = dict.fromkeys(name for run in runs for name in run.settings)
    values = {name: [_chosen(run, name) for run in runs if name not in run.unused] for name in names}
    return [name for name, found in values.items() if any(value != found[0] for value in found)]


def _chosen(run: LoggedRun, name: str) -> Any:
    """Return a setting's value, or that it is the default of the run's kind of layer."""
    value, kind, (group, _, option) = run.settings.get(name), run.settings.get("norm.kind"), name.partition(".")
    if group != "norm" or kind not in BUILT_IN or option not in (defaults := default_options(kind)):
        return value
    return _DEFAULT if value == defaults[option] else value


_DEFAULT = object()


def refuse_unlike(runs: Sequence[LoggedRun], tags: Sequence[str], named: Sequence[str] = ()) -> None:
    """Refuse runs whose values of these tags do not compare, by their protocols and by the floors they logged.

    The images that runs were trained on may differ, those they are measured on not. Runs that differ in a named
    setting of data, FID or the statistics measured by stand in rows of their own, and are not compared.

    Raises:
        UsageError: naming two runs and what differs.
    """
    telling = [name for name in named if name.startswith(("data.", "fid.", "recalibrate."))]
    firsts: dict[str, LoggedRun] = {}
    for run in runs:
        first = firsts.setdefault(repr([run.settings.get(name) for name in telling]), run)
        if differ := unlike(first, run, tags):
            raise UsageError(
                f"runs: {first.path} and {run.path} were measured otherwise ({', '.join(differ)} differ), so their "
                "values do not compare; take them apart"
            )
        for tag in dict.fromkeys(map(floor_tag, tags)):
            one, other = floor(first, tag), floor(run, tag)
            # Another machine's classifier may differ in the last digits; other images or another extractor by far more.
            if one is not None and other is not None and abs(one - other) > 0.01 * max(abs(one), abs(other)):
                raise UsageError(
                    f"runs: {tag} is {one:.4g} in {first.path} and {other:.4g} in {run.path}: they were measured "
                    "against different images, so their values do not compare; take them apart"
                )


def floor_tag(tag: str) -> str:
    """Return the tag of a value's floor: metric/fid_x_floor, of metric/fid_x and of its distance to the other split."""
    return f"{tag.removesuffix(FINAL).removesuffix('_train').removesuffix('_test')}_floor"


def floor(run: LoggedRun, tag: str) -> float | None:
    """Return the first floor that a run logged, if it did."""
    return next((line[tag] for line in run.lines if line.get(tag) is not None), None)


class Measured(Protocol):
    """What says how values were measured: a run's folder, or its row of results."""

    @property
    def protocol(self) -> dict[str, Any]: ...  # noqa: D102

    @property
    def settings(self) -> dict[str, Any]: ...  # noqa: D102


_OF_FEATURES = tuple(
    f"metric/{name}_"
    for name in ("kid", "inception_score", "precision", "recall", "copies", "train_gap", "class", "classes")
)
"""Beginnings of the tags of what else is computed of a FID's features."""


def measured_by(run: Measured, tags: Sequence[str]) -> dict[str, Any]:
    """Return what of a run's protocol these tags depend on, and the numbers of samples."""
    protocol, names = run.protocol, set()
    if any(tag.startswith(("metric/", "loss/test")) for tag in tags):
        names.add("content_test")
    if any(tag.startswith(("metric/", "loss/test", "loss/validation", "loss/train_eval")) for tag in tags):
        names.add("recalibrated")
    of_features = [tag for tag in tags if "fid" in tag or tag.startswith(_OF_FEATURES)]
    if of_features:
        names |= protocol.keys() - {"content_train", "content_validation"}
        if protocol.get("extractor") == "classifier":  # trained anew elsewhere, its weights differ in their last digits
            names.discard("extractor_id")
    counts = {f"fid.{'final_' if tag.endswith(FINAL) else ''}samples" for tag in of_features} & run.settings.keys()
    found = {name: value for name, value in protocol.items() if name in names}
    return found | {name: run.settings[name] for name in sorted(counts)}


def unlike(one: Measured, other: Measured, tags: Sequence[str]) -> list[str]:
    """Return the entries of two protocols in which these tags were measured otherwise."""
    ours, theirs = (measured_by(each, tags) for each in (one, other))
    return [name for name in ours if name in theirs and ours[name] != theirs[name]]


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
