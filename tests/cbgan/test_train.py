import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import cbgan.evaluate
import cbgan.train
from cbgan.config import GanConfig
from common.cli.arguments import parse
from common.errors import NonFiniteError
from common.runs.checkpoint import load
from common.runs.log import read_metrics

CONFIGS = Path(__file__).parents[2] / "configs" / "cbgan"


def config(name: str) -> GanConfig:
    return parse(GanConfig, ["--config", str(CONFIGS / name)])


def test_default_yaml_is_what_no_arguments_do():
    assert config("default.yaml") == parse(GanConfig, [])


@pytest.mark.parametrize("name", sorted(path.name for path in CONFIGS.glob("*.yaml")))
def test_every_configuration_file_is_valid(name):
    config(name)


@pytest.mark.parametrize("kind", ["bn", "mn", "ucb"])
def test_the_papers_configurations_are_the_papers(kind):
    cfg = config(f"paper_{kind}.yaml")
    assert (cfg.data.name, cfg.epochs, cfg.lr, cfg.beta1, cfg.beta2, cfg.width) == ("cifar100", 200, 2e-4, 0, 0.9, 512)
    assert (cfg.fid.every, cfg.fid.extractor, cfg.fid.samples, cfg.fid.final_samples) == (10, "inception", 10000, 50000)
    assert cfg.norm.kind == kind
    assert cfg.norm.num_components == 3
    if kind == "ucb":
        assert (cfg.norm.groups, cfg.norm.update, cfg.norm.affine) == (1, "weight", False)


def test_a_run_leaves_everything_behind(tiny, tmp_path, capsys):
    cbgan.train.main([*tiny, "--epochs", "2"])
    folder = tmp_path / "cbgan" / "digits-ucb-seed0"
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
    events = EventAccumulator(str(folder / "tensorboard")).Reload()
    assert names - {"step", "epoch"} == set(events.Tags()["scalars"])
    for line in lines:
        for name, value in line.items():
            if name not in ("step", "epoch"):
                logged = [e.value for e in events.Scalars(name) if e.step == line["step"]]
                assert [pytest.approx(value, rel=1e-6)] == logged  # events are float32
    assert "samples/generated" in events.Tags()["images"]
    with Image.open(folder / "samples" / "epoch-0002.png") as picture:
        assert picture.size == (8 * 33 + 1, 8 * 33 + 1)
    assert {p.name for p in (folder / "checkpoints").iterdir()} == {"best.pt", "step-00000008.pt", "step-00000016.pt"}
    summary = capsys.readouterr().out
    for part in ("FID (classifier)  first", "of 10 found among 60 samples", "images/s on cpu", "health norm1",
                 "tensorboard --logdir", "paper_ucb.yaml", str(folder / "samples")):  # fmt: skip
        assert part in summary


def test_the_best_checkpoint_is_that_of_the_lowest_fid(tiny, tmp_path):
    cbgan.train.main([*tiny, "--epochs", "3", "--name", "run"])
    folder = tmp_path / "cbgan" / "run"
    series = [(line["metric/fid_classifier"], line["step"]) for line in read_metrics(folder)
              if "metric/fid_classifier" in line]  # fmt: skip
    best = load(folder / "checkpoints" / "best.pt")
    assert (best["at"]["best_fid"], best["at"]["step"]) == min(series)


def test_evaluating_the_last_checkpoint_gives_the_logged_fid(tiny, tmp_path, capsys, monkeypatch):
    cbgan.train.main([*tiny, "--epochs", "1", "--name", "run"])
    folder = tmp_path / "cbgan" / "run"
    last = [line["metric/fid_classifier"] for line in read_metrics(folder) if "metric/fid_classifier" in line][-1]
    capsys.readouterr()
    cbgan.evaluate.main(["--run", str(folder), "--grid", str(tmp_path / "grid.png")])
    out = capsys.readouterr().out
    assert f"FID (classifier) {last:.4g} from 60 samples" in out
    assert (tmp_path / "grid.png").read_bytes() == (folder / "samples" / "epoch-0001.png").read_bytes()
    with pytest.raises(SystemExit, match="1"):  # one epoch teaches nothing, and the check must say so
        cbgan.evaluate.main(["--run", str(folder), "--check"])


