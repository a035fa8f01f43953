"""Everything that is measured of a classifier's logits, as plain values for JSON, and the pictures of it."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from common.metrics.scores import calibration, classification_scores
from common.reports import diagrams


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


def draw(out: Path, name: str, values: Mapping[str, Any]) -> list[Path]:
    """Draw confusion and reliability of what `measured` returned, as PNG and SVG; return their paths.

    Args:
        out: the folder for confusion-NAME and reliability-NAME.
        name: of the images, which is the figures' title too.
        values: as `measured` returns them.
    """
    counts, trust = torch.tensor(values["confusion"]), values["calibration"]
    bins, right = torch.tensor(trust["counts"]), torch.tensor(trust["accuracy"])
    return [
        *diagrams.confusion(out / f"confusion-{name}", counts, list(values["classes"]), name),
        *diagrams.reliability(out / f"reliability-{name}", bins, right, trust["error"], name),
    ]
