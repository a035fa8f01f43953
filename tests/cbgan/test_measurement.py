"""What of a generator is measured: fitted mixtures, averages and raw weights, classes, how much samples differ."""

import copy
import json
import math
import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from forked import Hit, run
from PIL import Image
from run_comparison import assert_same_runs
from torch import nn

import cbgan.evaluation
import cbgan.models
import cbgan.task
import cbgan.train
from cbgan.collapse import past_values
from cbgan.config import GanConfig
from cbgan.evaluation import Evaluator, distance, recalibrate
from cbgan.models import build_generator
from cbgan.networks.dcgan import Generator
from cbgan.noise import recalibration_noise
from cbgan.task import GanTask
from common.data import DataConfig
from common.data.sets.digits import digits
from common.metrics.features.neighbours import Copying
from common.metrics.fid import FidResult
from common.norms import recalibrate as norm_recalibrate
from common.norms.config import NormConfig
from common.runtime.cli import parse
from common.runtime.distributed import Env
from common.runtime.errors import NonFiniteError
from common.train.logging import read_metrics

CPU = torch.device("cpu")
FID = "metric/fid_classifier"


def fresh(cfg: GanConfig) -> Generator:
    return Generator(cfg.width, cfg.latent_dim, cfg.norm, cfg.data.size)


@pytest.mark.parametrize("kind", ["bn", "mn"])
def test_a_run_measures_statistics_that_were_estimated_anew(tiny, tmp_path, monkeypatch, kind):
    """The average's and the raw weights'; training goes on as if nothing had been measured."""
    measured: list[list[dict[str, torch.Tensor]]] = []

    def run(self: Evaluator, *generators: Any) -> dict[str, float]:
        measured.append([copy.deepcopy(g.state_dict()) for g in (generators[0], *generators[2:])])
        return {}

    monkeypatch.setattr(Evaluator, "run", run)
    flags = ["--norm.kind", kind, "--epochs", "1", "--batch_size", "500", "--evaluate_every", "0", "--ema_decay", "0.5",
             "--recalibrate.images", "100", "--recalibrate.batch_size", "50"]  # fmt: skip
    cbgan.train.main([*tiny, *flags, "--name", "all"])
    cbgan.train.main([*tiny, *flags, "--name", "none", "--recalibrate.layers", "none"])
    states = [
        torch.load(sorted((tmp_path / "cbgan" / name / "checkpoints").glob("step-*.pt"))[-1], weights_only=True)
        for name in ("all", "none")
    ]
    for group in ("networks", "averages"):
        for name, trained in states[0][group].items():
            torch.testing.assert_close(dict(trained), dict(states[1][group][name]), rtol=0, atol=0)
    cfg = parse(GanConfig, ["--config", str(tmp_path / "cbgan" / "all" / "config.yaml")])
    g = Generator(cfg.width, cfg.latent_dim, cfg.norm, cfg.data.size)
    for group, found in zip(("averages", "networks"), measured[-2], strict=True):
        g.load_state_dict(states[0][group]["g"])
        norm_recalibrate(g, [z for (z,) in recalibration_noise(cfg, [], CPU)])
        torch.testing.assert_close(found, dict(g.state_dict()), rtol=0, atol=0)
        assert any(not torch.equal(found[name], value) for name, value in states[0][group]["g"].items())
    for name, value in states[0]["statistics"]["g"].items():
        assert torch.equal(value, measured[-2][0][name])
    loaded = cbgan.load_generator(tmp_path / "cbgan" / "all").network.state_dict()
    torch.testing.assert_close(dict(loaded), measured[-2][0], rtol=0, atol=0)


