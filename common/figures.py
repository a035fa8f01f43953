"""Draw what runs logged: ``python -m common.figures``, see `common.reports.figures`."""

from common.cli.command import start

if __name__ == "__main__":
    start("common.reports.figures")
