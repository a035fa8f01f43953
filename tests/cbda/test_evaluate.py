import json
import shutil

import pytest
import torch
from refusals import refused
from sklearn.metrics import accuracy_score, confusion_matrix, f1_score
from torch import Tensor
from torch.distributions import Normal, kl_divergence

import cbda.adamatch
import cbda.evaluate
from cbda import load_model
from cbda.domains import load_domains
from cbda.task import AdaMatchTask
from common.runtime.seeding import permutation
from common.train.checkpoint import load
from common.train.logging import read_metrics


@pytest.mark.parametrize("kind", ["scb", "none"])
def test_what_is_measured_is_what_scikit_learn_says(runs, tmp_path, kind, capsys):
    folder = shutil.copytree(runs / kind, tmp_path / "run")
    cbda.evaluate.main(["--run", str(folder)])
    out = folder / "evaluation"
    found = json.loads((out / "evaluation.json").read_text())["domains"]
    model = load_model(folder)
    assert set(found["target"]) == ({"source", "target", "unknown"} if kind == "scb" else {"source"})
    for domain, split in (("source", "test"), ("target", "target_test")):
        images = AdaMatchTask.load_images(model.cfg)[split]
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
    drawn = [f"{what}-{domain}" for what in ("confusion", "reliability") for domain in ("source", "target")]
    names = {f"{what}.{ending}" for what in (*drawn, "tsne", "divergence") for ending in ("png", "svg")}
    assert {path.name for path in out.iterdir()} == names | {"evaluation.json"}
    assert "target as source" in capsys.readouterr().out
    assert "evaluation.json exists" in refused(capsys, cbda.evaluate.main, "--run", str(folder))
    (out / "tsne.png").unlink()
    cbda.evaluate.main(["--run", str(folder), "--force", "--tsne", "0"])
    assert not (out / "tsne.png").exists()


def symmetric(p: Normal, q: Normal) -> float:
    return float((kl_divergence(p, q) + kl_divergence(q, p)).mean())


def normal(channels: Tensor) -> Normal:
    return Normal(channels.mean(0), (channels.var(0, correction=0) + 1e-5).sqrt())


def test_how_far_the_domains_are_apart_in_each_layer_and_where_their_features_lie(runs, tmp_path, monkeypatch):
    projected, drawn = [], {}

    def project(features: Tensor, **options: float) -> Tensor:
        projected.append((features, options))
        return features[:, :2]

    monkeypatch.setattr(cbda.evaluate, "project", project)
    monkeypatch.setattr(cbda.evaluate, "draw_panels", lambda path, panels: drawn.update({path: panels}))
    cbda.evaluate.main(["--run", str(runs / "scb"), "--out", str(tmp_path / "out"), "--tsne", "8"])
    apart = json.loads((tmp_path / "out" / "evaluation.json").read_text())["divergence"]
    assert list(apart)[:3] == ["images", "norm", "network.stem"]
    assert list(apart)[-1] == "network.linear"
    text = (tmp_path / "out" / "divergence.svg").read_text()
    places = [text.index(f"<!-- {layer} -->") for layer in apart]
    assert places == sorted(places)
    model = load_model(runs / "scb")
    images = AdaMatchTask.load_images(model.cfg)
    of = {"source": images["test"], "target": images["target_test"]}
    pixels = [normal((each.images.double() / 127.5 - 1).mean((2, 3))) for each in of.values()]
    assert apart["images"] == pytest.approx(symmetric(*pixels), rel=1e-4)
    logits = [normal(model.logits(each.images, domain)) for domain, each in of.items()]
    assert apart["network.linear"] == pytest.approx(symmetric(*logits), rel=1e-4)
    ((features, options),), (by_class, by_domain) = projected, drawn[tmp_path / "out" / "tsne"]
    chosen = {domain: permutation(12, 0, "t-SNE", domain)[:8].sort().values for domain in of}
    linear = model.network.network.get_submodule("linear")
    for domain, rows in zip(of, features.chunk(2), strict=True):
        said = model.logits(of[domain].images[chosen[domain]], domain)
        torch.testing.assert_close(linear(rows).double(), said, rtol=1e-4, atol=1e-4)
    want = [label for domain, each in of.items() if each.labels is not None for label in each.labels[chosen[domain]]]
    assert (by_class.labels.tolist(), by_class.classes) == ([int(label) for label in want], ("cat", "dog", "fox"))
    assert (by_domain.labels.tolist(), by_domain.classes) == ([0] * 8 + [1] * 8, ("source", "target"))
    assert options == {"seed": 0, "perplexity": pytest.approx(14 / 3)}


