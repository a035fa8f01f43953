"""Processes of a run that are left alone: by the others, and by torchrun."""

import os
import select
import time
import warnings
from datetime import timedelta

import pytest
import torch

from common.runtime import distributed
from common.runtime.errors import RankError

CPU = torch.device("cpu")


@pytest.mark.parametrize("rank", ["0", "1"])
def test_a_process_that_no_other_meets_says_so(monkeypatch, rank):
    for name, value in {"RANK": rank, "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, "0" if (name, rank) == ("MASTER_PORT", "0") else value)
    monkeypatch.setattr(distributed, "_MEETING", timedelta(seconds=1))
    line = r"^world: the 2 processes of this run did not all meet within 0:00:01 \(.+\); "
    with pytest.raises(RankError, match=line), distributed.group(CPU):
        pass
    assert not torch.distributed.is_initialized()


def test_a_process_that_torchrun_has_left_ends(monkeypatch):
    for name, value in {"RANK": "1", "WORLD_SIZE": "2", "TORCHELASTIC_RUN_ID": "none"}.items():
        monkeypatch.setenv(name, value)
    (waiting, waits), (ends, lives) = os.pipe(), os.pipe()

    def stand(*_args, **_options):
        os.write(waits, b"!")
        time.sleep(100)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # forks beside threads: none of them holds a lock
        torchrun = os.fork()
        if torchrun == 0:
            if os.fork() == 0:
                monkeypatch.setattr(distributed, "rendezvous", stand)
                with distributed.group(CPU):
                    os._exit(1)
            os.read(waiting, 1)
            os._exit(0)
    os.close(lives)
    assert os.waitpid(torchrun, 0)[1] == 0
    ready, _, _ = select.select([ends], [], [], 60)
    assert ready  # nobody has the other end open any more
    assert os.read(ends, 1) == b""
