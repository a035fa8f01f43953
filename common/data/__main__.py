"""Look at a data set before training on it: ``python -m common.data``, see `common.reports.data_set`."""

from common.cli.command import start

if __name__ == "__main__":
    start("common.reports.data_set")