def test_without_labels_it_measures_what_needs_none(tiny, tmp_path, domains):
    bare = ["--target.root", str(domains / "target" / "bare"), "--target.test_root", "null"]
    cbda.adamatch.main([*tiny, *bare, "--epochs", "1", "--name", "run"])
    names = set().union(*read_metrics(tmp_path / "cbda" / "run"))
    of_labels = ("target_accuracy", "target_weighted", "gain", "oracle")
    assert not any(name for name in names if any(part in name for part in of_labels))
    assert {"metric/source_accuracy", "metric/target_information", "adapt/mask_rate"} <= names
    cbda.evaluate.main(["--run", str(tmp_path / "cbda" / "run"), "--out", str(tmp_path / "out")])
    content = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    found = content["domains"]["target"]["target"]
    assert content["divergence"]["images"] > 0
    assert (tmp_path / "out" / "tsne.png").exists()
    assert set(found) == {"count", "information", "density"}
    assert found["count"] == 36


def test_bad_input(tmp_path, capsys):
    assert "run: give the run's folder" in refused(capsys, cbda.evaluate.main)
    assert "tsne: expected 0 or more, got -1" in refused(capsys, cbda.evaluate.main, "--run", "x", "--tsne", "-1")
    assert "holds no config.yaml" in refused(capsys, cbda.evaluate.main, "--run", str(tmp_path))


def test_statistics_are_those_of_each_domains_training_images(tiny, domains, tmp_path):
    """By their own cluster, in one float64 pass; the target's images need no labels."""
    flags = ["--target.root", str(domains / "target" / "bare"), "--target.test_root", "null", "--ema_decay", "0",
             "--epochs", "1", "--norm.kind", "dsbn"]  # fmt: skip
    cbda.adamatch.main([*tiny, *flags, "--name", "all"])
    cbda.adamatch.main([*tiny, *flags, "--name", "none", "--recalibrate.layers", "none"])
    states = [load(tmp_path / "cbda" / name / "checkpoints" / "step-00000004.pt") for name in ("all", "none")]
    torch.testing.assert_close(states[0]["networks"], states[1]["networks"], rtol=0, atol=0)
    images = load_domains(load_model(tmp_path / "cbda" / "all").cfg)
    for network, name, split in (
        ("adamatch", "norm.domains.0", "train"),
        ("adamatch", "norm.domains.1", "target"),
        ("source_only", "norm", "train"),
    ):
        pixels = images[split].images[:].double().movedim(1, 3).flatten(0, 2) / 127.5 - 1
        found = states[0]["statistics"][network]
        torch.testing.assert_close(found[f"{name}.running_mean"].double(), pixels.mean(0), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(found[f"{name}.running_var"].double(), pixels.var(0), rtol=1e-5, atol=1e-6)
    loaded = load_model(tmp_path / "cbda" / "all").network.state_dict()
    assert all(torch.equal(loaded[name], value) for name, value in states[0]["statistics"]["adamatch"].items())
    torch.save({**states[0], "statistics": {}}, tmp_path / "cbda" / "all" / "checkpoints" / "step-00000004.pt")
    again = load_model(tmp_path / "cbda" / "all").network.state_dict()
    torch.testing.assert_close(dict(again), dict(loaded), rtol=0, atol=0)
