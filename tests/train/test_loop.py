"""What the loop offers to every application, each option against a closed form or a run without it."""

import json
import math
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import toy
from applications import APPLICATIONS
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn
from toy import ToyTask

from common.data.sets.digits import digits
from common.runtime.errors import UsageError
from common.train.checkpoint import load
from common.train.config import ScheduleConfig
from common.train.logging import read_metrics
from common.train.loop import Trainer
from common.train.optim import schedule_factor

TOY = APPLICATIONS["toy"]


@pytest.fixture
def train(tmp_path, monkeypatch):
    """Return a function that trains the toy application and returns its folder and what it trained."""
    trained: list[Trainer] = []
    sound = Trainer.run
    monkeypatch.setattr(Trainer, "run", lambda self: trained.append(self) or sound(self))

    def run(*flags: str, name: str = "run", epochs: int = 2) -> tuple[Path, Trainer]:
        TOY.main([*TOY.tiny(tmp_path, tmp_path / "cache"), "--epochs", str(epochs), "--name", name, *flags])
        return tmp_path / "toy" / name, trained[-1]

    return run


def column(folder: Path, tag: str) -> list[tuple[int, float]]:
    return [(line["step"], line[tag]) for line in read_metrics(folder) if tag in line]


def test_schedules_follow_their_closed_forms():
    def rates(steps, epochs, **settings):
        schedule = ScheduleConfig(**settings)
        return [schedule_factor(schedule, step, steps, epochs) for step in range(steps * epochs)]

    assert rates(2, 3) == [1.0] * 6
    assert rates(2, 3, kind="step", milestones=[1, 2], factor=0.5) == [1, 1, 0.5, 0.5, 0.25, 0.25]
    half = rates(5, 2, kind="cosine")
    assert half == pytest.approx([0.5 + 0.5 * math.cos(math.pi * i / 10) for i in range(10)])
    assert half[0] == 1
    assert rates(5, 2, kind="cosine", floor=0.25)[5] == pytest.approx(0.625)  # half way between 1 and 0.25
    arc = rates(5, 2, kind="partial_cosine", floor=0.25)
    assert arc == pytest.approx([math.cos(math.acos(0.25) * i / 10) for i in range(10)])
    # The page of Keras counts 937 steps an epoch where 382 are made, and never comes to the end of its schedule.
    assert rates(2, 3, kind="cosine", epoch_steps=4) == pytest.approx(rates(4, 3, kind="cosine")[:6])
    assert rates(2, 3, kind="cosine", epoch_steps=1)[3:] == [0.0] * 3  # nor does one that is over go on


def test_a_schedule_reaches_the_optimizers_and_the_log(train):
    folder, training = train("--schedule.kind", "step", "--schedule.milestones", "1", "--lr", "0.2", "--log_every", "1")
    assert [lr for _, lr in column(folder, "schedule/lr")] == pytest.approx([0.2] * 8 + [0.02] * 8)
    rates = [group["lr"] for opt in training.state.optimizers.values() for group in opt.param_groups]
    assert rates == pytest.approx([0.02, 0.02])


def test_averages_follow_the_recurrence_buffers_included(train, monkeypatch):
    wanted: dict[str, torch.Tensor] = {}
    sound = Trainer.train_step

    def step(self, batches):
        if not wanted:  # an average starts where its network starts
            wanted.update({k: v.double() for k, v in self.state.networks["net"].state_dict().items()})
        sound(self, batches)
        for name, value in self.state.networks["net"].state_dict().items():
            wanted[name] = 0.8 * wanted[name] + 0.2 * value.double() if value.is_floating_point() else value.double()

    monkeypatch.setattr(Trainer, "train_step", step)
    seen: list[dict[str, torch.Tensor]] = []
    evaluate = ToyTask.evaluate

    def measured(self, networks, moment):
        seen.append({k: v.clone() for k, v in networks["net"].state_dict().items()})
        return evaluate(self, networks, moment)

    monkeypatch.setattr(ToyTask, "evaluate", measured)
    folder, training = train("--ema_decay", "0.8", "--lr", "0.1")
    average = training.state.averages["net"].state_dict()
    assert average.keys() == wanted.keys()
    assert not any(parameter.requires_grad for parameter in training.state.averages["net"].parameters())
    assert {"0.mean", "0.initialized", "2.weight"} <= wanted.keys()
    for name, value in average.items():
        torch.testing.assert_close(value.double(), wanted[name], rtol=1e-5, atol=1e-6)
        assert torch.equal(seen[-1][name], value)  # what is measured is the average
        assert torch.equal(load(folder / "checkpoints" / "step-00000016.pt")["averages"]["net"][name], value)
    assert not torch.equal(average["2.weight"], training.state.networks["net"].get_parameter("2.weight"))


