import copy
import json
import shutil
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from forked import run as run_forked
from PIL import Image
from refusals import refused
from sklearn.metrics import f1_score, precision_recall_fscore_support, precision_score, recall_score
from sklearn.preprocessing import label_binarize

import cbcls.evaluate
import cbcls.evaluation
import cbcls.train
from cbcls.config import ClassifierConfig
from cbcls.evaluation import Evaluator
from cbcls.export import load_model
from cbcls.models import build_classifier
from cbcls.task import CHARTS, ClassifierTask
from common.data.clusters import write_clusters
from common.data.image_set import ImageSet, Splits, to_float
from common.data.sets.registry import load as load_images
from common.norms import recalibrate
from common.runtime.cli import parse
from common.runtime.errors import NonFiniteError
from common.runtime.seeding import permutation
from common.train.checkpoint import load
from common.train.logging import read_metrics

CPU = torch.device("cpu")


def results(run: Path, out: Path, *flags: str) -> dict[str, Any]:
    cbcls.evaluate.main(["--run", str(run), "--out", str(out), *flags])
    return json.loads((out / "evaluation.json").read_text())


def logged(run: Path) -> list[dict[str, Any]]:
    """Return what was measured after each epoch."""
    return [line for line in read_metrics(run) if "metric/accuracy" in line]


def measured(checkpoint: Path) -> dict[str, torch.Tensor]:
    """Return weights with the statistics by which they were measured."""
    state = load(checkpoint)
    return {**state["networks"]["network"], **state["statistics"]["network"]}


def config(run: Path) -> ClassifierConfig:
    return parse(ClassifierConfig, ["--config", str(run / "config.yaml")])


def test_what_is_measured_is_what_scikit_learn_says(runs, tmp_path, capsys):
    found = results(runs / "plain", tmp_path)
    images, model = ClassifierTask.load_images(config(runs / "plain")), load_model(runs / "plain")
    for split in ("test", "validation"):
        values, labels = found[split], images[split].labels
        assert labels is not None
        logits = model.logits(images[split].images)
        said = logits.argmax(1)
        accuracy = float((said == labels).double().mean())
        assert (values["count"], values["accuracy"], values["error"]) == pytest.approx(
            (len(labels), accuracy, 1 - accuracy)
        )
        top5 = (logits.topk(5).indices == labels[:, None]).any(1).double().mean()
        assert values["top5"] == pytest.approx(float(top5))
        assert values["macro"]["f1"] == pytest.approx(f1_score(labels, said, average="macro"))
        rows: Any = precision_recall_fscore_support(labels, said, labels=range(6), zero_division=0)  # pyright: ignore[reportArgumentType]
        for column, numbers in zip(("precision", "recall", "f1", "count"), rows, strict=True):
            assert [row[column] for row in values["classes"].values()] == pytest.approx(list(numbers))
        cells = label_binarize(labels, classes=range(6))
        for name, scores in (("logits", logits), ("probabilities", logits.softmax(1))):
            above = (scores > 0.5).int()
            pair = values["threshold"][name]
            assert pair["precision"] == pytest.approx(precision_score(cells, above, average="micro", zero_division=0))  # pyright: ignore[reportArgumentType]
            assert pair["recall"] == pytest.approx(recall_score(cells, above, average="micro"))
            assert pair["positives"] == pytest.approx(float(above.sum()) / len(labels))
    assert (found["epoch"], found["checkpoint"], found["run"]) == (2, "last", str(runs / "plain"))
    assert set(found["values"]) == {
        "features/purity", "features/silhouette", "activations/skewness", "activations/kurtosis", "activations/distance"
    }  # fmt: skip
    assert found["settings"]["norm"]["kind"] == "bn"
    assert found["images"] == {name: each.content_hash for name, each in images.items()}
    assert found["environment"]["versions"]["torch"] == torch.__version__
    assert "leak_audit" not in found  # of a model that is given no clusters
    assert not any(tag.startswith("audit/") for tag in logged(runs / "plain")[-1])
    assert {path.name for path in tmp_path.iterdir()} == {"evaluation.json"} | {
        f"{what}-{split}.{kind}" for what in ("confusion", "reliability") for split in ("test", "validation")
        for kind in ("png", "svg")
    }  # fmt: skip
    text, values = capsys.readouterr().out, found["test"]
    worst = min(values["classes"].items(), key=lambda item: item[1]["recall"])
    for part in (f"accuracy {values['accuracy']:.3f}, top-5 {values['top5']:.3f}", "18 images, epoch 2", "validation",
                 f"f1 {values['macro']['f1']:.3f}", f"recall of {worst[0]} {worst[1]['recall']:.3f}",
                 f"{values['threshold']['logits']['positives']:.3g} classes an image"):  # fmt: skip
        assert part in text


