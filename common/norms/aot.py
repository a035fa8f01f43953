"""Compile every kernel ahead of time: ``python -m common.norms.aot``, see `common.norms.tools.aot`."""

from common.cli.command import start

if __name__ == "__main__":
    start("common.norms.tools.aot")
