"""That a class of settings takes what is in range, to its ends, and names field, value and range of what is not."""

from collections.abc import Mapping
from typing import Any

import pytest


def assert_takes(cls: type, values: Mapping[str, Any]) -> None:
    """Assert that settings are taken as they are given."""
    made = cls(**values)
    assert {name: getattr(made, name) for name in values} == values


def assert_refuses(cls: type, values: Mapping[str, Any], line: str) -> None:
    """Assert that settings are refused in this line."""
    with pytest.raises(ValueError) as refused:  # noqa: PT011 - all of it is looked at
        cls(**values)
    assert str(refused.value) == line
