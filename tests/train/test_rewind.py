"""A run that is found collapsed goes back, draws anew from there, and does so alike however it is interrupted."""

import json
import math
import signal
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from applications import APPLICATIONS
from forked import Hit, run
from run_comparison import assert_same_runs, final_state, logged
from tasks import made
from toy import ToyTask

from common.runtime.errors import NonFiniteError
from common.runtime.seeding import derive
from common.train.loop import Trainer
from common.train.step import Metrics
from common.train.task import Detector

TOY = APPLICATIONS["toy"]
LIMIT = 3.0
WILD = ["--lr", "2", "--guard.action", "rewind", "--guard.lr_factor", "0.1", "--log_every", "1", "--epochs", "3"]


@pytest.fixture(autouse=True)
def collapses(monkeypatch):
    """Call a loss above 3 a collapse: a learning rate of 2 leads there, a tenth of it does not."""

    def high_loss(means: Mapping[str, float]) -> str | None:
        return f"the loss is {means['loss/net']:.3g}" if means["loss/net"] > LIMIT else None

    monkeypatch.setattr(ToyTask, "detectors", [Detector(high_loss, "steps")])


@pytest.fixture
def flags(tmp_path, cache) -> list[str]:
    return [*TOY.tiny(tmp_path, cache), *WILD]


def test_it_goes_back_with_a_lower_rate_and_other_draws(flags, tmp_path, capsys, monkeypatch):
    drawn: list[tuple[int, int, list[int]]] = []
    train_step = Trainer.train_step

    def step(self: Trainer, batches: Any) -> None:
        drawn.append((self.state.run.step, self.state.seed, batches[0]["train"].index.tolist()))
        train_step(self, batches)

    monkeypatch.setattr(Trainer, "train_step", step)
    TOY.main([*flags, "--name", "run"])
    folder = tmp_path / "toy" / "run"
    (rewound,) = final_state(folder)["run"]["rewinds"]
    assert rewound["to"] % 8 == 0
    assert rewound["cause"].startswith("the loss is ")
    again = next(i for i, (at, *_) in enumerate(drawn) if i and at <= drawn[i - 1][0])
    assert drawn[again][0] == rewound["to"]
    first = next(i for i, (at, *_) in enumerate(drawn) if at == rewound["to"])
    assert (drawn[first][1], drawn[again][1]) == (0, derive(0, "attempt", 1))
    assert drawn[first][2] != drawn[again][2]
    lines = logged(folder)
    steps = [line["step"] for line in lines if "loss/net" in line]
    assert steps == list(range(1, 25))  # what was logged of the collapse is cut away
    assert [line["schedule/lr"] for line in lines if "loss/net" in line][-1] == pytest.approx(0.2)
    assert "rewound to step" in capsys.readouterr().err
    assert json.loads((folder / "summary.json").read_text())["rewinds"] == [rewound]


def test_interrupted_anywhere_it_equals_the_run_left_alone(flags, tmp_path):
    whole = run(TOY.main, *flags, "--name", "whole")
    assert whole.statuses == [0], whole.err
    (rewound,) = final_state(tmp_path / "toy" / "whole")["run"]["rewinds"]
    resume = ["--name", "run", "--out", str(tmp_path), "--resume"]
    # Stopped just before the collapse, in a checkpoint's write, and killed when it has gone back.
    command = [*flags, "--name", "run"]
    for hit in (Hit(f"step:{rewound['step']}", signal.SIGTERM), Hit("save:1"), Hit("step:3")):
        done = run(TOY.main, *command, hit=hit)
        assert done.statuses in ([-signal.SIGKILL], [143]), done.err
        command = resume
    end = run(TOY.main, *resume)
    assert end.weights == whole.weights
    assert_same_runs(tmp_path / "toy" / "run", tmp_path / "toy" / "whole")


def test_after_so_many_rewinds_it_stops_with_the_cause(flags, tmp_path):
    before = threading.enumerate()
    with pytest.raises(NonFiniteError, match=r"^collapsed in step \d+ after 2 rewinds: the loss is") as _held:
        TOY.main([*flags, "--name", "run", "--guard.lr_factor", "1", "--guard.max_rewinds", "2"])
    ours = set(threading.enumerate()) - set(before)
    assert not [thread for thread in ours if thread.name.startswith("batches")]  # though it is held
    summary = json.loads((tmp_path / "toy" / "run" / "summary.json").read_text())
    assert summary["state"] == "failed"
    assert len(summary["rewinds"]) == 2


