"""Classification scores: the usual ones by argmax, what Keras' Precision and Recall count, and two without labels."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from common.registry import Registry

_TOP = 5
_TEMPERATURE = 0.05  # of soft neighbourhood density, as published
_ROWS = 1024  # of the similarities that are in memory at once


class Averages(NamedTuple):
    """Precision, recall and F1 in [0, 1], averaged over classes."""

    precision: float
    recall: float
    f1: float


class PrecisionRecall(NamedTuple):
    """Precision and recall in [0, 1]."""

    precision: float
    recall: float


@dataclass(frozen=True, eq=False)
class Scores:
    """How well a classifier did; every score is a fraction in [0, 1].

    Attributes:
        count: samples N.
        accuracy: share of samples whose predicted class is the true one.
        top5: share of samples whose true class is among the five of largest score; None without logits, and with
            five classes or fewer, where it is 1 whatever the classifier says.
        macro: means over the classes that occur in labels or predictions. Averaging keeps F1 at or below
            (precision + recall) / 2.
        weighted: means weighted by the classes' samples; this recall equals the accuracy.
        confusion: int64 (C, C), [i, j] counts samples of class i taken for class j.
    """

    count: int
    accuracy: float
    top5: float | None
    macro: Averages
    weighted: Averages
    confusion: Tensor


def classification_scores(labels: Tensor, outputs: Tensor, num_classes: int) -> Scores:
    """Score predicted classes, or logits whose largest entry is the prediction.

    A class that is never predicted has precision 0, and one without samples recall 0.

    Args:
        labels: true classes, integers (N,) in [0, C).
        outputs: predicted classes, integers (N,) in [0, C), or logits (or probabilities), floating (N, C).
        num_classes: classes C.

    Raises:
        ValueError: if shapes or types differ from these, N is 0, a class is out of range or a logit not finite.
    """
    _check_classes("labels", labels, num_classes)
    from sklearn import metrics  # noqa: PLC0415 - takes a second, which --help need not

    predictions, top5 = outputs, None
    if outputs.is_floating_point():
        logits = _check_scores("outputs", outputs, len(labels), num_classes)
        predictions, top5 = outputs.argmax(dim=1), _top5(labels.cpu(), torch.from_numpy(logits))
    else:
        _check_classes("outputs", outputs, num_classes)
        if len(outputs) != len(labels):
            raise ValueError(f"outputs: expected one for each of {len(labels)} labels, got {len(outputs)}")
    true, found = labels.cpu().numpy(), predictions.cpu().numpy()
    return Scores(
        count=len(true),
        accuracy=float(metrics.accuracy_score(true, found)),
        top5=top5,
        macro=_averages(true, found, "macro"),
        weighted=_averages(true, found, "weighted"),
        confusion=torch.from_numpy(metrics.confusion_matrix(true, found, labels=np.arange(num_classes))),
    )


class Metric(NamedTuple):
    """A number that says how well a classifier did, and which way it is better, if any."""

    measure: Callable[[Tensor, Tensor], float | None]
    better: Literal["higher", "lower"] | None


METRICS: Registry[Metric] = Registry("metrics")


def register_metric(
    name: str,
    measure: Callable[[Tensor, Tensor], float | None],
    *,
    better: Literal["higher", "lower"] | None = None,
) -> None:
    """Add a metric of classifiers; runs log it as metric/NAME and, of held-out images, metric/validation_NAME.

    Args:
        name: lower-case letters, digits and underscores, a letter first.
        measure: from true classes, int64 (N,) in [0, C), and logits, float64 (N, C), both on the CPU, to a number;
            None where it says nothing, which is not logged.
        better: "higher" or "lower"; None for one that has no best, so that `best.by` cannot choose epochs by it.

    Raises:
        ValueError: the name is taken or invalid, measure is no function, or better is something else.
    """
    if not callable(measure):
        raise ValueError(f"measure: expected a function of labels and logits, got {type(measure).__name__}")
    if better not in ("higher", "lower", None):
        raise ValueError(f"better: expected higher, lower or None, got {better!r}")
    METRICS.add(name, Metric(measure, better))


def measure_all(labels: Tensor, logits: Tensor) -> dict[str, float]:
    """Return every registered metric of logits, floating (N, C), by name; metrics that say nothing are left out.

    Arguments and errors as for `classification_scores`.
    """
    scores = _check_pair("logits", labels, logits)
    labels, logits = labels.cpu(), torch.from_numpy(scores)
    found = {name: metric.measure(labels, logits) for name, metric in METRICS.items()}
    return {name: float(value) for name, value in found.items() if value is not None}


def _accuracy(labels: Tensor, logits: Tensor) -> float:
    return float((logits.argmax(dim=1) == labels).double().mean())


def _macro(which: str) -> Callable[[Tensor, Tensor], float]:
    return lambda labels, logits: getattr(_averages(labels.numpy(), logits.argmax(dim=1).numpy(), "macro"), which)


def _top5(labels: Tensor, logits: Tensor) -> float | None:
    if logits.shape[1] <= _TOP:
        return None
    from sklearn.metrics import top_k_accuracy_score  # noqa: PLC0415 - as above

    return float(top_k_accuracy_score(labels.numpy(), logits.numpy(), k=_TOP, labels=np.arange(logits.shape[1])))


def keras_threshold(scores: Tensor, labels: Tensor, threshold: float = 0.5) -> PrecisionRecall:
    """Return what Keras' Precision() and Recall() report for one-hot labels: micro counts over all N C cells.

    A cell is a predicted positive if its score is above the threshold. Keras takes logits for probabilities without
    a word, so a model that knows a superclass, but not which of its classes, can have a recall near 1 and a
    precision near 1 / (classes in the superclass) whatever its accuracy. Without a predicted positive the precision
    is 0, as in Keras.

    Args:
        scores: logits or probabilities, floating (N, C) with C >= 2.
        labels: true classes, integers (N,) in [0, C).
        threshold: a score must exceed it.

    Raises:
        ValueError: if shapes or types differ from these, N is 0, a class is out of range or a score not finite.
    """
    if scores.ndim != 2 or scores.shape[1] < 2:
        raise ValueError(f"scores: expected (N, C) with two classes or more, got {tuple(scores.shape)}")
    positive = _check_pair("scores", labels, scores) > threshold
    true = labels.cpu().numpy()
    one_hot = np.zeros(positive.shape, dtype=bool)
    one_hot[np.arange(len(true)), true] = True
    precision, recall, _, _ = _support(one_hot, positive, "micro")
    return PrecisionRecall(float(precision), float(recall))


@dataclass(frozen=True, eq=False)
class Calibration:
    """How far a classifier's confidence is from its accuracy, by bins of confidence of one width.

    Attributes:
        counts: int64 (B,), samples whose confidence is in a bin, (b / B, (b + 1) / B].
        confidence: float64 (B,), their mean confidence; 0 in an empty bin.
        accuracy: float64 (B,), the share of them that is right; 0 in an empty bin.
        error: the expected calibration error, ``sum_b counts_b / N |accuracy_b - confidence_b|``.
    """

    counts: Tensor
    confidence: Tensor
    accuracy: Tensor
    error: float


def calibration(labels: Tensor, logits: Tensor, bins: int = 15) -> Calibration:
    """Compare confidence, the largest softmax probability, with accuracy.

    Arguments and errors as for `classification_scores`.

    Source: Guo et al., "On Calibration of Modern Neural Networks", ICML 2017.
    """
    _check_pair("logits", labels, logits)
    confidence, predicted = logits.detach().double().cpu().softmax(1).max(1)
    place = (confidence * bins).ceil().long().clamp(1, bins) - 1
    counts = place.bincount(minlength=bins)
    sure = counts.clamp(min=1)
    means = place.bincount(confidence, minlength=bins) / sure
    right = place.bincount((predicted == labels.cpu()).double(), minlength=bins) / sure
    error = float((counts * (right - means).abs()).sum() / len(labels))
    return Calibration(counts, means, right, error)


def information(logits: Tensor) -> float:
    """Return the mutual information of image and predicted class, in nats from 0 to log C; higher is better.

    ``H(mean_i p_i) - mean_i H(p_i)`` of the softmax p of logits (N, C): each prediction sure, all classes used.

    Source: Bridle et al., "Unsupervised Classifiers, Mutual Information and 'Phantom Targets'", NIPS 1991, as a
    validator in Musgrave et al., "Benchmarking Validation Methods for Unsupervised Domain Adaptation", 2022.
    """
    p = logits.double().softmax(1)
    return float(_entropy(p.mean(0)) - _entropy(p).mean())


def neighbourhood_density(logits: Tensor) -> float:
    """Return the soft neighbourhood density of predictions, in nats from 0 to log (N - 1); higher is better.

    The mean entropy of the softmax over the other images of ``cos(p_i, p_j) / 0.05``, p the softmax of logits (N, C):
    large where predictions form dense groups.

    Raises:
        ValueError: with fewer than 2 images.

    Source: Saito et al., "Tune It the Right Way", ICCV 2021.
    """
    if len(logits) < 2:
        raise ValueError(f"logits: expected at least 2 images, got {len(logits)}")
    p = torch.nn.functional.normalize(logits.double().softmax(1), dim=1)
    total = 0.0
    for first in range(0, len(p), _ROWS):
        near = p[first : first + _ROWS] @ p.T / _TEMPERATURE
        rows = torch.arange(len(near))
        near[rows, first + rows] = -math.inf
        total += float(_entropy(near.softmax(1)).sum())
    return total / len(p)


def _averages(true: np.ndarray, found: np.ndarray, average: str) -> Averages:
    precision, recall, f1, _ = _support(true, found, average)
    return Averages(float(precision), float(recall), float(f1))


def _support(true: np.ndarray, found: np.ndarray, average: str) -> tuple[Any, ...]:
    from sklearn.metrics import precision_recall_fscore_support  # noqa: PLC0415 - as above

    return precision_recall_fscore_support(
        true,
        found,
        average=average,
        zero_division=0,  # pyright: ignore[reportArgumentType] - the type is read off its default, "warn"
    )


def _check_pair(name: str, labels: Tensor, scores: Tensor) -> np.ndarray:
    """Return scores, floating (N, C), of labels (N,) in float64."""
    if scores.ndim != 2:
        raise ValueError(f"{name}: expected floating (N, C), got {scores.dtype} {tuple(scores.shape)}")
    _check_classes("labels", labels, scores.shape[1])
    return _check_scores(name, scores, len(labels), scores.shape[1])


def _check_classes(name: str, classes: Tensor, num_classes: int) -> None:
    if classes.ndim != 1 or classes.is_floating_point() or classes.is_complex() or classes.dtype == torch.bool:
        raise ValueError(f"{name}: expected integers (N,), got {classes.dtype} {tuple(classes.shape)}")
    if not len(classes):
        raise ValueError(f"{name}: expected at least one, got none")
    low, high = int(classes.min()), int(classes.max())
    if low < 0 or high >= num_classes:
        raise ValueError(f"{name}: expected classes from 0 to {num_classes - 1}, got {low if low < 0 else high}")


def _check_scores(name: str, scores: Tensor, count: int, num_classes: int) -> np.ndarray:
    if not scores.is_floating_point() or tuple(scores.shape) != (count, num_classes):
        expected = f"floating ({count}, {num_classes})"
        raise ValueError(f"{name}: expected {expected}, got {scores.dtype} {tuple(scores.shape)}")
    bad = int((~torch.isfinite(scores)).any(dim=1).sum())
    if bad:
        raise ValueError(f"{name}: expected finite values, got others in {bad} of {count} samples")
    return scores.detach().double().cpu().numpy()


def _entropy(p: Tensor) -> Tensor:
    return torch.special.entr(p).sum(-1)


register_metric("accuracy", _accuracy, better="higher")
register_metric("error", lambda labels, logits: 1 - _accuracy(labels, logits), better="lower")
register_metric("macro_precision", _macro("precision"), better="higher")
register_metric("macro_recall", _macro("recall"), better="higher")
register_metric("macro_f1", _macro("f1"), better="higher")
register_metric("top5", _top5, better="higher")