def test_a_run_logs_what_is_measured_of_its_checkpoints(runs, tmp_path):
    lines = logged(runs / "plain")
    for flags, line in (([], lines[1]), (["--checkpoint", "1"], lines[0])):
        found = results(runs / "plain", tmp_path, *flags, "--force")
        assert found["epoch"] == line["epoch"]
        for split, prefix in (("test", ""), ("validation", "validation_")):
            values = found[split] | {f"macro_{name}": value for name, value in found[split]["macro"].items()}
            for name in ("accuracy", "error", "top5", "macro_precision", "macro_recall", "macro_f1"):
                assert line[f"metric/{prefix}{name}"] == pytest.approx(values[name])
            assert line[f"loss/{split}"] == pytest.approx(values["loss"], rel=1e-6)


def test_training_images_are_measured_as_test_images_are(runs):
    """On a fixed sample, as many as there are test images."""
    run = runs / "plain"
    model, train = load_model(run), ClassifierTask.load_images(config(run))["train"]
    assert train.labels is not None
    chosen = permutation(len(train), 0, "seen")[:18]
    logits, labels = model.logits(train.images[chosen]), train.labels[chosen]
    line = logged(run)[1]
    assert line["loss/train_eval"] == pytest.approx(float(torch.nn.functional.cross_entropy(logits, labels)), rel=1e-5)
    assert line["metric/train_accuracy"] == pytest.approx(float((logits.argmax(1) == labels).double().mean()))
    assert line["metric/train_error"] == pytest.approx(1 - line["metric/train_accuracy"])
    assert "metric/train_macro_f1" not in line


def test_the_sample_of_training_images_is_no_larger_than_needed():
    def images(n: int) -> ImageSet:
        return ImageSet(torch.zeros(n, 3, 8, 8, dtype=torch.uint8), torch.arange(n) % 2, ("a", "b"), "x", "train")

    class Counts(torch.nn.Module):
        seen: int = 0

        def forward(self, x: torch.Tensor, cluster: torch.Tensor | None) -> torch.Tensor:
            self.seen += len(x)
            return torch.zeros(len(x), 2)

    for train, test, count in ((30, 20, 20), (20, 30, 20), (2100, 2100, 2000)):
        network = Counts()
        Evaluator(ClassifierConfig(), {"train": images(train), "test": images(test)}, CPU).scores(network, lambda: None)
        assert network.seen == test + count


def accuracy_by_hand(run: Path, ids: torch.Tensor) -> float:
    """Return the accuracy of the last checkpoint with these clusters, apart from the code under test."""
    cfg = config(run)
    network = build_classifier(cfg, 6, 6)
    network.load_state_dict(measured(last(run)))
    test = ClassifierTask.load_images(cfg)["test"]
    with torch.no_grad():
        said = network.eval()(to_float(test.images), ids).argmax(1)
    assert test.labels is not None
    return float((said == test.labels).double().mean())


def last(run: Path) -> Path:
    return sorted((run / "checkpoints").glob("step-*.pt"))[-1]


@pytest.mark.parametrize("name", ["scb", "onehot"])
def test_a_model_that_is_given_clusters_is_audited(runs, tmp_path, name, capsys):
    run = runs / name
    found = results(run, tmp_path)["leak_audit"]
    labels = ClassifierTask.load_images(config(run))["test"].labels
    assert labels is not None
    shuffled = labels[permutation(18, 0, "leak audit")]
    wanted = {"known": labels, "unknown": torch.full((18,), -1), "shuffled": shuffled,
              "constant": torch.zeros(18, dtype=torch.int64)}  # fmt: skip
    for what, ids in wanted.items():
        assert found["accuracy"][what] == pytest.approx(accuracy_by_hand(run, ids)), what
    assert found["flagged"]
    assert found["reasons"][0] == "clusters.by classes makes test clusters of test labels"
    assert found["class_given_cluster"] == {"without": pytest.approx(1 / 6), "given": 1.0, "reduction": 1.0}
    assert found["baseline"] == "no baseline"
    out = capsys.readouterr().out
    assert "LEAK" in out
    assert "no baseline" in out
    line = logged(run)[-1]
    for what in ("unknown", "shuffled", "constant", "weighed"):
        assert line[f"audit/accuracy_{what}"] == found["accuracy"][what]
    assert (line["audit/chance_given_cluster"], line["audit/flagged"]) == (1, 1)
    assert line["metric/accuracy"] == found["accuracy"]["known"]


