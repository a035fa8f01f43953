import json

import pytest
from refusals import refused
from sklearn.metrics import accuracy_score, confusion_matrix, f1_score

import cbda.adamatch
import cbda.evaluate
from cbda import load_model
from cbda.adamatch import AdaMatch


@pytest.mark.parametrize("kind", ["scb", "bn"])
def test_what_is_measured_is_what_scikit_learn_says(tiny, tmp_path, kind, capsys):
    cbda.adamatch.main([*tiny, "--epochs", "1", "--norm.kind", kind, "--lr", "0.1", "--name", "run"])
    folder = tmp_path / "cbda" / "run"
    cbda.evaluate.main(["--run", str(folder)])
    out = folder / "evaluation"
    found = json.loads((out / "evaluation.json").read_text())["domains"]
    model = load_model(folder)
    assert set(found["target"]) == ({"source", "target", "unknown"} if kind == "scb" else {"source"})
    for domain, split in (("source", "test"), ("target", "target_test")):
        images = AdaMatch.load(model.cfg)[split]
        assert images.labels is not None
        for cluster, values in found[domain].items():
            said = model.logits(images.images, cluster).argmax(1)
            assert values["accuracy"] == accuracy_score(images.labels, said)
            assert values["confusion"] == confusion_matrix(images.labels, said, labels=[0, 1, 2]).tolist()
            assert values["macro"]["f1"] == pytest.approx(f1_score(images.labels, said, average="macro"))
            assert values["weighted"]["recall"] == pytest.approx(values["accuracy"])
            assert [row["count"] for row in values["classes"].values()] == [4, 4, 4]
            recalls = [row["recall"] for row in values["classes"].values()]
            assert sum(recalls) / 3 == pytest.approx(values["accuracy"])
            assert sum(values["calibration"]["counts"]) == 12
    names = {f"{what}-{domain}.{kind}" for what in ("confusion", "reliability") for domain in ("source", "target")
             for kind in ("png", "svg")}  # fmt: skip
    assert {path.name for path in out.iterdir()} == names | {"evaluation.json"}
    assert "target as source" in capsys.readouterr().out


def test_without_labels_it_measures_what_needs_none(tiny, tmp_path, domains):
    bare = ["--target.root", str(domains / "target" / "bare"), "--target.test_root", "null"]
    cbda.adamatch.main([*tiny, *bare, "--epochs", "1", "--name", "run"])
    cbda.evaluate.main(["--run", str(tmp_path / "cbda" / "run"), "--out", str(tmp_path / "out")])
    found = json.loads((tmp_path / "out" / "evaluation.json").read_text())["domains"]["target"]["target"]
    assert set(found) == {"count", "information", "density"}
    assert found["count"] == 36


def test_bad_input(tmp_path, capsys):
    assert "run: give the run's folder" in refused(capsys, cbda.evaluate.main)
    assert "holds no config.yaml" in refused(capsys, cbda.evaluate.main, "--run", str(tmp_path))
