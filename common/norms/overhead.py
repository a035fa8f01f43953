"""Time the host in a step of a layer: ``python -m common.norms.overhead``, see `common.norms.tools.timing.overhead`."""

from common.cli.command import start

if __name__ == "__main__":
    start("common.norms.tools.timing.overhead")