def test_initial_weights_come_from_another_run_but_not_its_position(tiny, tmp_path):
    cbgan.train.main([*tiny, "--epochs", "1", "--name", "first"])
    source = tmp_path / "cbgan" / "first" / "checkpoints" / "step-00000008.pt"
    cbgan.train.main([*tiny, "--epochs", "1", "--name", "second", "--init_from", str(source), "--lr", "1e-30"])
    second = load(tmp_path / "cbgan" / "second" / "checkpoints" / "step-00000008.pt")
    assert second["at"]["step"] == 8
    for name, weight in load(source)["g"].items():
        if name.endswith("deconv1.weight"):
            torch.testing.assert_close(second["g"][name], weight, rtol=0, atol=1e-20)


def test_a_dry_run_writes_nothing_and_states_the_cost(tiny, tmp_path, capsys):
    before = sorted(tmp_path.iterdir())
    cbgan.train.main([*tiny, "--width", "512", "--batch_size", "8", "--norm.kind", "bn", "--dry_run"])
    out = capsys.readouterr().out
    assert f"generator: {3_812_355 - (128 - 16) * 512 * 16:,} parameters" in out  # tiny's latent has length 16
    assert "discriminator: 5,864,449 parameters" in out
    assert "MiB" in out
    assert "ms a step" in out
    assert sorted(tmp_path.iterdir()) == before


SPOILED = {
    "loss/d": ("discriminator_loss", lambda real, fake: (real - fake).mean() * math.nan),
    "loss/g": ("generator_loss", lambda fake: fake.mean() + math.inf),
}


@pytest.mark.parametrize("term", SPOILED)
def test_a_loss_that_is_not_finite_stops_the_run_with_step_and_term(tiny, tmp_path, monkeypatch, term):
    name, spoiled = SPOILED[term]
    sound, calls = getattr(cbgan.train, name), 0

    def loss(*logits):
        nonlocal calls
        calls += 1
        return spoiled(*logits) if calls == 11 else sound(*logits)

    monkeypatch.setattr(cbgan.train, name, loss)
    with pytest.raises(NonFiniteError, match=rf"^{term} is not finite in step 11;"):
        cbgan.train.main([*tiny, "--epochs", "2", "--name", "run"])
    for values in load(tmp_path / "cbgan" / "run" / "checkpoints" / "step-00000008.pt")["g"].values():
        assert torch.isfinite(values).all()


def test_a_gradient_that_is_not_finite_stops_the_run_too(tiny, tmp_path, monkeypatch):
    sound = cbgan.train.generator_loss

    def loss(fake):
        fake.register_hook(lambda gradient: gradient * math.nan)
        return sound(fake)

    monkeypatch.setattr(cbgan.train, "generator_loss", loss)
    with pytest.raises(NonFiniteError, match=r"^gradient/g is not finite in step 1;"):
        cbgan.train.main([*tiny, "--epochs", "2", "--name", "run"])


@pytest.mark.parametrize(("signum", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_saves_the_step_and_prints_how_to_go_on(tiny, tmp_path, signum, status):
    command = [sys.executable, "-m", "cbgan.train", *tiny, "--epochs", "500", "--fid.every", "0", "--name", "run",
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
        os.killpg(process.pid, signum)  # as a terminal and a scheduler do: loader workers get it too
        _, errors = process.communicate(timeout=120)
    assert process.returncode == status, errors
    assert "Traceback" not in errors
    assert f"python -m cbgan.train --name run --resume --out {tmp_path}" in errors
    steps = max(int(path.stem.removeprefix("step-")) for path in (metrics.parent / "checkpoints").glob("step-*.pt"))
    assert f"stopped after step {steps}" in errors
    assert read_metrics(metrics.parent)[-1]["step"] == steps
