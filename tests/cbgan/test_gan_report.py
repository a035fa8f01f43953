"""What a run of the GAN logs, draws and tells, and what measuring it again says."""

import contextlib
import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from PIL import Image
from refusals import refused
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar import layout_pb2

import cbgan.evaluate
import cbgan.train
from cbgan.config import GanConfig
from cbgan.evaluation import Evaluator
from cbgan.task import GanTask
from common.metrics.fid import FidConfig, FidResult
from common.train.logging import read_metrics

TINY = ["--width", "8", "--batch_size", "500", "--latent_dim", "16", "--log_every", "1", "--data.size", "8",
        "--fid.samples", "60", "--fid.batch_size", "30", "--fid.final_samples", "70", "--lr", "0.1"]  # fmt: skip
FID = "metric/fid_classifier"


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Train two epochs of two steps, measured before and after: epochs 0, 2."""
    out = tmp_path_factory.mktemp("out")
    cbgan.train.main([*TINY, "--epochs", "2", "--evaluate_every", "2", "--name", "run", "--out", str(out),
                      "--cache", str(out / "cache")])  # fmt: skip
    return out / "cbgan" / "run"


@pytest.fixture(scope="module")
def lines(folder) -> list[dict[str, Any]]:
    return read_metrics(folder)


def test_every_tag_is_one_of_the_page_and_each_is_logged_when_it_is_due(folder, lines):
    page = (Path(__file__).parents[2] / "docs" / "results.md").read_text("utf-8")
    quality = {f"metric/{name}_classifier" for name in ("precision", "recall", "copies", "train_gap")}
    of_samples = {FID, f"{FID}_test", "metric/classes_found", *quality}
    measured = {*of_samples, f"{FID}_floor", "metric/diversity"}
    finals = {f"{tag}_final" for tag in of_samples}
    step = {"loss/d", "loss/g", "gradient/d", "gradient/g", "schedule/lr", "time/images_per_second",
            "time/peak_memory_mib", "discriminator/real", "discriminator/fake", "gradient/d_variance",
            "gradient/d_variance_max", "gradient/g_variance", "gradient/g_variance_max",
            "gradient/g_variance_shared"}  # fmt: skip
    kinds = {"measured": [], "final": [], "step": [], "health": []}
    for line in lines:
        tags = line.keys() - {"step", "epoch"}
        named = {"measured": measured, "final": measured | finals, "step": step}
        kind = next((kind for kind, wanted in named.items() if tags == wanted), "health")
        kinds[kind].append((line["epoch"], line["step"]))
        if kind == "health":
            assert {tag.split("/")[1] for tag in tags} == {"norm1", "norm2"}
            assert all(tag.startswith("health/norm") for tag in tags)
    assert kinds == {
        "measured": [(0, 0)],
        "final": [(2, 4)],
        "step": [(0, 1), (0, 2), (1, 3), (1, 4)],
        "health": [(1, 2), (2, 4)],
    }
    ways = json.loads((folder / "summary.json").read_text())["better"]
    wanted = dict.fromkeys((FID, f"{FID}_test", "metric/copies_classifier"), "lower")
    higher = ("metric/classes_found", "metric/precision_classifier", "metric/recall_classifier")
    wanted |= dict.fromkeys(higher, "higher")
    logged = {tag: ways[tag] for line in lines for tag in line if tag in ways}
    assert logged == {f"{tag}{end}": way for tag, way in wanted.items() for end in ("", "_final")}
    named = ("_floor", "_test")
    alike = {tag for tag in step if "/g" in tag or tag == "discriminator/fake" or tag.endswith("_max")}
    also = {"metric/inception_score_classifier", "metric/kid_classifier"}
    assert all(f"_{end}`" in page for end in ("centre", "low", "high", "infinity"))
    for tag in quality | also:
        assert f"`{tag.replace('classifier', '...')}`" in page, tag
    for tag in (measured - quality) | (step - alike) | {"health/LAYER/..."}:
        ending = next((end for end in named if tag.endswith(end)), None)
        assert f"`{tag if ending is None else f'metric/fid_...{ending}'}`" in page, tag
    assert "`metric/..._final`" in page
    assert all(1 <= line["metric/classes_found"] <= 10 for line in lines if FID in line)


def test_the_distances_share_a_chart_and_so_do_gradient_variances(folder):
    events = EventAccumulator(str(folder)).Reload()
    (text,) = events.Tensors("custom_scalars__config__")[0].tensor_proto.string_val
    layout = layout_pb2.Layout.FromString(text)  # pyright: ignore[reportAttributeAccessIssue]
    distances, variance = (category.chart[0] for category in layout.category)
    name = "1_result/fid_classifier"
    known = events.Tags()["scalars"]

    def drawn(chart: Any) -> list[str]:  # as TensorBoard finds a chart's lines
        return [tag for pattern in chart.multiline.tag for tag in known if re.match(pattern, tag)]

    assert drawn(distances) == ["0_headline/fid_classifier", f"{name}_test", f"{name}_floor"]
    assert drawn(variance) == [f"5_gradient/{tag}" for tag in ("d_variance", "g_variance", "g_variance_shared")]


def test_there_are_pictures_of_real_images_and_of_each_measurement(folder):
    names = sorted(path.name for path in (folder / "samples").iterdir())
    assert names == ["epoch-0000.png", "epoch-0002.png", "nearest.png", "real.png"]
    for name in set(names) - {"nearest.png"}:
        with Image.open(folder / "samples" / name) as picture:
            assert picture.size == (8 * 9 + 1, 8 * 9 + 1)  # eight a row, of 8 pixels and a line between


def task(latest: FidResult | None = None, measures: bool = True) -> GanTask:
    """Return a task that has measured this last."""
    gan = GanTask.__new__(GanTask)
    gan.cfg = GanConfig(fid=FidConfig(final_samples=50_000))
    extractor, tag_of = SimpleNamespace(name="classifier"), "metric/{}_classifier".format
    fid = SimpleNamespace(tag=FID, other_tag=f"{FID}_test", floor=0.5, extractor=extractor, tag_of=tag_of)
    gan.evaluator = cast(Any, SimpleNamespace(latest=latest, fid=fid if measures else None))
    return gan


def closing(gan: GanTask, lines: list[dict[str, Any]]) -> dict[str, str]:
    return dict(gan.summary_rows(lines, Path("my runs/cbgan/one")))


SERIES = [
    {"epoch": 0, "step": 0, FID: 300.25, f"{FID}_test": 301.0},
    {"epoch": 1, "step": 5, "loss/d": 1.0},
    {"epoch": 2, "step": 9, FID: 12.5, f"{FID}_test": 13.75},
    {"epoch": 4, "step": 19, FID: None},
    {"epoch": 6, "step": 29, FID: 20.0, f"{FID}_test": 19.0},
]


def test_a_finished_run_tells_its_distances_and_what_to_do_next():
    lines = [*SERIES[:-1], SERIES[-1] | {f"{FID}_final": 11.5}]
    assert closing(task(FidResult(20.0, 1200, (0, 1000, 1, 199))), lines) == {
        "FID (classifier)": "first 300.2 (epoch 0), best 12.5 (2), last 20 (6); "
        "the best against the test images 13.75; real test images 0.5",
        "FID, final": "11.5 (epoch 6) from 50,000 samples",
        "classes": "3 of 4 found among 1,200 samples",
        "pictures": "my runs/cbgan/one/samples",
        "evaluate": "python -m cbgan.evaluate --run 'my runs/cbgan/one'",
        "paper's run": "python -m cbgan.train --config paper_ucb --device cuda",
    }
    none = closing(task(measures=False), [])
    assert none["FID"] == "not measured (evaluate_every is 0)"
    assert list(none) == ["FID", "pictures", "evaluate", "paper's run"]


VERDICTS = [
    (29.9, (1,) * 10, 0, "FID 29.9 is below a tenth of 300; 0 classes missing"),
    (30.0, (1,) * 10, 1, "FID 30 is not below a tenth of 300; 0 classes missing"),
    (29.9, (*[1] * 9, 0), 1, "FID 29.9 is below a tenth of 300; 1 classes missing"),
]


def test_a_check_passes_below_a_tenth_with_every_class(folder, monkeypatch, capsys):
    found = [FidResult(fid, 60, classes) for fid, classes, *_ in VERDICTS]
    counts = []

    def measure(self, g, count, *, thorough):
        assert thorough
        counts.append(count)
        return found[len(counts) - 1]

    monkeypatch.setattr(Evaluator, "measure", measure)
    monkeypatch.setattr(Evaluator, "nearest", lambda *_: torch.zeros(3, 2, 2, dtype=torch.uint8))
    series = {FID: [(0, 300.0), (2, 30.5)], f"{FID}_final": [(2, 29.5)]}
    monkeypatch.setattr(cbgan.evaluate, "fid_series", lambda lines, tag: series[tag])
    for fid, classes, status, verdict in VERDICTS:
        with pytest.raises(SystemExit) if status else contextlib.nullcontext() as left:
            cbgan.evaluate.main(["--run", str(folder), "--check"])
        assert (left.value.code if left else 0) == status
        out = capsys.readouterr().out.splitlines()
        assert out[0] == f"epoch 2: FID (classifier) {fid:.4g} from 60 samples"
        assert out[1].startswith("real test images: ")
        assert out[2] == "logged, of 60 samples: 300 (epoch 0), 30.5 (epoch 2)"
        assert out[3] == "logged, of 70 samples: 29.5 (epoch 2)"
        samples = ", ".join(f"{name}: {n}" for name, n in enumerate(classes))
        assert out[4] == f"classes: {10 - classes.count(0)} of 10 found; samples of {samples}"
        assert out[-1] == f"check: {verdict}"
    assert counts == [60] * len(VERDICTS)
    line = refused(capsys, cbgan.evaluate.main, "--run", str(folder), "--check", "--samples", "70")
    assert f"check: {folder} logged no {FID} of 70 samples to compare with" in line


def test_a_measurement_is_told_in_short():
    gan = task()
    values = {FID: 5.4321, f"{FID}_test": 6.0, "metric/precision_classifier": 0.61234, "metric/recall_classifier": 0.7,
              f"{FID}_low": 4.5, f"{FID}_high": 5.25, f"{FID}_infinity": 4.9, "metric/classes_found": 10.0}  # fmt: skip
    told = ["FID (classifier) 5.432", "between the distributions 4.5 to 5.25", "precision 0.612", "recall 0.7"]
    assert gan.summary_line(values) == told
    assert gan.summary_line({FID: 5.4321, "metric/diversity": 0.5}) == told[:1]
    final = {f"{FID}_final": 5.25, f"{FID}_low_final": 4.75, f"{FID}_high_final": 5.125}
    told[1:2] = ["of 50,000 samples 5.25", "between the distributions 4.75 to 5.125"]
    assert gan.summary_line(values | final) == told
    assert task(measures=False).summary_line({"metric/diversity": 0.5}) == ["metric/diversity 0.5"]


def test_the_end_is_measured_on_both_numbers_of_samples_each_under_a_tag_of_its_own(folder, lines, capsys):
    last = [line for line in lines if FID in line][-1]
    summary = json.loads((folder / "summary.json").read_text())
    logged = [f"logged, of 60 samples: {lines[0][FID]:.4g} (epoch 0), {last[FID]:.4g} (epoch 2)",
              f"logged, of 70 samples: {last[f'{FID}_final']:.4g} (epoch 2)"]  # fmt: skip
    assert last[FID] != last[f"{FID}_final"]
    assert summary["best"]["value"] == min(lines[0][FID], last[FID])
    for flags, count, end in (((), 60, ""), (("--samples", "70"), 70, "_final")):
        cbgan.evaluate.main(["--run", str(folder), *flags])
        out = capsys.readouterr().out.splitlines()
        assert out[0] == f"epoch 2: FID (classifier) {last[f'{FID}{end}']:.4g} from {count} samples"
        assert out[1] == f"real test images: {last[f'{FID}_floor']:.4g}"
        assert out[2:4] == logged
        found = summary["last"][f"metric/classes_found{end}"]["value"]
        assert out[4].startswith(f"classes: {found:.0f} of 10 found; samples of 0: ")
        counts = [int(word.split(": ")[1]) for word in out[4].split("samples of ")[1].split(", ")]
        assert sum(counts) == count
        assert sum(n > 0 for n in counts) == found


def test_epochs_that_are_due():
    for every, checkpoint_every, epochs in ((2, 1, [0, 2, 4, 5]), (5, 1, [0, 5]), (0, 2, [2, 4, 5])):
        cfg = GanConfig(epochs=5, checkpoint_every=checkpoint_every, evaluate_every=every)
        gan = GanTask.__new__(GanTask)
        gan.cfg = cfg
        assert [epoch for epoch in range(6) if gan.should_evaluate(epoch)] == epochs
