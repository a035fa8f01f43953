"""The benchmark prints a table of every layer."""

import subprocess
import sys

import pytest

from common.norms import bench


def test_the_table_has_a_row_for_each_shape_and_pass(monkeypatch, capsys):
    monkeypatch.setattr(bench, "SHAPES", ((4, 6, 2, 2),))
    bench.main(rounds=3)
    lines = capsys.readouterr().out.strip().splitlines()
    header, rule, *rows = lines[2:]
    assert header.count("|") == rule.count("|") == 7
    assert [row.split("|")[2].strip() for row in rows] == ["forward", "forward + backward"]
    for row in rows:
        assert all(float(cell.split("(")[0]) > 0 for cell in row.split("|")[3:-1])


def test_quantiles_are_those_of_the_sorted_values():
    assert bench.quantiles([5.0, 1.0, 4.0, 2.0, 3.0, 6.0]) == pytest.approx((2.0, 3.0, 5.0))


def test_the_command_line_explains_itself():
    done = subprocess.run(
        [sys.executable, "-m", "common.norms.bench", "--help"], capture_output=True, text=True, check=True
    )
    assert "--backend" in done.stdout
