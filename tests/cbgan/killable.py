"""Run the trainer and kill it, hard, at a chosen moment: ``python killable.py WHERE:N ARGUMENTS``.

WHERE is ``step`` (before training step N of this process), ``save`` (in the middle of writing checkpoint file N),
``fid`` (while the N-th batch of images is generated for a measurement) or ``never``.
"""

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import cbgan.evaluation
import cbgan.train
import common.checkpoint
from common.cli import run_command


def killing(function: Callable[..., Any], at: int) -> Callable[..., Any]:
    calls = 0

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == at:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*args, **kwargs)

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
    if where == "step":
        cbgan.train.step = killing(cbgan.train.step, int(at))
    elif where == "save":
        common.checkpoint.write_atomic = dying_in_mid_write(common.checkpoint.write_atomic, int(at))
    elif where == "fid":
        cbgan.evaluation.Evaluation.sample = killing(cbgan.evaluation.Evaluation.sample, int(at))
    run_command(lambda: cbgan.train.main(sys.argv[2:]))


if __name__ == "__main__":
    main()
