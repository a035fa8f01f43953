"""How a run ends whose workers fail: one line, a status, and no process left."""

import multiprocessing
import os
import signal

import forked
import pytest
import torch
import toy
from run_comparison import assert_same_runs
from toy import ToyTask

from common.data import ImageSet, StepLoader, Stream
from common.runtime.errors import UsageError
from common.train.loop import train

IMAGES = ImageSet(torch.zeros(64, 3, 8, 8, dtype=torch.uint8), None, (), "toy", "train")


def unreadable(images, index, seed, *position):
    """Show images as they are, but for the tenth."""
    if 10 in index:
        raise UsageError("cat.png: cannot be read")
    return images


def killed(images, index, seed, *position):
    """End the process as the system does when memory is short."""
    if 10 in index:
        os.kill(os.getpid(), signal.SIGKILL)
    return images


def no_memory_to_share(images, index, seed, *position):
    """Show images that cannot be shared, as where /dev/shm is full."""

    class Full(torch.Tensor):
        def share_memory_(self):
            raise RuntimeError("unable to allocate shared memory(shm) for file </torch_1>: No space left on device")

    return images.as_subclass(Full)


FAILURES = {
    unreadable: (2, "error: cat.png: cannot be read"),
    killed: (1, "error: workers: DataLoader worker (pid"),
    no_memory_to_share: (4, "error: workers: the memory that processes share is used up"),
}


@pytest.mark.parametrize("view", FAILURES, ids=lambda view: view.__name__)
@pytest.mark.parametrize("workers", [1, 2])
def test_a_worker_that_fails_ends_the_command_in_one_line(view, workers):
    def main(_):
        for step in StepLoader({"train": Stream(IMAGES, 4, (view,))}, workers=workers).epoch(0, 0, 0):
            assert step
            print(*(child.pid for child in multiprocessing.active_children()), flush=True)

    status, start = FAILURES[view]
    done = forked.run(main)
    assert done.statuses == [status], done.err
    *more, line = done.err.splitlines()
    assert line.startswith(start)
    assert not more or view is killed  # a signal's error may meet torch while it closes a file
    for pid in set(done.out.split()):
        with pytest.raises(ProcessLookupError):
            os.kill(int(pid), 0)


class Failing(ToyTask):
    """Finds a training image unreadable in the second epoch."""

    def streams(self):
        def view(images, index, seed, *position):
            return unreadable(images, index if position[-1] == 1 else index[:0], seed)

        return super().streams() | {"train": Stream(self.images["train"], self.cfg.batch_size, (view,))}


def test_the_run_goes_on_from_its_last_epoch(tmp_path):
    flags = ["--out", str(tmp_path), "--batch_size", "120", "--data.workers", "1", "--epochs", "3"]
    whole = forked.run(toy.main, *flags, "--name", "whole")
    failed = forked.run(lambda argv: train(Failing, argv), *flags, "--name", "failed")
    assert (failed.statuses, failed.err) == ([2], "error: cat.png: cannot be read\n")
    resumed = forked.run(toy.main, "--out", str(tmp_path), "--name", "failed", "--resume")
    assert (whole.statuses, resumed.statuses) == ([0], [0]), resumed.err
    assert_same_runs(tmp_path / "toy" / "failed", tmp_path / "toy" / "whole")
