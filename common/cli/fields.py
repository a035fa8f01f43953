"""What a setting may say about itself besides its type and text."""

import dataclasses
import typing
from collections.abc import Iterator

MAY_CHANGE = {"may_change": True}
"""``field(metadata=MAY_CHANGE)``: a resumed run may change it, since it alters for how long, how often or where a run
computes, never what."""


def changeable(cls: type, prefix: str = "") -> Iterator[str]:
    """Yield the dotted names of a configuration's settings that a resumed run may change."""
    hints = typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):
        if field.metadata.get("may_change"):
            yield prefix + field.name
        elif dataclasses.is_dataclass(hints[field.name]):
            yield from changeable(typing.cast(type, hints[field.name]), f"{prefix}{field.name}.")
