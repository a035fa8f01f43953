"""Commands start where their page says."""

import pytest
from commands import assert_starts


@pytest.mark.parametrize("name", ["train", "clusters", "evaluate", "figures", "predict"])
def test_a_command_starts_its_module(name, monkeypatch):
    assert_starts(f"cbcls/{name}.py", f"cbcls.{name}", monkeypatch)
