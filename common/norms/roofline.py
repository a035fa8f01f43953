"""Bound a step of a layer on a GPU: ``python -m common.norms.roofline``, see `common.norms.tools.timing.roofline`."""

from common.cli.command import start

if __name__ == "__main__":
    start("common.norms.tools.timing.roofline")
