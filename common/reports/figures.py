"""Figures for reports: curves over seeds and grids of pictures, as PNG and SVG.

Nothing here touches pyplot, the backend or the settings of the program that imports it, and nothing reads the user's
matplotlibrc: the same input gives the same bytes.
"""

import io
import math
import re
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib import style
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.font_manager import findfont, get_font
from matplotlib.text import Text
from matplotlib.ticker import LogFormatter, MaxNLocator
from torch import Tensor

from common.reports.records import LoggedRun, differing
from common.runtime.atomic import write_atomic
from common.runtime.cli import shown
from common.runtime.errors import UsageError

Run = tuple[Sequence[float], Sequence[float]]
"""x and y of one run, equally long."""

_STYLE: dict[str, Any] = {
    "axes.grid": True,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "figure.dpi": 144,
    "font.size": 11,
    "grid.color": "0.9",
    "legend.frameon": False,
    "lines.linewidth": 1.8,
    "lines.markersize": 4.5,
    "savefig.dpi": "figure",
    "svg.hashsalt": "cluster-based-norm",  # identifiers follow from content, not from a random draw
    "text.parse_math": False,  # a dollar sign in a label is a dollar sign
}
_SIZE = (7.0, 4.0)  # inches: 1008 x 576 pixels, about a README's width
_PANEL = (4.2, 3.1)
# Okabe and Ito, "Color Universal Design" (2008), without the yellow, which is too pale for lines on white.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#000000", "#56B4E9", "#E69F00")
_LINES = ("-", "--", "-.", ":")
_MARKERS = ("o", "s", "^", "D", "v", "P", "X")
_MOST_MARKERS = 30
_GRID_WIDTH = 840
_CAPTION_POINTS = (5, 10)


@dataclass(frozen=True)
class Curves:
    """A panel of curves: for each label its run, or the mean of several with a band of one standard deviation.

    Attributes:
        series: runs over seeds by label; the runs of a label must have the same x.
        ylabel: what y is, with its unit.
        floor: where to draw a horizontal reference line.
        floor_label: the reference line's name.
    """

    series: Mapping[str, Sequence[Run]]
    ylabel: str
    floor: float | None = None
    floor_label: str = "floor"


