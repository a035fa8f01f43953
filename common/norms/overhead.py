"""Time the host in a step of the layers: ``python -m common.norms.overhead``, see `common.norms.tools.overhead`."""

from common.cli.command import start

if __name__ == "__main__":
    start("common.norms.tools.overhead")
