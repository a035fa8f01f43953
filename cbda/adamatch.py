"""Adapt a classifier from one domain to another by AdaMatch: ``python -m cbda.adamatch``."""

from collections.abc import Sequence

from cbda.task import AdaMatchTask
from common.runtime.command import run_command
from common.train.loop import train


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command."""
    train(AdaMatchTask, argv)


if __name__ == "__main__":
    run_command(main)
