"""What a run prints, logs and sums up, against what it logged and a clock that the test moves."""

import contextlib
import io
import json
import math
import re
import shlex
import sys
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from applications import APPLICATIONS
from refusals import refused
from toy import ToyTask

from common.data.sets.digits import digits
from common.train import dry_run, loop
from common.train.checkpoint import load
from common.train.config import RunConfig
from common.train.logging import read_metrics
from common.train.loop import Trainer
from common.train.setup import resume_command
from common.train.task import Detector

TOY = APPLICATIONS["toy"]
STEP, MEASUREMENT = 0.25, 3.0
"""Seconds by the clock of these tests."""
SPEED = (120 + 60) / STEP
"""Of the two streams that a step draws from."""


@dataclass
class Seen:
    """A run that is over, and what it printed and wrote."""

    folder: Path
    out: list[str] = field(default_factory=list)
    summaries: list[dict[str, Any]] = field(default_factory=list)
    """As they were when an epoch began."""

    @property
    def closing(self) -> dict[str, str]:
        """The lines after the blank one, by their labels."""
        rows = self.out[self.out.index("") + 1 :]
        return dict(re.split(" {2,}", line, maxsplit=1) for line in rows)


@pytest.fixture(scope="module")
def summed(tmp_path_factory) -> Seen:
    """Train the toy application by this test's clock."""
    out = tmp_path_factory.mktemp("out") / "my runs"
    now, seen, printed = [100.0], Seen(out / "toy" / "run"), io.StringIO()
    step, evaluate, epoch = Trainer.train_step, ToyTask.evaluate, Trainer.train_epoch

    def stepped(self, batches):
        now[0] += STEP
        step(self, batches)

    def measured(self, networks, context):
        now[0] += MEASUREMENT
        return evaluate(self, networks, context)

    def begun(self):
        seen.summaries.append(json.loads((self.folder / "summary.json").read_text()))
        epoch(self)

    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(printed):
        patch.setattr(loop, "time", SimpleNamespace(monotonic=lambda: now[0]))
        patch.setattr(Trainer, "train_step", stepped)
        patch.setattr(ToyTask, "evaluate", measured)
        patch.setattr(Trainer, "train_epoch", begun)
        TOY.main([*TOY.tiny(out, out / "cache"), "--name", "run", "--epochs", "2", "--best.keep"])
    seen.out = printed.getvalue().splitlines()
    return seen


def by_epoch(folder: Path, tag: str) -> dict[int, float]:
    return {line["epoch"]: line[tag] for line in read_metrics(folder) if tag in line}


def test_a_run_logs_what_the_page_says_of_every_run(summed):
    lines = read_metrics(summed.folder)
    losses = {f"{group}/{name}" for group in ("loss", "gradient") for name in ("net", "top")}
    timed = {"schedule/lr", "time/images_per_second", "time/peak_memory_mib"}
    # 900 images are 7 batches of 120 an epoch; a line every third step, and one a measurement.
    assert [line["step"] for line in lines if len(line) > 2] == [3, 6, 7, 9, 12, 14]
    for line in lines:
        if len(line) > 2:
            at_end = {"loss/test", "loss/validation"}
            wanted = at_end if line["step"] in (7, 14) else {*losses, *timed}
            assert line.keys() == {"step", "epoch"} | wanted


def test_speed_is_images_by_the_seconds_of_training_alone(summed):
    assert {line.get("time/images_per_second", SPEED) for line in read_metrics(summed.folder)} == {SPEED}
    summary = json.loads((summed.folder / "summary.json").read_text())
    assert summary["seconds"] == {"training": 14 * STEP, "evaluation": 2 * MEASUREMENT}
    assert summed.closing["speed"] == "720 images/s on cpu"


