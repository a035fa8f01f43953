"""What settings call by name."""

import re
from typing import Any, cast

import pytest

from common.registry import Registry


@pytest.fixture
def registry() -> Registry[int]:
    found = Registry[int]("data.name")
    for number, name in enumerate(("digits", "mnist", "svhn_2")):
        found.add(name, number)
    return found


def test_things_are_found_by_name_in_the_order_they_were_added(registry):
    assert registry.names() == ("digits", "mnist", "svhn_2")
    assert registry.items() == (("digits", 0), ("mnist", 1), ("svhn_2", 2))
    assert registry["svhn_2"] == 2


def test_a_name_is_well_formed_and_given_once(registry):
    for name in ("", "MNIST", "2digits", "a-b", "_a", "\u00e9", "a\n", cast(Any, None)):
        with pytest.raises(ValueError, match=re.escape(f"a letter first, got {name!r}")):
            registry.add(name, 4)
    with pytest.raises(ValueError, match=r"^name: mnist is taken; for data\.name there are digits, mnist, svhn_2$"):
        registry.add("mnist", 4)
    assert registry.items() == (("digits", 0), ("mnist", 1), ("svhn_2", 2))


def test_an_unknown_name_is_refused_with_the_nearest_one(registry):
    for name, hint in (("mnits", "; did you mean mnist?"), ("xyz", ""), (cast(Any, 7), "")):
        line = f"data.name: expected one of digits, mnist, svhn_2, got {name}{hint}"
        with pytest.raises(ValueError, match=f"^{re.escape(line)}$"):
            registry[name]
