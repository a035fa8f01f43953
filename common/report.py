"""Write what runs reached beside the paper's numbers: ``python -m common.report``, see `common.reports.paper.page`."""

from common.cli.command import start

if __name__ == "__main__":
    start("common.reports.paper.page")
