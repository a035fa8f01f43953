"""Claims of a paper as data, and what rows of results say of each of them."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from statistics import fmean
from typing import Any, Literal

import yaml

from common.reports.records import unlike
from common.reports.rows import Row, by_seed
from common.reports.verdicts import Difference, Judged, judge, paired_difference
from common.runtime.errors import UsageError

Arms = tuple[str, ...]
"""One arm, or two whose difference is meant: the first less the second."""
Tags = tuple[str, ...]


@dataclass(frozen=True)
class Claim:
    """What a paper says, and the one contrast that it is judged by.

    Attributes:
        id: its name.
        place: where the paper says it.
        text: what it says, in a sentence.
        experiment: of the study.
        tag: the logged value, or several of which the first that runs have counts.
        treated: the arm that the claim is about, or two of them whose difference it is about.
        control: the arm, or two, that it is compared with.
        better: the direction that is claimed.
        take: "last"; "chosen", by ``best.by``; "mean" of the run's values, the area under its curve; or "quarter", the
            last value in the first quarter of the epochs.
        scale: what values are multiplied by, such as 100 for percentage points.
        unit: of the scaled values.
        effect: the paper's effect in this unit and in the claimed direction, if it has a number.
        controls: further arms, which are compared with ``control`` too.
        paper_control: the arm that the paper compares with, where it is another one.
        note: what has to be known to read the verdict.
    """

    id: str
    place: str
    text: str
    experiment: str
    tag: Tags
    treated: Arms
    control: Arms
    better: Literal["higher", "lower"]
    take: Literal["last", "chosen", "mean", "quarter"] = "last"
    scale: float = 1.0
    unit: str = ""
    effect: float | None = None
    controls: tuple[str, ...] = ()
    paper_control: str | None = None
    note: str = ""


@dataclass(frozen=True)
class Finding:
    """A claim with its verdict.

    Attributes:
        claim: what was claimed.
        judged: the primary contrast and the verdict.
        treated: the mean of the treated arm over the pairs, nan where there is none.
        control: that of the control.
        controls: by further arm, the same contrast for it.
        paper: the paper's own contrast, where the control is another one.
        missing: why pairs are missing, a sentence each.
    """

    claim: Claim
    judged: Judged
    treated: float
    control: float
    controls: Mapping[str, Difference]
    paper: Difference | None
    missing: Sequence[str]

    @property
    def verdict(self) -> str:
        """The verdict, with the controls that have the same gain."""
        alike = [arm for arm, found in self.controls.items() if found.low > 0]
        verdict = self.judged.verdict
        return f"{verdict}, but so does {' and '.join(alike)}" if verdict.startswith("holds") and alike else verdict


def read_claims(path: Path) -> list[Claim]:
    """Read claims from YAML: a mapping of ids to what `Claim` holds.

    Raises:
        UsageError: if the file cannot be read, or a claim lacks something or holds what it should not.
    """
    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise UsageError(f"claims: cannot read {path} ({' '.join(str(error).split())})") from None
    if not isinstance(found, dict) or not all(isinstance(values, dict) for values in found.values()):
        raise UsageError(f"claims: expected a mapping of ids to claims in {path}")
    return [_claim(path, str(name), values) for name, values in found.items()]


_ALLOWED = {"better": ("higher", "lower"), "take": ("last", "chosen", "mean", "quarter")}


def _claim(path: Path, name: str, values: Mapping[str, Any]) -> Claim:
    known = {each.name: each for each in fields(Claim) if each.name != "id"}
    for given in values:
        if given not in known:
            raise UsageError(f"claims: {name}.{given} in {path}: no such entry; expected {', '.join(known)}")
    for needed in known.values():
        if needed.default is MISSING and needed.name not in values:
            raise UsageError(f"claims: {name} in {path} has no {needed.name}")
    for entry, allowed in _ALLOWED.items():
        if values.get(entry, allowed[0]) not in allowed:
            raise UsageError(f"claims: {name}.{entry}: expected one of {', '.join(allowed)}, got {values[entry]}")
    for entry in ("scale", "effect"):
        if not isinstance(values.get(entry), int | float | None):
            raise UsageError(f"claims: {name}.{entry}: expected a number, got {values[entry]}")
    arms = {
        entry: _arms(name, entry, values[entry])
        for entry in ("tag", "treated", "control", "controls")
        if entry in values
    }
    if len(arms["treated"]) != len(arms["control"]) or len(arms["control"]) > 2:
        raise UsageError(f"claims: {name}.control: expected one arm, or two as treated has, got {values['control']}")
    return Claim(id=name, **{**values, **arms})


def _arms(name: str, entry: str, value: Any) -> Arms:
    arms = tuple(value) if isinstance(value, list) else (value,)
    if not all(isinstance(arm, str) for arm in arms):
        raise UsageError(f"claims: {name}.{entry}: expected a name, or a list of them, got {value}")
    return arms


def findings(claims: Sequence[Claim], rows: Sequence[Row], experiments: Iterable[str] = ()) -> list[Finding]:
    """Judge claims by rows, all together, since Holm's method looks at all.

    Args:
        claims: to judge.
        rows: of results.
        experiments: names that may have no rows yet.

    Raises:
        UsageError: if a claim names an experiment that is neither planned nor there, or its runs do not compare.
    """
    known = {row.experiment for row in rows} | set(experiments)
    for claim in claims:
        if claim.experiment not in known:
            raise UsageError(
                f"claims: {claim.id} names experiment {claim.experiment}; there are {', '.join(sorted(known))}"
            )
    contrasts = {claim.id: _contrast(claim, rows, claim.treated, claim.control) for claim in claims}
    verdicts = judge({name: found[0] for name, found in contrasts.items()}, {c.id: c.effect for c in claims})
    return [
        Finding(
            claim,
            verdicts[claim.id],
            *_means(claim, rows, contrasts[claim.id][0].seeds),
            {arm: _contrast(claim, rows, (arm,), claim.control)[0] for arm in claim.controls},
            _contrast(claim, rows, claim.treated, (claim.paper_control,))[0] if claim.paper_control else None,
            contrasts[claim.id][1],
        )
        for claim in claims
    ]


def _contrast(claim: Claim, rows: Sequence[Row], treated: Arms, control: Arms) -> tuple[Difference, list[str]]:
    """Return the paired difference of arms, and why pairs are missing."""
    sides = [{arm: by_seed(rows, claim.experiment, arm) for arm in arms} for arms in (treated, control)]
    runs = [run for side in sides for arm in side.values() for run in arm.values()]
    tag = tag_of(claim, runs)
    _refuse_unlike(runs, tag)
    missing = [f"{arm} has no runs" for side in sides for arm, of_arm in side.items() if not of_arm]
    values = []
    for side in sides:
        of_side: dict[int, list[float]] = {}
        for arm, of_arm in side.items():
            for seed, run in of_arm.items():
                value = taken(claim, run, tag)
                of_side.setdefault(seed, []).append(value)
                if not math.isfinite(value):
                    missing.append(f"{arm}, seed {seed}: no finite {tag}")
        values.append(
            {
                seed: claim.scale * (found[0] - sum(found[1:]))
                for seed, found in of_side.items()
                if len(found) == len(side) and all(map(math.isfinite, found))
            }
        )
    ours, theirs = values
    return paired_difference(ours, theirs, claim.better), missing


def tag_of(claim: Claim, runs: Iterable[Row]) -> str:
    """Return the first of a claim's tags that runs have."""
    found = {tag for run in runs for tag in run.last}
    return next((tag for tag in claim.tag if tag in found), claim.tag[0])


