from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
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
    draw(tmp_path, "test", measured(labels, logits, CLASSES))
    assert {path.name for path in tmp_path.iterdir()} == {
        "confusion-test.png", "confusion-test.svg", "reliability-test.png", "reliability-test.svg",
    }  # fmt: skip
    drawn = (tmp_path / "confusion-test.svg").read_text()
    assert all(name in drawn for name in CLASSES)
    error = measured(labels, logits, CLASSES)["calibration"]["error"]
    assert f"test, ECE {error:.3f}" in (tmp_path / "reliability-test.svg").read_text()


def drawn(folder: Path, confusion: torch.Tensor, classes: list[str], name: str = "set") -> tuple[Path, Path]:
    """Draw, and return the PNGs of confusion and reliability."""
    calibration = {"error": 0.123, "counts": [0, 3, 0, 2], "accuracy": [0.0, 0.5, 0.0, 1.0]}
    values = {"confusion": confusion.tolist(), "classes": dict.fromkeys(classes), "calibration": calibration}
    draw(folder, name, values)
    return folder / f"confusion-{name}.png", folder / f"reliability-{name}.png"


def test_a_confusion_matrix_is_shaded_where_classes_are_taken_for_each_other(tmp_path):
    counts = 5 * torch.eye(4, dtype=torch.int64)
    shades = []
    for name, matrix in (("right", counts), ("wrong", counts.flip(0))):
        png, _ = drawn(tmp_path, matrix, list("abcd"), name)
        with Image.open(png) as image:
            wide, high = image.size
            corner = image.convert("L").crop((int(0.75 * wide), int(0.7 * high), int(0.88 * wide), int(0.82 * high)))
        shades.append(1 - float(np.asarray(corner).mean()) / 255)  # of the last class taken for itself
        assert all(text in png.with_suffix(".svg").read_text() for text in (name, "taken for", "true class"))
    assert shades[0] > 0.5 > shades[1]
    drawn(tmp_path, torch.zeros(60, 60, dtype=torch.int64), [f"c{i}" for i in range(60)])  # many, and without samples


def test_letters_that_the_font_lacks_are_escaped_and_others_drawn(tmp_path):
    counts = torch.eye(3, dtype=torch.int64)
    png, _ = drawn(tmp_path / "names", counts, ["猫 ж", "caf\udce9", "a\nb"])
    spelt, _ = drawn(tmp_path / "spelt", counts, [r"\u732b ж", r"caf\udce9", r"a\nb"])
    other, _ = drawn(tmp_path / "other", counts, [r"\u732b д", r"caf\udce9", r"a\nb"])
    assert png.read_bytes() == spelt.read_bytes() != other.read_bytes()


def test_reliability_has_a_bar_for_each_bin_that_is_not_empty(tmp_path):
    _, png = drawn(tmp_path, torch.eye(2), ["a", "b"], "target")
    text = png.with_suffix(".svg").read_text()
    assert "target, ECE 0.123" in text
    assert text.count("#56b4e9") == 2
