"""The steps of a dry run are those that the run would make."""

from types import SimpleNamespace

import torch
from applications import APPLICATIONS
from run_comparison import assert_same, final_state
from toy import ToyConfig, ToyTask

from common.train import dry_run as module
from common.train.dry_run import Steps, Timed
from common.train.task import TrainContext

CPU = torch.device("cpu")


def made() -> Steps:
    cfg = ToyConfig(epochs=2, ema_decay=0.5, batch_size=250).resolved()
    return Steps(ToyTask(cfg, ToyTask.load_images(cfg), TrainContext(CPU)))


def test_they_leave_what_training_leaves(tmp_path):
    flags = ["--epochs", "2", "--ema_decay", "0.5", "--batch_size", "250", "--out", str(tmp_path), "--name", "run"]
    APPLICATIONS["toy"].main(flags)
    trained, steps = final_state(tmp_path / "toy" / "run"), made()
    assert trained["run"]["step"] == 2 * 4  # the second epoch's batches are others
    for _ in range(8):
        steps.make()
    assert steps.state.run.step == 8
    for group in ("networks", "averages", "optimizers"):
        ours = {name: part.state_dict() for name, part in getattr(steps.state, group).items()}
        assert_same(ours, trained[group], group)
    steps.make()  # and on, beyond the last epoch


def test_time_is_taken_by_loss(monkeypatch):
    """A clock that a loss's update moves by 1 and 2 seconds, and nothing else."""
    clock = [5.0]
    monkeypatch.setattr(module, "time", SimpleNamespace(perf_counter=lambda: clock[0]))
    steps = made()
    optimize = module.Step.optimize

    def slow(self, name, loss, *, frozen=()):
        metrics = optimize(self, name, loss, frozen=frozen)
        clock[0] += {"net": 1.0, "top": 2.0}[name]
        return metrics

    monkeypatch.setattr(module.Step, "optimize", slow)
    for began in (5.0, 8.0):
        step = steps.make(Timed)
        assert isinstance(step, Timed)
        assert step.seconds == {"net": 1.0, "top": 2.0}
        assert step.began == began
