"""Everything that is measured of a classifier's logits, as plain values for JSON, and the pictures of it."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor
from torch.nn.functional import cross_entropy

from common.metrics.scores import calibration, classification_scores
from common.reports.figures import drawable, drawing_style, write_figure

_NAMED, _COUNTED = 40, 15
"""Most classes that are named, and that are counted in their cells."""


def measured(labels: Tensor, logits: Tensor, classes: Sequence[str]) -> dict[str, Any]:
    """Return accuracy, loss, macro and weighted averages, a row for each class, confusion and calibration.

    Args:
        labels: true classes, integers (N,) in [0, C).
        logits: floating (N, C).
        classes: names of the classes C, none twice.

    Returns:
        ``count``, ``accuracy``, ``loss``; ``macro`` and ``weighted``, each of precision, recall and f1; ``classes``,
        by name, each of count, precision and recall (0 where nothing is counted); ``confusion``, rows of true
        classes; and ``calibration`` with its error and, by bin of confidence, counts, confidence and accuracy.

    Raises:
        ValueError: if shapes or types differ from these, N is 0, a class is out of range or a logit not finite.
    """
    scores, trust = classification_scores(labels, logits, len(classes)), calibration(labels, logits)
    hits, truly, taken = scores.confusion.diag(), scores.confusion.sum(1), scores.confusion.sum(0)
    return {
        "count": scores.count,
        "accuracy": scores.accuracy,
        "loss": float(cross_entropy(logits.double(), labels)),
        "macro": scores.macro._asdict(),
        "weighted": scores.weighted._asdict(),
        "classes": {
            name: {
                "count": int(truly[k]),
                "precision": float(hits[k] / taken[k]) if taken[k] else 0.0,
                "recall": float(hits[k] / truly[k]) if truly[k] else 0.0,
            }
            for k, name in enumerate(classes)
        },
        "confusion": scores.confusion.tolist(),
        "calibration": {
            "error": trust.error,
            "counts": trust.counts.tolist(),
            "confidence": trust.confidence.tolist(),
            "accuracy": trust.accuracy.tolist(),
        },
    }


def draw(out: Path, name: str, values: Mapping[str, Any]) -> None:
    """Draw confusion and reliability of what `measured` returned, as PNG and SVG.

    Shades are shares of each true class; bars are accuracy over confidence, beside the line of perfect confidence.

    Args:
        out: the folder for confusion-NAME and reliability-NAME.
        name: of the images, which is the figures' title too.
        values: as `measured` returns them.
    """
    with drawing_style():
        confusion = _confusion(torch.tensor(values["confusion"]), list(values["classes"]), name)
        write_figure(confusion, out / f"confusion-{name}")
        write_figure(_reliability(values["calibration"], name), out / f"reliability-{name}")


def _confusion(counts: Tensor, classes: Sequence[str], title: str) -> Figure:
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
        for i, j in counts.nonzero().tolist():
            colour = "white" if shares[i, j] > 0.5 else "black"
            axes.text(j, i, str(int(counts[i, j])), ha="center", va="center", color=colour, fontsize=8)
    return figure


def _reliability(calibration: Mapping[str, Any], title: str) -> Figure:
    figure = Figure(figsize=(4.5, 4.5), layout="constrained")
    axes = figure.subplots()
    counts, accuracy = torch.tensor(calibration["counts"]), torch.tensor(calibration["accuracy"])
    bins = len(counts)
    for b in counts.nonzero().flatten().tolist():
        axes.bar((b + 0.5) / bins, float(accuracy[b]), 1 / bins, color="#56B4E9", edgecolor="white")
    axes.plot((0, 1), (0, 1), "--", color="black")
    axes.set(title=f"{title}, ECE {calibration['error']:.3f}", xlabel="confidence", ylabel="accuracy",
             xlim=(0, 1), ylim=(0, 1))  # fmt: skip
    return figure