@pytest.fixture(scope="module")
def conditional(tmp_path_factory, cache) -> Path:
    """Train a conditional run with an average of its weights."""
    out = tmp_path_factory.mktemp("conditional")
    cbgan.train.main(["--norm.kind", "scb", "--norm.num_components", "10", "--width", "8", "--latent_dim", "8",
                      "--data.size", "8", "--batch_size", "100", "--epochs", "1", "--ema_decay", "0.5", "--lr", "0.1",
                      "--evaluate_every", "1", "--fid.samples", "50", "--schedule.kind", "constant",
                      "--spectral", "false", "--name", "run", "--out", str(out), "--cache", str(cache)])  # fmt: skip
    return out / "cbgan" / "run"


def test_average_and_raw_weights_are_both_measured(conditional, cache):
    last = [line for line in read_metrics(conditional) if FID in line][-1]
    norm = NormConfig(kind="scb", num_components=10)
    cfg = GanConfig(width=8, latent_dim=8, batch_size=100, data=DataConfig(size=8), norm=norm, cache=cache)
    images = GanTask.load_images(cfg)
    state = torch.load(conditional / "checkpoints" / "step-00000010.pt", weights_only=True)
    g = build_generator(cfg)
    for tag, weights in ((FID, state["averages"]["g"]), (f"{FID}_raw", state["networks"]["g"])):
        g.load_state_dict(weights)
        recalibrate(cfg, g, Evaluator(cfg, images, CPU).class_counts(), CPU)
        assert Evaluator(cfg, images, CPU).measure(g, 50).fid == pytest.approx(last[tag], rel=1e-6)
    assert last[FID] != last[f"{FID}_raw"]


def test_a_conditional_run_leaves_its_classes_and_is_asked_for_them(conditional):
    train = digits(8).train
    assert train.labels is not None
    assert json.loads((conditional / "classes.json").read_text()) == {
        "classes": list(train.classes),
        "counts": torch.bincount(train.labels).tolist(),
    }
    assert 0 <= [line for line in read_metrics(conditional) if FID in line][-1]["metric/class_accuracy"] <= 1


def test_the_share_as_asked_is_of_classes_asked_and_seen(monkeypatch):
    cfg = GanConfig(norm=NormConfig(kind="scb", num_components=10))
    evaluation = Evaluator.__new__(Evaluator)
    evaluation.cfg, evaluation.device = cfg, CPU
    labels = torch.arange(1000) % 10
    monkeypatch.setattr(Evaluator, "labels", lambda self, count: labels[:count])
    monkeypatch.setattr(Evaluator, "sample", lambda self, g, z, asked: torch.where(asked < 3, 9, asked))
    classifier = SimpleNamespace(predict=lambda images: images)
    assert evaluation._share_as_asked(cast(Any, SimpleNamespace(latent_dim=2)), cast(Any, classifier)) == 0.7


def test_how_much_images_differ_is_their_mean_distance():
    images = torch.tensor([[0, 0], [3, 4], [0, 0]], dtype=torch.uint8).view(3, 2, 1, 1)
    assert distance(images) == pytest.approx(10 / 3)
    lines = [{"epoch": 1, "metric/a": 1.0, "loss/d": 9.0}, {"metric/a": 3.0, "metric/b": None}, {"metric/a": 2.0}]
    assert past_values(lines, 0) == ({"metric/a": 3.0}, {})


def test_copies_of_one_picture_are_trained_on_and_measured(tiny, tmp_path):
    for name in ("a/1", "a/2", "a/3", "a/4", "b/1", "b/2", "b/3", "b/4"):
        (tmp_path / "copies" / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), "teal").save(tmp_path / "copies" / f"{name}.png")
    images = ["--data.name", "imagefolder", "--data.root", str(tmp_path / "copies"), "--batch_size", "4"]
    cbgan.train.main([*tiny, *images, "--epochs", "1", "--name", "copies"])
    measured = [line for line in read_metrics(tmp_path / "cbgan" / "copies") if "metric/fid_classifier" in line]
    assert [line["metric/diversity"] for line in measured] == [None, None]  # a share of a distance of 0
    assert all(math.isfinite(line["metric/fid_classifier"]) for line in measured)


