import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from tasks import made
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.nn.functional import softplus

import cbgan.evaluate
import cbgan.train
from cbgan.config import GanConfig
from cbgan.noise import noise
from cbgan.task import GanTask
from common.data import DataConfig
from common.data.image_set import to_float
from common.data.sets.digits import digits
from common.runtime.cli import parse
from common.train.checkpoint import load, save
from common.train.guard import StepGuard
from common.train.logging import chart_name, read_metrics
from common.train.step import Metrics, MicroBatch, Step

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
    session = json.loads((folder / "environment.json").read_text())["sessions"][0]
    assert session["threads"] == torch.get_num_threads()
    lines = read_metrics(folder)
    names = set().union(*lines)
    assert {"loss/d", "loss/g", "metric/fid_classifier", "metric/fid_classifier_floor", "time/images_per_second",
            "health/norm1/information", "health/norm2/usage_min"} <= names  # fmt: skip
    assert [line["epoch"] for line in lines if "metric/fid_classifier" in line] == [0, 1, 2]
    assert [line["step"] for line in lines if "loss/d" in line] == [3, 6, 9, 12, 15]
    events = EventAccumulator(str(folder)).Reload()
    assert {chart_name(name) for name in names - {"step", "epoch"}} == set(events.Tags()["scalars"])
    for line in lines:
        for name, value in line.items():
            if name not in ("step", "epoch"):
                logged = [e.value for e in events.Scalars(chart_name(name)) if e.step == line["step"]]
                assert [pytest.approx(value, rel=1e-6)] == logged  # events are float32
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


def test_evaluating_the_last_checkpoint_gives_the_logged_fid(measured, tmp_path, capsys):
    folder = shutil.copytree(measured[0], tmp_path / "run")
    last = [line["metric/fid_classifier"] for line in read_metrics(folder) if "metric/fid_classifier" in line][-1]
    cbgan.evaluate.main(["--run", str(folder), "--grid", str(tmp_path / "grid.png")])
    out = capsys.readouterr().out
    assert f"FID (classifier) {last:.4g} from 60 samples" in out
    assert (tmp_path / "grid.png").read_bytes() == (folder / "samples" / "epoch-0002.png").read_bytes()
    with pytest.raises(SystemExit, match="1"):  # two epochs teach nothing, and the check must say so
        cbgan.evaluate.main(["--run", str(folder), "--check"])


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


def test_a_signal_to_all_processes_of_a_terminal_saves_the_step_and_prints_how_to_go_on(tiny, tmp_path):
    command = [sys.executable, "-m", "cbgan.train", *tiny, "--epochs", "500", "--evaluate_every", "0", "--name", "run",
               "--log_every", "1", "--data.workers", "2"]  # fmt: skip
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    ) as process:  # fmt: skip
        metrics = tmp_path / "cbgan" / "run" / "metrics.jsonl"
        deadline = time.monotonic() + 120
        while not (metrics.exists() and len(metrics.read_text().splitlines()) > 5):
            assert time.monotonic() < deadline, process.stderr.read() if process.stderr else ""
            time.sleep(0.05)
        os.killpg(process.pid, signal.SIGINT)  # loader workers get it too
        _, errors = process.communicate(timeout=120)
    assert process.returncode == 130, errors
    assert "Traceback" not in errors
    assert f"python -m cbgan.train --name run --resume --out {tmp_path}" in errors
    steps = max(int(path.stem.removeprefix("step-")) for path in (metrics.parent / "checkpoints").glob("step-*.pt"))
    assert f"stopped after step {steps}" in errors
    assert read_metrics(metrics.parent)[-1]["step"] == steps


def test_each_loss_sees_the_right_images_and_its_own_noise(cache):
    """Hold a step against the two losses written out: real before fake, and two draws of noise."""
    cfg = GanConfig(width=16, latent_dim=16, batch_size=64, data=DataConfig(size=8), cache=cache, loss="logistic",
                    spectral=False, augment=["none"])  # fmt: skip
    task = made(GanTask, cfg)
    losses: dict[str, Callable[[MicroBatch], Any]] = {}

    class Caught(Step):
        def optimize(self, name: str, loss: Callable[[MicroBatch], Any], *, frozen: Sequence[str] = ()) -> Metrics:
            losses[name] = loss
            assert list(frozen) == (["d"] if name == "g" else [])  # no gradients of the discriminator are computed
            return Metrics()

    guard = StepGuard(task.networks.values(), ["loss/d", "loss/g"], torch.device("cpu"))
    step = Caught(task.new_state(), guard, next(task.loader.epoch(0, 0, cfg.seed)), cfg)
    task.train_step(step)
    (micro,) = step.micro_batches
    g, d = task.networks["g"], task.networks["d"]
    real = to_float(micro["train"].images)
    z = noise(cfg, 0, 128, torch.device("cpu"))
    assert not torch.equal(z[:64], z[64:])
    want_d = softplus(-d(real)).mean() + softplus(d(g(z[:64]).detach())).mean()
    want_g = softplus(-d(g(z[64:]))).mean()
    assert losses["d"](micro)[0].item() == pytest.approx(want_d.item(), rel=1e-5)
    assert losses["g"](micro).item() == pytest.approx(want_g.item(), rel=1e-5)
    loss, _ = losses["d"](micro)
    loss.backward()
    assert all(p.grad is None for p in g.parameters())  # the discriminator's half does not train the generator
    # Other steps, parts, ranks and attempts draw other noise.
    others = [noise(cfg, 1, 128, torch.device("cpu")), noise(cfg, 0, 128, torch.device("cpu"), rank=1),
              noise(cfg, 0, 128, torch.device("cpu"), seed=5)]  # fmt: skip
    assert not any(torch.equal(z, other) for other in others)
