"""Time the layers against BatchNorm: ``python -m common.norms.bench``, see `common.norms.tools.bench`."""

from common.cli.command import start

if __name__ == "__main__":
    start("common.norms.tools.bench")
