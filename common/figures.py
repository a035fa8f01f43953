"""Draw what runs logged: ``python -m common.figures``."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from common.reports.figures import Curves, Run, curves, labelled, stems
from common.reports.records import LoggedRun, floor, floor_tag, group_by_seed, read_run, refuse_unlike
from common.runtime.cli import parse
from common.runtime.command import run_command
from common.runtime.errors import UsageError
from common.runtime.paths import refuse_overwriting


@dataclass(frozen=True, kw_only=True)
class FiguresConfig:
    """Draw a logged value of several runs; runs that differ by their seed alone become one line with a band."""

    runs: list[Path] = field(default_factory=list)
    """Folders of runs, for instance runs/cbgan/digits-ucb-seed0 runs/cbgan/digits-ucb-seed1."""
    tag: list[str] = field(default_factory=lambda: ["metric/fid_classifier"])
    """Which values, a panel each; TAG_floor, where it was logged, becomes a horizontal line."""
    label: list[str] = field(default_factory=list)
    """The lines' names in the order of their first runs; without any, the settings in which they differ."""
    out: Path | None = None
    """The figure: OUT.png and OUT.svg."""
    x: Literal["epoch", "step"] = "epoch"
    """What to draw it over; values logged more often than once an epoch need step."""
    title: str | None = None
    """A line above the figure."""
    log_y: bool = False
    """Draw the value on a logarithmic axis."""
    force: bool = False
    """Replace figures that exist."""

    def __post_init__(self) -> None:
        if not self.runs:
            raise ValueError("runs: name at least one run's folder, --runs runs/cbgan/NAME")
        if not self.tag:
            raise ValueError("tag: name at least one logged value, --tag loss/test")
        if self.out is None or not self.out.name.removesuffix(".png").removesuffix(".svg"):
            given = "none" if self.out is None else repr(str(self.out))
            raise ValueError(f"out: expected the figure's path without ending, such as --out fid, got {given}")


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command.

    Raises:
        UsageError: if a folder is no run, does not have the tag, or the runs cannot share a figure.
    """
    cfg = parse(FiguresConfig, argv, prog="python -m common.figures")
    assert cfg.out is not None  # FiguresConfig refuses otherwise
    refuse_overwriting(*stems(cfg.out), force=cfg.force)
    runs = [read_run(path) for path in cfg.runs]
    groups = labelled(group_by_seed(runs), cfg.label)
    panels = [_logged(groups, tag, cfg.x) for tag in cfg.tag]
    refuse_unlike(runs, cfg.tag)
    try:
        written = curves(cfg.out, panels, xlabel=cfg.x, title=cfg.title, log_y=cfg.log_y)
    except ValueError as error:
        raise UsageError(f"runs: {error}") from None
    except OSError as error:
        raise UsageError(f"out: cannot write {cfg.out} ({error.strerror})") from None
    for label, group in groups.items():
        print(f"{label}: {', '.join(str(run.path) for run in group)}")
    print(f"written: {', '.join(map(str, written))}")


def _logged(groups: Mapping[str, list[LoggedRun]], tag: str, x: str) -> Curves:
    series = {label: [_points(run, tag, x) for run in group] for label, group in groups.items()}
    floors = (floor(run, floor_tag(tag)) for group in groups.values() for run in group)
    first = next((found for found in floors if found is not None), None)
    name = "real test images" if tag.startswith("metric/fid") else "floor"
    return Curves(series, tag, floor=first, floor_label=name)


def _points(run: LoggedRun, tag: str, x: str) -> Run:
    run.require(tag)
    points = [(line[x], line[tag]) for line in run.lines if line.get(tag) is not None and line.get(x) is not None]
    if not points:
        raise UsageError(f"tag: {tag} is not finite anywhere in {run.path}")
    xs, ys = [place for place, _ in points], [value for _, value in points]
    if len(set(xs)) < len(xs):
        remedy = "use --x step" if x == "epoch" else "expected one"
        raise UsageError(f"x: {run.path} has several values of {tag} in one {x}; {remedy}")
    return xs, ys


if __name__ == "__main__":
    run_command(main)
