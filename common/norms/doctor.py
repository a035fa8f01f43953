"""Check how this machine computes the layers: ``python -m common.norms.doctor``, see `common.norms.tools.doctor`."""

from common.cli.command import start

if __name__ == "__main__":
    start("common.norms.tools.doctor")
