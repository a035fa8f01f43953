"""Commands start where their page says."""

import pytest
from commands import assert_starts


@pytest.mark.parametrize(
    ("file", "module"),
    [
        ("common/figures.py", "common.reports.figures"),
        ("common/report.py", "common.reports.paper.page"),
        ("common/tables.py", "common.reports.tables"),
    ],
)
def test_a_command_starts_its_module(file, module, monkeypatch):
    assert_starts(file, module, monkeypatch)