def test_a_run_ends_with_its_scores_and_what_the_audit_found(tmp_path):
    task = ClassifierTask.__new__(ClassifierTask)  # the rows follow from the log alone

    def rows(**more: float) -> list[tuple[str, str]]:
        return task.summary_rows([latest, {name.replace("__", "/"): value for name, value in more.items()}], tmp_path)

    latest = {"loss/test": 0.5, "metric/accuracy": 0.75, "metric/error": 0.25, "loss/train_eval": 0.25,
              "metric/train_accuracy": 0.875, "metric/train_error": 0.125, "loss/train": 9.0}  # fmt: skip
    plain = [("test", "loss 0.5, accuracy 0.75, error 0.25"), ("train", "loss 0.25, accuracy 0.875, error 0.125")]
    assert rows()[:2] == plain
    held = rows(loss__validation=0.4, metric__validation_accuracy=0.7)
    assert held[1] == ("validation", "loss 0.4, accuracy 0.7")
    audit = {"audit__accuracy_unknown": 0.4, "audit__accuracy_shuffled": 0.3, "audit__chance_given_cluster": 0.2}
    clusters = ("clusters", "known 0.75, unknown 0.4, shuffled 0.3, chance given the cluster 0.2")
    assert rows(**audit, audit__flagged=0.0)[:-2] == [*plain, clusters]
    *others, (name, text) = rows(**audit, audit__flagged=1.0)[:-2]
    assert (others, name) == ([*plain, clusters], "LEAK")
    assert "clusters unknown" in text


def test_what_tensorboard_shows_in_one_chart_is_logged(runs):
    assert {tag for tags in CHARTS.values() for tag in tags} <= set(logged(runs / "plain")[-1])


def test_clusters_that_labels_do_not_make_are_not_flagged(tiny, tmp_path, capsys):
    cfg = parse(ClassifierConfig, tiny)
    splits = load_images(cfg.data)

    def random(images: ImageSet, seed: int) -> ImageSet:
        ids = torch.randint(0, 2, (len(images),), generator=torch.Generator().manual_seed(seed))
        return ImageSet(**{**vars(images), "clusters": ids, "cluster_names": ("left", "right")})

    assert splits.test is not None
    file = tmp_path / "clusters.json"
    how = {"method": "a coin", "seeds": [0, 1]}
    write_clusters(file, Splits(random(splits.train, 0), random(splits.test, 1)), how)
    flags = ["--clusters.by", "file", "--clusters.file", str(file), "--norm.kind", "scb", "--norm.num_components", "2"]
    cbcls.train.main([*tiny, *flags, "--epochs", "1", "--name", "run", "--recalibrate.layers", "mn"])
    state = load(last(tmp_path / "cbcls" / "run"))
    assert state["protocol"]["recalibrated"] == "mn, 2048 images by 256"
    for name, value in load_model(tmp_path / "cbcls" / "run").network.state_dict().items():
        assert torch.equal(value, state["networks"]["network"][name])  # moving averages are measured
    found = results(tmp_path / "cbcls" / "run", tmp_path / "out")["leak_audit"]
    assert (found["flagged"], found["reasons"]) == (False, [])
    assert found["clusters"] == {"by": "file", "file": str(file), "configuration": how}
    assert logged(tmp_path / "cbcls" / "run")[-1]["audit/flagged"] == 0
    assert load_model(tmp_path / "cbcls" / "run").clusters == ("left", "right")

    def refuses() -> str:
        return refused(capsys, cbcls.evaluate.main, "--run", str(tmp_path / "cbcls" / "run"))

    write_clusters(file, Splits(random(splits.train, 0), random(splits.test, 2)), {})
    assert "its images are others now (clusters_test differ)" in refuses()
    write_clusters(file, Splits(random(splits.test, 0), random(splits.train, 1)), {})
    assert "clusters.file" in refuses()  # of other images
    file.unlink()
    assert "clusters.file" in refuses()


def altered(run: Path, out: Path, *changes: tuple[str, str], **protocol: str) -> Path:
    """Copy a run with other text in its configuration, or other values in its last checkpoint's protocol."""
    shutil.copytree(run, out)
    file = out / "config.yaml"
    text = file.read_text()
    for old, new in changes:
        assert old in text
        text = text.replace(old, new)
    file.write_text(text)
    state = load(last(out))
    torch.save(state | {"protocol": state["protocol"] | protocol}, last(out))
    return out


