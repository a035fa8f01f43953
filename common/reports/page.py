"""One page of verdicts and results: HTML that opens offline, and the same in Markdown."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, median

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from common.reports.claims import Finding
from common.reports.rows import Row, by_seed
from common.reports.study import Experiment, Study
from common.reports.verdicts import FEWEST_SEEDS, Difference, mean_interval
from common.runtime.atomic import write_text_atomic

_METHOD = (
    "Runs are paired by seed. The difference is the treated arm less its control, in the claimed direction: above 0 is "
    "what the claim says. Intervals are Student's t over seeds; p is adjusted over all claims by Holm's method. Holds: "
    "the interval is above 0 and p below 0.05. Fails: it does not hold, and the interval is below half the paper's "
    f"effect, or below 0 where the paper has no number. Fewer than {FEWEST_SEEDS} seeds are not judged."
)


@dataclass(frozen=True)
class _Section:
    name: str
    title: str
    command: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    notes: Sequence[str]


def write_page(folder: Path, findings: Sequence[Finding], rows: Sequence[Row], study: Study, title: str) -> list[Path]:
    """Write index.html and page.md into a folder, and return them.

    Args:
        folder: is made where it is missing.
        findings: the claims with their verdicts, in the order of the page.
        rows: of results.
        study: its experiments get a section each.
        title: of the page.
    """
    environment = Environment(
        loader=PackageLoader("common.reports"), trim_blocks=True, lstrip_blocks=True, undefined=StrictUndefined
    )
    content = {
        "title": title,
        "summary": _summary(findings, rows),
        "method": _METHOD,
        "claims": [_claim(finding) for finding in findings],
        "sections": [_section(each, rows, findings) for each in study.experiments.values()],
        "untested": study.untested,
    }
    written = []
    for name, template in (("index.html", "page.html.j2"), ("page.md", "page.md.j2")):
        environment.autoescape = name.endswith("html")
        write_text_atomic(folder / name, environment.get_template(template).render(content))
        written.append(folder / name)
    return written


def _summary(findings: Sequence[Finding], rows: Sequence[Row]) -> str:
    verdicts = [finding.judged.verdict for finding in findings]
    counts = "; ".join(f"{verdicts.count(each)} {each}" for each in dict.fromkeys(verdicts))
    commits = ", ".join(dict.fromkeys(row.commit[:12] + "+" * row.commit.endswith("+changes") for row in rows))
    machines = ", ".join(dict.fromkeys(_machine(row) for row in rows))
    hours = sum(sum(row.seconds.values()) * row.threads for row in rows) / 3600
    claims = f"{len(findings)} claims: {counts}. " if findings else ""
    return f"{claims}{len(rows)} runs, {hours:.1f} hours of {machines}; commits {commits}."


def _claim(finding: Finding) -> dict[str, object]:
    claim, found = finding.claim, finding.judged.difference
    unit = f" {claim.unit}" if claim.unit else ""
    kind = finding.judged.verdict.partition(",")[0]
    return {
        "id": claim.id,
        "text": claim.text,
        "place": claim.place,
        "experiment": claim.experiment,
        "verdict": finding.verdict,
        "kind": kind if kind in ("holds", "fails") else "open",
        "difference": "-" if math.isnan(found.mean) else f"{_interval(found)}{unit}",
        "drawing": _drawing(found, claim.effect),
        "p": "-" if math.isnan(finding.judged.adjusted_p) else f"{finding.judged.adjusted_p:.2g}",
        "seeds": str(len(found.seeds)),
    }


def _interval(found: Difference) -> str:
    """Return "+1.2 (0.3 to 2.1)"; the mean alone where one seed gives no interval."""
    if math.isnan(found.low):
        return f"{found.mean:+.3g}"
    return f"{found.mean:+.3g} ({found.low:.3g} to {found.high:.3g})"


def _drawing(found: Difference, effect: float | None) -> Markup:
    """Return an interval as SVG, with a line at 0 and a diamond at the paper's effect."""
    if math.isnan(found.low):
        return Markup("")
    ends = [0.0, found.low, found.high, *([] if effect is None else [effect])]
    low, high = min(ends), max(ends)
    x = {value: 6 + 188 * (value - low) / ((high - low) or 1) for value in (*ends, found.mean)}
    diamond = "" if effect is None else f'<path d="M{x[effect]:.1f} 6l5 6-5 6-5-6z" fill="none"/>'
    return Markup(
        '<svg viewBox="0 0 200 24" role="img" aria-label="interval" stroke="currentColor" stroke-width="2">'
        f'<line x1="{x[0.0]:.1f}" x2="{x[0.0]:.1f}" y1="1" y2="23" stroke-width="1" stroke-dasharray="3 2"/>'
        f'<line x1="{x[found.low]:.1f}" x2="{x[found.high]:.1f}" y1="12" y2="12"/>'
        f'<circle cx="{x[found.mean]:.1f}" cy="12" r="3.5" fill="currentColor"/>{diamond}</svg>'
    )


