"""A command that must be refused: one line, exit status 2."""

from collections.abc import Callable
from typing import Any

import pytest

from common.runtime.command import run_command


def refused(capsys: Any, main: Callable[[list[str]], object], *argv: str) -> str:
    """Run a command that must be refused and return its one line."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as left:
        run_command(lambda: main(list(argv)))
    captured = capsys.readouterr()
    assert left.value.code == 2, captured.err
    lines = captured.err.splitlines()
    assert len(lines) == 1, captured.err
    assert lines[0].startswith("error: ")
    return lines[0]
