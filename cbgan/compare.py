"""Compare runs of a GAN, FID and samples: ``python -m cbgan.compare RUN RUN ...``."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from common.reports.figures import Curves, Run, curves, grid, labelled, stems
from common.reports.records import LoggedRun, floor, floor_tag, group_by_seed, read_run, refuse_unlike
from common.runtime.cli import parse, shown
from common.runtime.command import run_command
from common.runtime.errors import UsageError
from common.runtime.paths import refuse_overwriting
from common.tables import best_of, over_seeds
from common.train.logging import FINAL

_PROTOCOL = ("fid.reference", "fid.extractor", "data.size")
"""Settings that FIDs have to share to be compared, besides the number of samples and what the protocols hold."""
_ROWS = 4
"""Of eight samples of each run."""


@dataclass(frozen=True, kw_only=True)
class CompareConfig:
    """Draw what runs logged and made side by side; runs that differ by their seed alone become one line with a band.

    Writes fid-epoch and fid-time (FID against epoch and against hours of training, as in the paper's Figure 10) and
    samples (as in its Figure 11), each as PNG and SVG.
    """

    runs: list[Path] = field(default_factory=list)
    """Folders of runs, for instance runs/cbgan/digits-ucb-seed0 runs/cbgan/digits-bn-seed0; --runs may be left out."""
    tag: str | None = None
    """The logged distance to draw; null: that of fid.extractor."""
    label: list[str] = field(default_factory=list)
    """The lines' names in the order of their first runs; without any, the settings in which they differ."""
    out: Path = Path("comparison")
    """Folder for the figures."""
    log_y: bool = False
    """Draw the distance on a logarithmic axis."""
    force: bool = False
    """Replace figures that exist."""

    def __post_init__(self) -> None:
        if not self.runs:
            raise ValueError("runs: name the runs' folders, python -m cbgan.compare runs/cbgan/ONE runs/cbgan/OTHER")


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command.

    Raises:
        UsageError: if a folder is no run of a GAN, the runs were measured otherwise, or a figure is in the way.
    """
    given = list(sys.argv[1:] if argv is None else argv)
    if given and not given[0].startswith("-"):
        given.insert(0, "--runs")
    cfg = parse(CompareConfig, given, prog="python -m cbgan.compare")
    figures = {name: cfg.out / name for name in ("fid-epoch", "fid-time", "samples")}
    refuse_overwriting(*(path for figure in figures.values() for path in stems(figure)), force=cfg.force)
    runs = [read_run(path) for path in cfg.runs]
    tag = cfg.tag or f"metric/fid_{runs[0].settings.get('fid.extractor')}"
    refuse_unlike_protocols(runs, tag)
    refuse_unlike(runs, [tag])
    groups = labelled(group_by_seed(runs), cfg.label)
    sheet, captions = samples(groups)
    found = [value for run in runs if (value := floor(run, floor_tag(tag))) is not None]
    try:
        for name, x, unit in (("fid-epoch", "epoch", "epoch"), ("fid-time", "time", "hours of training")):
            series = {label: _series(group, tag, x) for label, group in groups.items()}
            panel = Curves(series, _title(tag), floor=found[0] if found else None, floor_label="real test images")
            curves(figures[name], [panel], xlabel=unit, log_y=cfg.log_y)
        grid(figures["samples"], sheet, columns=len(captions), captions=captions)
    except ValueError as error:
        raise UsageError(f"runs: {error}") from None
    print("\n".join(_table(groups, tag)))
    print("written: " + ", ".join(str(path) for figure in figures.values() for path in stems(figure)))


def refuse_unlike_protocols(runs: Sequence[LoggedRun], tag: str) -> None:
    """Refuse runs whose distances were measured by different settings.

    Raises:
        UsageError: naming the setting, and the values that two runs have.
    """
    for name in ("fid.final_samples" if tag.endswith(FINAL) else "fid.samples", *_PROTOCOL):
        for run in runs[1:]:
            one, other = (shown(each.settings.get(name)) for each in (runs[0], run))
            if one != other:
                raise UsageError(
                    f"runs: {name} is {one} in {runs[0].path} and {other} in {run.path}, so their distances do not "
                    "compare; measure both alike with python -m cbgan.evaluate"
                )


def training_hours(run: LoggedRun) -> dict[int, float]:
    """Return the hours trained by each logged step, measurements left out: images done, by the speed they were done at.

    A resumed or rewound run counts each step once.
    """
    settings = run.settings
    world = max((session.get("world") or 1 for session in run.sessions), default=1)
    images = settings["batch_size"] * settings["grad_accum_steps"] * world
    hours, last, found = 0.0, 0, {0: 0.0}
    for line in run.lines:
        speed = line.get("time/images_per_second")
        if speed:
            hours += (line["step"] - last) * images / speed / 3600
            last = line["step"]
        found[line["step"]] = hours
    return found


def _series(group: Sequence[LoggedRun], tag: str, x: str) -> list[Run]:
    """Return x and y of each run of a line; at the time that they took on average, where x is the time."""
    measured: list[list[tuple[Any, ...]]] = []
    for run in group:
        run.require(tag)
        hours = training_hours(run)
        lines = [line for line in run.lines if line.get(tag) is not None]
        measured.append([(line["epoch"], hours[line["step"]], line[tag]) for line in lines])
    epochs = [[epoch for epoch, _, _ in points] for points in measured]
    if x == "epoch" or any(each != epochs[0] for each in epochs):  # the latter is refused when it is drawn
        xs = epochs
    else:
        xs = [np.mean([[hour for _, hour, _ in points] for points in measured], axis=0).tolist()] * len(group)
    return [(place, [value for _, _, value in points]) for place, points in zip(xs, measured, strict=True)]


def samples(groups: dict[str, list[LoggedRun]]) -> tuple[Tensor, list[str]]:
    """Return a panel of real images and one of the last samples of each line's first run, with their captions.

    Returns:
        uint8 (N, 3, H, W), N panels of four rows of eight images.

    Raises:
        UsageError: if a run has no pictures, or they are of other sizes.
    """
    first = next(iter(groups.values()))[0]
    panels, captions = [_picture(first, "real.png")], ["real"]
    for label, group in groups.items():
        files = sorted((group[0].path / "samples").glob("epoch-*.png"))
        panels.append(_picture(group[0], files[-1].name if files else "epoch-*.png"))
        captions.append(label)
        if panels[-1].shape != panels[0].shape:
            raise UsageError(f"runs: samples of {group[0].path} are of another size than those of {first.path}")
    return torch.stack(panels), captions


def _picture(run: LoggedRun, name: str) -> Tensor:
    """Read the upper rows of a grid of samples, uint8 (3, H, W)."""
    try:
        with Image.open(run.path / "samples" / name, formats=["PNG"]) as picture:
            pixels = torch.from_numpy(np.array(picture.convert("RGB"))).permute(2, 0, 1)
    except OSError:
        raise UsageError(f"runs: {run.path} has no samples/{name}; expected a run of cbgan that was measured") from None
    side = (pixels.shape[2] - 1) // 8
    return pixels[:, : _ROWS * side + 1]


def _table(groups: dict[str, list[LoggedRun]], tag: str) -> list[str]:
    """Return a Markdown table of the last and the best value of each line, and of the hours it trained."""
    best = best_of([run for group in groups.values() for run in group], tag)
    name = {min: "lowest", max: "highest"}.get(best)
    head = ["seeds", f"{_title(tag)}, last", *([name] if name else []), "hours of training"]
    lines = [f"| | {' | '.join(head)} |", f"|---|{'---|' * len(head)}"]
    for label, group in groups.items():
        values = [run.values(tag) for run in group]
        cells = [[each[-1] for each in values], *([[best(each) for each in values]] if best else []),
                 [max(training_hours(run).values()) for run in group]]  # fmt: skip
        means = [over_seeds(each).text() for each in cells]
        lines.append(f"| {' | '.join([label, ' '.join(str(run.seed) for run in group), *means])} |")
    chosen = f"; the {name} was chosen by the value itself" if name else ""
    return [*lines, "", f"Mean ± standard deviation over seeds{chosen}."]


def _title(tag: str) -> str:
    """Return "FID (classifier)" of metric/fid_classifier."""
    return f"FID ({tag.removeprefix('metric/fid_').replace('_', ', ')})" if tag.startswith("metric/fid_") else tag


if __name__ == "__main__":
    run_command(main)
