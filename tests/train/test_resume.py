"""What every run promises, however it is interrupted: in all ways by the toy application, once by each real one."""

import json
import os
import signal
from pathlib import Path

import pytest
from applications import APPLICATIONS, Application
from forked import Hit, run
from refusals import refused
from run_comparison import assert_same_runs, final_state

from common.runtime.errors import Interrupted, Stopped
from common.train.checkpoint import load
from common.train.logging import read_metrics
from common.train.run_dir import RunFolder

TOY = APPLICATIONS["toy"]
AVERAGED = ["--ema_decay", "0.9", "--grad_accum_steps", "2"]
INTERRUPTED = [
    # application, workers, ranks, options
    ("toy", 0, 1, []),
    ("toy", 2, 1, AVERAGED),
    ("toy", 0, 2, AVERAGED),
    ("toy", 2, 2, []),
    ("toy", 0, 1, ["--precision", "fp16"]),
    ("cbgan", 2, 2, ["--norm.kind", "mn", "--ema_decay", "0.9"]),
    ("cbcls", 2, 2, ["--norm.kind", "mn", "--grad_accum_steps", "2"]),
    ("cbda", 2, 2, AVERAGED),
]


@pytest.mark.parametrize(("application", "workers", "ranks", "options"), INTERRUPTED, indirect=["application"], ids=str)
def test_interrupted_and_resumed_equals_left_alone(application, tiny, tmp_path, workers, ranks, options):
    given = [*tiny, "--epochs", "2", "--batch_size", str(application.batch_size // ranks)]
    given += ["--data.workers", str(workers), *options]
    whole = run(application.main, *given, "--name", "whole", ranks=ranks)
    assert whole.statuses == [0] * ranks, whole.err
    assert len(set(whole.weights)) == 1  # the ranks learnt one model
    assert len(whole.weights) == ranks
    # Stopped in the middle of an epoch between two log lines, then killed while a checkpoint is written (which is the
    # same for all applications) and in a measurement.
    last = ranks - 1
    hits = [Hit(f"step:5@{last}", signal.SIGTERM), Hit("save:1@0"), Hit(f"evaluation:1@{last}")]
    argv = [*given, "--name", "run"]
    for hit in hits if application is TOY else hits[::2]:
        ended = run(application.main, *argv, ranks=ranks, hit=hit)
        assert (143 if hit.signum == signal.SIGTERM else -signal.SIGKILL) in ended.statuses, (hit, ended.err)
        argv = ["--name", "run", "--out", str(tmp_path), "--resume"]
    end = run(application.main, *argv, ranks=ranks)
    assert end.statuses == [0] * ranks, end.err
    assert end.weights == whole.weights
    assert_same_runs(tmp_path / application.name / "run", tmp_path / application.name / "whole")


@pytest.mark.parametrize(
    ("moment", "signum"), [("step:8", signal.SIGINT), ("step:13", signal.SIGUSR1), ("evaluation:1", signal.SIGTERM)]
)
def test_stopped_by_a_signal_and_resumed_equals_left_alone(application, tiny, tmp_path, cache, moment, signum):
    # Step 8 ends an epoch, 13 falls between two log lines.
    whole = left_alone(application, cache)
    stopped = run(application.main, *tiny, "--epochs", "2", "--name", "run", hit=Hit(moment, signum))
    assert stopped.statuses == [128 + signum], stopped.err
    step = moment.split(":")[1] if moment.startswith("step") else "8"
    resume = f"python -m toy.train --name run --resume --out {tmp_path}"
    assert f"stopped after step {step}; go on with:\n  {resume}" in stopped.err
    assert json.loads((tmp_path / application.name / "run" / "summary.json").read_text())["state"] == "stopped"
    application.main(["--name", "run", "--out", str(tmp_path), "--resume"])
    assert_same_runs(tmp_path / application.name / "run", whole)


def left_alone(application: Application, cache: Path) -> Path:
    """Return the folder of a run of two epochs that nothing disturbed, trained once for all tests."""
    out = cache / "left alone"
    if not (out / application.name / "whole" / "summary.json").exists():
        application.main([*application.tiny(out, cache), "--epochs", "2", "--name", "whole"])
    return out / application.name / "whole"


def test_of_two_ranks_both_stop_after_the_same_step_or_say_that_the_other_is_gone(application, tiny, tmp_path):
    pair = [*tiny, "--epochs", "1", "--batch_size", str(application.batch_size // 2), "--name", "run"]
    stopped = run(application.main, *pair, ranks=2, hit=Hit("step:5@1", signal.SIGTERM))
    assert stopped.statuses == [143, 143], stopped.err
    assert stopped.err.count("stopped after step 5; go on with:") == 1
    assert "torchrun --nproc-per-node 2 -m toy.train --name run --resume" in stopped.err
    assert final_state(tmp_path / "toy" / "run")["run"]["step"] == 5
    resume = ["--name", "run", "--out", str(tmp_path), "--resume"]
    alone = run(application.main, *resume)
    assert alone.statuses == [2]
    assert "world: the run used 2, this process has 1; start it with torchrun --nproc-per-node 2" in alone.err
    killed = run(application.main, *resume, ranks=2, hit=Hit("step:1@1"))
    assert killed.statuses == [1, -signal.SIGKILL]
    (line,) = [line for line in killed.err.splitlines() if not line.startswith("warning: ")]
    assert line.startswith("error: world: another process of this run has ended; ")


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_loss_that_is_not_finite_on_one_rank_stops_all_and_changes_no_rank(application, tiny, tmp_path, ranks):
    given = [*tiny, "--epochs", "1", "--batch_size", str(application.batch_size // ranks)]
    hit = Hit(f"step:5@{ranks - 1}", loss=application.loss)
    spoiled = run(application.main, *given, "--name", "spoiled", ranks=ranks, hit=hit)
    assert spoiled.statuses == [3] * ranks, spoiled.err
    assert spoiled.err.count(f"error: loss/{application.loss} is not finite in step 5;") == 1
    summary = json.loads((tmp_path / application.name / "spoiled" / "summary.json").read_text())
    assert summary["state"] == "failed"
    assert "is not finite in step 5" in summary["why"]
    # What was kept is the state after four good steps, which a run stopped there has too.
    four = run(application.main, *given, "--name", "four", ranks=ranks, hit=Hit("step:4@0", signal.SIGINT))
    assert spoiled.weights == four.weights
    assert len(set(four.weights)) == 1


def listing(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_what_a_finished_run_refuses(application, tiny, tmp_path, capsys):
    application.main([*tiny, "--epochs", "1", "--name", "run"])
    before = listing(tmp_path)
    resume = ["--name", "run", "--out", str(tmp_path), "--resume"]
    assert "exists; add --resume" in refused(capsys, application.main, *tiny, "--name", "run")
    ghost = ["--out", str(tmp_path), "--name", "rnu", "--resume"]
    assert "runs there: run" in refused(capsys, application.main, *ghost)
    assert "lr: the run has 0.001, got 0.1" in refused(capsys, application.main, *resume, "--lr", "0.1")
    assert "seed: the run has 0, got 1" in refused(capsys, application.main, *resume, "--seed", "1")
    assert "init_from" in refused(capsys, application.main, *resume, "--init_from", "somewhere.pt")
    assert listing(tmp_path) == before
    held = RunFolder.reopen(tmp_path / application.name / "run")
    try:  # a lock is a process's own, so the second one has to be another
        second = run(application.main, *resume)
    finally:
        held.close()
    assert second.statuses == [2]
    assert "in use by another process" in second.err
    for path in (tmp_path / application.name / "run" / "checkpoints").iterdir():
        os.truncate(path, 100)
    assert "every checkpoint" in refused(capsys, application.main, *resume)


def test_a_damaged_newest_checkpoint_costs_only_the_steps_since_the_one_before(
    application, tiny, tmp_path, cache, capsys
):
    whole = left_alone(application, cache)
    application.main([*tiny, "--epochs", "2", "--name", "run"])
    newest = tmp_path / application.name / "run" / "checkpoints" / "step-00000016.pt"
    newest.write_bytes(newest.read_bytes()[:-5000])
    capsys.readouterr()
    application.main(["--name", "run", "--out", str(tmp_path), "--resume"])
    assert "damaged checkpoint passed over" in capsys.readouterr().err
    assert_same_runs(newest.parents[1], whole)


def test_resume_auto_starts_a_run_goes_on_with_it_and_makes_it_longer(application, tiny, tmp_path, cache):
    command = [*tiny, "--name", "run", "--resume", "auto"]
    first = run(application.main, *command, "--epochs", "1", hit=Hit("step:5", signal.SIGTERM))
    assert first.statuses == [143]
    for epochs in ("1", "2", "2"):  # the last time there is nothing left to do
        application.main([*command, "--epochs", epochs])
    assert_same_runs(tmp_path / "toy" / "run", left_alone(application, cache))
    assert "epochs: 2" in (tmp_path / "toy" / "run" / "config.yaml").read_text()


@pytest.mark.parametrize("application", APPLICATIONS, indirect=True)
def test_a_dry_run_writes_nothing_and_states_the_cost(application, tiny, tmp_path, capsys):
    before = sorted(tmp_path.iterdir())
    application.main([*tiny, "--dry_run"])
    out = capsys.readouterr().out
    for part in ("parameters", "MiB", "ms a step", "8 steps an epoch"):
        assert part in out
    assert sorted(tmp_path.iterdir()) == before


def test_initial_weights_come_from_another_run_all_of_them_but_not_its_position(application, tiny, tmp_path, capsys):
    application.main([*tiny, "--epochs", "1", "--name", "first"])
    source = tmp_path / application.name / "first" / "checkpoints" / "step-00000008.pt"
    flags = [*tiny, "--epochs", "1", "--init_from", str(source)]
    application.main([*flags, "--name", "second", "--lr", "1e-30", "--weight_decay", "0"])
    second, first = load(source.parents[2] / "second" / "checkpoints" / "step-00000008.pt"), load(source)
    assert second["run"]["step"] == 8
    kept = 0
    for name, network in first["networks"].items():
        for key, value in network.items():
            if key.endswith("weight"):
                kept += 1
                assert (second["networks"][name][key] - value).abs().max() < 1e-20, (name, key)
    assert kept >= 2 * len(first["networks"]) - 1
    assert next(line["step"] for line in read_metrics(source.parents[2] / "second")) <= 3
    os.truncate(source, 1000)
    assert "init_from" in refused(capsys, application.main, *flags, "--name", "third")
    assert not (source.parents[2] / "third").exists()


def test_a_signal_before_the_run_began_writes_nothing(application, tiny, tmp_path, monkeypatch):
    made = application.kind.__init__

    def signalled(self, cfg, images, context):
        made(self, cfg, images, context)
        os.kill(os.getpid(), signal.SIGINT)
        if context.should_stop():
            raise Interrupted

    monkeypatch.setattr(application.kind, "__init__", signalled)
    with pytest.raises(Stopped, match="before the run began") as stopped:
        application.main(tiny)
    assert stopped.value.signum == signal.SIGINT
    assert list(tmp_path.iterdir()) == []
