"""What a run tells while it goes on and at its end, against what it logged and a clock that the test moves."""

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
from typing import Any, ClassVar, cast

import pytest
import torch
from applications import APPLICATIONS
from refusals import refused
from toy import ToyTask

from common.data.sets.digits import digits
from common.train import dry_run, loop
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
class Told:
    """A run that is over, and what was seen of it."""

    folder: Path
    out: list[str] = field(default_factory=list)
    summaries: list[dict[str, Any]] = field(default_factory=list)
    """As they were when an epoch began."""

    @property
    def closing(self) -> dict[str, str]:
        """The lines after the blank one, by their labels."""
        rows = self.out[self.out.index("") + 1 :]
        return dict(re.split(" {2,}", line, maxsplit=1) for line in rows)


def trained(out: Path, cache: Path, *flags: str) -> Told:
    """Train the toy application by the test's clock."""
    now, told, printed = [100.0], Told(out / "toy" / "run"), io.StringIO()
    step, evaluate, epoch = Trainer.train_step, ToyTask.evaluate, Trainer.train_epoch

    def stepped(self, batches):
        now[0] += STEP
        step(self, batches)

    def measured(self, networks, moment):
        now[0] += MEASUREMENT
        return evaluate(self, networks, moment)

    def begun(self):
        told.summaries.append(json.loads((self.folder / "summary.json").read_text()))
        epoch(self)

    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(printed):
        patch.setattr(loop, "time", SimpleNamespace(monotonic=lambda: now[0]))
        patch.setattr(Trainer, "train_step", stepped)
        patch.setattr(ToyTask, "evaluate", measured)
        patch.setattr(Trainer, "train_epoch", begun)
        TOY.main([*TOY.tiny(out, cache), "--name", "run", *flags])
    told.out = printed.getvalue().splitlines()
    return told


@pytest.fixture(scope="module")
def told(tmp_path_factory) -> Told:
    out = tmp_path_factory.mktemp("out") / "my runs"
    return trained(out, out / "cache", "--epochs", "2", "--best.keep")


def by_epoch(folder: Path, tag: str) -> dict[int, float]:
    return {line["epoch"]: line[tag] for line in read_metrics(folder) if tag in line}


def test_a_run_logs_what_the_page_says_of_every_run(told):
    lines = read_metrics(told.folder)
    losses = {f"{group}/{name}" for group in ("loss", "gradient") for name in ("net", "top")}
    timed = {"schedule/lr", "time/images_per_second", "time/peak_memory_mib"}
    # 900 images are 7 batches of 120 an epoch; a line every third step, and one a measurement.
    assert [line["step"] for line in lines if len(line) > 2] == [3, 6, 7, 9, 12, 14]
    for line in lines:
        if len(line) > 2:
            at_end = {"loss/test", "loss/validation"}
            wanted = at_end if line["step"] in (7, 14) else {*losses, *timed}
            assert line.keys() == {"step", "epoch"} | wanted


def test_speed_is_images_by_the_seconds_of_training_alone(told):
    assert {line.get("time/images_per_second", SPEED) for line in read_metrics(told.folder)} == {SPEED}
    summary = json.loads((told.folder / "summary.json").read_text())
    assert summary["seconds"] == {"training": 14 * STEP, "evaluation": 2 * MEASUREMENT}
    assert told.closing["speed"] == "720 images/s on cpu"


def test_parts_of_a_step_count_as_images(tmp_path):
    told = trained(tmp_path, tmp_path, "--grad_accum_steps", "2", "--log_every", "1")
    assert {line.get("time/images_per_second", 2 * SPEED) for line in read_metrics(told.folder)} == {2 * SPEED}


def test_each_epoch_and_each_measurement_is_a_line(told):
    lines, test, valid = iter(told.out), by_epoch(told.folder, "loss/test"), by_epoch(told.folder, "loss/validation")
    logged = [line for line in read_metrics(told.folder) if "loss/net" in line]
    for epoch, step, shown in ((1, 7, logged[1]), (2, 14, logged[3])):  # the last of 6 and of 12
        losses = f"loss/net {shown['loss/net']:.4g}  loss/top {shown['loss/top']:.4g}"
        assert next(lines) == f"epoch {epoch}/2, step {step}  {losses}  images/s 720"
        measured = f"loss/test {test[epoch]:.4g}  loss/validation {valid[epoch]:.4g}"
        assert next(lines) == f"epoch {epoch}/2  {measured}  {MEASUREMENT:.1f} s"
    assert next(lines) == ""


def test_the_closing_lines_say_what_came_out_and_where_it_is(told):
    test, valid = by_epoch(told.folder, "loss/test"), by_epoch(told.folder, "loss/validation")
    best = min(valid, key=lambda epoch: valid[epoch])
    assert told.closing == {
        "run": str(told.folder),
        "last": f"test {test[2]:.3g}, validation {valid[2]:.3g}",
        "best": f"loss/validation {valid[best]:.4g} (epoch {best})",
        "speed": "720 images/s on cpu",
        "charts": f"tensorboard --logdir '{told.folder.parents[1]}' --host 127.0.0.1",
    }


def test_settings_that_no_file_of_the_run_can_hold_are_refused(tmp_path, capsys):
    line = refused(capsys, TOY.main, *TOY.tiny(tmp_path, tmp_path), "--out", str(tmp_path / "caf\udce9"))
    assert line.startswith("error: out: expected UTF-8, which config.yaml and TensorBoard can hold, got '")
    assert list(tmp_path.iterdir()) == []


