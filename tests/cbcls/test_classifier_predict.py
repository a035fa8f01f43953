import csv
import os
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image
from refusals import refused

import cbcls.predict
import cbcls.train
from cbcls import load_model
from cbcls.models import build_classifier
from cbcls.task import ClassifierTask
from common.data import images_below, read_images, to_float
from common.train.checkpoint import Checkpoints, load


def rows(out: Path) -> list[dict[str, str]]:
    return list(csv.DictReader((out / "predictions.csv").read_text(encoding="utf-8").splitlines()))


def by_hand(run: Path, images: torch.Tensor, cluster: int | None) -> torch.Tensor:
    """Return probabilities of a run's last checkpoint, apart from the code under test."""
    model = load_model(run)
    network = build_classifier(model.cfg, 6, len(model.clusters))
    state = load(sorted((run / "checkpoints").glob("step-*.pt"))[-1])
    network.load_state_dict({**state["networks"]["network"], **state["statistics"]["network"]})
    # In the run's layout: under every cluster this network's rounding alone is 1e-4 in NCHW, against float64.
    network.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    with torch.no_grad():
        ids = None if cluster is None else torch.full((len(images),), cluster)
        return network.eval()(to_float(images).contiguous(memory_format=torch.channels_last), ids).softmax(1)


@pytest.mark.parametrize(
    ("name", "flags", "cluster"),
    [("plain", [], None), ("scb", [], -1), ("scb", ["--cluster", "class4"], 4), ("onehot", ["--cluster", "class1"], 1)],
)
def test_predictions_are_those_of_the_network(runs, pictures, tmp_path, name, flags, cluster, capsys):
    folder = pictures / "test"
    cbcls.predict.main(["--run", str(runs / name), "--images", str(folder), "--out", str(tmp_path), *flags])
    files = images_below(folder, "images")
    best, said = by_hand(runs / name, read_images(files, 8), cluster).max(1)
    found = rows(tmp_path)
    assert [row["file"] for row in found] == [str(file.relative_to(folder)) for file in files]
    assert [row["class"] for row in found] == [f"class{k}" for k in said.tolist()]
    assert [float(row["probability"]) for row in found] == pytest.approx(best.tolist(), abs=1e-5)
    given = None if cluster is None else "unknown" if cluster < 0 else f"class{cluster}"
    assert {row.get("cluster") for row in found} == {given}
    text = capsys.readouterr().out
    assert "classified 18 images" in text
    assert (f"their cluster {given}" in text) == (given is not None)
    with Image.open(tmp_path / "predictions.png") as sheet:
        assert sheet.size == (4 + 8 * 74, 4 + 3 * 88)


