from typing import Any

import torch
from sklearn.metrics import accuracy_score, confusion_matrix, log_loss, precision_recall_fscore_support

from common.classification.measured import draw, measured

CLASSES = ("cat", "dog", "fox", "owl")


def sample() -> tuple[torch.Tensor, torch.Tensor]:
    draws = torch.Generator().manual_seed(3)
    labels = torch.randint(0, 3, (60,), generator=draws)  # no owl
    logits = torch.randn(60, 4, generator=draws, dtype=torch.float64) + 2 * torch.eye(4, dtype=torch.float64)[labels]
    logits[:, 2] = -9  # nothing is taken for a fox
    return labels, logits


def test_values_are_scikit_learns():
    labels, logits = sample()
    found, said = measured(labels, logits, CLASSES), logits.argmax(1)
    rows: Any = precision_recall_fscore_support(labels, said, labels=range(4), zero_division=0)  # pyright: ignore[reportArgumentType]
    precision, recall, _, count = rows
    torch.testing.assert_close(
        found["classes"],
        {
            name: {"count": int(count[k]), "precision": float(precision[k]), "recall": float(recall[k])}
            for k, name in enumerate(CLASSES)
        },
    )
    assert found["confusion"] == confusion_matrix(labels, said, labels=range(4)).tolist()
    assert (found["count"], found["accuracy"]) == (60, accuracy_score(labels, said))
    assert abs(found["loss"] - log_loss(labels, logits.softmax(1), labels=range(4))) < 1e-12
    for average in ("macro", "weighted"):
        p, r, f, _ = precision_recall_fscore_support(labels, said, average=average, zero_division=0)  # pyright: ignore[reportArgumentType]
        torch.testing.assert_close(found[average], {"precision": float(p), "recall": float(r), "f1": float(f)})
    trust = found["calibration"]
    assert sum(trust["counts"]) == 60
    gaps = [n * abs(a - c) for n, a, c in zip(trust["counts"], trust["accuracy"], trust["confidence"], strict=True)]
    assert abs(trust["error"] - sum(gaps) / 60) < 1e-12


def test_pictures_go_by_the_name_of_the_images(tmp_path):
    labels, logits = sample()
    paths = draw(tmp_path, "test", measured(labels, logits, CLASSES))
    assert {path.name for path in paths} == {path.name for path in tmp_path.iterdir()} == {
        "confusion-test.png", "confusion-test.svg", "reliability-test.png", "reliability-test.svg",
    }  # fmt: skip
    drawn = (tmp_path / "confusion-test.svg").read_text()
    assert all(name in drawn for name in CLASSES)
    error = measured(labels, logits, CLASSES)["calibration"]["error"]
    assert f"test, ECE {error:.3f}" in (tmp_path / "reliability-test.svg").read_text()
