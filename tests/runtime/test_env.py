"""Two processes over gloo, without a launcher: each asserts what it finds and prints that it is done."""

import os
import select
import socket
import subprocess
import sys
import time
import warnings
from datetime import timedelta

import pytest
import torch
from torch import nn

from common.runtime import distributed
from common.runtime.distributed import Env, group, local_device, mean_over_ranks, smallest_over_ranks
from common.runtime.errors import RankError

CPU = torch.device("cpu")
PAIR = """
import os
import warnings
import torch
from torch import nn
from common.runtime.errors import UsageError
from common.runtime.distributed import group, mean_over_ranks, smallest_over_ranks

warnings.filterwarnings("error", module=r"common\\.|__main__")
with group(torch.device("cpu")) as env:
    rank = env.rank
    assert (env.rank, env.world, env.first) == (int(os.environ["RANK"]), 2, rank == 0)
{body}
assert not torch.distributed.is_initialized()
print("done")
"""


def pair(body: str) -> None:
    """Run the lines on both ranks, with our warnings as errors."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    script = PAIR.format(body="\n".join("    " + line for line in body.splitlines()))
    shared = os.environ | {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", script],
            env=shared | {"RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        told = [process.communicate(timeout=120) for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [out for out, _ in told] == ["done\n"] * 2, [err for _, err in told]


def test_numbers_and_values_meet_and_rank_0_leads(tmp_path):
    pair(f"""
import pathlib, time
assert env.largest(rank - 5) == -4
assert env.mean(dict(a=float(rank), b=1 + 1e-12 * rank)) == dict(a=0.5, b=1 + 5e-13)
assert env.mean(dict()) == dict()
assert env.gather(dict(rank=rank)) == [dict(rank=0), dict(rank=1)]
rows = torch.full((3, 2), float(rank)).T
assert [part.tolist() for part in env.stacked(rows)] == [[[0.0] * 3] * 2, [[1.0] * 3] * 2]
numbers = torch.tensor([rank, -rank])
smallest_over_ranks(numbers)
assert numbers.tolist() == [0, -1]
own = torch.tensor([1.0 + rank, 5.0])
assert mean_over_ranks(own).tolist() == [1.5, 5.0]
assert own.tolist() == [1.0 + rank, 5.0]

calls = []
assert env.on_rank0(lambda: calls.append(rank) or rank + 7) == 7
assert calls == ([0] if rank == 0 else [])

def refuse():
    raise UsageError("told by " + str(rank))

for way in (env.on_rank0, env.rank0_first):
    try:
        way(refuse)
    except UsageError as error:
        assert str(error) == "told by 0"
    else:
        raise AssertionError

file = pathlib.Path({str(tmp_path / "cache")!r})

def use():  # the others find what rank 0 has made
    if rank == 0:
        time.sleep(0.5)
        file.write_text("ready")
    return file.read_text() + str(rank)

assert env.rank0_first(use) == "ready" + str(rank)
""")


def test_a_wrapped_network_averages_gradients_and_leaves_each_rank_its_buffers_unless_they_are_lent():
    """Of y = w x on x = 1 and x = 3, dy/dw is 2 on both; BatchNorm's averages are those of the rank's own images."""
    pair("""
network = nn.Sequential(nn.Linear(1, 1, bias=False), nn.BatchNorm1d(1, momentum=1.0))
network.register_buffer("own", torch.tensor([rank + 5.0]))
with torch.no_grad():
    network[0].weight.fill_(1.0 + rank)  # which the first rank settles
    network[1].running_var.fill_(rank + 2.0)
wrapped = env.wrap(network)
assert network[0].weight.item() == 1.0
assert (network.own.item(), network[1].running_var.item()) == (rank + 5.0, rank + 2.0)
x = torch.tensor([[1.0], [1.0]]) * (1 + 2 * rank) + torch.tensor([[-0.5], [0.5]])
for _ in range(2):  # a second pass would start by sharing buffers
    wrapped(x)
assert network[1].running_mean.item() == 1.0 + 2 * rank
assert network.own.item() == rank + 5.0

line = nn.Linear(1, 1, bias=False)
wrapped = env.wrap(line)
wrapped(torch.tensor([[1.0 + 2 * rank]])).sum().backward()
assert line.weight.grad.item() == 2.0

network = nn.BatchNorm1d(2)
network.running_mean.fill_(float(rank))
try:
    with env.buffers_of_first(network):
        assert network.running_mean.tolist() == [0.0, 0.0]
        raise KeyError
except KeyError:
    pass
assert network.running_mean.tolist() == [rank, rank]
""")


def test_alone_everything_is_the_identity(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with group(CPU) as env:
        assert env == Env(0, 1)
        assert not torch.distributed.is_initialized()
    network, numbers = nn.Linear(1, 1), torch.tensor([3])
    assert env.wrap(network) is network
    smallest_over_ranks(numbers)
    assert mean_over_ranks(numbers) is numbers
    assert (numbers.item(), env.largest(7), env.gather(8), env.mean({"a": 2.0})) == (3, 7, [8], {"a": 2.0})
    assert (env.on_rank0(lambda: 4), env.rank0_first(lambda: 5)) == (4, 5)
    assert env.stacked(numbers) == [numbers]


def test_each_process_of_a_machine_takes_a_gpu_of_its_own(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    assert str(local_device(torch.device("cuda"))) == "cuda"
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert str(local_device(torch.device("cuda"))) == "cuda:1"
    assert local_device(CPU) == CPU
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(RankError, match=r"^device: process 2 of this machine has no GPU .* sees 2; .*--device cpu$"):
        local_device(torch.device("cuda"))


def test_a_process_that_no_other_meets_says_so(monkeypatch):
    monkeypatch.setattr(distributed, "_MEETING", timedelta(seconds=1))
    for rank in ("0", "1"):
        for name, value in {"RANK": rank, "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}.items():
            monkeypatch.setenv(name, value)
        line = r"^world: the 2 processes of this run did not all meet within 0:00:01 \(.+\); "
        with pytest.raises(RankError, match=line), group(CPU):
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
                with group(CPU):
                    os._exit(1)
            os.read(waiting, 1)
            os._exit(0)
    os.close(lives)
    assert os.waitpid(torchrun, 0)[1] == 0
    ready, _, _ = select.select([ends], [], [], 60)
    assert ready  # nobody has the other end open any more
    assert os.read(ends, 1) == b""