def test_a_collapse_that_is_measured_goes_back_to_what_was_measured_and_good(flags, tmp_path, monkeypatch):
    """At the end of the second epoch its checkpoint is there already, and holds the collapse."""
    calm = ["--lr", "0.01", "--checkpoint_every", "1"]
    causes = iter([None, None, "few different", None, None, None, None])
    asked: list[set[str]] = []

    def find(values: Mapping[str, float]) -> str | None:
        asked.append(set(values))
        return next(causes) if values else None

    monkeypatch.setattr(ToyTask, "detectors", [Detector(find, "evaluation")])
    monkeypatch.setattr(ToyTask, "health", lambda self, step: ({"health/x": 1.0} if step == 16 else {}, []))
    TOY.main([*flags, *calm, "--name", "run"])
    folder = tmp_path / "toy" / "run"
    assert {"health/x"} in asked  # the layers' health is asked for too
    state = final_state(folder)
    assert state["run"]["rewinds"] == [{"step": 16, "to": 8, "cause": "few different"}]
    assert [line["epoch"] for line in logged(folder) if "loss/test" in line] == [1, 2, 3]
    assert state["run"]["last_evaluated_checkpoint"] == 24


def test_it_only_warns_of_the_first_cause_or_stops_where_asked(flags, tmp_path, monkeypatch, capsys):
    causes = iter(["dead", None, "dead again", None, None, None])
    monkeypatch.setattr(ToyTask, "detectors", [Detector(lambda _: next(causes, None), "evaluation")])
    TOY.main([*flags, "--name", "run", "--guard.action", "warn", "--lr", "0.01"])
    summary = json.loads((tmp_path / "toy" / "run" / "summary.json").read_text())
    assert summary["collapsed"] == {"step": 8, "cause": "dead"}
    printed, remedy = capsys.readouterr(), "dead; try a lower --lr, or --guard.action rewind"
    assert printed.err.count("warning: collapsed in step") == 1
    assert f"warning: collapsed in step 8: {remedy}\n" in printed.err
    assert f"collapsed  in step 8: {remedy}\n" in printed.out
    causes = iter(["dead"])
    with pytest.raises(NonFiniteError, match=r"^collapsed in step 8: dead; the checkpoint before stands"):
        TOY.main([*flags, "--name", "stopped", "--guard.action", "stop", "--lr", "0.01"])
    summary = json.loads((tmp_path / "toy" / "stopped" / "summary.json").read_text())
    assert (summary["state"], summary["collapsed"]) == ("failed", None)
    assert "dead" in summary["why"]
    assert final_state(tmp_path / "toy" / "stopped")["run"]["step"] == 0


def test_what_is_not_finite_rewinds_too_and_nothing_of_it_stays(flags, tmp_path, monkeypatch):
    calls, train_step = 0, ToyTask.train_step

    def spoiled(self: ToyTask, step: Any) -> Metrics:
        nonlocal calls
        calls += 1
        optimize = step.optimize
        if calls == 11:
            step.optimize = lambda name, loss: optimize(name, lambda micro: loss(micro) * math.nan)
        return train_step(self, step)

    monkeypatch.setattr(ToyTask, "train_step", spoiled)
    TOY.main([*flags, "--lr", "0.01", "--guard.max_rewinds", "1", "--name", "run"])
    state = final_state(tmp_path / "toy" / "run")
    assert [(r["step"], r["to"]) for r in state["run"]["rewinds"]] == [(11, 8)]
    assert state["run"]["step"] == 24
    for network in state["networks"].values():
        assert all(torch.isfinite(value).all() for value in network.values())


@pytest.mark.parametrize(
    ("name", "good", "bad"),
    [("cbgan", {"loss/d": 1e-3}, {"loss/d": 9e-4}), ("cbcls", {"loss/train": 4.6}, {"loss/train": 4.61})],
)
def test_each_application_knows_a_collapse(name, good, bad, cache):
    """A discriminator below 0.001 has won; a classifier of 10 classes above 2 log 10 = 4.605 is worse than a guess."""
    kind = APPLICATIONS[name].kind
    cfg = kind.config(cache=Path(cache))
    task = made(kind, cfg)
    finds = [detector.find for detector in task.detectors if detector.reads == "steps"]
    assert [find(good) for find in finds] == [None]
    assert all(find(bad) for find in finds)
