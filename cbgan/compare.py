"""Compare runs of a GAN, FID and samples: ``python -m cbgan.compare RUN RUN ...``, see `cbgan.reports.comparison`."""

from common.cli.command import start

if __name__ == "__main__":
    start("cbgan.reports.comparison")