def taken(claim: Claim, run: Row, tag: str) -> float:
    """Return a run's value of a claim, unscaled; nan where it has none that is finite."""
    if claim.take in ("last", "chosen"):
        value = (run.last if claim.take == "last" else run.chosen).get(tag)
        return math.nan if value is None else value
    pairs = run.series.get(tag, [])
    if claim.take == "quarter":
        pairs = [(epoch, value) for epoch, value in pairs if 4 * epoch <= run.epochs][-1:]
    values = [math.nan if value is None else value for _, value in pairs]
    return fmean(values) if values else math.nan


def _means(claim: Claim, rows: Sequence[Row], seeds: Sequence[int]) -> tuple[float, float]:
    """Return the mean of the first treated and the first control arm over the pairs."""
    found = []
    for arm in (claim.treated[0], claim.control[0]):
        runs = by_seed(rows, claim.experiment, arm)
        values = [claim.scale * taken(claim, runs[seed], tag_of(claim, runs.values())) for seed in seeds]
        found.append(fmean(values) if values else math.nan)
    return found[0], found[1]


def _refuse_unlike(runs: Sequence[Row], tag: str) -> None:
    """Refuse runs that were measured otherwise, by name."""
    for run in runs[1:]:
        if differ := unlike(runs[0], run, [tag]):
            raise UsageError(
                f"results: {runs[0].name} and {run.name} were measured otherwise ({', '.join(differ)} differ), so "
                f"their {tag} does not compare; run one of them again"
            )
