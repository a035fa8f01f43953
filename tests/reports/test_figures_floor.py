"""Which floors a figure draws, and the line that refuses the others."""

import math

import pytest

from common.reports.figures import curves

RUNS = [([0, 1, 2], [3.0, 2.0, 1.0])]


def test_a_floor_that_cannot_be_drawn_is_refused_before_anything_is_written(tmp_path):
    for log_y, floor, wanted in (
        (False, math.nan, "a finite number, got nan"),
        (False, -math.inf, "a finite number, got -inf"),
        (True, math.inf, "a finite positive number, got inf"),
        (True, 0.0, "a finite positive number, got 0.0"),
        (True, -1.0, "a finite positive number, got -1.0"),
    ):
        with pytest.raises(ValueError) as refused:  # noqa: PT011 - all of it is looked at
            curves(tmp_path / "f", {"a": RUNS}, xlabel="x", ylabel="y", log_y=log_y, floor=floor)
        assert str(refused.value) == f"floor: expected {wanted}"
        assert list(tmp_path.iterdir()) == []