def _section(experiment: Experiment, rows: Sequence[Row], findings: Sequence[Finding]) -> _Section:
    here = [row for row in rows if row.experiment == experiment.name]
    arms = {arm: by_seed(here, experiment.name, arm) for arm in experiment.arms}
    health = sorted({name.rpartition("/")[2] for row in here for name in row.health} & set(_HEALTH))
    head = ["arm", "seeds"]
    for tag, heading in experiment.show.items():
        head += [heading, f"{heading}, paper"] if _has_paper(experiment, tag) else [heading]
    head += ["minutes", "MiB", *(_HEALTH[name] for name in health)]
    table = [_row(experiment, arm, runs, health) for arm, runs in arms.items()]
    return _Section(
        experiment.name,
        experiment.title or experiment.name,
        f"python -m {experiment.command} {experiment.flags}".strip(),
        head,
        table,
        [*_of_claims(experiment, findings), *experiment.notes, *_of_runs(experiment, arms)],
    )


def _has_paper(experiment: Experiment, tag: str) -> bool:
    return any(tag in values for values in experiment.paper.values())


_HEALTH = {"effective": "components in use", "sample_information": "nats of the sample"}
"""What of the layers' health the tables show, mean over layers."""


def _row(experiment: Experiment, arm: str, runs: Mapping[int, Row], health: Sequence[str]) -> list[str]:
    cells = [arm, f"{len(runs)} of {len(experiment.seeds)}"]
    for tag in experiment.show:
        cells.append(_mean([row.last.get(tag) for row in runs.values()]))
        if _has_paper(experiment, tag):
            cells.append(f"{value:g}" if (value := experiment.paper.get(arm, {}).get(tag)) is not None else "-")
    seconds = [sum(row.seconds.values()) for row in runs.values()]
    cells.append(f"{median(seconds) / 60:.1f}" if seconds else "missing")
    cells.append(f"{max(row.peak_memory_mib for row in runs.values()):,.0f}" if runs else "missing")
    for name in health:
        values = [v for row in runs.values() for tag, v in row.health.items() if tag.rpartition("/")[2] == name]
        cells.append(f"{fmean(known):.3g}" if (known := [v for v in values if v is not None]) else "-")
    return cells


def _mean(values: Sequence[float | None]) -> str:
    """Return "0.61 ± 0.02", mean and half width of the 95 % interval, and how many values are not finite."""
    finite = [value for value in values if value is not None and math.isfinite(value)]
    lost = f", {len(values) - len(finite)} not finite" if len(finite) < len(values) else ""
    if not finite:
        return f"-{lost}" if values else "missing"
    mean, low, high = mean_interval(finite)
    return f"{mean:.4g}{f' ± {(high - low) / 2:.2g}' if len(finite) > 1 else ''}{lost}"


def _of_claims(experiment: Experiment, findings: Sequence[Finding]) -> Iterator[str]:
    for finding in findings:
        claim = finding.claim
        if claim.experiment != experiment.name:
            continue
        of, than = (" less ".join(arms) for arms in (claim.treated, claim.control))
        numbers = "" if math.isnan(finding.treated) else f" ({finding.treated:.4g} and {finding.control:.4g})"
        yield f"{claim.id}: {of} against {than}, {claim.take} {' or '.join(claim.tag)}{numbers}: {finding.verdict}."
        for arm, found in finding.controls.items():
            if not math.isnan(found.mean):
                yield f"{claim.id}, the same for {arm} against {than}: {_interval(found)}."
        if finding.paper is not None and not math.isnan(finding.paper.mean):
            yield f"{claim.id}, as the paper compares: {of} against {claim.paper_control}: {_interval(finding.paper)}."
        if finding.missing:
            yield f"{claim.id}: pairs are missing: {'; '.join(finding.missing)}."
        if claim.note:
            yield f"{claim.id}: {claim.note}"


def _of_runs(experiment: Experiment, arms: Mapping[str, Mapping[int, Row]]) -> Iterator[str]:
    """Say which arms are which settings, what is missing, what collapsed, and where the runs come from."""
    for arm, flags in experiment.arms.items():
        yield f"{arm}: {flags or 'no further settings'}"
    runs = [row for of_arm in arms.values() for row in of_arm.values()]
    missing = [f"{arm}-seed{seed}" for arm, of_arm in arms.items() for seed in experiment.seeds if seed not in of_arm]
    if missing:
        yield f"Missing runs: {', '.join(missing)}."
    collapsed = [f"{row.arm}-seed{row.seed} in step {row.collapsed['step']}" for row in runs if row.collapsed]
    if collapsed:
        yield f"Found collapsed: {', '.join(collapsed)}."
    images = {f"{name} {found['count']:,} ({found['content_hash'][:12]})": None
              for row in runs for name, found in row.images.items()}  # fmt: skip
    if images:
        yield f"Images: {', '.join(images)}."
    origins = dict.fromkeys(
        f"commit {row.commit[:12]}, torch {row.versions.get('torch')}, {_machine(row)}" for row in runs
    )
    if origins:
        yield f"Runs of {'; '.join(origins)}."


def _machine(row: Row) -> str:
    return f"{row.hardware.get('gpu') or row.hardware.get('cpu')}, {row.threads} thread{'s' * (row.threads > 1)}"
