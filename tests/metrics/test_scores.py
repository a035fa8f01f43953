from typing import Any

import numpy as np
import pytest
import torch
from torch.nn.functional import one_hot

from common.metrics import classification_scores, keras_threshold, measure_all
from common.metrics.scores import calibration
from common.runtime.seeding import generator

# Hand count: class 0 has 3 samples (2 found), class 1 has 2 (1 found), class 2 has 1 (0 found), class 3 none.
LABELS = torch.tensor([0, 0, 0, 1, 1, 2])
FOUND = torch.tensor([0, 0, 1, 1, 0, 0])
CONFUSION = [[2, 1, 0, 0], [1, 1, 0, 0], [1, 0, 0, 0], [0, 0, 0, 0]]


def test_scores_counted_by_hand():
    scores = classification_scores(LABELS, FOUND, 4)
    assert scores.count == 6
    assert scores.accuracy == pytest.approx(3 / 6)
    assert scores.top5 is None
    assert scores.confusion.tolist() == CONFUSION
    # Of 4 found as class 0 two are right, of 2 as class 1 one; nothing is taken for class 2, whose precision is 0.
    # F1 by class: 2 * (1/2) * (2/3) / (1/2 + 2/3) = 4/7; 1/2; 0. Class 3 occurs nowhere and is left out.
    assert scores.macro == pytest.approx(((1 / 2 + 1 / 2 + 0) / 3, (2 / 3 + 1 / 2 + 0) / 3, (4 / 7 + 1 / 2 + 0) / 3))
    assert scores.weighted == pytest.approx(((3 / 2 + 2 / 2 + 0) / 6, (2 + 1 + 0) / 6, (12 / 7 + 1 + 0) / 6))


def test_logits_count_as_their_argmax_and_top_five_as_torchs_topk():
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        source = generator(0, "scores")
        labels = torch.randint(0, 12, (300,), generator=source)
        # A permutation of 0..11 in each row has no ties in any of the types.
        logits = torch.stack([torch.randperm(12, generator=source) for _ in labels]).to(dtype)
        scores = classification_scores(labels, logits, 12)
        by_class = classification_scores(labels, logits.argmax(dim=1), 12)
        assert (
            scores.accuracy == by_class.accuracy == pytest.approx((logits.argmax(1) == labels).double().mean().item())
        )
        assert scores.macro == by_class.macro
        assert torch.equal(scores.confusion, by_class.confusion)
        top = (logits.topk(5, dim=1).indices == labels[:, None]).any(dim=1)
        assert scores.top5 == pytest.approx(top.double().mean().item())


def test_scores_from_the_confusion_matrix():
    source = generator(1, "scores")
    labels, found = torch.randint(0, 7, (2, 500), generator=source)
    scores = classification_scores(labels, found, 7)
    table = torch.zeros(7, 7, dtype=torch.float64)
    for true, taken in zip(labels.tolist(), found.tolist(), strict=True):
        table[true, taken] += 1
    right, precision, recall = table.diag(), table.diag() / table.sum(0), table.diag() / table.sum(1)
    f1 = 2 * right / (table.sum(0) + table.sum(1))
    share = table.sum(1) / table.sum()
    assert torch.equal(scores.confusion.double(), table)
    assert scores.macro == pytest.approx((precision.mean().item(), recall.mean().item(), f1.mean().item()))
    assert scores.weighted == pytest.approx(
        ((share * precision).sum().item(), (share * recall).sum().item(), (share * f1).sum().item())
    )
    assert scores.weighted.recall == pytest.approx(scores.accuracy)
    assert scores.macro.f1 <= (scores.macro.precision + scores.macro.recall) / 2


def test_the_built_in_metrics_are_the_scores_of_the_same_logits():
    logits, labels = torch.randn(300, 12), torch.arange(300) % 12
    scores = classification_scores(labels, logits, 12)
    shares = {"accuracy": scores.accuracy, "error": 1 - scores.accuracy}
    expected = {**shares, **{f"macro_{name}": v for name, v in scores.macro._asdict().items()}}
    assert measure_all(labels, logits) == pytest.approx(expected | {"top5": scores.top5}, abs=0)
    assert "top5" not in measure_all(labels % 5, logits[:, :5])  # where it says nothing


def test_top_five_of_five_classes_says_nothing():
    assert classification_scores(torch.tensor([0, 1]), torch.eye(5)[:2], 5).top5 is None
    assert classification_scores(torch.tensor([0, 1]), torch.eye(6)[:2], 6).top5 == 1.0


