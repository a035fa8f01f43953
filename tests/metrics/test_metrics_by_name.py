"""Metrics and feature extractors of one's own, by name."""

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import cbcls.train
import cbgan.config
import cbgan.task
from common.data import ImageSet, Splits
from common.metrics import Fid, FidConfig, register_extractor, register_metric
from common.metrics.extractors import EXTRACTORS
from common.metrics.scores import METRICS
from common.runtime.cli import parse
from common.runtime.errors import UsageError
from common.train.logging import read_metrics


@pytest.fixture(autouse=True)
def as_before(monkeypatch):
    for registry in (METRICS, EXTRACTORS):
        monkeypatch.setattr(registry, "_known", dict(registry._known))


def confidence(labels: torch.Tensor, logits: torch.Tensor) -> float:
    return float(logits.softmax(1).amax(1).mean())


def test_a_classifiers_run_logs_a_metric_of_ones_own_and_chooses_an_epoch_by_it(tmp_path):
    register_metric("confidence", confidence, better="lower")
    register_metric("plain", confidence)
    flags = ["--epochs", "2", "--batch_size", "500", "--data.size", "8", "--out", str(tmp_path), "--name", "run"]
    cbcls.train.main([*flags, "--best.keep", "--best.by", "metric/validation_confidence"])
    values = [line for line in read_metrics(tmp_path / "cbcls" / "run") if "metric/confidence" in line]
    assert [0.1 < line["metric/confidence"] <= 1 for line in values] == [True, True]
    summary = yaml.safe_load((tmp_path / "cbcls" / "run" / "summary.json").read_text())
    assert summary["best"]["value"] == min(line["metric/validation_confidence"] for line in values)
    better = {"accuracy": "higher", "error": "lower", "macro_f1": "higher", "top5": "higher", "confidence": "lower"}
    for name, way in better.items():
        for split in ("", "validation_", "train_"):
            assert summary["better"][f"metric/{split}{name}"] == way
    assert {tag for tag, way in summary["better"].items() if way == "lower" and tag.startswith("loss/")} == {
        "loss/train", "loss/train_eval", "loss/validation", "loss/test"}  # fmt: skip
    assert "metric/plain" not in summary["better"]
    with pytest.raises(UsageError, match=r"metric/confidence is measured on test images"):
        cbcls.train.main([*flags[:-1], "other", "--best.keep", "--best.by", "metric/confidence"])


class Means:
    """The mean of each channel: their distance is known in closed form."""

    name, id, resize, dim = "means", "means-1", "none", 3
    warning = "these are but means"

    def __init__(self, weights: Path | None) -> None:
        self.weights = weights

    def __call__(self, images):
        return images.float().mean((2, 3))


def build(config: FidConfig, splits: Splits, cache: Path, device: object) -> Means:
    return Means(config.weights)


def test_an_extractor_of_ones_own_gives_the_features_of_the_distance(tmp_path):
    register_extractor("means", build, reads_weights=True)
    pixels = torch.randint(0, 100, (400, 3, 8, 8), dtype=torch.uint8)
    real = ImageSet(pixels, None, (), "noise", "train")
    fid = Fid(FidConfig(extractor="means", weights=tmp_path), Splits(real, None), tmp_path, "cpu")
    assert (fid.tag, fid.warning) == ("metric/fid_means", "these are but means")
    assert isinstance(fid.extractor, Means)
    assert fid.extractor.weights == tmp_path
    shifted = pixels + 7  # the same covariance, each mean 7 higher
    assert fid.measure(lambda i, n: shifted[i : i + n], 400).fid == pytest.approx(3 * 7**2, rel=1e-4)


def test_a_gans_run_can_be_measured_and_chosen_by_it():
    register_extractor("means", build)
    cfg = parse(cbgan.config.GanConfig, ["--fid.extractor", "means"])
    assert next(iter(cbgan.task.GanTask.selection_metrics(cfg))) == "metric/fid_means"
    with pytest.raises(
        UsageError, match=r"^fid\.weights: means reads none, expected null or fid\.extractor inception( or \w+)*$"
    ):
        parse(cbgan.config.GanConfig, ["--fid.extractor", "means", "--fid.weights", "x.pth"])


def test_wrong_names_and_registrations_are_one_line(tmp_path):
    with pytest.raises(
        ValueError, match=r"^fid\.extractor: .* inception, .*classifier, got clasifier; did you mean clas"
    ):
        FidConfig(extractor="clasifier")
    register_extractor("other", build)
    images = ImageSet(torch.zeros(4, 3, 8, 8, dtype=torch.uint8), None, (), "black", "train")
    with pytest.raises(UsageError, match=r"^fid\.extractor: expected other to have that name, it has means$"):
        Fid(FidConfig(extractor="other"), Splits(images, None), tmp_path, "cpu")
    wrong: Any = "more"
    for register, line in (
        (lambda: register_extractor("inception", build), "name: inception is taken; for fid.extractor there are inc"),
        (lambda: register_extractor("mine", wrong), "build: expected a function"),
        (lambda: register_metric("accuracy", confidence), "name: accuracy is taken; for metrics there are accuracy,"),
        (lambda: register_metric("Mine", confidence), "name: expected lower-case letters"),
        (lambda: register_metric("mine", wrong), "measure: expected a function"),
        (
            lambda: register_metric("mine", confidence, better=wrong),
            "better: expected higher, lower or None, got 'mor",
        ),
    ):
        with pytest.raises(ValueError, match=f"^{line}"):
            register()
