"""Train a DCGAN and measure it: ``python -m cbgan.train``."""

from collections.abc import Sequence

from cbgan.task import GanTask
from common.runtime.command import run_command
from common.train.loop import train


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command."""
    train(GanTask, argv)


if __name__ == "__main__":
    run_command(main)