@pytest.fixture
def stalled(tiny, monkeypatch) -> list[str]:
    """Return the flags of a run of 2 steps an epoch whose discriminator says the same of every image."""
    sound = cbgan.models.build_networks

    def silenced(module: nn.Module, given: Any, logits: torch.Tensor) -> torch.Tensor:
        return 0 * logits

    def build(cfg: GanConfig) -> dict[str, nn.Module]:
        networks = sound(cfg)
        networks["d"].register_forward_hook(silenced)
        return networks

    monkeypatch.setattr(cbgan.task, "build_networks", build)
    monkeypatch.setattr("cbgan.collapse._WINDOW", 6)
    return [*tiny, "--epochs", "5", "--batch_size", "500", "--log_every", "1", "--evaluate_every", "0"]


def test_a_stalled_game_is_told_alike_however_the_run_was_interrupted(stalled, tmp_path):
    whole = run(cbgan.train.main, *stalled, "--name", "whole")
    assert whole.statuses == [0], whole.err
    cause = json.loads((tmp_path / "cbgan" / "whole" / "summary.json").read_text())["collapsed"]
    assert cause["step"] == 6  # no sooner: before, the measurements look back on fewer steps
    assert cause["cause"].startswith("the discriminator gives real and generated images the same verdict: over 6 steps")
    remedy = "--loss logistic --spectral false --lr 2e-4"
    assert whole.err.count(f"{cause['cause']}; try {remedy}") == whole.out.count(f"; try {remedy}") == 1
    assert run(cbgan.train.main, *stalled, "--name", "run", hit=Hit("step:6")).statuses == [-signal.SIGKILL]
    again = run(cbgan.train.main, "--name", "run", "--out", str(tmp_path), "--resume")
    assert again.weights == whole.weights
    assert_same_runs(tmp_path / "cbgan" / "run", tmp_path / "cbgan" / "whole")


def test_a_stalled_game_stops_or_goes_back_and_is_given_time_there(stalled):
    cause = "the discriminator gives real and generated images the same verdict"
    with pytest.raises(NonFiniteError, match=f"^collapsed in step 6: {cause}.* stands; try --loss logistic"):
        cbgan.train.main([*stalled, "--name", "stop", "--guard.action", "stop"])
    rewind = ["--guard.action", "rewind", "--guard.max_rewinds", "1"]
    with pytest.raises(NonFiniteError, match=f"^collapsed in step 10 after 1 rewinds: {cause}"):  # 6 steps from 4 on
        cbgan.train.main([*stalled, "--name", "rewind", *rewind])


@pytest.mark.parametrize("alarm", [True, False])
def test_copied_training_images_are_reported_after_the_last_epoch(monkeypatch, tmp_path, alarm):
    cfg = GanConfig(epochs=3, width=8, latent_dim=4)
    evaluation = Evaluator.__new__(Evaluator)
    evaluation.cfg, evaluation.env, evaluation.warnings = cfg, Env(), []
    found = FidResult(1.0, 10, None, copying=Copying(0.5, 0.9, alarm))
    evaluation.fid = cast(Any, SimpleNamespace(thorough=lambda last: last, values=lambda _: {}, tag=FID))
    monkeypatch.setattr(evaluation, "measure", lambda *_, **__: found)
    drawn, told = [], []
    log = SimpleNamespace(image=lambda step, name, sheet: drawn.append((step, name)))
    monkeypatch.setattr(evaluation, "nearest", lambda *_: torch.zeros(3, 2, 2, dtype=torch.uint8))
    monkeypatch.setattr(evaluation, "_draw", lambda *_: {})
    for epoch in (2, 3):
        moment: Any = SimpleNamespace(epoch=epoch, step=epoch, folder=tmp_path, log=log, should_stop=None,
                                      report=told.append, rewound_to=0)  # fmt: skip
        (tmp_path / "metrics.jsonl").touch()
        evaluation.run(fresh(cfg), moment)
    assert drawn == [(3, "samples/nearest")]
    assert len(told) == alarm
    assert all("gives back its training images" in line for line in told)
