"""Figures of trained classifiers show what the networks give."""

import re
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from refusals import refused
from torch import Tensor

from cbcls.export import load_model
from cbcls.figures import main
from cbcls.task import ClassifierTask
from common.runtime.seeding import permutation


def words(svg: Path) -> list[str]:
    return [line.strip() for line in re.findall(r"<!--(.*?)-->", svg.read_text())]


def output(run: Path, layer: str, checkpoint: str = "last", count: int = 256, seed: int = 0) -> Tensor:
    """Return what a layer of a run's network gives of the figure's images, (B, ...)."""
    model = load_model(run, checkpoint=checkpoint)
    test = ClassifierTask.load_images(model.cfg)["test"]
    images = test.select(permutation(len(test), seed, "figure")[:count])
    found: list[Tensor] = []
    handle = model.network.get_submodule(layer).register_forward_hook(lambda _m, _a, out: found.append(out.detach()))
    own = images.clusters if model.clusters else None
    model.logits(images.images, "unknown" if own is None else own)
    handle.remove()
    return torch.cat(found)


def rows(text: str) -> dict[tuple[str, str], list[str]]:
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("| ")]
    return {(row[0], row[2]): row[3:] for row in cells[1:]}


def test_densities_are_those_of_conv2_and_of_the_layer_under_test(runs, tmp_path, capsys):
    main(["--kind", "densities", "--runs", str(runs / "plain"), str(runs / "scb"), "--label", "BN", "SCB",
          "--out", str(tmp_path / "d"), "--images", "12", "--seed", "3"])  # fmt: skip
    printed = capsys.readouterr().out
    found = rows(printed)
    assert list(found) == [("BN", "conv2"), ("BN", "norm3"), ("SCB", "conv2"), ("SCB", "norm3")]
    for (label, layer), cells in found.items():
        x = output(runs / {"BN": "plain", "SCB": "scb"}[label], layer, count=12, seed=3).double().numpy()
        z = (x - x.mean()) / x.std()
        assert [float(cell) for cell in cells[:2]] == pytest.approx([(z**3).mean(), (z**4).mean() - 3], rel=6e-3)
        by_channel = x.transpose(1, 0, 2, 3).reshape(x.shape[1], -1)
        z = (by_channel - by_channel.mean(1, keepdims=True)) / by_channel.std(1, keepdims=True)
        assert float(cells[3]) == pytest.approx(np.abs((z**3).mean(1)).mean(), rel=6e-3)
    shown = Counter(words(tmp_path / "d.svg"))
    assert (shown["BN"], shown["SCB"], shown["density at conv2"], shown["density at norm3"]) == (2, 2, 1, 1)
    assert printed.splitlines()[-1] == f"written: {tmp_path}/d.png, {tmp_path}/d.svg"


def test_runs_that_differ_by_seed_alone_are_one_model_with_a_spread(runs, tmp_path, capsys):
    twin = tmp_path / "twin"
    twin.mkdir()
    for name in ("metrics.jsonl", "checkpoints", "categories.json", "environment.json", "summary.json"):
        (twin / name).symlink_to(runs / "plain" / name)
    config = (runs / "plain" / "config.yaml").read_text()
    (twin / "config.yaml").write_text(re.sub("^seed: 0", "seed: 7", config, flags=re.MULTILINE))
    main(["--runs", str(runs / "plain"), str(twin), "--label", "BN", "--layers", "norm3", "--out", str(tmp_path / "d")])
    printed = capsys.readouterr().out
    assert "| BN | 0 7 | norm3 |" in printed
    assert all(cell.endswith("± 0") for cell in rows(printed)[("BN", "norm3")])
    assert words(tmp_path / "d.svg").count("BN") == 1


def test_embeddings_show_the_features_at_kept_epochs_coloured_by_prediction(runs, tmp_path):
    main(["--kind", "embedding", "--runs", str(runs / "plain"), str(runs / "mn"), "--label", "BN", "MN",
          "--checkpoints", "last", "--perplexity", "5", "--out", str(tmp_path / "e"), "--title", "noise"])  # fmt: skip
    shown = Counter(words(tmp_path / "e.svg"))
    assert shown == {"BN, epoch 2": 1, "MN, epoch 2": 1, "noise": 1, **{f"class{i}": 1 for i in range(6)}}
    main(["--kind", "embedding", "--runs", str(runs / "plain"), "--checkpoints", "1", "last", "--perplexity", "5",
          "--colour", "class", "--out", str(tmp_path / "f")])  # fmt: skip
    text = (tmp_path / "f.svg").read_text()
    assert {"plain, epoch 1", "plain, epoch 2"} <= set(words(tmp_path / "f.svg"))
    for colour in ("#0072b2", "#d55e00", "#009e73"):  # three images a class in either panel, and the legend
        assert len(re.findall(rf"<use [^>]*fill: {colour}", text)) == 2 * 3 + 1


def test_components_are_those_of_the_layers_output(runs, tmp_path):
    argv = ["--kind", "components", "--runs", str(runs / "scb"), "--colour", "cluster"]
    main([*argv, "--out", str(tmp_path / "own")])
    text = (tmp_path / "own.svg").read_text()
    assert text.count('<g id="axes_') == 5 + 10
    assert {"component 1", "component 5", "class0", "class5"} <= set(words(tmp_path / "own.svg"))
    for layer, name in (("norm3", "named"), ("features", "features")):
        main([*argv, "--layers", layer, "--out", str(tmp_path / name)])
    main([*argv, "--cluster", "unknown", "--out", str(tmp_path / "unknown")])
    assert (tmp_path / "named.svg").read_text() == text
    assert (tmp_path / "features.svg").read_text() != text
    assert (tmp_path / "unknown.svg").read_text() != text


def test_bad_input_is_one_line_and_writes_nothing(runs, tmp_path, capsys):
    plain, out = ["--runs", str(runs / "plain")], ["--out", str(tmp_path / "f")]
    for argv, line in (
        (out, "runs: name at least one"),
        (plain, "out: expected the figure's path"),
        ([*plain, str(runs / "mn"), *out, "--kind", "components"], "runs: components takes one run, got 2"),
        ([*plain, *out, "--checkpoints", "1", "last"], "checkpoints: densities takes one, got 1 last"),
        (
            [*plain, *out, "--kind", "embedding", "--layers", "conv1", "conv2"],
            "layers: embedding takes one, got conv1 c",
        ),
        ([*plain, *out, "--images", "0"], "images: expected at least 1, got 0"),
        ([*plain, *out, "--layers", "conv9"], "has no conv9; it has features, pixels, conv1"),
        ([*plain, *out, "--checkpoints", "77"], "checkpoint: "),
        ([*plain, *out, "--kind", "embedding"], "needs at least 92 points, got 18"),
        ([*plain, *out, "--kind", "components"], "have no superclass; expected predicted, class"),
        (["--runs", str(tmp_path), *out], "is not a run's folder"),
    ):
        assert line in refused(capsys, main, *argv)
    (tmp_path / "f.svg").write_text("mine")
    assert f"out: {tmp_path}/f.svg exists; add --force" in refused(capsys, main, *plain, *out)
    assert [path.name for path in tmp_path.iterdir()] == ["f.svg"]
    main([*plain, *out, "--force", "--layers", "norm3", "--images", "6"])
    assert "density at norm3" in words(tmp_path / "f.svg")
