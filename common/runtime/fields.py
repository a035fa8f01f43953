"""What a setting may say about itself besides its type and text.

``field(metadata={"names": DATA_SETS.names})``: a text that is one of these names, to which users may add; --help lists
them.
"""

import dataclasses
import typing
from collections.abc import Iterator, Mapping
from typing import Any

MAY_CHANGE = {"may_change": True}
"""``field(metadata=MAY_CHANGE)``: a resumed run may change it, since it alters for how long, how often or where a run
computes, never what."""


def names_of(cls: type) -> dict[str, tuple[str, ...]]:
    """Return the names that there are now for each setting that takes one, by its dotted name."""
    return {name: metadata["names"]() for name, metadata in _metadata(cls) if "names" in metadata}


def changeable(cls: type) -> set[str]:
    """Return the dotted names of a configuration's settings that a resumed run may change."""
    return {name for name, metadata in _metadata(cls) if metadata.get("may_change")}


def _metadata(cls: type, prefix: str = "") -> Iterator[tuple[str, Mapping[str, Any]]]:
    hints = typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):
        if dataclasses.is_dataclass(hints[field.name]):
            yield from _metadata(typing.cast(type, hints[field.name]), f"{prefix}{field.name}.")
        else:
            yield prefix + field.name, field.metadata
