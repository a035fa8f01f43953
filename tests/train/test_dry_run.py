"""Steps of a run that is none are those that the run would make."""

from types import SimpleNamespace

import pytest
import torch
from applications import APPLICATIONS
from fourth import Fourth, FourthConfig
from run_comparison import assert_same, final_state

from common.runtime.distributed import Env
from common.runtime.errors import NonFiniteError
from common.train import dry_run as module
from common.train.dry_run import Steps, Timed
from common.train.setup import prepare

CPU = torch.device("cpu")


def made() -> Steps:
    cfg = FourthConfig(epochs=2, ema=0.5, batch_size=250).resolved()
    return Steps(cfg, *prepare(Fourth, cfg, Fourth.load(cfg), CPU, Env()))


def test_they_leave_what_training_leaves(tmp_path):
    flags = ["--epochs", "2", "--ema", "0.5", "--batch_size", "250", "--out", str(tmp_path), "--name", "run"]
    APPLICATIONS["fourth"].main(flags)
    trained, steps = final_state(tmp_path / "fourth" / "run"), made()
    assert trained["at"]["step"] == 2 * 4  # the second epoch's batches are others
    for _ in range(8):
        steps.make()
    assert steps.parts.at["step"] == 8
    for group in ("networks", "averages", "optimizers"):
        ours = {name: part.state_dict() for name, part in getattr(steps.parts, group).items()}
        assert_same(ours, trained[group], group)
    steps.make()  # and on, beyond the last epoch


def test_a_loss_that_is_not_finite_is_told():
    steps = made()
    with torch.no_grad():
        steps.parts.networks["top"].get_parameter("bias").fill_(torch.nan)
    with pytest.raises(NonFiniteError, match="loss/top is not finite in step 1"):
        steps.make()


def test_time_is_told_apart_by_loss(monkeypatch):
    """A clock that a loss's update moves by 1 and 2 seconds, and nothing else."""
    clock = [5.0]
    monkeypatch.setattr(module, "time", SimpleNamespace(perf_counter=lambda: clock[0]))
    steps = made()
    descend = module.Update.descend

    def slow(self, name, loss):
        descend(self, name, loss)
        clock[0] += {"net": 1.0, "top": 2.0}[name]

    monkeypatch.setattr(module.Update, "descend", slow)
    for began in (5.0, 8.0):
        update = steps.make(Timed)
        assert isinstance(update, Timed)
        assert update.seconds == {"net": 1.0, "top": 2.0}
        assert update.began == began
