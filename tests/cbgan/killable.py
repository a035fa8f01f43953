"""Run the trainer and kill it, hard, at a chosen moment: ``python killable.py WHERE:N ARGUMENTS``.

WHERE is ``step`` (before training step N of this process), ``save`` (in the middle of writing checkpoint file N),
``fid`` (while the N-th batch of images is generated for a measurement) or ``never``; ``stop`` sends SIGINT in step N
instead, ``loss`` makes the discriminator's loss of step N infinite. ``step@1`` is step on rank 1 of several processes.
At the end each process prints its rank and a hash of its weights.
"""

import math
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import cbgan.evaluation
import cbgan.train
import common.runs.checkpoint
from common.cli.command import run_command
from common.metrics.extractors import weights_hash


def killing(function: Callable[..., Any], at: int, signum: int = signal.SIGKILL) -> Callable[..., Any]:
    calls = 0

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == at:
            os.kill(os.getpid(), signum)
        return function(*args, **kwargs)

    return wrapped


def spoiling(loss: Callable[..., Any], at: int) -> Callable[..., Any]:
    calls = 0

    def wrapped(*logits: Any) -> Any:
        nonlocal calls
        calls += 1
        return loss(*logits) + (math.inf if calls == at else 0)  # the gradients stay finite

    return wrapped


def dying_in_mid_write(write_atomic: Callable[..., Any], at: int) -> Callable[..., Any]:
    calls = 0

    def wrapped(path: Path, writer: Callable[[BinaryIO], object]) -> None:
        nonlocal calls
        calls += 1
        write_atomic(path, half if calls == at else writer)

    def half(file: BinaryIO) -> None:
        file.write(b"PK" + bytes(1000))
        file.flush()
        os.kill(os.getpid(), signal.SIGKILL)

    return wrapped


def main() -> None:
    where, at = sys.argv[1].split(":")
    where, _, rank = where.partition("@")
    if rank not in ("", os.environ.get("RANK")):
        where = "never"
    if where == "step":
        cbgan.train.step = killing(cbgan.train.step, int(at))
    elif where == "stop":
        cbgan.train.step = killing(cbgan.train.step, int(at), signal.SIGINT)
    elif where == "loss":
        cbgan.train.discriminator_loss = spoiling(cbgan.train.discriminator_loss, int(at))
    elif where == "save":
        common.runs.checkpoint.write_atomic = dying_in_mid_write(common.runs.checkpoint.write_atomic, int(at))
    elif where == "fid":
        cbgan.evaluation.Evaluation.sample = killing(cbgan.evaluation.Evaluation.sample, int(at))
    run, trained = cbgan.train.Training.run, []
    cbgan.train.Training.run = lambda self: trained.append(self) or run(self)
    try:
        run_command(lambda: cbgan.train.main(sys.argv[2:]))
    finally:
        for training in trained:
            g, d = (dict(network.named_parameters()) for network in (training.state.g, training.state.d))
            line = f"\nrank {os.environ.get('RANK', '0')}: {weights_hash(g)}{weights_hash(d)}\n"
            os.write(1, line.encode())  # one call, so that two ranks do not mix their lines


if __name__ == "__main__":
    main()