def test_how_to_go_on_is_quoted_for_a_shell():
    method, cfg = SimpleNamespace(application="cbx", command="train"), RunConfig(name="it's one", out=Path("my runs"))
    words = ["python", "-m", "cbx.train", "--name", "it's one", "--resume", "--out", "my runs"]
    assert shlex.split(resume_command(cast(Any, method), cfg)) == words


def test_a_summary_tells_from_the_first_moment_on_that_the_run_is_under_way(told):
    first, second = told.summaries
    assert (first["state"], first["why"], first["epochs"], first["step"]) == (
        "running", None, {"done": 0, "wanted": 2}, 0)  # fmt: skip
    assert (first["last"], first["best"]) == ({}, None)
    assert (second["state"], second["epochs"]["done"], second["step"]) == ("running", 1, 7)
    assert second["last"]["loss/test"]["value"] == by_epoch(told.folder, "loss/test")[1]
    assert second["best"]["epoch"] == 1


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


def test_the_last_lines_name_a_test_metric_and_an_early_end(tmp_path, monkeypatch, capsys):
    values = iter((1.0, 2.0, 3.0))
    monkeypatch.setattr(ToyTask, "evaluate", lambda *_: {"loss/test": next(values)})
    flags = ["--best.by", "loss/test", "--best.allow_test_metric", "--best.patience", "2", "--epochs", "9"]
    trained_plainly(tmp_path, *flags)
    lines = capsys.readouterr().out.splitlines()
    assert "best     loss/test 1 (epoch 1, chosen by a value of test images)" in lines
    assert "stopped  after 3 of 9 epochs: 2 evaluations without a better value" in lines


def test_what_is_wrong_with_layers_and_what_was_rewound_is_told_once_more(tmp_path, monkeypatch, capsys):
    broken = ("0: use of a component is nothing", "0: something else", "1: another")
    monkeypatch.setattr(ToyTask, "health", lambda self, step: ({"health/0/usage_min": 0.125, "health/0/other_one": 2.0},
                                                              list(broken)))  # fmt: skip
    collapsed = iter(["has won"])
    monkeypatch.setattr(ToyTask, "detectors", [Detector(lambda _: next(collapsed, None), "steps")])
    folder = trained_plainly(tmp_path, "--guard.action", "rewind", "--epochs", "2")
    told = capsys.readouterr()
    closing = told.out.split("\n\n")[1].splitlines()
    assert "health 0  usage min 0.125, other one 2" in closing
    assert [line for line in closing if line.startswith("warning")] == [f"warning   {line}" for line in broken]
    assert "rewound   in step 3 to step 0: has won" in closing
    # While it runs: a line a subject, once a run; the rewind with its new rates.
    assert told.err.splitlines() == [
        "warning: rewound to step 0: has won; learning rates are now 0.5 of the first",
        f"warning: {broken[0]}", f"warning: {broken[2]}",
    ]  # fmt: skip
    rewinds = json.loads((folder / "summary.json").read_text())["rewinds"]
    assert rewinds == [{"step": 3, "to": 0, "cause": "has won"}]


def test_an_epoch_without_a_log_line_still_has_its_own(tmp_path, capsys):
    trained_plainly(tmp_path, "--log_every", "100")
    assert capsys.readouterr().out.splitlines()[0] == "epoch 1/1, step 8"


class Bar:
    """What stands in for the bar of a terminal."""

    made: ClassVar[list["Bar"]] = []
    write = staticmethod(lambda *arguments, **options: None)

    def __init__(self, **options: Any) -> None:
        self.options, self.updates, self.postfixes, self.closed = options, 0, [], False
        Bar.made.append(self)

    def update(self) -> None:
        self.updates += 1

    def set_postfix(self, values: dict[str, Any]) -> None:
        self.postfixes.append(values)

    def close(self) -> None:
        self.closed = True


def test_on_a_terminal_there_is_a_bar_instead_of_lines(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(loop, "tqdm", Bar)
    monkeypatch.setattr(Bar, "made", [])
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    folder = trained_plainly(tmp_path, "--epochs", "2")
    TOY.main(["--name", "run", "--out", str(tmp_path), "--resume", "--epochs", "3"])
    first, second = Bar.made
    assert (first.options["total"], first.options["initial"], first.options["disable"]) == (16, 0, False)
    assert (second.options["total"], second.options["initial"]) == (24, 16)
    assert {first.options["unit"], second.options["unit"]} == {"step"}
    assert (first.updates, second.updates, first.closed, second.closed) == (16, 8, True, True)
    logged = [line for line in read_metrics(folder) if "loss/net" in line]
    assert [postfix["epoch"] for postfix in first.postfixes] == [1, 1, 2, 2, 2]
    for postfix, line in zip(first.postfixes, logged, strict=False):
        assert postfix["loss/net"] == f"{line['loss/net']:.4g}"
        assert postfix["images/s"] == f"{line['time/images_per_second']:.4g}"
    assert not [line for line in capsys.readouterr().out.splitlines() if line.startswith("epoch")]


def test_without_a_terminal_there_is_no_bar(tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "tqdm", Bar)
    monkeypatch.setattr(Bar, "made", [])
    trained_plainly(tmp_path)
    assert [bar.options["disable"] for bar in Bar.made] == [True]


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
