"""Several processes learn one model and measure what one would; torchrun itself starts those that are refused."""

import os
import subprocess
import sys
from pathlib import Path

import torch
from forked import run
from run_comparison import final_state, logged

import cbgan.evaluate
import cbgan.train


def test_a_pair_learns_one_model_and_measures_what_one_process_would(tiny, tmp_path, capsys):
    flags = ["--epochs", "1", "--batch_size", "60", "--norm.init", "kmeans++", "--data.flip"]  # 8 steps of 2 x 60
    pair = run(cbgan.train.main, *tiny, *flags, "--name", "pair", ranks=2)
    assert pair.statuses == [0, 0], pair.err
    assert len(set(pair.weights)) == 1
    assert pair.out.count("FID (classifier)  first") == 1  # one summary, not two
    folder = tmp_path / "cbgan" / "pair"
    state = final_state(folder)
    own = [rank["networks"]["g"]["norm3.running_mean"] for rank in state["ranks"]]
    assert not torch.equal(*own)  # each rank's averages are those of its own images
    assert torch.equal(own[0], state["networks"]["g"]["norm3.running_mean"])
    # Three batches of samples on two ranks, one has a batch less: the FID is what one process measures.
    measured = [line["metric/fid_classifier"] for line in logged(folder) if "metric/fid_classifier" in line][-1]
    cbgan.evaluate.main(["--run", str(folder)])
    assert f"FID (classifier) {measured:.4g} from 60 samples" in capsys.readouterr().out


def test_a_mistake_is_told_once_and_ends_every_process(tiny, tmp_path):
    (tmp_path / "cbgan" / "taken").mkdir(parents=True)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    refused = subprocess.run(
        [*torchrun, "-m", "cbgan.train", *tiny, "--name", "taken"], capture_output=True, text=True, timeout=300,
        check=False, env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert refused.returncode != 0
    assert refused.stderr.count("error: name: ") == 1
    assert 'Traceback (most recent call last):\n  File "' + str(Path(__file__).parents[2]) not in refused.stderr


def test_a_conditional_pair_asks_for_the_same_classes_as_one_process(tiny, tmp_path, capsys):
    flags = ["--norm.kind", "scb", "--norm.num_components", "10", "--epochs", "1", "--name", "pair"]
    pair = run(cbgan.train.main, *tiny, *flags, ranks=2)
    assert pair.statuses == [0, 0], pair.err
    assert len(set(pair.weights)) == 1
    folder = tmp_path / "cbgan" / "pair"
    line = [line for line in logged(folder) if "metric/fid_classifier" in line][-1]
    assert 0 <= line["metric/class_accuracy"] <= 1
    cbgan.evaluate.main(["--run", str(folder)])
    assert f"FID (classifier) {line['metric/fid_classifier']:.4g} from 60 samples" in capsys.readouterr().out
