import dataclasses
import math
import re
from pathlib import Path

import pytest
import torch
from tasks import made

import cbcls.train
from cbcls.config import ClassifierConfig
from cbcls.evaluation import Evaluator
from cbcls.task import ClassifierTask
from common.data.augmentation import Augmentation
from common.data.sets import registry
from common.runtime.cli import parse
from common.runtime.errors import NonFiniteError, UsageError
from common.runtime.seeding import derive
from common.train.checkpoint import Checkpoints
from common.train.logging import read_metrics


def test_a_run_logs_scores_and_health_of_each_epoch(finished):
    folder, summary = finished
    cfg = parse(ClassifierConfig, ["--config", str(folder / "config.yaml")])
    assert (cfg.epochs, cfg.data.size, cfg.norm.average) == (2, 8, "em")  # the layer's default is written out
    lines = read_metrics(folder)
    assert {"metric/macro_precision", "metric/macro_recall", "time/images_per_second"} <= set().union(*lines)
    for tag in ("metric/accuracy", "health/norm3/information"):
        assert [line["epoch"] for line in lines if tag in line] == [1, 2]
    assert [line["step"] for line in lines if "loss/train" in line] == [3, 6]
    for part in (str(folder), "accuracy", "images/s on cpu", "information", "tensorboard --logdir"):
        assert part in summary
    tags = ("loss/test", "metric/accuracy", "loss/train_eval", "metric/train_accuracy")
    last = next(line for line in reversed(lines) if tags[0] in line)
    scores = "  ".join(f"{tag} {last[tag]:.4g}" for tag in tags)
    assert re.search(rf"^epoch 2/2  {re.escape(scores)}  [0-9.]+ s$", summary, re.MULTILINE)


def test_it_learns(tmp_path):
    flags = ["--out", str(tmp_path), "--name", "run", "--epochs", "4", "--data.size", "8", "--batch_size", "50"]
    cbcls.train.main([*flags, "--norm.kind", "bn"])
    accuracy = [line["metric/accuracy"] for line in read_metrics(tmp_path / "cbcls" / "run") if "loss/test" in line]
    assert accuracy[-1] > 0.8  # chance is 0.1


def assert_same(ours: Path, theirs: Path) -> None:
    (a, _), (b, _) = (Checkpoints(folder / "checkpoints").load_latest() for folder in (ours, theirs))
    assert a is not None
    assert b is not None
    assert a["protocol"] == b["protocol"]
    for group in ("networks", "statistics"):
        torch.testing.assert_close(a[group], b[group], rtol=0, atol=0)
    logs = [[{k: v for k, v in line.items() if not k.startswith("time/")} for line in read_metrics(folder)]
            for folder in (ours, theirs)]  # fmt: skip
    assert logs[0] == logs[1]


def test_logits_that_are_not_finite_stop_the_run_and_name_the_images():
    cfg = ClassifierConfig()

    class Broken(torch.nn.Module):
        def forward(self, x: torch.Tensor, cluster: None) -> torch.Tensor:
            return torch.full((len(x), 10), math.nan)

    evaluation = Evaluator(cfg, ClassifierTask.load_images(cfg), torch.device("cpu"))
    with pytest.raises(NonFiniteError, match=r"^logits of the test images are not finite"):
        evaluation.scores(Broken(), lambda: None)


def test_dropout_of_a_resumed_run_is_that_of_an_uninterrupted_one(tiny, tmp_path):
    flags = [*tiny, "--model.name", "densenet-7-2", "--model.dropout", "0.5", "--norm.kind", "none"]
    cbcls.train.main([*flags, "--epochs", "2", "--name", "whole"])
    cbcls.train.main([*flags, "--epochs", "1", "--name", "parts"])
    torch.rand(7)  # whatever a process draws in between
    cbcls.train.main([*flags, "--epochs", "2", "--name", "parts", "--resume"])
    assert_same(tmp_path / "cbcls" / "whole", tmp_path / "cbcls" / "parts")


def test_weights_without_a_gradient_shrink_as_the_optimizer_says():
    for flags, kept in (
        (["--decay", "absolute", "--lr", "0.01"], 1 - 0.25),
        (["--lr", "0.01"], 1 - 0.25 * 0.01),
        (["--optimizer", "sgd", "--lr", "0.01"], 1 - 0.01 * 0.25 * 1.9),  # Nesterov's first step is 1 + 0.9 long
        (["--optimizer", "adam", "--lr", "0.01"], 1 - 0.01),
    ):
        cfg = parse(ClassifierConfig, ["--weight_decay", "0.25", *flags])
        task = made(ClassifierTask, cfg)
        for parameter in task.networks["network"].parameters():
            torch.nn.init.ones_(parameter)
            parameter.grad = torch.zeros_like(parameter)
        task.optimizers["train"].step()
        found = {round(value, 6) for p in task.networks["network"].parameters() for value in p.unique().tolist()}
        assert sorted(found) == pytest.approx(sorted({kept, 1.0}), abs=2e-6)  # biases and layers under test stay


def test_images_decoded_in_the_workers_train_the_same_network(tiny, tmp_path):
    flags = [*tiny, "--epochs", "1", "--data.augment", "weak", "--data.flip", "--data.normalise", "dataset"]
    flags += ["--norm.kind", "none", "--data.validation", "0.1", "--batch_size", "20"]
    cbcls.train.main([*flags, "--name", "memory"])
    cbcls.train.main([*flags, "--name", "disk", "--data.in_memory", "false", "--data.workers", "1"])
    assert_same(tmp_path / "cbcls" / "memory", tmp_path / "cbcls" / "disk")


def test_augmented_images_are_drawn_anew_each_time_and_follow_from_the_seed(tiny):
    cfg = parse(ClassifierConfig, [*tiny, "--data.augment", "strong", "--data.flip"])
    task = made(ClassifierTask, cfg)
    (view,) = task.streams()["train"].views
    images, index = task.images["train"].images[:], torch.arange(60)
    first, again, other = (view(images, index, 0, epoch) for epoch in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert torch.equal(first[5], Augmentation("strong", 8, flip=True)(images[5], derive(0, "image", 0, 5)))


def test_a_data_sets_own_validation_images_are_taken(tiny, monkeypatch):
    cfg = parse(ClassifierConfig, tiny)
    splits = registry.load(cfg.data)
    own = splits.train.select(torch.arange(7))
    monkeypatch.setattr(cbcls.task, "load", lambda _: dataclasses.replace(splits, validation=own))
    assert len(ClassifierTask.load_images(cfg)["validation"]) == 7
    assert len(ClassifierTask.load_images(parse(ClassifierConfig, [*tiny, "--best.keep"]))["train"]) == 60
    with pytest.raises(UsageError, match=r"^data.validation: expected null, since the data set has 7 validation"):
        ClassifierTask.load_images(parse(ClassifierConfig, [*tiny, "--data.validation", "0.2"]))
