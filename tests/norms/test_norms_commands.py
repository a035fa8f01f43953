"""Commands start where their page says."""

import pytest
from commands import assert_starts


@pytest.mark.parametrize(
    ("file", "module"),
    [
        (f"common/norms/{name}.py", f"common.norms.tools.{name}")
        for name in ("aot", "bench", "costs", "counts", "doctor")
    ],
)
def test_a_command_starts_its_module(file, module, monkeypatch):
    assert_starts(file, module, monkeypatch)
