"""What settings call by name and users may add to: data sets, metrics, feature extractors."""

import difflib
import re
from typing import Generic, TypeVar

T = TypeVar("T")


class Registry(Generic[T]):
    """Things by name, in the order in which they were added, for the setting ``field``."""

    def __init__(self, field: str) -> None:
        self.field = field
        self._known: dict[str, T] = {}

    def add(self, name: str, thing: T) -> None:
        """Add a thing; ValueError if the name is taken or malformed."""
        if not isinstance(name, str) or not re.fullmatch(r"[a-z][a-z0-9_]*", name):
            raise ValueError(f"name: expected lower-case letters, digits and underscores, a letter first, got {name!r}")
        if name in self._known:
            raise ValueError(f"name: {name} is taken; for {self.field} there are {', '.join(self._known)}")
        self._known[name] = thing

    def names(self) -> tuple[str, ...]:
        """Return all names."""
        return tuple(self._known)

    def items(self) -> tuple[tuple[str, T], ...]:
        """Return all names and things."""
        return tuple(self._known.items())

    def __getitem__(self, name: str) -> T:
        """Return the thing of a name; ValueError, with the nearest name, if there is none."""
        if name not in self._known:
            near = difflib.get_close_matches(str(name), self._known, n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise ValueError(f"{self.field}: expected one of {', '.join(self._known)}, got {name}{hint}")
        return self._known[name]
