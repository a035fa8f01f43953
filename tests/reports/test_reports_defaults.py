"""Settings have the defaults that docs/configuration.md states."""

from pathlib import Path

import pytest
from settings import assert_documented

NEEDED = {
    "common.data.__main__.InspectConfig": {},
    "common.figures.FiguresConfig": {"runs": [Path("run")], "out": Path("figure")},
    "common.report.ReportConfig": {"runs": [Path("run")]},
    "common.tables.TablesConfig": {"runs": [Path("run")], "tags": ["loss/d"]},
}


@pytest.mark.parametrize("name", NEEDED)
def test_defaults_are_those_of_the_page(name):
    assert_documented(name, **NEEDED[name])