def test_a_baseline_is_given_the_same(runs, tmp_path, capsys):
    other = altered(runs / "onehot", tmp_path / "other", ("lr: 0.01", "lr: 0.05"), ("seed: 0", "seed: 1"),
                    content_train="0" * 64)  # fmt: skip # another seed may have held other images out
    labels = ClassifierTask.load_images(config(runs / "onehot"))["test"].labels
    assert labels is not None
    theirs = accuracy_by_hand(runs / "onehot", labels)
    differ = ["seed 1, the model 0", "lr 0.05, the model 0.01"]
    for baseline, differs in ((runs / "onehot", []), (other, differ)):
        found = results(runs / "scb", tmp_path, "--baseline", str(baseline), "--force")["leak_audit"]
        assert found["clusters"] == {"by": "classes"}
        assert found["baseline"]["accuracy"] == pytest.approx(theirs)
        assert found["baseline"]["gain"]["value"] == pytest.approx(found["accuracy"]["known"] - theirs)
        assert found["baseline"]["run"] == str(baseline)
        assert sorted(found["baseline"]["differs"]) == sorted(differs)
    out = capsys.readouterr().out
    assert f"baseline   {theirs:.3f}" in out
    assert "note       the baseline has lr 0.05, the model 0.01" in out


def test_baselines_that_are_not_alike_are_refused_by_what_differs(runs, tmp_path, capsys):
    scb, onehot = runs / "scb", runs / "onehot"
    for number, (run, baseline, line) in enumerate((
        (scb, runs / "plain", "expected a run with model.onehot_cluster true"),
        (runs / "plain", onehot, "is given no clusters"),
        (scb, ("  flip: false", "  flip: true"), "baseline: expected data.flip false"),
        (scb, ("  by: classes", "  by: superclasses"), "baseline: expected clusters.by classes"),
        (scb, {"clusters_test": "0" * 64}, "has other images or clusters"),
        (scb, {"content_train": "0" * 64}, "has other images or clusters"),
    )):  # fmt: skip
        if isinstance(baseline, tuple):
            baseline = altered(onehot, tmp_path / str(number), baseline)  # noqa: PLW2901
        elif isinstance(baseline, dict):
            baseline = altered(onehot, tmp_path / str(number), **baseline)  # noqa: PLW2901
        flags = ("--run", str(run), "--baseline", str(baseline), "--out", str(tmp_path / "out"))
        assert line in refused(capsys, cbcls.evaluate.main, *flags)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["plain", "mn"])
def test_statistics_are_estimated_from_training_images_before_each_measurement(runs, tmp_path, name):
    """Against estimates by hand, which give other scores than the averages that training left."""
    run = runs / name
    cfg, images = config(run), ClassifierTask.load_images(config(run))
    network = build_classifier(cfg, 6)
    network.load_state_dict(load(last(run))["networks"]["network"])
    pixels, labels = to_float(images["test"].images), images["test"].labels
    assert labels is not None

    def loss(labels: torch.Tensor = labels) -> float:
        with torch.no_grad():
            return float(torch.nn.functional.cross_entropy(network.eval()(pixels), labels))

    averaged = loss()
    order = permutation(len(images["train"]), cfg.seed, "recalibrate")[: cfg.recalibrate.images]
    batches = list(to_float(images["train"].images[order]).split(cfg.recalibrate.batch_size))
    if name == "mn":
        recalibrate(network, batches)
    else:  # of one batch, by torch's own averages in float64: each layer after those before it
        assert len(batches) == 1
        network.double()
        for layer in (
            module for module in network.modules() if isinstance(module, torch.nn.modules.batchnorm._BatchNorm)
        ):
            layer.train().momentum = 1.0
            with torch.no_grad():
                network(batches[0].double())
            layer.eval()
        network.float()
    fitted = loss()
    assert abs(averaged - fitted) > 1e-3
    assert logged(run)[-1]["loss/test"] == pytest.approx(fitted, rel=1e-4)
    assert results(run, tmp_path)["test"]["loss"] == pytest.approx(fitted, rel=1e-4)
    model = load_model(run)
    model.save(tmp_path / "model")
    assert results(tmp_path / "model", tmp_path / "again")["test"]["loss"] == pytest.approx(fitted, rel=1e-4)


def test_a_checkpoint_that_was_not_measured_is_evaluated_as_one_that_was(runs, tmp_path):
    bare = altered(runs / "plain", tmp_path / "bare")
    torch.save({**load(last(bare)), "statistics": {}}, last(bare))
    want, found = load_model(runs / "plain").network.state_dict(), load_model(bare).network.state_dict()
    assert not torch.equal(load(last(bare))["networks"]["network"]["norm1.running_mean"], want["norm1.running_mean"])
    torch.testing.assert_close(dict(found), dict(want), rtol=0, atol=0)