def test_gradients_are_clipped_and_their_norm_is_logged_before(train, monkeypatch):
    norms: list[float] = []
    sound = torch.optim.SGD.step

    def noted(self, *args, **kwargs):
        gradients = [p.grad for group in self.param_groups for p in group["params"]]
        norms.append(float(torch.cat([g.flatten() for g in gradients]).norm()))
        return sound(self, *args, **kwargs)

    monkeypatch.setattr(torch.optim.SGD, "step", noted)
    free, _ = train("--log_every", "1", name="free", epochs=1)
    assert norms[0::2] == pytest.approx([norm for _, norm in column(free, "gradient/net")])
    norms.clear()
    clipped, _ = train("--log_every", "1", "--grad_clip_norm", "0.01", name="clipped", epochs=1)
    assert max(norms) == pytest.approx(0.01, rel=1e-3)
    assert column(clipped, "gradient/net")[0] == column(free, "gradient/net")[0]


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # dynamo looks at every tensor
def test_compiled_networks_learn_what_others_do(train, monkeypatch):
    compiled: list[nn.Module] = []
    sound = nn.Module.compile

    def compile_eagerly(self, *args: Any, **kwargs: Any) -> None:
        compiled.append(self)
        sound(self, *args, backend="eager", **kwargs)  # traced and run as any backend would, without a compiler

    monkeypatch.setattr(nn.Module, "compile", compile_eagerly)
    plain, _ = train(name="plain", epochs=1)
    assert not compiled
    traced, training = train("--compile", name="traced", epochs=1)
    assert compiled == list(training.state.networks.values())
    assert dict(column(traced, "loss/net")) == pytest.approx(dict(column(plain, "loss/net")), rel=1e-4)
    ours, theirs = (load(folder / "checkpoints" / "step-00000008.pt")["networks"] for folder in (traced, plain))
    assert ours["net"].keys() == theirs["net"].keys()  # no prefix of a wrapper


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_reduced_precision_and_nhwc_train_float32_weights(train, precision):
    plain, _ = train(name="plain", epochs=1)
    reduced, training = train("--precision", precision, "--channels_last", name="reduced", epochs=1)
    assert all(p.dtype == torch.float32 for p in training.state.networks["net"].parameters())
    assert training.state.scalers["net"].is_enabled() == (precision == "fp16")
    ulp = {"bf16": 2.0**-8, "fp16": 2.0**-11}[precision]
    # A linear map of 192 terms and a cross-entropy: a handful of roundings, which steps with lr 0.001 hardly amplify.
    assert [v for _, v in column(reduced, "loss/net")] == pytest.approx(
        [v for _, v in column(plain, "loss/net")], rel=8 * ulp
    )


def test_epochs_and_what_is_done_after_them(train):
    schedule = ["--steps_per_epoch", "3", "--evaluate_every", "2", "--grad_accum_steps", "2"]
    folder, training = train(*schedule, "--checkpoint_keep", "1", "3", "--checkpoint_every", "4", epochs=5)
    assert (training.state.run.epoch, training.state.run.step) == (5, 15)
    assert [step for step, _ in column(folder, "loss/test")] == [6, 12, 15]
    names = {path.name for path in (folder / "checkpoints").iterdir()}
    assert names == {"epoch-0001.pt", "epoch-0003.pt", "step-00000012.pt", "step-00000015.pt"}
    assert [load(folder / "checkpoints" / f"epoch-000{n}.pt")["run"]["epoch"] for n in (1, 3)] == [1, 3]


