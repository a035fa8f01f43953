"""Commands in processes of their own, forked from the tests' so that none has to import torch anew.

A moment says when a process is hit: ``step:N`` before training step N of this process, ``save:N`` in the middle of
writing checkpoint file N, ``evaluation:N`` when a measurement asks for the N-th time whether to stop. ``@1`` after it
means rank 1 alone. What hits it is SIGKILL, another signal, or a loss of infinity.
"""

import importlib
import math
import multiprocessing
import os
import signal
import socket
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch

import common.train.checkpoint
from common.metrics.extractors import weights_hash
from common.norms.backends.cpu import library
from common.runtime.command import run_command
from common.train.guard import StepGuard
from common.train.loop import Trainer

for _name in ("sklearn.datasets", "sklearn.metrics", "tensorboard.plugins.custom_scalar.layout_pb2", "torch._dynamo",
              "torch.utils.tensorboard", "torch_fidelity"):  # fmt: skip
    importlib.import_module(_name)  # once, here, and not in every fork: two seconds each

PATIENCE = 240
"""Seconds that a run may take on a busy machine."""


@dataclass(frozen=True)
class Outcome:
    """How the processes of a run ended, in the order of ranks; a signal's number is negative."""

    statuses: list[int]
    out: str
    err: str
    weights: list[str]
    """A hash of all networks' parameters, of each rank that lived to its end."""


@dataclass(frozen=True)
class Hit:
    """What happens to a process, and when."""

    moment: str
    signum: int = signal.SIGKILL
    loss: str | None = None
    """Instead of a signal, the name of a loss that becomes infinite in that step."""

    def arm(self, rank: int) -> None:
        """Lie in wait in this process."""
        where, _, number = self.moment.partition(":")
        number, _, only = number.partition("@")
        if only and int(only) != rank:
            return
        calls = 0

        def counts() -> bool:
            nonlocal calls
            calls += 1
            return calls == int(number)

        def hit() -> None:
            if counts():
                os.kill(os.getpid(), self.signum)

        if self.loss is not None:
            _spoil(self.loss, counts)
        elif where == "step":
            _before(Trainer, "train_step", hit)
        elif where == "save":
            common.train.checkpoint.write_atomic = _dying_in_mid_write(common.train.checkpoint.write_atomic, counts)
        else:
            assert where == "evaluation"
            _before(Trainer, "evaluate", lambda: _before(Trainer, "stop_requested", hit), once=True)


def run(main: Callable[[list[str]], object], *argv: str, ranks: int = 1, hit: Hit | None = None) -> Outcome:
    """Run a command in one process, or in several as torchrun starts them."""
    for components in (2, 3):
        library.library(components)  # else every fork would compile it
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        context, place = multiprocessing.get_context("fork"), Path(folder)
        processes = [
            context.Process(target=_child, args=(main, list(argv), rank, ranks, port, place, hit))
            for rank in range(ranks)
        ]
        for process in processes:
            process.start()
        for process in processes:
            process.join(PATIENCE)
            if process.exitcode is None or process.exitcode < 0:  # torchrun ends the others of one that died, too
                for other in processes:
                    other.join(10)
                    other.kill()
            process.join()
        statuses = [process.exitcode or 0 for process in processes]
        texts = {kind: [(place / f"{kind}{rank}").read_text() for rank in range(ranks)] for kind in ("out", "err")}
        weights = [path.read_text() for path in sorted(place.glob("weights*"))]
    return Outcome(statuses, "".join(texts["out"]), "".join(texts["err"]), weights)


def _child(
    main: Callable[[list[str]], object], argv: list[str], rank: int, world: int, port: int, place: Path, hit: Hit | None
) -> None:
    torch.set_num_threads(1)
    for number, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(place / f"{name}{rank}", os.O_WRONLY | os.O_CREAT), number)
    sys.stdout, sys.stderr = (open(number, "w", closefd=False, encoding="utf-8") for number in (1, 2))  # noqa: SIM115
    sys.stdin = open(os.devnull, encoding="utf-8")  # noqa: SIM115
    if world > 1:
        numbers = {
            "RANK": rank,
            "LOCAL_RANK": rank,
            "WORLD_SIZE": world,
            "LOCAL_WORLD_SIZE": world,
            "MASTER_PORT": port,
        }
        os.environ |= {name: str(number) for name, number in numbers.items()} | {"MASTER_ADDR": "localhost"}
    if hit is not None:
        hit.arm(rank)
    trained: list[Trainer] = []
    _before(Trainer, "run", lambda *_: None, keep=trained)
    try:
        run_command(lambda: main(argv))
    finally:
        for training in trained:
            parameters = {
                f"{name}.{key}": p for name, net in training.state.networks.items() for key, p in net.named_parameters()
            }
            (place / f"weights{rank}").write_text(weights_hash(parameters))
        sys.stdout.flush()
        sys.stderr.flush()


def _before(
    owner: type, name: str, act: Callable[[], object], *, once: bool = False, keep: list[Any] | None = None
) -> None:
    sound, acted = getattr(owner, name), False

    def wrapped(self: Any, *args: Any, **kwargs: Any) -> Any:
        nonlocal acted
        if keep is not None:
            keep.append(self)
        elif not (once and acted):
            acted = True
            act()
        return sound(self, *args, **kwargs)

    setattr(owner, name, wrapped)


def _spoil(name: str, counts: Callable[[], bool]) -> None:
    sound = StepGuard.update

    def update(self: StepGuard, term: str, losses: Any, *args: Any, **kwargs: Any) -> Any:
        if term == f"loss/{name}" and counts():
            losses = (loss + math.inf for loss in losses)  # the gradients stay finite
        return sound(self, term, losses, *args, **kwargs)

    StepGuard.update = update


def _dying_in_mid_write(write_atomic: Callable[..., Any], counts: Callable[[], bool]) -> Callable[..., Any]:
    def half(file: BinaryIO) -> None:
        file.write(b"PK" + bytes(1000))
        file.flush()
        os.kill(os.getpid(), signal.SIGKILL)

    return lambda path, writer: write_atomic(path, half if counts() else writer)
