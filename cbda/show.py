"""Look at weak and strong views of a data set: ``python -m cbda.show --name digits_m``."""

from common.cli.command import start

if __name__ == "__main__":
    start("common.reports.views")
