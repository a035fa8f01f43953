"""Two processes over gloo, started as torchrun starts them."""

import re
from pathlib import Path

import torch
from run_comparison import assert_same, charted, final_state, logged

import cbgan.evaluate

PAIR = ["--epochs", "2", "--batch_size", "60", "--norm.init", "kmeans++", "--data.flip"]  # 8 steps an epoch of 2 x 60


def hashes(output: str) -> dict[str, str]:
    return dict(re.findall(r"rank (\d): ([0-9a-f]{128})", output))


def test_a_pair_learns_one_model_and_survives_the_death_of_a_worker(launch, tiny, tmp_path, capsys):
    left_alone = launch("killable.py", "never:0", *tiny, *PAIR, "--name", "whole", processes=2)
    assert left_alone.returncode == 0, left_alone.stderr
    weights = hashes(left_alone.stdout)
    assert weights.keys() == {"0", "1"}
    assert weights["0"] == weights["1"]
    assert left_alone.stdout.count("FID (classifier)") == 1  # one summary, not two
    theirs = tmp_path / "cbgan" / "whole"
    state = final_state(theirs)
    own = [rank["g"]["norm3.running_mean"] for rank in state["ranks"]]
    assert not torch.equal(*own)  # each rank's averages are those of its own images
    assert torch.equal(own[0], state["g"]["norm3.running_mean"])

    # Three batches of samples on two ranks, one has a batch less: the FID is what one process measures.
    measured = [line["metric/fid_classifier"] for line in logged(theirs) if "metric/fid_classifier" in line][-1]
    cbgan.evaluate.main(["--run", str(theirs)])
    assert f"FID (classifier) {measured:.4g} from 60 samples" in capsys.readouterr().out

    killed = launch("killable.py", "step@1:12", *tiny, *PAIR, "--name", "killed", processes=2)
    assert killed.returncode != 0
    resume = ["--name", "killed", "--out", str(tmp_path), "--resume"]
    alone = launch("killable.py", "never:0", *resume)
    assert alone.returncode == 2
    assert "world: the run used 2, this process has 1; start it with torchrun --nproc-per-node 2" in alone.stderr
    end = launch("killable.py", "never:0", *resume, processes=2)
    assert end.returncode == 0, end.stderr
    assert hashes(end.stdout) == weights
    ours = tmp_path / "cbgan" / "killed"
    assert_same(final_state(ours), state)
    assert logged(ours) == logged(theirs)
    assert charted(ours) == charted(theirs)


def test_a_mistake_is_told_once_and_ends_every_process(launch, tiny, tmp_path):
    (tmp_path / "cbgan" / "taken").mkdir(parents=True)
    refused = launch("cbgan.train", *tiny, "--name", "taken", processes=2)
    assert refused.returncode != 0
    assert refused.stderr.count("error: name: ") == 1
    assert 'Traceback (most recent call last):\n  File "' + str(Path(__file__).parents[2]) not in refused.stderr


def test_a_signal_to_one_rank_stops_all_after_the_same_step(launch, tiny, tmp_path):
    launch("killable.py", "never:0", *tiny, *PAIR, "--name", "whole", processes=2)
    stopped = launch("killable.py", "stop@1:5", *tiny, *PAIR, "--name", "run", processes=2)
    assert "stopped after step 5; go on with:" in stopped.stderr
    assert f"torchrun --nproc-per-node 2 -m cbgan.train --name run --resume --out {tmp_path}" in stopped.stderr
    end = launch("killable.py", "never:0", "--name", "run", "--out", str(tmp_path), "--resume", processes=2)
    assert end.returncode == 0, end.stderr
    assert_same(final_state(tmp_path / "cbgan" / "run"), final_state(tmp_path / "cbgan" / "whole"))


def test_a_loss_that_is_not_finite_on_one_rank_changes_no_rank(launch, tiny, tmp_path):
    spoiled = launch("killable.py", "loss@1:5", *tiny, *PAIR, "--name", "run", processes=2)
    assert spoiled.returncode != 0
    assert spoiled.stderr.count("error: loss/d is not finite in step 5;") == 1
    weights = hashes(spoiled.stdout)
    assert weights["0"] == weights["1"]
    # What was kept is the state after four good steps, which a run stopped there has too.
    stopped = launch("killable.py", "stop@0:4", *tiny, *PAIR, "--name", "four", processes=2)
    assert hashes(stopped.stdout) == weights
