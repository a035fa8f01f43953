"""Bound the time of the layers on a GPU: ``python -m common.norms.roofline``, see `common.norms.tools.roofline`."""

from common.cli.command import start

if __name__ == "__main__":
    start("common.norms.tools.roofline")
