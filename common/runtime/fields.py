"""What a setting may say about itself besides its type and text."""

import dataclasses
import typing
from collections.abc import Callable, Iterator

MAY_CHANGE = {"may_change": True}
"""``field(metadata=MAY_CHANGE)``: a resumed run may change it, since it alters for how long, how often or where a run
computes, never what."""


def named(names: Callable[[], tuple[str, ...]]) -> dict[str, Callable[[], tuple[str, ...]]]:
    """Return ``field(metadata=...)`` of a text that is one of some names, which users may add to: for its help."""
    return {"names": names}


def names_of(cls: type, prefix: str = "") -> Iterator[tuple[str, tuple[str, ...]]]:
    """Yield the dotted names of a configuration's settings that take a name, with the names there are now."""
    hints = typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):
        if "names" in field.metadata:
            yield prefix + field.name, field.metadata["names"]()
        elif dataclasses.is_dataclass(hints[field.name]):
            yield from names_of(typing.cast(type, hints[field.name]), f"{prefix}{field.name}.")


def changeable(cls: type, prefix: str = "") -> Iterator[str]:
    """Yield the dotted names of a configuration's settings that a resumed run may change."""
    hints = typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):
        if field.metadata.get("may_change"):
            yield prefix + field.name
        elif dataclasses.is_dataclass(hints[field.name]):
            yield from changeable(typing.cast(type, hints[field.name]), f"{prefix}{field.name}.")
