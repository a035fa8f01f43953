"""Commands start where their page says."""

import pytest
from commands import assert_starts


@pytest.mark.parametrize(
    ("file", "module"),
    [
        *((f"cbgan/{name}.py", f"cbgan.{name}") for name in ("train", "evaluate", "sample", "bench")),
        ("cbgan/compare.py", "cbgan.reports.comparison"),
    ],
)
def test_a_command_starts_its_module(file, module, monkeypatch):
    assert_starts(file, module, monkeypatch)