def test_a_model_that_knows_the_superclass_alone_has_precision_20_and_recall_100_percent():
    """The paper's Table VII shows precision 23 % and recall 99 % for a model with accuracy 67 %; this is why."""
    labels = torch.arange(100).repeat(100)  # 20 superclasses of 5 classes, each class 100 times
    source = generator(2, "superclass")
    logits = -5 + torch.rand(len(labels), 100, generator=source)
    same = labels[:, None] // 5 == torch.arange(100) // 5
    logits += 10 * same  # every class of the true superclass is above the threshold, no other is
    logits[:, :] += 0.5 * one_hot(labels, 100)  # and the right one of the five has an edge
    scores = classification_scores(labels, logits, 100)
    counted = keras_threshold(logits, labels)
    assert counted == pytest.approx((0.20, 1.0))
    assert scores.top5 == 1.0
    assert 0.2 < scores.accuracy < 0.99  # precision and recall at the threshold say nothing about it
    # u + 1/2 beats four uniform draws with probability integral_0^(1/2) (u + 1/2)^4 du + 1/2 = 0.69375.
    expected = (1 - 1 / 32) / 5 + 1 / 2
    deviation = (expected * (1 - expected) / len(labels)) ** 0.5
    assert abs(scores.accuracy - expected) < 4 * deviation


def test_threshold_counts_by_hand():
    scores = torch.tensor([[0.6, 0.7, 0.1], [0.5, 0.2, 0.9], [0.1, 0.2, 0.3]])
    labels = torch.tensor([0, 0, 2])
    # Above 0.5: (0, 0) right, (0, 1) wrong, (1, 2) wrong; 0.5 itself is not above.
    assert keras_threshold(scores, labels) == pytest.approx((1 / 3, 1 / 3))
    # Above 0.25: those, (1, 0) right and (2, 2) right.
    assert keras_threshold(scores, labels, 0.25) == pytest.approx((3 / 5, 3 / 3))
    assert keras_threshold(scores, labels, 0.95) == (0.0, 0.0)  # nothing is positive: 0, and no warning


def test_softmax_outputs_bound_the_accuracy_at_one_half():
    logits = 3 * torch.randn(400, 10, generator=generator(3, "scores"))
    labels = (logits + 2 * torch.randn(400, 10, generator=generator(4, "scores"))).argmax(1)
    precision, recall = keras_threshold(logits.softmax(1), labels)
    # At most one probability of a row is above 1/2, and it is the largest (experiments: micro bounds).
    assert recall <= classification_scores(labels, logits, 10).accuracy <= precision


def test_misuse_names_the_argument():
    for measure, labels, outputs, message in (
        (classification_scores, torch.zeros(3), torch.zeros(3, dtype=torch.int64), "labels: expected integers"),
        (classification_scores, LABELS[:0], LABELS[:0], "labels: expected at least"),
        (classification_scores, torch.tensor([0, 4]), FOUND[:2], "labels: expected classes from 0 to 3, got 4"),
        (classification_scores, FOUND[:2], torch.tensor([0, -1]), "outputs: expected classes from 0 to 3, got -1"),
        (classification_scores, FOUND[:2], FOUND[:1], "outputs: expected one for each of 2 labels, got 1"),
        (classification_scores, FOUND[:2], torch.zeros(2, 3), r"outputs: expected floating \(2, 4\), got .*\(2, 3\)"),
        (classification_scores, FOUND[:2], torch.full((2, 4), np.nan), "finite values, got others in 2 of 2"),
        (keras_threshold, LABELS, torch.zeros(6, 1), "scores: expected"),
        (keras_threshold, torch.tensor([2]), torch.zeros(1, 2), "labels: expected classes from 0 to 1, got 2"),
        (keras_threshold, torch.tensor([1]), torch.tensor([[0.0, np.inf]]), "scores: expected finite"),
        (measure_all, torch.tensor([0, 3]), torch.zeros(2, 3), "labels: expected classes from 0 to 2, got 3"),
        (measure_all, torch.tensor([0, 1]), torch.zeros(3, 3), r"logits: expected floating \(2, 3\)"),
        (measure_all, torch.tensor([0, 1]), torch.zeros(2), r"logits: expected floating \(N, C\)"),
        (calibration, torch.tensor([0]), torch.full((1, 2), np.nan), "logits: expected finite values"),
    ):  # fmt: skip
        arguments: Any = {keras_threshold: (outputs, labels), classification_scores: (labels, outputs, 4)}
        with pytest.raises(ValueError, match=message):
            measure(*arguments.get(measure, (labels, outputs)))


def test_calibration_counted_by_hand():
    # In five bins: above 0.8, above 0.6, and two above 0.4.
    confidence = torch.tensor([0.9, 0.79, 0.59, 0.55], dtype=torch.float64)
    logits = torch.stack([confidence.log(), (1 - confidence).log()], 1)
    found = calibration(torch.tensor([0, 1, 0, 1]), logits + 3, bins=5)
    assert found.counts.tolist() == [0, 0, 2, 1, 1]
    assert found.confidence.tolist() == pytest.approx([0, 0, 0.57, 0.79, 0.9])
    assert found.accuracy.tolist() == pytest.approx([0, 0, 0.5, 0, 1])
    assert found.error == pytest.approx((2 * 0.07 + 0.79 + 0.1) / 4)
    sure = calibration(torch.tensor([0]), torch.tensor([[100.0, 0.0]]))
    assert (sure.counts.tolist(), sure.error) == ([0] * 14 + [1], 0)
