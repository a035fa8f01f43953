import json
import shutil
from pathlib import Path

from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import cbgan.evaluate
import cbgan.train
from cbgan.config import GanConfig
from common.data.sets.digits import digits
from common.runtime.cli import parse
from common.train.checkpoint import load, save
from common.train.logging import read_metrics

CONFIGS = Path(__file__).parents[2] / "configs" / "cbgan"


def config(name: str) -> GanConfig:
    return parse(GanConfig, ["--config", str(CONFIGS / name)])


def test_every_configuration_file_is_valid():
    for path in CONFIGS.glob("*.yaml"):
        config(path.name)


def test_the_papers_configurations_are_the_papers():
    for kind in ("bn", "mn", "ucb"):
        cfg = config(f"paper_{kind}.yaml")
        paper = ("cifar100", 200, 2e-4, 0, 0.9, 512)
        assert (cfg.data.name, cfg.epochs, cfg.lr, cfg.beta1, cfg.beta2, cfg.width) == paper
        fid = (cfg.evaluate_every, cfg.fid.extractor, cfg.fid.samples, cfg.fid.final_samples)
        assert fid == (10, "inception", 10000, 50000)
        plain = ("constant", "logistic", False, [], 0)
        assert (cfg.schedule.kind, cfg.loss, cfg.spectral, cfg.augment, cfg.ema_decay) == plain
        assert (cfg.norm.kind, cfg.norm.num_components) == (kind, 3)
    ucb = config("paper_ucb.yaml").norm
    assert (ucb.groups, ucb.update, ucb.affine) == (1, "weight", False)


def test_a_run_leaves_everything_behind(measured):
    folder, printed = measured
    cfg = parse(GanConfig, ["--config", str(folder / "config.yaml")])
    assert (cfg.epochs, cfg.width, cfg.norm.average) == (2, 8, "em")  # resolved: the layer's default is written out
    lines = read_metrics(folder)
    names = set().union(*lines)
    assert {"loss/d", "loss/g", "metric/fid_classifier", "metric/fid_classifier_floor", "time/images_per_second",
            "health/norm1/information", "health/norm2/usage_min"} <= names  # fmt: skip
    assert [line["epoch"] for line in lines if "metric/fid_classifier" in line] == [0, 1, 2]
    assert [line["step"] for line in lines if "loss/d" in line] == [3, 6, 9, 12, 15]
    events = EventAccumulator(str(folder)).Reload()
    assert "3_samples/generated" in events.Tags()["images"]
    with Image.open(folder / "samples" / "epoch-0002.png") as picture:
        assert picture.size == (8 * 9 + 1, 8 * 9 + 1)
    assert {p.name for p in (folder / "checkpoints").iterdir()} == {"best.pt", "step-00000008.pt", "step-00000016.pt"}
    for part in ("FID (classifier)  first", "of 10 found among 60 samples", "images/s on cpu", "health norm1",
                 "tensorboard --logdir", "--config paper_ucb ", str(folder / "samples")):  # fmt: skip
        assert part in printed


def test_the_best_checkpoint_is_that_of_the_lowest_fid_and_is_reported_against_the_other_images(measured):
    folder, printed = measured
    lines = [line for line in read_metrics(folder) if "metric/fid_classifier" in line]
    lowest = min(lines, key=lambda line: line["metric/fid_classifier"])
    best = load(folder / "checkpoints" / "best.pt")["run"]
    assert (best["best"]["value"], best["step"]) == (lowest["metric/fid_classifier"], lowest["step"])
    assert f"the best against the test images {lowest['metric/fid_classifier_test']:.4g}" in printed


def test_an_evaluation_is_written_beside_the_run_under_a_name_of_its_own(measured, tmp_path, capsys):
    folder = shutil.copytree(measured[0], tmp_path / "run")
    protocol = json.loads((folder / "summary.json").read_text())["protocol"]
    (line,) = [line for line in read_metrics(folder) if "metric/fid_classifier" in line and line["epoch"] == 2]
    cbgan.evaluate.main(["--run", str(folder)])
    (file,) = (folder / "evaluations").glob("*.json")
    assert {path.name for path in (folder / "evaluations").glob("*.png")} == {
        f"{file.stem}-grid.png", f"{file.stem}-nearest.png"}  # fmt: skip
    out = capsys.readouterr().out
    assert out.splitlines()[-1] == f"written: {file}"
    record = json.loads(file.read_text())
    counted = ("step", "epoch", "metric/classes_found", "metric/diversity")
    assert record["values"] == {name: value for name, value in line.items() if name not in counted}
    assert record["protocols"].keys() == record["values"].keys()
    for each in record["protocols"].values():
        assert each["noise_seed"] == 314159
        assert each["extractor_id"] == record["protocol"]["extractor_id"]
    assert (record["epoch"], record["step"], record["samples"]) == (2, 16, 60)
    assert record["protocol"].items() <= protocol.items()
    assert list(record["classes"]) == list(digits(8).train.classes)
    assert sum(record["classes"].values()) == 60
    assert sum(n > 0 for n in record["classes"].values()) == line["metric/classes_found"]
    assert f"samples of 0: {record['classes']['0']}, 1: {record['classes']['1']}, " in out
    before = file.read_bytes()
    cbgan.evaluate.main(["--run", str(folder)])  # the same again
    assert [path.read_bytes() for path in (folder / "evaluations").glob("*.json")] == [before]
    cbgan.evaluate.main(["--run", str(folder), "--samples", "50"])  # another one
    state = load(folder / "checkpoints" / "step-00000016.pt")
    state["networks"]["g"]["deconv4.bias"] += 1.0  # other weights at the same step
    save(folder / "checkpoints" / "step-00000016.pt", state)
    cbgan.evaluate.main(["--run", str(folder)])
    assert len({path.read_bytes() for path in (folder / "evaluations").glob("*.json")}) == 3
    assert file.read_bytes() == before