def test_files_whose_names_are_no_utf8_are_in_the_table_escaped(runs, tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    for name in (b"caf\xe9.png", "café 猫.png".encode()):
        Image.new("RGB", (8, 8)).save(os.path.join(os.fsencode(folder), name).decode(errors="surrogateescape"))
    cbcls.predict.main(["--run", str(runs / "plain"), "--images", str(folder), "--out", str(tmp_path)])
    assert [row["file"] for row in rows(tmp_path)] == ["café 猫.png", r"caf\udce9.png"]


def test_an_exported_model_says_the_same_without_its_run_or_data(runs, tmp_path, monkeypatch):
    images = ClassifierTask.load_images(load_model(runs / "plain").cfg)["test"].images
    for name in ("plain", "scb", "mn"):
        trained, out = load_model(runs / name), tmp_path / name
        cbcls.predict.main(["--run", str(runs / name), "--export", str(out)])
        assert {path.name for path in out.iterdir()} == {"model.safetensors", "config.yaml", "model.json"}
        with monkeypatch.context() as without:
            without.setattr(ClassifierTask, "load_images", lambda _: pytest.fail("it needs no images"))
            exported = load_model(out)
        assert torch.equal(exported.logits(images), trained.logits(images))
        assert exported.classes == trained.classes == tuple(f"class{k}" for k in range(6))
        assert (exported.clusters, exported.epoch) == (trained.clusters, 2)
        assert exported.protocol == trained.protocol
        assert not exported.network.training


def test_names_come_from_the_run_or_else_from_its_images(runs, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(runs / "scb", copy)
    wanted = load_model(copy)
    assert wanted.clusters == wanted.classes
    (copy / "categories.json").unlink()
    assert load_model(copy).clusters == wanted.clusters


def test_images_are_brought_to_size_as_the_runs_were(runs, tmp_path):
    folder, copy = tmp_path / "wide", tmp_path / "copy"
    folder.mkdir()
    Image.effect_noise((24, 8), 90).convert("RGB").save(folder / "one.png")
    shutil.copytree(runs / "plain", copy)
    text = (copy / "config.yaml").read_text()
    assert "fit: cut" in text
    found = []
    for fit in ("cut", "pad"):
        (copy / "config.yaml").write_text(text.replace("fit: cut", f"fit: {fit}"))
        cbcls.predict.main(["--run", str(copy), "--images", str(folder), "--out", str(tmp_path / fit)])
        found.append(float(rows(tmp_path / fit)[0]["probability"]))
        best = by_hand(copy, read_images([folder / "one.png"], 8, fit), None).max()
        assert found[-1] == pytest.approx(float(best), abs=1e-5)
    assert found[0] != found[1]


def test_clusters_of_each_image_can_be_given_by_number(runs):
    model, images = load_model(runs / "scb"), ClassifierTask.load_images(load_model(runs / "scb").cfg)["test"].images
    ids = torch.arange(18) % 6
    mixed = model.logits(images, ids)
    for k in range(6):
        torch.testing.assert_close(mixed[ids == k], model.logits(images, f"class{k}")[ids == k])


def test_a_layer_that_has_to_be_given_a_cluster_says_so(tiny, tmp_path, capsys, pictures):
    flags = ["--norm.kind", "dsbn", "--clusters.by", "classes", "--norm.num_components", "6", "--epochs", "1"]
    cbcls.train.main([*tiny, *flags, "--name", "run"])
    run = str(tmp_path / "cbcls" / "run")
    line = refused(capsys, cbcls.predict.main, "--run", run, "--images", str(pictures / "test"), "--out", str(tmp_path))
    assert "cluster: expected one of class0, class1" in line
    assert "since dsbn has to be given one, got unknown" in line


def test_bad_input(runs, pictures, tmp_path, capsys):
    images, plain, scb = str(pictures / "test"), str(runs / "plain"), str(runs / "scb")
    for name in ("empty", "model"):
        (tmp_path / name).mkdir()
    (tmp_path / "model" / "model.safetensors").write_bytes(b"")
    adapted = tmp_path / "adapted"  # what a run of another application leaves, as far as reading it goes
    networks = {"networks": {"adamatch": {}, "alignment": {}}, "averages": {}, "statistics": {}, "run": {}}
    Checkpoints(adapted / "checkpoints").save(1, networks)
    (adapted / "config.yaml").write_text("source: {name: digits}\n")
    flags, out = ["--run", plain, "--images", images], ["--out", str(tmp_path / "out")]
    for argv, line in (
        (["--images", images], "run: which model?"),
        (["--run", plain], "images: which images?"),
        (["--run", str(tmp_path), "--images", images], "holds no config.yaml"),
        ([*flags, "--device", "tpu"], "device: expected auto"),
        (["--run", plain, "--images", "nowhere"], "images: no folder nowhere"),
        (["--run", plain, "--images", str(tmp_path / "empty")], "images: no images in"),
        (["--run", scb, "--images", images, "--cluster", "cat"], "cluster: expected one of unknown, class0"),
        ([*flags, "--cluster", "class0"], "given none (bn); leave class0 out"),
        (["--run", str(adapted), "--images", images], "holds the networks adamatch, alignment"),
        ([*flags, "--export", str(tmp_path / "model")], "holds a model already"),
    ):
        assert line in refused(capsys, cbcls.predict.main, *argv, *out)
    assert not (tmp_path / "out").exists()
    cbcls.predict.main([*flags, *out])
    assert "predictions.csv exists" in refused(capsys, cbcls.predict.main, *flags, *out)
    cbcls.predict.main([*flags, *out, "--force"])
