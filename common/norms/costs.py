"""What a layer of each kind costs, as the paper's Table I asks: ``python -m common.norms.costs``."""

from common.cli.command import start

if __name__ == "__main__":
    start("common.norms.tools.costs")
