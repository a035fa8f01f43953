"""What a file does that is run as a command."""

import pkgutil
import runpy
from pathlib import Path

import pytest

import common.cli.command

ROOT = Path(__file__).parents[2]


def assert_starts(file: str, module: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Assert that running a file starts a module's main, which is there, and that importing it starts nothing."""
    started: list[str] = []

    def start(name: str) -> None:
        started.append(name)
        raise SystemExit

    monkeypatch.setattr(common.cli.command, "start", start)
    with pytest.raises(SystemExit):
        runpy.run_path(str(ROOT / file), run_name="__main__")
    assert started == [module]
    assert callable(pkgutil.resolve_name(f"{module}:main"))
    runpy.run_path(str(ROOT / file), run_name="imported")
    assert started == [module]
