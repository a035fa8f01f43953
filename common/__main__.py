"""``python -m common`` lists the commands, see `common.cli.commands`."""

from common.cli.commands import main

if __name__ == "__main__":
    main("common")
