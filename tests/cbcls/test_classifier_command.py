"""Commands start where their page says."""

import pytest
from commands import assert_starts


@pytest.mark.parametrize(
    ("file", "module"),
    [(f"cbcls/{name}.py", f"cbcls.{name}") for name in ("evaluate", "figures", "predict", "train")],
)
def test_a_command_starts_its_module(file, module, monkeypatch):
    assert_starts(file, module, monkeypatch)