def test_two_ranks_measure_the_mixtures_that_one_process_would(tiny, tmp_path):
    """Each rank's moving averages differ; all measure those of the first, fitted to the same images."""
    flags = ["--norm.kind", "mn", "--recalibrate.images", "30", "--epochs", "1", "--name", "pair"]
    pair = run_forked(cbcls.train.main, *tiny, *flags, ranks=2)
    assert pair.statuses == [0, 0], pair.err
    run = tmp_path / "cbcls" / "pair"
    means = [rank["networks"]["network"]["norm3.mean"] for rank in load(last(run))["ranks"]]
    assert not torch.equal(*means)
    found = results(run, tmp_path / "out")["test"]
    line = logged(run)[-1]
    assert line["loss/test"] == pytest.approx(found["loss"], rel=1e-5)
    assert line["metric/accuracy"] == found["accuracy"]


def test_measuring_leaves_no_trace_in_a_network(runs):
    cfg = config(runs / "mn")
    images = ClassifierTask.load_images(cfg)
    network = build_classifier(cfg, 6)
    network.load_state_dict(measured(last(runs / "mn")))
    network.train()
    before = copy.deepcopy(network.state_dict())
    Evaluator(cfg, images, CPU).scores(network, lambda: None)
    torch.testing.assert_close(dict(network.state_dict()), dict(before), rtol=0, atol=0)
    assert network.training
    with torch.no_grad():
        next(network.get_submodule("conv1").parameters()).fill_(torch.nan)
    with pytest.raises(NonFiniteError, match="statistics cannot be estimated anew"):
        cbcls.evaluation.recalibrate(cfg, network, images["train"], CPU)


def test_bad_input(runs, tmp_path, capsys):
    (tmp_path / "evaluation.json").write_text("mine")
    bare = altered(runs / "plain", tmp_path / "bare")
    shutil.rmtree(bare / "checkpoints")
    wide = altered(runs / "scb", tmp_path / "wide", ("position: null", "position: 2"))
    plain = ["--run", str(runs / "plain")]
    for argv, line in (
        ([], "run: give the run's folder"),
        (["--run", str(tmp_path)], "holds no config.yaml"),
        ([*plain, "--device", "tpu"], "device: expected auto"),
        ([*plain, "--checkpoint", "first"], "checkpoint: expected last, best or the number"),
        ([*plain, "--checkpoint", "2"], "has none of 2; there are last, best, 1"),
        ([*plain, "--out", str(tmp_path)], "evaluation.json exists"),
        (["--run", str(bare)], "has no checkpoint yet"),
        (["--run", str(wide)], "are not of its config.yaml"),
    ):
        assert line in refused(capsys, cbcls.evaluate.main, *argv)
    assert (tmp_path / "evaluation.json").read_text() == "mine"


def test_images_that_are_others_now_are_refused(tiny, tmp_path, pictures, capsys):
    shutil.copytree(pictures / "test", tmp_path / "test")
    flags = [*tiny, "--data.test_root", str(tmp_path / "test"), "--norm.kind", "none", "--epochs", "1", "--name", "run"]
    cbcls.train.main(flags)
    Image.new("RGB", (8, 8)).save(tmp_path / "test" / "class3" / "1.png")
    line = refused(capsys, cbcls.evaluate.main, "--run", str(tmp_path / "cbcls" / "run"))
    assert "its images are others now (content_test differ)" in line
    assert not (tmp_path / "cbcls" / "run" / "evaluation").exists()


def test_features_that_follow_the_class_are_pure_and_those_that_do_not_are_as_pure_as_chance(runs, monkeypatch):
    model = load_model(runs / "plain")
    count, classes = 600, len(model.classes)
    labels = torch.arange(count) % classes
    images = ImageSet(torch.zeros(count, 3, 8, 8, dtype=torch.uint8), labels, model.classes, "toy", "test")
    of_class, noise = torch.nn.functional.one_hot(labels).double(), torch.randn(count, classes).double()
    for features, purity in ((of_class + 0.01 * noise, 1.0), (noise, 1 / classes)):

        @contextmanager
        def collected(_network, features=features):
            order = permutation(count, model.cfg.seed, "distributions")
            yield [features[order]]

        monkeypatch.setattr(cbcls.evaluate, "collect_features", collected)
        found = cbcls.evaluate.distributions(model, images)
        assert found["features/purity"] == pytest.approx(purity, abs=0.03)
        assert (found["features/silhouette"] > 0.9) == (purity == 1)
