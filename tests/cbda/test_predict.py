import csv
import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from refusals import refused

import cbda.adamatch
import cbda.evaluate
import cbda.predict
from cbda import load_model
from cbda.networks.classifier import SOURCE, TARGET
from common.data import images_below, read_images, to_float
from common.runtime.errors import UsageError
from common.train.checkpoint import load


@pytest.fixture
def run(runs) -> Path:
    """Return a run with clusters."""
    return runs / "scb"


def rows(path: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(path.read_text(encoding="utf-8").splitlines()))


def test_predictions_are_those_of_the_runs_average(run, domains, tmp_path, capsys):
    folder = domains / "target" / "test"
    cbda.predict.main(["--run", str(run), "--images", str(folder), "--out", str(tmp_path), "--all_clusters"])
    found = rows(tmp_path / "predictions.csv")
    files = images_below(folder, "images")
    assert [row["file"] for row in found] == [str(file.relative_to(folder)) for file in files]
    state = load(run / "checkpoints" / "step-00000004.pt")
    network = load_model(run).network
    network.load_state_dict({**state["averages"]["adamatch"], **state["statistics"]["adamatch"]})
    x = to_float(read_images(files, 8))
    with torch.no_grad():
        by = {k: network.eval()(x, torch.full((len(x),), k)).double().softmax(1) for k in (SOURCE, TARGET)}
    best, said = by[TARGET].max(1)
    threshold = float(state["networks"]["alignment"]["threshold"])
    assert 0 < threshold < 1
    for i, row in enumerate(found):
        assert row["class"] == ("cat", "dog", "fox")[int(said[i])]
        assert float(row["probability"]) == pytest.approx(float(best[i]), abs=1e-5)
        assert row["above_threshold"] == ("yes" if best[i] >= threshold else "no")
        assert float(row["probability_as_source"]) == pytest.approx(float(by[SOURCE][i, said[i]]), abs=1e-5)
        assert row["cluster"] == "target"
        assert "probability_as_unknown" in row
    with Image.open(tmp_path / "predictions.png") as sheet:
        assert sheet.size[0] == 4 + 8 * 74
    assert "classified 12 images as target" in capsys.readouterr().out


def test_another_cluster_is_recorded(run, domains, tmp_path):
    flags = ["--run", str(run), "--images", str(domains / "target" / "bare"), "--out", str(tmp_path)]
    cbda.predict.main([*flags, "--cluster", "unknown"])
    assert {row["cluster"] for row in rows(tmp_path / "predictions.csv")} == {"unknown"}
    assert list(rows(tmp_path / "predictions.csv")[0]) == ["file", "class", "probability", "above_threshold", "cluster"]


def test_an_exported_model_says_the_same_without_its_run_or_data(run, tmp_path, domains):
    cbda.predict.main(["--run", str(run), "--export", str(tmp_path / "model")])
    assert {path.name for path in (tmp_path / "model").iterdir()} == {"model.safetensors", "config.yaml", "model.json"}
    images = read_images(images_below(domains / "target" / "test", "images"), 8)
    exported, trained = load_model(tmp_path / "model"), load_model(run)
    assert torch.equal(exported.logits(images), trained.logits(images))
    assert (exported.classes, exported.threshold) == (("cat", "dog", "fox"), trained.threshold)
    assert not exported.network.training
    with pytest.raises(UsageError, match="cluster: expected source or target or unknown of scb, got third"):
        exported.logits(images, "third")
    for wrong, said in ((images / 255, "float32"), (images[:, :1], r"\(12, 1, 8, 8\)"), (images[..., :4], r"8, 4\)")):
        with pytest.raises(ValueError, match=rf"images: expected uint8 \(N, 3, 8, 8\), got .*{said}"):
            exported.logits(wrong)


def test_the_best_checkpoint_is_the_one_that_validation_chose(finished, domains, tmp_path, capsys):
    run, _ = finished
    images = read_images(images_below(domains / "target" / "test", "images"), 8)
    state = load(run / "checkpoints" / "best.pt")
    best = load_model(run, checkpoint="best")
    weight = state["averages"].get("adamatch", state["networks"]["adamatch"])["network.linear.weight"]
    assert torch.equal(best.network.get_parameter("network.linear.weight"), weight)
    cbda.predict.main(["--run", str(run), "--checkpoint", "best", "--images", str(domains / "target" / "test"),
                       "--out", str(tmp_path)])  # fmt: skip
    said = [best.classes[k] for k in best.logits(images).argmax(1)]
    assert [row["class"] for row in rows(tmp_path / "predictions.csv")] == said
    flags = ("--checkpoint", "best", "--tsne", "0")
    cbda.evaluate.main(["--run", str(run), "--out", str(tmp_path / "evaluation"), *flags])
    line = refused(capsys, cbda.predict.main, "--run", str(run), "--checkpoint", "7", "--export", str(tmp_path / "e"))
    assert re.search("checkpoint: .* has none of 7; there are last, best", line)


def test_a_checkpoint_that_was_not_measured_has_the_statistics_of_one_that_was(tiny, tmp_path):
    loaded = []
    for every in ("1", "2"):
        cbda.adamatch.main([*tiny, "--norm.kind", "bn", "--best.keep", "--checkpoint_keep", "1",
                            "--evaluate_every", every, "--name", every])  # fmt: skip
        loaded.append(load_model(tmp_path / "cbda" / every, checkpoint="1").network.state_dict())
    measured, estimated = loaded
    assert all(torch.equal(measured[name], estimated[name]) for name in measured)


def test_a_stored_model_computes_in_the_precision_of_its_run(run):
    model = load_model(run)
    images = torch.arange(4 * 3 * 8 * 8, dtype=torch.uint8).view(4, 3, 8, 8)
    x, ids = to_float(images), torch.full((4,), TARGET)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        wanted = model.network(x, ids).double()
    narrow = replace(model, cfg=replace(model.cfg, precision="bf16"))
    assert torch.equal(narrow.logits(images), wanted)
    assert not torch.equal(model.logits(images), wanted)


def test_a_run_named_by_its_checkpoint_is_evaluated_in_its_folder(finished, capsys):
    run, _ = finished
    best = str(run / "checkpoints" / "best.pt")
    cbda.evaluate.main(["--run", best, "--tsne", "0", "--force"])
    epoch = load(run / "checkpoints" / "best.pt")["run"]["epoch"]
    assert json.loads((run / "evaluation" / "evaluation.json").read_text())["epoch"] == epoch
    assert f"results of epoch {epoch} in {run}/evaluation" in capsys.readouterr().out
    line = refused(capsys, cbda.evaluate.main, "--run", best, "--checkpoint", "1", "--out", str(run / "other"))
    assert "best.pt is one itself, got 1 too" in line


def test_bad_input(run, domains, tmp_path, capsys):
    images = str(domains / "target" / "bare")

    def refuses(*flags: str) -> str:
        return refused(capsys, cbda.predict.main, *flags, "--out", str(tmp_path / "out"))

    assert "run: give the run's folder" in refuses("--images", images)
    assert "images: give the folder" in refuses("--run", str(run))
    assert "images: no folder nowhere" in refuses("--run", str(run), "--images", "nowhere")
    assert "third" in refuses("--run", str(run), "--images", images, "--cluster", "third")
    assert not (tmp_path / "out").exists()
    cbda.predict.main(["--run", str(run), "--images", images, "--out", str(tmp_path / "out")])
    assert "predictions.csv exists" in refuses("--run", str(run), "--images", images)
    cbda.predict.main(["--run", str(run), "--images", images, "--out", str(tmp_path / "out"), "--force"])
