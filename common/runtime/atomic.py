"""Files that are written whole or not at all."""

import errno
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

_WRITING = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)


def write_atomic(path: Path, writer: Callable[[BinaryIO], object]) -> None:
    """Write a file so that its path holds either the old content or all of the new, even after a power cut.

    The writer gets a binary file beside the target; it is flushed to disk, renamed over the target, and the
    folder entry is flushed too. On any error the temporary file is removed and the target is untouched.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    temporary = Path(name)
    try:
        with naming(path), os.fdopen(descriptor, "wb") as file:
            writer(file)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o666 & ~umask())  # mkstemp makes private files; results are meant to be shared
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def write_text_atomic(path: Path, text: str) -> None:
    r"""Write UTF-8 text whole or not at all (see `write_atomic`); what is no text in a file's name becomes \udcXX."""
    write_atomic(path, lambda file: file.write(text.encode(errors="backslashreplace")))


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Give an OSError of writing, such as a full disk's, the name of this file, which Python leaves out there."""
    try:
        yield
    except OSError as error:
        if error.errno in _WRITING and error.filename is None:
            error.filename = str(path)
        raise


def umask() -> int:
    """Return the process's file mode creation mask."""
    mask = os.umask(0)
    os.umask(mask)
    return mask
