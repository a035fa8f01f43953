"""``python -m cbcls`` lists the commands, see `common.cli.commands`."""

from common.cli.commands import main

if __name__ == "__main__":
    main("cbcls")