def test_each_epoch_and_each_measurement_is_a_line(summed):
    lines, test, valid = (
        iter(summed.out),
        by_epoch(summed.folder, "loss/test"),
        by_epoch(summed.folder, "loss/validation"),
    )
    logged = [line for line in read_metrics(summed.folder) if "loss/net" in line]
    for epoch, step, shown in ((1, 7, logged[1]), (2, 14, logged[3])):  # the last of 6 and of 12
        losses = f"loss/net {shown['loss/net']:.4g}  loss/top {shown['loss/top']:.4g}"
        assert next(lines) == f"epoch {epoch}/2, step {step}  {losses}  images/s 720"
        measured = f"loss/test {test[epoch]:.4g}  loss/validation {valid[epoch]:.4g}"
        assert next(lines) == f"epoch {epoch}/2  {measured}  {MEASUREMENT:.1f} s"
    assert next(lines) == ""


def test_the_closing_lines_say_what_came_out_and_where_it_is(summed):
    test, valid = by_epoch(summed.folder, "loss/test"), by_epoch(summed.folder, "loss/validation")
    best = min(valid, key=lambda epoch: valid[epoch])
    assert summed.closing == {
        "run": str(summed.folder),
        "last": f"test {test[2]:.3g}, validation {valid[2]:.3g}",
        "best": f"loss/validation {valid[best]:.4g} (epoch {best})",
        "speed": "720 images/s on cpu",
        "charts": f"tensorboard --logdir '{summed.folder.parents[1]}' --host 127.0.0.1",
    }


def test_settings_that_no_file_of_the_run_can_hold_are_refused(tmp_path, capsys):
    line = refused(capsys, TOY.main, *TOY.tiny(tmp_path, tmp_path), "--out", str(tmp_path / "caf\udce9"))
    assert line.startswith("error: out: expected UTF-8, which config.yaml and TensorBoard can hold, got '")
    assert list(tmp_path.iterdir()) == []


def test_how_to_go_on_is_quoted_for_a_shell():
    method, cfg = SimpleNamespace(application="cbx", command="train"), RunConfig(name="it's one", out=Path("my runs"))
    words = ["python", "-m", "cbx.train", "--name", "it's one", "--resume", "--out", "my runs"]
    assert shlex.split(resume_command(cast(Any, method), cfg)) == words


def test_a_summary_says_from_the_start_how_a_run_goes(summed):
    first, second = summed.summaries
    assert (first["state"], first["why"], first["epochs"], first["step"]) == (
        "running", None, {"done": 0, "wanted": 2}, 0)  # fmt: skip
    assert (first["last"], first["best"]) == ({}, None)
    assert (second["state"], second["epochs"]["done"], second["step"]) == ("running", 1, 7)
    last = json.loads((summed.folder / "summary.json").read_text())
    assert (last["state"], last["epochs"], last["step"]) == ("finished", {"done": 2, "wanted": 2}, 14)
    for epoch, summary in ((1, second), (2, last)):
        value = by_epoch(summed.folder, "loss/test")[epoch]
        assert summary["last"]["loss/test"] == {"value": value, "epoch": epoch, "split": "test"}
    assert last["best"]["with"]["loss/validation"] == last["best"]["value"]
    assert last["peak_memory_mib"] > 50
    assert last["protocol"] == load(summed.folder / "checkpoints" / "step-00000014.pt")["protocol"]
    assert digits(8).test is not None
    assert last["images"]["test"] == {"content_hash": digits(8).test.content_hash, "count": 200}  # pyright: ignore[reportOptionalMemberAccess]


def test_a_summary_has_no_number_that_json_has_no_word_for(tmp_path, monkeypatch):
    monkeypatch.setattr(ToyTask, "evaluate", lambda *_: {"loss/validation": math.inf, "loss/test": 1.0})
    folder = trained_plainly(tmp_path, "--best.keep")
    text = (folder / "summary.json").read_text()
    summary = json.loads(text, parse_constant=pytest.fail)
    assert summary["best"]["value"] is None
    assert summary["last"] == {
        "loss/validation": {"value": None, "epoch": 1, "split": "validation"},
        "loss/test": {"value": 1.0, "epoch": 1, "split": "test"},
    }
    assert text.endswith("}\n")


def trained_plainly(tmp_path: Path, *flags: str) -> Path:
    TOY.main([*TOY.tiny(tmp_path, tmp_path), "--name", "run", *flags])
    return tmp_path / "toy" / "run"


