"""The command line of `bench` and `doctor`, by the standard library alone."""

import argparse
import contextlib
import difflib
import errno
import os
import re
import signal
import sys
from collections.abc import Callable
from typing import NoReturn

import torch


class Parser(argparse.ArgumentParser):
    """An ArgumentParser that answers bad input in one line, with exit status 2."""

    def __init__(self, prog: str, description: str) -> None:
        formatter = argparse.ArgumentDefaultsHelpFormatter
        super().__init__(prog, description=description, allow_abbrev=False, formatter_class=formatter)

    def error(self, message: str) -> NoReturn:
        """Print what is wrong, and exit."""
        line = re.sub(r"^argument --(\w+)", r"\1", message)
        if unknown := re.match(r"unrecognized arguments: ([^\s=]+)", line):
            near = difflib.get_close_matches(unknown[1], self._option_string_actions, n=1)
            line = f"{unknown[1]}: no such option; {f'did you mean {near[0]}?' if near else 'see --help'}"
        line = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in line)
        self.exit(2, f"error: {line}\n")

    def add_switch(self, flag: str, default: bool, help: str) -> None:
        """Add an option that takes true or false, or nothing for true."""
        self.add_argument(flag, type=_truth, nargs="?", const=True, default=default, metavar="{true,false}", help=help)

    def add_device(self) -> None:
        """Add ``--device``."""
        text = "auto (cuda where there is one), cpu, cuda or cuda:n"
        self.add_argument("--device", type=_device, default="auto", help=text)


def whole(least: int) -> Callable[[str], int]:
    """Return the type of an option that is a whole number of at least this."""

    def number(text: str) -> int:
        if not re.fullmatch(r"[+-]?\d+", text) or int(text) < least:
            raise argparse.ArgumentTypeError(f"expected a whole number of at least {least}, got {text}")
        return int(text)

    return number


def _truth(text: str) -> bool:
    if text.lower() not in ("true", "yes", "false", "no"):
        raise argparse.ArgumentTypeError(f"expected true or false, got {text}")
    return text.lower() in ("true", "yes")


def _device(text: str) -> torch.device:
    if text == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if not re.fullmatch(r"cpu|cuda(:\d+)?", text):
        raise argparse.ArgumentTypeError(f"expected auto, cpu, cuda or cuda:n, got {text}")
    index, count = text.partition(":")[2] or 0, torch.cuda.device_count()
    if text != "cpu" and int(index) >= count:
        raise argparse.ArgumentTypeError(f"{text} asked for, but torch sees {count} CUDA devices; use cpu or auto")
    return torch.device(text)


def run_command(main: Callable[[], object]) -> NoReturn:
    """Run a command's main function and exit.

    Statuses: 0 done, 1 out of memory, 2 usage, 4 a full disk, 130 stopped by Ctrl-C, 141 where what reads its output
    has ended, as head does.
    """
    try:
        try:
            main()
        finally:
            sys.stdout.flush()
    except KeyboardInterrupt:
        print("stopped at once", file=sys.stderr)
        sys.exit(128 + signal.SIGINT)
    except torch.OutOfMemoryError as error:
        print(f"error: device: out of memory ({str(error).partition('. ')[0]}); take another", file=sys.stderr)
        sys.exit(1)
    except OSError as error:
        if error.errno not in (errno.EPIPE, errno.ENOSPC, errno.EDQUOT):
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the interpreter flushes once more at its end
        if error.errno == errno.EPIPE:
            sys.exit(128 + signal.SIGPIPE)
        with contextlib.suppress(OSError):
            print(f"error: {error.strerror}; make room, then start again", file=sys.stderr)
        sys.exit(4)
    sys.exit(0)
