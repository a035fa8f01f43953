"""``python -m common`` lists the commands, see `common.runtime.command`."""

from common.runtime.command import list_or_start

if __name__ == "__main__":
    list_or_start("common")