def curves(
    path: Path, panels: Sequence[Curves], *, xlabel: str, title: str | None = None, log_y: bool = False
) -> tuple[Path, Path]:
    """Draw curves side by side, two or three panels a row; each label looks alike in all panels.

    The legend says how many runs a line is the mean of. On a logarithmic axis a band that would reach 0 ends at the
    lowest run.

    Args:
        path: PATH.png and PATH.svg are written, each whole or not at all; either ending may be given.
        panels: what to draw.
        xlabel: what x is, with its unit.
        title: a line above.
        log_y: draw y on a logarithmic axis.

    Returns:
        The two files.

    Raises:
        ValueError: naming the label, if a run is not finite, its x and y differ in length, x differs between runs, or y
            is not positive on a logarithmic axis; or if a floor cannot be drawn.
    """
    checked = [{label: _checked(label, runs, log_y) for label, runs in panel.series.items()} for panel in panels]
    for floor in (panel.floor for panel in panels):
        if floor is not None and not (math.isfinite(floor) and (floor > 0 or not log_y)):
            raise ValueError(f"floor: expected a finite {'positive ' if log_y else ''}number, got {floor}")
    columns = 3 if len(panels) in (3, 5, 6, 9) else min(2, len(panels))
    rows = -(-len(panels) // columns)
    size = _SIZE if len(panels) == 1 else (_PANEL[0] * columns, _PANEL[1] * rows)
    with drawing_style():
        figure = Figure(figsize=size, layout="constrained")
        drawn = []
        for number, (panel, series) in enumerate(zip(panels, checked, strict=True)):
            axes = figure.add_subplot(rows, columns, number + 1)
            drawn.append(_draw_curves(axes, panel, series, log_y=log_y))
            axes.set_xlabel(xlabel)
        means = any(len(ys) > 1 for _, ys in checked[0].values())
        _legends(figure, drawn, len(checked[0]), means=means)
        if title is not None:
            if len(panels) == 1:
                figure.axes[0].set_title(title, loc="left")
            else:
                figure.suptitle(title)
        return write_figure(figure, path)


def _draw_curves(
    axes: Axes, panel: Curves, series: Mapping[str, tuple[np.ndarray, np.ndarray]], *, log_y: bool
) -> tuple[list[Any], list[str]]:
    """Draw a panel; return what a legend is made of: its lines, then its floor if it has one, and their names."""
    handles = [_line(axes, i, x, ys, log_y) for i, (x, ys) in enumerate(series.values())]
    names = [f"{label} (n = {len(ys)})" for label, (_, ys) in series.items()]
    if panel.floor is not None:
        handles.append(axes.axhline(panel.floor, color="0.45", linestyle=(0, (1, 1.5)), linewidth=1.4))
        names.append(f"{panel.floor_label} ({panel.floor:.3g})")
    if log_y:
        axes.set_yscale("log")
        axes.grid(visible=True, which="minor", axis="y")
        for set_formatter in (axes.yaxis.set_major_formatter, axes.yaxis.set_minor_formatter):
            set_formatter(LogFormatter(labelOnlyBase=False, minor_thresholds=(2, 0.5)))
    if all((x == x.round()).all() for x, _ in series.values()):
        axes.xaxis.set_major_locator(MaxNLocator("auto", integer=True, steps=[1, 2, 5, 10]))
    axes.set_ylabel(panel.ylabel)
    # matplotlib leaves out what begins with an underscore
    return handles, [f" {name}" if name.startswith("_") else name for name in names]


def _legends(figure: Figure, drawn: list[tuple[list[Any], list[str]]], lines: int, *, means: bool) -> None:
    """Name lines and floor in a single panel; of several, the lines once below them all, each floor in its panel."""
    title = "mean ± standard deviation" if means else None
    if len(drawn) == 1:
        figure.axes[0].legend(*drawn[0], title=title, alignment="left")
        return
    handles, names = drawn[0][0][:lines], drawn[0][1][:lines]
    width, height = figure.get_size_inches()
    rows = next(rows for rows in range(1, lines + 1) if rows == lines or _inches(names, rows) < width)
    figure.set_size_inches(width, height + 0.25 * (rows + means))
    figure.legend(handles, names, title=title, ncols=-(-lines // rows), loc="outside lower center")
    for axes, (handles, names) in zip(figure.axes, drawn, strict=True):
        if names[lines:]:
            axes.legend(handles[lines:], names[lines:])


def _inches(names: list[str], rows: int) -> float:
    """Return about how wide a legend of so many rows is, which is filled column by column."""
    return sum(0.6 + 0.085 * max(map(len, names[i : i + rows])) for i in range(0, len(names), rows))


def grid(
    path: Path, images: Tensor, *, columns: int | None = None, captions: Sequence[str] | None = None
) -> tuple[Path, Path]:
    """Draw pictures side by side, row by row, enlarged by a whole factor without smoothing.

    Args:
        path: PATH.png and PATH.svg are written, each whole or not at all; either ending may be given.
        images: uint8 (N, 3, H, W).
        columns: pictures a row; without it, a near-square grid.
        captions: a line under each picture.

    Returns:
        The two files.

    Raises:
        ValueError: if the images are of another type or shape, there are none, or captions are not one each.
    """
    if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3 or not images.numel():
        raise ValueError(f"images: expected uint8 (N, 3, H, W), got {images.dtype} {tuple(images.shape)}")
    count, _, height, width = images.shape
    columns = min(columns or math.ceil(math.sqrt(count)), count)
    rows = math.ceil(count / columns)
    captions = None if captions is None else [drawable(caption) for caption in captions]
    scale = max(1, _GRID_WIDTH // (columns * (width + 1) + 1))
    dpi = _STYLE["figure.dpi"]
    low, high = _CAPTION_POINTS
    longest = max((len(caption) for caption in captions or ()), default=0)
    # A character of the font is about 0.6 of its size wide.
    points = min(high, max(low, width * scale * 72 / dpi / (0.6 * max(longest, 1))))
    band = 0 if captions is None else math.ceil(1.6 * points * dpi / 72 / scale)
    cell = height + band + 1
    sheet = np.full((rows * cell + 1, columns * (width + 1) + 1, 3), 255, dtype=np.uint8)
    corners = [(1 + i // columns * cell, 1 + i % columns * (width + 1)) for i in range(count)]
    for (top, left), image in zip(corners, images.cpu().permute(0, 2, 3, 1).numpy(), strict=True):
        sheet[top : top + height, left : left + width] = image
    with drawing_style():
        figure = Figure(figsize=(sheet.shape[1] * scale / dpi, sheet.shape[0] * scale / dpi))
        axes = figure.add_axes((0, 0, 1, 1))
        axes.set_axis_off()
        axes.imshow(sheet, interpolation="none", aspect="auto")
        for (top, left), caption in zip(corners, captions or [""] * count, strict=True):
            axes.text(left + width / 2 - 0.5, top + height - 0.5 + band / 2, caption,
                      fontsize=points, ha="center", va="center")  # fmt: skip
        return write_figure(figure, path)


def stems(path: Path) -> tuple[Path, Path]:
    """Return the PNG and SVG files of a path given with either ending or without."""
    name = path.name.removesuffix(".png").removesuffix(".svg")
    return path.with_name(f"{name}.png"), path.with_name(f"{name}.svg")


def _checked(label: str, runs: Sequence[Run], log_y: bool) -> tuple[np.ndarray, np.ndarray]:
    """Return x (M,) and y (runs, M) of a label."""
    arrays = [(np.asarray(x, dtype=np.float64), np.asarray(y, dtype=np.float64)) for x, y in runs]
    first = arrays[0][0]
    for x, y in arrays:
        if x.shape != y.shape or not (np.isfinite(x).all() and np.isfinite(y).all()):
            raise ValueError(f"{label}: expected finite x and y of one length in every run")
        if not np.array_equal(x, first):
            raise ValueError(f"{label}: its runs have different x ({_ends(first)} and {_ends(x)})")
        if log_y and (y <= 0).any():
            raise ValueError(f"{label}: expected values above 0 on a logarithmic axis, got {y.min():g}")
    return first, np.stack([y for _, y in arrays])


def _ends(x: np.ndarray) -> str:
    return f"{len(x)} from {x[0]:g} to {x[-1]:g}"


def _line(axes: Axes, number: int, x: np.ndarray, ys: np.ndarray, log_y: bool) -> Any:
    colour, marker = COLOURS[number % len(COLOURS)], _MARKERS[number % len(_MARKERS)]
    mean = ys.mean(axis=0)
    if len(ys) > 1:
        deviation = ys.std(axis=0, ddof=1)
        low = mean - deviation
        if log_y:
            low = np.where(low > 0, low, ys.min(axis=0))
        axes.fill_between(x, low, mean + deviation, color=colour, alpha=0.18, linewidth=0)
    return axes.plot(
        x,
        mean,
        color=colour,
        linestyle=_LINES[number // len(COLOURS) % len(_LINES)],
        marker=marker if len(x) <= _MOST_MARKERS else "",
    )[0]


def drawing_style() -> AbstractContextManager[None]:
    """Draw as all figures of this project are drawn, inside the block."""
    return style.context(["default", _STYLE])  # puts back what it found; "default" outdoes a matplotlibrc


FONT = findfont("DejaVu Sans")
"""The file of the figures' font, which comes with matplotlib."""


def drawable(text: str) -> str:
    r"""Return a text with all that the figures' font has no glyph for escaped, such as \u732b or, of bytes, \udce9."""
    known = get_font(FONT).get_char_index
    return "".join(c if known(ord(c)) else c.encode("unicode_escape").decode() for c in text)


def write_figure(figure: Figure, path: Path) -> tuple[Path, Path]:
    """Write a figure as PNG and SVG, the same bytes for the same figure, and return their paths."""
    paths = stems(path)
    contents = []
    for text in figure.findobj(Text):
        text.set_text("\n".join(map(drawable, text.get_text().split("\n"))))  # pyright: ignore[reportAttributeAccessIssue]
    for kind, metadata in (("png", {"Software": None}), ("svg", {"Date": None, "Creator": None})):
        buffer = io.BytesIO()
        figure.savefig(buffer, format=kind, metadata=metadata)
        contents.append(buffer.getvalue())
    for target, content in zip(paths, contents, strict=True):
        write_atomic(target, lambda file, content=content: file.write(content))
    return paths


_OF_PLACE = ("cache", "device", "threads", "log_every", "checkpoint_every", "checkpoint_keep", "data.root",
             "data.test_root", "data.download", "data.workers", "norm.backend", "compile")  # fmt: skip
"""Settings of where and how a run executes, not of what it computes: named only where nothing else differs."""


def labelled(groups: list[list[LoggedRun]], names: Sequence[str]) -> dict[str, list[LoggedRun]]:
    """Name each line: as asked for, by the settings in which the lines differ, or a single one by its runs' name.

    Raises:
        UsageError: if as many different names as lines were expected.
    """
    if names and (len(names) != len(groups) or len(set(names)) < len(names)):
        found = "; ".join(_label(group) for group in groups)
        raise UsageError(f"label: expected {len(groups)} different names, for {found}; got {', '.join(names)}")
    return dict(zip(names or _labels(groups), groups, strict=True))


def _labels(groups: list[list[LoggedRun]]) -> list[str]:
    if len(groups) == 1:
        return [_label(groups[0])]
    differ = differing([group[0] for group in groups])
    labels: list[str] = []
    for names in ([name for name in differ if name not in _OF_PLACE], differ):
        labels = [_values(group[0], names) for group in groups]
        if len(set(labels)) == len(labels):
            return labels
    return [f"{label} ({_label(group)})" for label, group in zip(labels, groups, strict=True)]


def _values(run: LoggedRun, names: Sequence[str]) -> str:
    """Return "ucb, lr 0.001" of norm.kind and lr."""
    values = {name: shown(run.settings.get(name)) for name in names if name not in run.unused}
    return ", ".join(value if name == "norm.kind" else f"{name} {value}" for name, value in values.items())


def _label(group: list[LoggedRun]) -> str:
    """Return the name that the runs share but for the seed in it, or all their names."""
    names = [run.path.resolve().name for run in group]
    short = {re.sub(r"[-_]?seed[-_]?\d+", "", name) or name for name in names}
    return short.pop() if len(short) == 1 else ", ".join(names)
