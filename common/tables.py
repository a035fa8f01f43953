"""Print a table of what runs logged in the end: ``python -m common.tables``, see `common.reports.tables`."""

from common.cli.command import start

if __name__ == "__main__":
    start("common.reports.tables")
