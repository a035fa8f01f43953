"""Paths as users give them, and the files that may be written there."""

import typing
from pathlib import Path

from common.runtime.errors import UsageError


def expanded(path: Path | str, field: str) -> Path:
    """Return a path with its ``~`` or ``~user`` replaced by a home folder.

    Raises:
        UsageError: naming ``field``, the setting it was given for, if there is no such user or home.
    """
    try:
        return Path(path).expanduser()
    except RuntimeError:
        reason = "this user has no home; set HOME" if Path(path).parts[0] == "~" else "there is no such user"
        raise UsageError(f"{field}: expected a path, got {path}, and {reason}") from None


def texts_to_paths(config: object) -> None:
    """Turn texts that a frozen dataclass was given for paths into paths, as ``DataConfig(root="photos")``."""
    for name, hint in typing.get_type_hints(type(config)).items():
        if Path in (hint, *typing.get_args(hint)) and isinstance(value := getattr(config, name), str):
            object.__setattr__(config, name, Path(value))


def refuse_overwriting(*paths: Path, force: bool, field: str = "out") -> None:
    """Raise UsageError, naming ``field``, the setting of their place, if files exist and ``--force`` is not given."""
    for path in paths:
        if path.exists() and not force:
            raise UsageError(f"{field}: {path} exists; add --force to replace it, or take another --{field}")
