import dataclasses
import json
import math
import re
import shutil
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from sklearn.metrics import accuracy_score, precision_recall_fscore_support, top_k_accuracy_score
from tasks import made
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import cbcls.train
from cbcls.config import ClassifierConfig
from cbcls.evaluation import Evaluator
from cbcls.networks.shallow_cnn import ShallowCNN
from cbcls.task import ClassifierTask
from common.data.augmentation import Augmentation
from common.data.image_set import to_float
from common.data.sets import registry
from common.runtime.cli import parse
from common.runtime.errors import NonFiniteError, UsageError
from common.runtime.seeding import derive
from common.train.checkpoint import Checkpoints, load
from common.train.logging import chart_name, read_metrics


def test_a_run_leaves_everything_behind(finished):
    folder, summary = finished
    cfg = parse(ClassifierConfig, ["--config", str(folder / "config.yaml")])
    assert (cfg.epochs, cfg.data.size, cfg.norm.average) == (2, 8, "em")  # the layer's default is written out
    session = json.loads((folder / "environment.json").read_text())["sessions"][0]
    assert session["threads"] == torch.get_num_threads()
    lines = read_metrics(folder)
    names = set().union(*lines)
    assert {"loss/train", "loss/test", "metric/accuracy", "metric/top5", "metric/macro_precision",
            "metric/macro_recall", "metric/macro_f1", "time/images_per_second",
            "health/norm3/information"} <= names  # fmt: skip
    assert [line["epoch"] for line in lines if "metric/accuracy" in line] == [1, 2]
    assert [line["epoch"] for line in lines if "health/norm3/information" in line] == [1, 2]
    assert [line["step"] for line in lines if "loss/train" in line] == [3, 6]
    events = EventAccumulator(str(folder)).Reload()
    assert {chart_name(name) for name in names - {"step", "epoch"}} == set(events.Tags()["scalars"])
    assert {p.name for p in (folder / "checkpoints").iterdir()} == {"step-00000004.pt", "step-00000008.pt"}
    for part in (str(folder), "accuracy", "images/s on cpu", "information", "tensorboard --logdir"):
        assert part in summary
    tags = ("loss/test", "metric/accuracy", "loss/train_eval", "metric/train_accuracy")
    last = next(line for line in reversed(lines) if tags[0] in line)
    shown = "  ".join(f"{tag} {last[tag]:.4g}" for tag in tags)
    assert re.search(rf"^epoch 2/2  {re.escape(shown)}  [0-9.]+ s$", summary, re.MULTILINE)


def test_the_scores_of_a_run_are_those_of_its_weights(finished):
    """Score the last checkpoint with scikit-learn alone, all images in one batch."""
    folder, _ = finished
    cfg = parse(ClassifierConfig, ["--config", str(folder / "config.yaml")])
    network = ShallowCNN(6, cfg.norm)
    state = load(folder / "checkpoints" / "step-00000008.pt")
    network.load_state_dict({**state["networks"]["network"], **state["statistics"]["network"]})
    test = registry.load(cfg.data).test
    assert test is not None
    assert test.labels is not None
    with torch.no_grad():
        logits = network.eval()(to_float(test.images))
    true, found = test.labels.numpy(), logits.argmax(1).numpy()
    precision, recall, f1, _ = precision_recall_fscore_support(true, found, average="macro", zero_division=0)  # pyright: ignore[reportArgumentType]
    want = {
        "loss/test": float(F.cross_entropy(logits, test.labels)),
        "metric/accuracy": accuracy_score(true, found),
        "metric/top5": top_k_accuracy_score(true, logits.numpy(), k=5),
        "metric/macro_precision": precision,
        "metric/macro_recall": recall,
        "metric/macro_f1": f1,
    }
    last = next(line for line in reversed(read_metrics(folder)) if "metric/accuracy" in line)
    assert {name: last[name] for name in want} == pytest.approx(want, rel=1e-5)


