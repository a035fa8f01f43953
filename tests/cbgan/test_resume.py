"""A run that is killed anywhere and resumed equals the one that was left alone, bit for bit."""

import os
import signal

import pytest
from run_comparison import assert_same, charted, final_state, logged

import cbgan.train
from cbgan.evaluation import Evaluation
from common.errors import Stopped


@pytest.mark.parametrize(("workers", "norm"), [("0", "ucb"), ("2", "ucb"), ("0", "mn")])
def test_killed_three_times_and_resumed_equals_left_alone(launch, tiny, tmp_path, workers, norm):
    options = [
        "--epochs",
        "3",
        "--norm.kind",
        norm,
        "--norm.init",
        "kmeans++",
        "--data.flip",
        "--data.workers",
        workers,
    ]
    whole = launch("killable.py", "never:0", *tiny, *options, "--name", "whole")
    assert whole.returncode == 0, whole.stderr

    # 8 steps an epoch: killed in the middle of the first, then while a checkpoint is written, then during FID.
    killed = launch("killable.py", "step:6", *tiny, *options, "--name", "killed")
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    resume = ["--name", "killed", "--out", str(tmp_path), "--resume"]
    for moment in ("save:2", "fid:5"):
        again = launch("killable.py", moment, *resume)
        assert again.returncode == -signal.SIGKILL, (moment, again.stderr)
    end = launch("killable.py", "never:0", *resume)
    assert end.returncode == 0, end.stderr

    ours, theirs = tmp_path / "cbgan" / "killed", tmp_path / "cbgan" / "whole"
    assert_same(final_state(ours), final_state(theirs))
    assert logged(ours) == logged(theirs)
    assert charted(ours) == charted(theirs)
    for picture in (theirs / "samples").iterdir():
        assert (ours / "samples" / picture.name).read_bytes() == picture.read_bytes()


@pytest.mark.parametrize("moment", ["step 1", "step 3", "step 8", "step 13", "fid 2", "fid 6"])
def test_stopped_by_a_signal_and_resumed_equals_left_alone(tiny, tmp_path, monkeypatch, moment):
    # Steps 3 and 8 are those of a log line and of an epoch's end; 1 and 13 fall between two log lines.
    cbgan.train.main([*tiny, "--epochs", "2", "--name", "whole"])
    owner, name = (cbgan.train, "step") if moment.startswith("step") else (Evaluation, "sample")
    sound, calls, at = getattr(owner, name), 0, int(moment.split()[1])

    def interrupted(*args):
        nonlocal calls
        calls += 1
        if calls == at:
            os.kill(os.getpid(), signal.SIGINT)
        return sound(*args)

    monkeypatch.setattr(owner, name, interrupted)
    with pytest.raises(Stopped) as stopped:
        cbgan.train.main([*tiny, "--epochs", "2", "--name", "run"])
    assert stopped.value.signum == signal.SIGINT
    if moment.startswith("step"):
        assert f"stopped after step {at};" in str(stopped.value)
    cbgan.train.main(["--name", "run", "--out", str(tmp_path), "--resume"])
    ours, theirs = tmp_path / "cbgan" / "run", tmp_path / "cbgan" / "whole"
    assert_same(final_state(ours), final_state(theirs))
    assert logged(ours) == logged(theirs)


def test_a_finished_run_can_be_made_longer(tiny, tmp_path):
    cbgan.train.main([*tiny, "--epochs", "2", "--name", "whole"])
    cbgan.train.main([*tiny, "--epochs", "1", "--name", "run"])
    cbgan.train.main(["--name", "run", "--out", str(tmp_path), "--resume", "--epochs", "2"])
    ours, theirs = tmp_path / "cbgan" / "run", tmp_path / "cbgan" / "whole"
    assert_same(final_state(ours), final_state(theirs))
    assert logged(ours) == logged(theirs)
    assert "epochs: 2" in (ours / "config.yaml").read_text()


def test_a_damaged_newest_checkpoint_is_reported_and_costs_only_the_steps_since_the_one_before(tiny, tmp_path, capsys):
    cbgan.train.main([*tiny, "--epochs", "2", "--name", "run"])
    folder = tmp_path / "cbgan" / "run"
    before, lines = final_state(folder), logged(folder)
    newest = folder / "checkpoints" / "step-00000016.pt"
    newest.write_bytes(newest.read_bytes()[:-5000])
    cbgan.train.main(["--name", "run", "--out", str(tmp_path), "--resume"])
    assert "damaged checkpoint passed over" in capsys.readouterr().err
    assert_same(final_state(folder), before)
    assert logged(folder) == lines
