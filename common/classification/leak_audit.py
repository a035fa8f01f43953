"""The leak audit: how much accuracy comes from knowing each image's cluster, and whether clusters leak the label.

Layers of known clusters are given one at test time. Where test clusters come from labels, part of the accuracy is what
they tell, whatever the layer does with them. The functions here are arithmetic on classes, clusters and logits.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from common.runtime.seeding import permutation

UNKNOWN = -1
FIXES = 0.99
"""From this reduction of errors on, one category counts as fixed by the other: labels that make clusters reach 1, and
clusters that a good classifier makes of pixels do not."""
_Z = 1.959963984540054  # of the normal distribution: 95 % lie between -z and z


class Categories(NamedTuple):
    """Two categories of the same images, each int64 (N,) from 0 on."""

    classes: Tensor
    clusters: Tensor


class Guess(NamedTuple):
    """How well a category of test images is guessed by what was most frequent among training images.

    Attributes:
        without: share guessed right by the one answer that is best for all.
        given: share guessed right where the other category is given.
    """

    without: float
    given: float

    @property
    def reduction(self) -> float:
        """The share of errors that being given avoids, 1 at most: Goodman and Kruskal's lambda, here held out.

        0 where there are no errors to avoid; below 0 where what was learnt misleads.
        """
        return (self.given - self.without) / (1 - self.without) if self.without < 1 else 0.0


class Difference(NamedTuple):
    """A difference of two accuracies on the same images, and half the width of its 95 % interval."""

    value: float
    half_width: float


def counted(given: Tensor, wanted: Tensor, num_given: int, num_wanted: int) -> Tensor:
    """Return how many images have each pair of categories, int64 (num_given, num_wanted)."""
    return torch.bincount(given * num_wanted + wanted, minlength=num_given * num_wanted).view(num_given, num_wanted)


def guess(counts: Tensor, given: Tensor, wanted: Tensor) -> Guess:
    """Guess a category of test images from another one.

    Args:
        counts: of training images, (G, W), as `counted` returns them. The guess for each row is its most frequent
            column, the first of several; for a row of zeros it is that of all.
        given: what is given of the test images, int64 (N,) in [0, G).
        wanted: what is to be guessed, int64 (N,) in [0, W).
    """
    overall = counts.sum(0).argmax()
    best = torch.where(counts.sum(1) > 0, counts.argmax(1), overall)
    right, blind = best[given] == wanted, overall == wanted
    return Guess(float(blind.double().mean()), float(right.double().mean()))


def weighed(logits: Tensor, clusters: Tensor, counts: Tensor) -> Tensor:
    """Return the logits of a classifier that learns the clusters afterwards, by Bayes' rule alone.

    ``logits + log p(class | cluster) - log p(class)``: right where the image, given its class, says nothing more of the
    cluster. A class that never occurs with the cluster is out of the question; a cluster without training images
    changes nothing.

    Args:
        logits: of a classifier that was not given the clusters, floating (N, C).
        clusters: int64 (N,) in [0, K).
        counts: training images by cluster and class, (K, C).
    """
    counts = counts.double()
    share, overall = counts / counts.sum(1, keepdim=True), counts.sum(0) / counts.sum()
    ratio = torch.where(counts.sum(1, keepdim=True) > 0, share / overall, 1.0)
    return logits + torch.where(overall > 0, ratio, 1.0).log()[clusters]


def paired_difference(ours: Tensor, theirs: Tensor) -> Difference:
    """Return how much more often one classifier is right than another, each bool (N,) of the same images.

    The interval is of 1.96 standard errors of the mean; 0 for one image.
    """
    each = ours.double() - theirs.double()
    error = float(each.std() / math.sqrt(len(each))) if len(each) > 1 else 0.0
    return Difference(float(each.mean()), _Z * error)


def audit_inputs(train: Tensor, test: Tensor, *, unknown: bool) -> dict[str, Tensor]:
    """Return what a classifier is given of test images in each part of the audit, int64 (N,) by name.

    Args:
        train: clusters of the training images.
        test: clusters of the test images (N,).
        unknown: whether the classifier can do without.

    Returns:
        ``known``, each image's own; ``unknown``, -1, where that can be; ``shuffled``, each that of another image of
        the same set, so that clusters are as frequent as before; ``constant``, for all the most frequent one of
        training. The order of shuffling is the same for all classifiers.
    """
    ids = {"known": test}
    if unknown:
        ids["unknown"] = torch.full_like(test, UNKNOWN)
    ids["shuffled"] = test[permutation(len(test), 0, "leak audit")]
    ids["constant"] = torch.full_like(test, int(train.bincount().argmax()))
    return ids


@dataclass(frozen=True)
class LeakAudit:
    """What the audit of a classifier found.

    Attributes:
        accuracy: by what the classifier was given (see `audit_inputs`); ``weighed`` is that without clusters, its
            logits weighed afterwards (see `weighed`).
        lost: how much less each of them is than ``known``.
        classes: how well clusters tell classes; ``classes.given`` is the chance given the cluster.
        clusters: how well classes tell clusters.
        labelled: the setting by which clusters come from labels; None where they do not, or nothing says so.
        baseline: accuracy of a classifier that is given the same clusters without such a layer, if there is one.
        gain: how much more ``known`` is than that.
    """

    accuracy: Mapping[str, float]
    lost: Mapping[str, Difference]
    classes: Guess
    clusters: Guess
    labelled: str | None = None
    baseline: float | None = None
    gain: Difference | None = None

    @property
    def reasons(self) -> list[str]:
        """Why test clusters have to be taken for labels; none where no leak is seen."""
        found = [] if self.labelled is None else [f"{self.labelled} makes test clusters of test labels"]
        for guess_of, one, other in ((self.clusters, "cluster", "class"), (self.classes, "class", "cluster")):
            if guess_of.reduction >= FIXES:
                found.append(f"the {other} of a test image tells its {one} in {100 * guess_of.given:.1f} % of cases")
        return found

    def scalars(self) -> dict[str, float]:
        """Return what a run logs by tag: accuracies but the known one, the chance given the cluster, the flag."""
        logged = {f"audit/accuracy_{name}": value for name, value in self.accuracy.items() if name != "known"}
        return logged | {"audit/chance_given_cluster": self.classes.given, "audit/flagged": float(bool(self.reasons))}

    def plain(self) -> dict[str, Any]:
        """Return all of it as plain values."""
        gained = None if self.gain is None else {"accuracy": self.baseline, "gain": self.gain._asdict()}
        return {
            "flagged": bool(self.reasons),
            "reasons": self.reasons,
            "accuracy": dict(self.accuracy),
            "lost": {name: difference._asdict() for name, difference in self.lost.items()},
            "class_given_cluster": self.classes._asdict() | {"reduction": self.classes.reduction},
            "cluster_given_class": self.clusters._asdict() | {"reduction": self.clusters.reduction},
            "baseline": gained or "no baseline",
        }

    def lines(self) -> list[str]:
        """Return it as lines of text: a table, and what follows from it."""
        rows = []
        for name, accuracy in self.accuracy.items():
            less = ""
            if (lost := self.lost.get(name)) is not None:
                way = "less" if lost.value >= 0 else "more"
                less = f", {_points(lost._replace(value=abs(lost.value)))} {way}"
            rows.append((name, accuracy, f"{_MEANINGS[name]}{less}"))
        guessed = f"guessed from the cluster alone; {self.classes.without:.3f} without"
        rows.append(("chance", self.classes.given, guessed))
        if self.gain is None or self.baseline is None:
            tail = ["baseline   no baseline: nothing says what a network without such a layer makes of the clusters"]
        else:
            rows.append(("baseline", self.baseline, "the same clusters beside the features of a network"))
            tail = [f"gain       {_points(self.gain)} over the baseline"]
        if self.reasons:
            tail += [f"LEAK       {'; '.join(self.reasons)}: quote the accuracy with clusters unknown, or the gain"]
        return [f"{name:10} {value:.3f}  {text}" for name, value, text in rows] + tail


_MEANINGS = {
    "known": "each image given its own cluster",
    "unknown": "no cluster given",
    "weighed": "no cluster given, answers weighed by the cluster afterwards",
    "shuffled": "given another image's",
    "constant": "all given the same",
}


def _points(difference: Difference) -> str:
    return f"{100 * difference.value:.1f} ± {100 * difference.half_width:.1f} points"


def leak_audit(
    train: Categories,
    test: Categories,
    logits: Mapping[str, Tensor],
    num_clusters: int,
    *,
    labelled: str | None = None,
    baseline: Tensor | None = None,
) -> LeakAudit:
    """Audit a classifier that is given clusters.

    Args:
        train: of the training images, which guesses are learnt from.
        test: of the test images (N,).
        logits: of the test images, floating (N, C), by what the classifier was given, as `audit_inputs` names it.
        num_clusters: clusters K there are.
        labelled: the setting by which clusters come from labels, if they do.
        baseline: logits (N, C) of a classifier that is given the same clusters without such a layer, if there is one.
    """
    num_classes = logits["known"].shape[1]
    counts = counted(train.clusters, train.classes, num_clusters, num_classes)
    logits = dict(logits)
    if "unknown" in logits:
        logits["weighed"] = weighed(logits["unknown"], test.clusters, counts)
    right = {name: given.argmax(1) == test.classes for name, given in logits.items()}
    known = right["known"]
    theirs = None if baseline is None else baseline.argmax(1) == test.classes
    return LeakAudit(
        {name: float(each.double().mean()) for name, each in right.items()},
        {name: paired_difference(known, each) for name, each in right.items() if name != "known"},
        guess(counts, test.clusters, test.classes),
        guess(counts.T, test.classes, test.clusters),
        labelled,
        None if theirs is None else float(theirs.double().mean()),
        None if theirs is None else paired_difference(known, theirs),
    )
