"""Paths as users give them."""

from pathlib import Path

from common.errors import UsageError


def expanded(path: Path | str, field: str) -> Path:
    """Return a path with its ``~`` or ``~user`` replaced by a home folder.

    Args:
        path: what was given.
        field: the setting or flag that it was given for.

    Raises:
        UsageError: if there is no such user, or it has no home.
    """
    try:
        return Path(path).expanduser()
    except RuntimeError:
        raise UsageError(f"{field}: expected a path, got {path}, and there is no such user") from None
