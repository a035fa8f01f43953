"""``python -m common`` lists the commands, see `common.runtime.commands`."""

from common.runtime.commands import main

if __name__ == "__main__":
    main("common")