@pytest.fixture
def measured(monkeypatch):
    """Return a function that sets what the next evaluations find."""

    def values(*found: float) -> None:
        remaining = list(found)
        monkeypatch.setattr(ToyTask, "evaluate", lambda *_: {"loss/validation": remaining.pop(0)})

    return values


def test_losses_are_printed_of_the_epochs_that_logged_some(train, capsys):
    _, training = train("--log_every", "1000", epochs=1)
    steps = training.state.run.step
    capsys.readouterr()
    train("--log_every", str(2 * steps), name="other", epochs=3)
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("epoch") and ", step" in line]
    assert ["loss/net" in line for line in lines] == [False, True, False]


def test_early_stopping_waits_and_the_best_is_kept(train, measured, capsys):
    measured(math.nan, 2.0, 2.5, math.nan, 9.0)
    folder, training = train("--best.keep", "--best.patience", "2", "--checkpoint_every", "5", epochs=6)
    assert training.state.run.epoch == 4  # two evaluations that are not better than epoch 2
    best = load(folder / "checkpoints" / "best.pt")["run"]
    assert (best["epoch"], best["best"]) == (2, {"value": 2.0, "epoch": 2, "tag": "loss/validation"})
    assert (folder / "checkpoints" / f"step-{training.state.run.step:08d}.pt").exists()  # the end is saved anyway
    assert "after 4 of 6 epochs" in capsys.readouterr().out
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["state"] == "finished"
    assert {"value": 2.0, "split": "validation", "chosen_by_test": False}.items() <= summary["best"].items()


def test_choices_read_validation_images_that_are_held_out_of_training(train):
    folder, training = train("--best.keep", epochs=1)
    images = training.task.images
    whole = digits(8).train
    assert whole.labels is not None
    held = sum(round(0.1 * n) for n in torch.bincount(whole.labels).tolist())  # a tenth of each class
    sizes = {name: len(part) for name, part in images.items()}
    assert sizes == {"train": 1000 - held, "validation": held, "test": 200}
    assert column(folder, "loss/validation")
    # Nothing is held out where nothing is chosen.
    assert train(name="none", epochs=1)[1].task.images.keys() == {"train", "test"}


def test_choosing_by_test_images_is_refused_unless_it_is_marked(train):
    with pytest.raises(UsageError, match=r"best\.by: loss/test is measured on test .*--best\.allow_test_metric"):
        train("--best.keep", "--best.by", "loss/test")
    with pytest.raises(UsageError, match=r"best\.by: expected loss/validation or loss/test, got loss/tset"):
        train("--best.keep", "--best.by", "loss/tset")
    with pytest.raises(UsageError, match=r"data\.validation: expected more than 0"):
        train("--best.keep", "--data.validation", "0")
    folder, _ = train("--best.keep", "--best.by", "loss/test", "--best.allow_test_metric", epochs=1)
    assert json.loads((folder / "summary.json").read_text())["best"]["chosen_by_test"] is True


def test_tensorboard_has_the_settings(train):
    folder, _ = train("--lr", "0.125", epochs=1)
    assert not (folder / "tensorboard").exists()  # else TensorBoard would call the run by that folder too
    events = EventAccumulator(str(folder)).Reload()
    assert {tag.split("/")[0] for tag in events.Tags()["scalars"]} == {"2_loss", "5_gradient", "6_schedule", "7_time"}
    text = events.Tensors("settings/text_summary")[0].tensor_proto.string_val[0].decode()
    assert "    lr: 0.125" in text.split("\n")


def test_what_networks_warn_of_is_printed_once_in_a_line_without_a_place_in_the_code(train, monkeypatch, capsys):
    sound = toy.networks

    def networks() -> dict[str, nn.Module]:
        for _ in range(2):
            warnings.warn("net: made of straw", stacklevel=1)
        return sound()

    monkeypatch.setattr(toy, "networks", networks)
    train(epochs=1)
    printed = [line for line in capsys.readouterr().err.splitlines() if "straw" in line]
    assert printed == ["warning: net: made of straw"]
