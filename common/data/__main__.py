"""``python -m common.data``: look at a data set, see `common.reports.data_set`."""

from common.cli.command import start

if __name__ == "__main__":
    start("common.reports.data_set")
