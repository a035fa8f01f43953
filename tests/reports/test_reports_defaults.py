"""Settings have the defaults that docs/configuration.md states."""

from pathlib import Path

import pytest
from settings import assert_documented

NEEDED = {
    "common.reports.data_set.InspectConfig": {},
    "common.reports.figures.FiguresConfig": {"runs": [Path("run")], "out": Path("figure")},
    "common.reports.paper.page.ReportConfig": {"runs": [Path("run")]},
    "common.reports.tables.TablesConfig": {"runs": [Path("run")], "tags": ["loss/d"]},
}


@pytest.mark.parametrize("name", NEEDED)
def test_defaults_are_those_of_the_page(name):
    assert_documented(name, **NEEDED[name])
