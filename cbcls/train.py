"""Train a classifier and measure it: ``python -m cbcls.train``."""

from collections.abc import Sequence

from cbcls.task import ClassifierTask
from common.runtime.command import run_command
from common.train.loop import train


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command."""
    train(ClassifierTask, argv)


if __name__ == "__main__":
    run_command(main)
