"""What settings call by name."""

import re

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
    assert [registry[name] for name in registry.names()] == [0, 1, 2]


@pytest.mark.parametrize("name", ["", "MNIST", "2digits", "a-b", "a b", "_a", "\u00e9", "a\n", None, 3])
def test_a_name_that_is_none_is_refused(registry, name):
    with pytest.raises(ValueError, match=re.escape(f"a letter first, got {name!r}")):
        registry.add(name, 4)
    assert registry.names() == ("digits", "mnist", "svhn_2")


def test_a_name_is_given_once(registry):
    with pytest.raises(ValueError, match=r"^name: mnist is taken; for data\.name there are digits, mnist, svhn_2$"):
        registry.add("mnist", 4)
    assert registry["mnist"] == 1


@pytest.mark.parametrize(("name", "hint"), [("mnits", "; did you mean mnist?"), ("xyz", ""), (7, "")])
def test_an_unknown_name_is_refused_with_the_nearest_one(registry, name, hint):
    line = f"data.name: expected one of digits, mnist, svhn_2, got {name}{hint}"
    with pytest.raises(ValueError, match=f"^{re.escape(line)}$"):
        registry[name]
