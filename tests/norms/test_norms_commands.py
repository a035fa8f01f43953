"""Commands start where their page says."""

import pytest
from commands import assert_starts


@pytest.mark.parametrize(
    ("file", "module"),
    [
        (f"common/norms/{name.split('.')[-1]}.py", f"common.norms.tools.{name}")
        for name in ("aot", "bench", "costs", "counts", "doctor", "timing.overhead", "timing.roofline")
    ],
)
def test_a_command_starts_its_module(file, module, monkeypatch):
    assert_starts(file, module, monkeypatch)
