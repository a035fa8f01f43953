"""Several processes, started by torchrun, that train one model: a thin layer over torch.distributed.

Alone, everything here is the identity, so that loops are written once.
"""

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as torch_dist
from torch import Tensor, nn
from torch.distributed.rendezvous import rendezvous
from torch.nn.parallel import DistributedDataParallel

from common.runtime.errors import RankError, UsageError

T = TypeVar("T")

_MEETING = timedelta(minutes=10)
"""How long a process waits for the others to start."""
_PATIENCE = timedelta(hours=2)
"""How long ranks wait for one that downloads data, trains the classifier of a FID, or measures alone."""


@dataclass(frozen=True)
class Env:
    """This process among the processes of a run."""

    rank: int = 0
    world: int = 1

    @property
    def first(self) -> bool:
        """Whether this is rank 0, the one that writes and prints."""
        return self.rank == 0

    def largest(self, number: int) -> int:
        """Return the largest of the ranks' numbers (waits for all)."""
        if self.world == 1:
            return number
        value = torch.tensor(number, device=self._device)
        torch_dist.all_reduce(value, torch_dist.ReduceOp.MAX)
        return int(value)

    def mean(self, values: dict[str, float]) -> dict[str, float]:
        """Return the mean over ranks of named numbers, the same names on each."""
        if self.world == 1 or not values:
            return values
        sums = torch.tensor(list(values.values()), dtype=torch.float64, device=self._device)
        torch_dist.all_reduce(sums)
        return dict(zip(values, (sums / self.world).tolist(), strict=True))

    def gather(self, value: T) -> list[T]:
        """Return the ranks' picklable values in the order of ranks, on every rank."""
        if self.world == 1:
            return [value]
        values: list[Any] = [None] * self.world
        torch_dist.all_gather_object(values, value)
        return values

    def on_rank0(self, function: Callable[[], T]) -> T:
        """Run a function on rank 0 and return its picklable result on every rank.

        Raises:
            UsageError: on every rank, if rank 0 raised it.
        """
        if self.world == 1:
            return function()
        outcome: list[Any] = [None, None]
        if self.first:
            try:
                outcome[0] = function()
            except UsageError as error:
                outcome[1] = str(error)
        torch_dist.broadcast_object_list(outcome, src=0, device=self._device)
        if outcome[1] is not None:
            raise UsageError(outcome[1])
        return outcome[0]

    def rank0_first(self, function: Callable[[], T]) -> T:
        """Run a function on rank 0 and then on the others, which find what it downloaded or cached.

        Raises:
            UsageError: on every rank, if rank 0 raised it.
        """
        if self.world == 1:
            return function()
        results: list[T] = []
        self.on_rank0(lambda: results.append(function()))
        return results[0] if results else function()

    def stacked(self, rows: Tensor) -> list[Tensor]:
        """Return every rank's tensor, on the CPU; all of one shape."""
        if self.world == 1:
            return [rows.cpu()]
        rows = rows.to(self._device).contiguous()
        gathered = [torch.empty_like(rows) for _ in range(self.world)]
        torch_dist.all_gather(gathered, rows)
        return [part.cpu() for part in gathered]

    @contextmanager
    def buffers_of_first(self, network: nn.Module) -> Iterator[None]:
        """Give a network rank 0's buffers inside the block, so that all ranks compute what rank 0 would."""
        if self.world == 1:
            yield
            return
        own = {name: buffer.clone() for name, buffer in network.named_buffers()}
        shared = self.on_rank0(lambda: {name: buffer.cpu() for name, buffer in own.items()})
        network.load_state_dict(shared, strict=False)
        try:
            yield
        finally:
            network.load_state_dict(own, strict=False)

    def wrap(self, network: nn.Module) -> nn.Module:
        """Wrap a network so that its gradients are averaged over ranks; its buffers stay each rank's own."""
        if self.world == 1:
            return network
        devices = [self._device] if self._device.type == "cuda" else None
        # broadcast_buffers=False is deprecated since torch 2.13, and its replacement copies rank 0's buffers once.
        own = [name for name, _ in network.named_buffers()]
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(network, own)
        return DistributedDataParallel(network, device_ids=devices)

    @property
    def _device(self) -> torch.device:
        on_cuda = torch_dist.get_backend() == "nccl"
        return torch.device("cuda", torch.cuda.current_device()) if on_cuda else torch.device("cpu")


def local_device(device: torch.device) -> torch.device:
    """Return this process's own device: under torchrun, the GPU of its local rank.

    Raises:
        UsageError: if a machine runs more processes than it has GPUs.
    """
    if device.type != "cuda" or "LOCAL_RANK" not in os.environ:
        return device
    index = int(os.environ["LOCAL_RANK"])
    if index >= torch.cuda.device_count():
        raise RankError(
            f"device: process {index} of this machine has no GPU of its own, torch sees "
            f"{torch.cuda.device_count()}; start fewer processes or use --device cpu"
        )
    return torch.device("cuda", index)


@contextmanager
def group(device: torch.device) -> Iterator[Env]:
    """Join the other processes of this run, if torchrun started several, and leave them in the end.

    Args:
        device: this process's device; decides between NCCL and gloo.

    Raises:
        UsageError: if the others are not there in time.
    """
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world == 1:
        yield Env()
        return
    if "TORCHELASTIC_RUN_ID" in os.environ:
        _stop_with_torchrun()
    if device.type == "cuda":
        torch.cuda.set_device(device)
    try:
        store, rank, world = next(rendezvous("env://", timeout=_MEETING))
        store.set(f"here/{rank}", "")
        store.wait([f"here/{each}" for each in range(world)], _MEETING)
    except (RuntimeError, ValueError) as error:  # torch's DistError among them
        reason = str(error).splitlines()[0]
        raise RankError(
            f"world: the {world} processes of this run did not all meet within {_MEETING} ({reason}); start each, with "
            "the same MASTER_ADDR and MASTER_PORT, or leave that to torchrun"
        ) from None
    store.set_timeout(_PATIENCE)
    torch_dist.init_process_group(
        "nccl" if device.type == "cuda" else "gloo", store=store, rank=rank, world_size=world, timeout=_PATIENCE
    )
    try:
        yield Env(torch_dist.get_rank(), world)
    finally:
        torch_dist.destroy_process_group()


def _stop_with_torchrun() -> None:
    """Send this process SIGTERM when torchrun, its parent, is gone: it would train on with nobody to end it."""
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        if os.environ.get("LOCAL_RANK") == "0":
            with contextlib.suppress(OSError):
                print("error: torchrun, which started this process, is gone", file=sys.stderr, flush=True)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, name="torchrun", daemon=True).start()


def smallest_over_ranks(numbers: Tensor) -> None:
    """Replace each number by its smallest over ranks, in place; the device does not wait. Nothing happens alone."""
    if torch_dist.is_initialized():
        torch_dist.all_reduce(numbers, torch_dist.ReduceOp.MIN)


def mean_over_ranks(values: Tensor) -> Tensor:
    """Return the mean over ranks of a tensor without gradient; the device does not wait. Alone, the tensor itself."""
    if not torch_dist.is_initialized():
        return values
    total = values.clone()
    torch_dist.all_reduce(total)
    return total / torch_dist.get_world_size()