def test_the_last_lines_name_a_test_metric(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(ToyTask, "evaluate", lambda *_: {"loss/test": 1.0})
    trained_plainly(tmp_path, "--best.by", "loss/test", "--best.allow_test_metric", "--best.keep")
    assert "best    loss/test 1 (epoch 1, chosen by a value of test images)" in capsys.readouterr().out.splitlines()


def test_what_is_wrong_with_layers_and_what_was_rewound_is_said_once_more(tmp_path, monkeypatch, capsys):
    broken = ("0: use of a component is nothing", "0: something else", "1: another")
    monkeypatch.setattr(ToyTask, "health", lambda self, step: ({"health/0/usage_min": 0.125, "health/0/other_one": 2.0},
                                                              list(broken)))  # fmt: skip
    collapsed = iter(["has won"])
    monkeypatch.setattr(ToyTask, "detectors", [Detector(lambda _: next(collapsed, None), "steps")])
    folder = trained_plainly(tmp_path, "--guard.action", "rewind", "--epochs", "2")
    printed = capsys.readouterr()
    closing = printed.out.split("\n\n")[1].splitlines()
    assert "health 0  usage min 0.125, other one 2" in closing
    assert [line for line in closing if line.startswith("warning")] == [f"warning   {line}" for line in broken]
    assert "rewound   in step 3 to step 0: has won" in closing
    # While it runs: a line a subject, once a run; the rewind with its new rates.
    assert printed.err.splitlines() == [
        "warning: rewound to step 0: has won; learning rates are now 0.5 of the first",
        f"warning: {broken[0]}", f"warning: {broken[2]}",
    ]  # fmt: skip
    rewinds = json.loads((folder / "summary.json").read_text())["rewinds"]
    assert rewinds == [{"step": 3, "to": 0, "cause": "has won"}]


def test_on_a_terminal_there_is_a_bar_instead_of_lines(tmp_path, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        patch.setattr(sys.stderr, "isatty", lambda: True)
        trained_plainly(tmp_path, "--epochs", "2")
    printed = capsys.readouterr()
    assert "16/16" in printed.err
    assert "epoch=2, loss/net=" in printed.err
    assert not [line for line in printed.out.splitlines() if line.startswith("epoch")]
    TOY.main(["--name", "run", "--out", str(tmp_path), "--resume", "--epochs", "3"])
    assert "/24" not in capsys.readouterr().err


def test_a_dry_run_counts_in_closed_form(tmp_path, monkeypatch, capsys):
    """The first step warms up; of the three after it, 40, 20 and 60 ms, the middle counts."""
    durations = iter((9.0, 0.04, 0.02, 0.06, 100.0, 100.0))
    clock = [0.0]
    calls: list[int] = []

    def perf_counter() -> float:
        calls.append(1)
        if len(calls) % 2 == 0:  # a step's end
            clock[0] += next(durations)
        return clock[0]

    monkeypatch.setattr(dry_run, "time", SimpleNamespace(perf_counter=perf_counter))
    TOY.main([*TOY.tiny(tmp_path, tmp_path), "--dry_run", "--epochs", "1000", "--data.validation", "0.1"])
    data, net, top, memory, time = capsys.readouterr().out.splitlines()
    labels = digits(8).train.labels
    assert labels is not None
    held_out = sum(round(0.1 * n) for n in torch.bincount(labels).tolist())  # a tenth of each class
    sets = f"{len(labels) - held_out} train, 200 test, {held_out} validation"
    assert data == f"data: images of 8 pixels a side: {sets}"
    # UCBNorm(3, 2) moves its averages and learns a scale and a shift of each channel alone.
    weights = 192 * 10 + 10
    assert net.startswith(f"Sequential: {weights + 6:,} parameters, of them 6 in 0")
    assert top == "Linear: 110 parameters, of them none in normalizations"
    held = 2 * 4 * (weights + 6 + 110)  # float32 weights and as many gradients; SGD keeps nothing
    assert memory.startswith(f"memory: {held / 2**20:.1f} MiB for weights, gradients and the optimizers' state; ")
    threads = torch.get_num_threads()
    assert time == (
        f"time: 40 ms a step on cpu with {threads} threads, 7 steps an epoch, 0:04:40 for 7,000 steps; measurements "
        "come on top"
    )
