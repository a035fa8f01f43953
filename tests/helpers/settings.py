"""What docs/configuration.md says of a class of settings, and that the class keeps to it."""

import dataclasses
import functools
import pkgutil
import re
from collections.abc import Collection
from pathlib import Path
from typing import Any

import pytest
import yaml

PAGE = Path(__file__).parents[2] / "docs" / "configuration.md"


@functools.cache
def documented() -> dict[str, tuple[dict[str, Any], set[str]]]:
    """Return each class's defaults by setting, and which of these a run that goes on may change."""
    blocks = re.findall(r"^```yaml\n# ([\w.]+)\n(.*?)^```", PAGE.read_text("utf-8"), re.MULTILINE | re.DOTALL)
    return {name: (yaml.safe_load(text), set(re.findall(r"^(\w+):.*  # free$", text, re.M))) for name, text in blocks}


def assert_documented(name: str, **needed: Any) -> None:
    """Assert that a class has the page's settings, defaults and freedoms, groups with a block of their own aside.

    ``needed`` is what it cannot be made without.
    """
    cls = pkgutil.resolve_name(name)
    assert isinstance(cls, type)
    wanted: dict[str, Any] = {}
    free: set[str] = set()
    for base in reversed(cls.__mro__):
        own, own_free = documented().get(f"{base.__module__}.{base.__qualname__}", ({}, set()))
        wanted, free = wanted | own, (free - own.keys()) | own_free
    found = cls(**needed)
    apart = {field.name for field in dataclasses.fields(found) if _name(getattr(found, field.name)) in documented()}
    defaults = {field.name: getattr(found, field.name) for field in dataclasses.fields(found)}
    for field in dataclasses.fields(cls):
        if field.name in needed:
            defaults[field.name] = field.default_factory() if callable(field.default_factory) else field.default
    plain = {key: _plain(value) for key, value in defaults.items() if key not in apart}
    assert plain == wanted
    assert {key: type(value) for key, value in plain.items()} == {key: type(value) for key, value in wanted.items()}
    assert {field.name for field in dataclasses.fields(found) if field.metadata.get("may_change")} == free
    _assert_settled(found, cls(**needed), needed)


def _assert_settled(found: Any, other: Any, needed: Collection[str] = ()) -> None:
    """Assert that settings are given by name, never change, and are shared with no other of their class."""
    assert other == found
    for field in dataclasses.fields(found):
        value, same = getattr(found, field.name), getattr(other, field.name)
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(found, field.name, value)
        if dataclasses.is_dataclass(value):
            _assert_settled(value, same)
        assert field.name in needed or not isinstance(value, list) or value is not same
    with pytest.raises(TypeError, match="positional"):
        type(found)(getattr(found, dataclasses.fields(found)[0].name))


def _name(value: Any) -> str:
    return f"{type(value).__module__}.{type(value).__qualname__}"


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        return {field.name: _plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    return str(value) if isinstance(value, Path) else value
