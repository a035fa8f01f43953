"""Cache files that are whole and of the key asked for, or ignored."""

import hashlib
import io
import os
import sys
import warnings
from pathlib import Path
from typing import Any

import torch

from common.runtime import seeding
from common.runtime.atomic import write_atomic

_DIGEST = hashlib.sha256().digest_size
_warned: set[str] = set()
"""Reasons that have been printed."""


def cache_path(folder: Path, key: str) -> Path:
    """Return the file of a key."""
    return folder / f"{seeding.derive(0, key):016x}.pt"


def write_cache(folder: Path, key: str, value: object) -> None:
    """Keep tensors and plain values under a key, whole or not at all; warn where the folder cannot be written."""
    buffer = io.BytesIO()
    torch.save(value, buffer)
    content = buffer.getvalue()
    try:
        write_atomic(cache_path(folder, key), lambda file: file.write(_digest(key, content) + content))
    except OSError as error:
        reason = error.strerror or str(error)
        if reason not in _warned and os.environ.get("RANK", "0") == "0":
            line = f"warning: cache: cannot write to {folder} ({reason}); going on without it, give another by --cache"
            print(line, file=sys.stderr)
        _warned.add(reason)


def read_cache(folder: Path, key: str) -> Any | None:
    """Return what is kept under a key; None where nothing is, or the file is damaged or of another key."""
    try:
        stored = cache_path(folder, key).read_bytes()
    except OSError:
        return None
    content = stored[_DIGEST:]
    # torch.load checks no sums: it returns other numbers without a word where a bit of a tensor has flipped
    return load_tensors(content) if stored[:_DIGEST] == _digest(key, content) else None


def load_tensors(content: bytes) -> Any:
    """Unpickle tensors and plain values, and nothing that runs.

    Raises:
        ValueError: if the content is anything else.
    """
    try:
        with warnings.catch_warnings():  # torch remarks on pickles it then refuses
            warnings.simplefilter("ignore")
            return torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except Exception as error:  # damaged pickles make the reader fail in a dozen unrelated ways
        raise ValueError(str(error) or type(error).__name__) from error


def _digest(key: str, content: bytes) -> bytes:
    return hashlib.sha256(key.encode() + b"\0" + content).digest()
