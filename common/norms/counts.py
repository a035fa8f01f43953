"""Count launches and traffic of the layers: ``python -m common.norms.counts``, see `common.norms.tools.counts`."""

from common.cli.command import start

if __name__ == "__main__":
    start("common.norms.tools.counts")
