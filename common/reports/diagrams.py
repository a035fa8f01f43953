"""Figures of one classifier: what it confuses, how far its confidence can be trusted, a number of each layer."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.ticker import LogFormatter
from torch import Tensor

from common.reports.figures import drawable, drawing_style, write_figure

_NAMED, _COUNTED = 40, 15
"""Most classes that are named, and that are counted in their cells."""


def confusion(path: Path, counts: Tensor, classes: Sequence[str], title: str) -> tuple[Path, Path]:
    """Draw a confusion matrix as PNG and SVG, shares of each true class as shades; return the two paths.

    Args:
        path: without suffix.
        counts: int64 (C, C), [i, j] counts samples of class i taken for class j.
        classes: their names.
        title: of the figure.
    """
    with drawing_style():
        side = min(10.0, 3.0 + 0.35 * len(classes))
        figure = Figure(figsize=(side, side), layout="constrained")
        axes = figure.subplots()
        shares = counts / counts.sum(1, keepdim=True).clamp(min=1)
        axes.imshow(shares.numpy(), cmap="Blues", vmin=0, vmax=1)
        axes.grid(visible=False)
        axes.set(title=title, xlabel="taken for", ylabel="true class")
        if len(classes) <= _NAMED:
            names = [drawable(name) for name in classes]
            axes.set_xticks(range(len(classes)), names, rotation=90)
            axes.set_yticks(range(len(classes)), names)
        if len(classes) <= _COUNTED:
            for i, row in enumerate(counts.tolist()):
                for j, count in enumerate(row):
                    if count:
                        colour = "white" if shares[i, j] > 0.5 else "black"
                        axes.text(j, i, str(count), ha="center", va="center", color=colour, fontsize=8)
        return write_figure(figure, path)


def by_layer(path: Path, values: Mapping[str, float], label: str, title: str) -> tuple[Path, Path]:
    """Draw a positive number of each layer as PNG and SVG, from the first layer on the left; return the two paths.

    Args:
        path: without suffix.
        values: by the layer's name, in the order in which layers run.
        label: what the numbers are.
        title: of the figure.
    """
    with drawing_style():
        figure = Figure(figsize=(min(12.0, 2.0 + 0.28 * len(values)), 4.5), layout="constrained")
        axes = figure.subplots()
        axes.plot(range(len(values)), list(values.values()), "o-", color="#0072B2")
        axes.set_xticks(range(len(values)), list(values), rotation=90, fontsize=8)
        axes.set(title=title, ylabel=label, yscale="log")
        axes.yaxis.set_major_formatter(LogFormatter())
        return write_figure(figure, path)


def reliability(path: Path, counts: Tensor, accuracy: Tensor, error: float, title: str) -> tuple[Path, Path]:
    """Draw accuracy over confidence as PNG and SVG, with what perfect confidence is; return the two paths.

    Args:
        path: without suffix.
        counts: samples in each bin of confidence (B,); empty ones are not drawn.
        accuracy: their share that is right (B,).
        error: the expected calibration error.
        title: of the figure.
    """
    with drawing_style():
        figure = Figure(figsize=(4.5, 4.5), layout="constrained")
        axes = figure.subplots()
        bins = len(counts)
        for b in range(bins):
            if counts[b]:
                axes.bar((b + 0.5) / bins, float(accuracy[b]), 1 / bins, color="#56B4E9", edgecolor="white")
        axes.plot((0, 1), (0, 1), "--", color="black")
        axes.set(title=f"{title}, ECE {error:.3f}", xlabel="confidence", ylabel="accuracy", xlim=(0, 1), ylim=(0, 1))
        return write_figure(figure, path)