def test_a_known_classifier_gets_the_scores_counted_by_hand():
    cfg = ClassifierConfig(batch_size=64)
    splits = registry.load(cfg.data)
    assert splits.test is not None
    assert splits.test.labels is not None

    class Zero(torch.nn.Module):
        """Takes every image for a 0, with logit log 9 against zeros: probability 1/2."""

        def forward(self, x: torch.Tensor, cluster: None) -> torch.Tensor:
            return torch.tensor([math.log(9)] + 9 * [0.0]).expand(len(x), 10)

    zeros, n = int((splits.test.labels == 0).sum()), len(splits.test)
    found = Evaluator(cfg, ClassifierTask.load_images(cfg), torch.device("cpu")).scores(Zero(), lambda: None)
    share = zeros / n
    assert found["metric/accuracy"] == pytest.approx(share)
    assert found["metric/macro_precision"] == pytest.approx(share / 10)
    assert found["metric/macro_recall"] == pytest.approx(1 / 10)
    assert found["metric/macro_f1"] == pytest.approx(2 * share / (1 + share) / 10)
    assert found["loss/test"] == pytest.approx(share * math.log(2) + (1 - share) * math.log(18), rel=1e-6)


def test_it_learns(tmp_path):
    flags = ["--out", str(tmp_path), "--name", "run", "--epochs", "4", "--data.size", "8", "--batch_size", "50"]
    cbcls.train.main([*flags, "--norm.kind", "bn"])
    accuracy = [line["metric/accuracy"] for line in read_metrics(tmp_path / "cbcls" / "run") if "loss/test" in line]
    assert accuracy[-1] > 0.8  # chance is 0.1


def final(folder: Path) -> dict:
    state, reports = Checkpoints(folder / "checkpoints").load_latest()
    assert state is not None
    assert reports == []
    del state["log_position"]  # logged speeds differ in length
    return state


def assert_same(ours: Path, theirs: Path) -> None:
    states = [final(folder) for folder in (ours, theirs)]
    assert states[0]["protocol"] == states[1]["protocol"]
    torch.testing.assert_close(*(state["networks"] for state in states), rtol=0, atol=0)
    logs = [
        [{k: v for k, v in line.items() if not k.startswith("time/")} for line in read_metrics(folder)]
        for folder in (ours, theirs)
    ]
    assert logs[0] == logs[1]


def test_a_collapsed_mixture_is_told_once(tiny, capsys):
    # Of 128 components some hold less than 1 % of the locations, whatever is learnt.
    cbcls.train.main([*tiny, "--epochs", "2", "--norm.num_components", "128"])
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning: norm3: component")]
    assert 0 < len(lines) == len({line.split(" holds ")[0] for line in lines})


def test_logits_that_are_not_finite_stop_the_run_and_name_the_images():
    cfg = ClassifierConfig()

    class Broken(torch.nn.Module):
        def forward(self, x: torch.Tensor, cluster: None) -> torch.Tensor:
            return torch.full((len(x), 10), math.nan)

    evaluation = Evaluator(cfg, ClassifierTask.load_images(cfg), torch.device("cpu"))
    with pytest.raises(NonFiniteError, match=r"^logits of the test images are not finite"):
        evaluation.scores(Broken(), lambda: None)


def test_validation_images_are_scored_by_names_of_their_own(runs):
    line = next(line for line in read_metrics(runs / "plain") if "metric/accuracy" in line)
    names = {"accuracy", "top5", "macro_precision", "macro_recall", "macro_f1"}
    assert {f"metric/validation_{name}" for name in names} | {f"metric/{name}" for name in names} <= line.keys()
    assert {"loss/validation", "loss/test"} <= line.keys()
    assert line["loss/validation"] != line["loss/test"]


def test_a_run_does_not_go_on_with_other_images(runs, tmp_path, pictures):
    shutil.copytree(runs / "plain", tmp_path / "cbcls" / "run")
    other = tmp_path / "other"
    shutil.copytree(pictures / "train", other)
    (other / "class0" / "0.png").unlink()
    flags = ["--name", "run", "--out", str(tmp_path), "--resume", "--epochs", "3", "--data.root", str(other)]
    with pytest.raises(UsageError, match=r"content_train.* differ\); start a new run"):
        cbcls.train.main(flags)


def test_dropout_of_a_resumed_run_is_that_of_an_uninterrupted_one(tiny, tmp_path):
    flags = [*tiny, "--model.name", "densenet-7-2", "--model.dropout", "0.5", "--norm.kind", "none"]
    cbcls.train.main([*flags, "--epochs", "2", "--name", "whole"])
    cbcls.train.main([*flags, "--epochs", "1", "--name", "parts"])
    torch.rand(7)  # whatever a process draws in between
    cbcls.train.main([*flags, "--epochs", "2", "--name", "parts", "--resume"])
    ours, theirs = (final(tmp_path / "cbcls" / name) for name in ("whole", "parts"))
    for group in ("networks", "statistics"):
        torch.testing.assert_close(ours[group], theirs[group], rtol=0, atol=0)


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
