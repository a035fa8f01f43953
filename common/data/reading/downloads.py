"""Published files: fetched whole and verified, unpacked whole, or not at all."""

import gzip
import hashlib
import http.client
import os
import shutil
import tarfile
import tempfile
import urllib.request
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from tqdm import tqdm

from common.data.reading.layout import is_there
from common.runtime.atomic import write_atomic
from common.runtime.errors import UsageError

_CHUNK = 2**20
_TIMEOUT = 60  # seconds without an answer


@dataclass(frozen=True)
class Published:
    """A file that its authors publish: where it is kept, its checksum in hexadecimal, and URLs to try in this order."""

    path: Path
    md5: str
    urls: tuple[str, ...]


def obtain(*files: Published, download: bool) -> None:
    """Fetch the files that are missing or damaged; all are published in one place and kept in one folder.

    A fetched file is written beside its place, compared with its checksum and renamed, so that an interrupted
    download leaves nothing that looks like the file.

    Raises:
        UsageError: if one is missing or damaged, and ``download`` is false or fails.
    """
    wanted = [file for file in files if not file.path.is_file() or _md5(file.path) != file.md5]
    if not download and wanted:
        states = [f"{'damaged' if file.path.exists() else 'no'} {file.path.name}" for file in wanted]
        raise UsageError(f"data.root: {', '.join(states)}; {_advice(wanted)}, or set data.download true")
    for number, file in enumerate(wanted):
        reasons = []
        for url in file.urls:
            try:
                _fetch(url, file)
                break
            except (OSError, http.client.HTTPException, ValueError) as error:
                reasons.append(one_line(error))
        else:
            failed = f"{file.path.name} could not be downloaded ({'; '.join(dict.fromkeys(reasons))})"
            raise UsageError(f"data.root: {failed}; {_advice(wanted[number:])}")


def obtain_folders(archives: Mapping[Path, Published], *, download: bool) -> None:
    """Unpack the archives of folders that are missing or empty; others stay as they are. Errors as for `obtain`."""
    wanted = {folder: archive for folder, archive in archives.items() if not is_there(folder)}
    obtain(*wanted.values(), download=download)
    for folder, archive in wanted.items():
        unpack(archive.path, folder)


def obtain_unzipped(files: Mapping[Path, Published], *, download: bool) -> None:
    """Unpack files that are published compressed by gzip, unless they exist. Errors as for `obtain`."""
    wanted = {path: compressed for path, compressed in files.items() if not path.exists()}
    obtain(*wanted.values(), download=download)
    for path, compressed in wanted.items():
        with _refusing(compressed.path), gzip.open(compressed.path) as content:
            write_atomic(path, lambda target, content=content: shutil.copyfileobj(content, target, _CHUNK))


def unpack(archive: Path, folder: Path) -> None:
    """Unpack a .zip or .tar.gz file that holds `folder`'s name at its top, and move that into place when complete.

    Args:
        archive: the file, its checksum verified.
        folder: what to create; it must not exist, or be empty.

    Raises:
        UsageError: if the archive cannot be unpacked, or lacks the folder.
    """
    with _refusing(archive), tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.") as name:
        if archive.suffix == ".zip":
            with zipfile.ZipFile(archive) as file:
                file.extractall(name)
        else:
            with tarfile.open(archive) as file:
                file.extraction_filter = getattr(tarfile, "data_filter", None)  # as of Python 3.11.4
                file.extractall(name)
        complete = Path(name, folder.name)
        if not complete.is_dir():
            raise ValueError(f"it holds no folder {folder.name}")
        try:
            os.rename(complete, folder)
        except OSError:
            if not folder.is_dir():  # else another process has just finished the same
                raise


@contextmanager
def reading(place: Path) -> Iterator[None]:
    """Turn whatever damaged files make a reader raise into a UsageError that says what to remove."""
    try:
        yield
    except (UsageError, MemoryError):
        raise
    except Exception as error:  # parsers of half a dozen formats
        raise UsageError(
            f"data.root: {place} is incomplete or damaged ({one_line(error)}); remove it, so that it is made anew"
        ) from error


def present(files: list[Path], count: int) -> list[Path]:
    """Return files that a list names; all must exist, as many as were published, or the list was cut off."""
    if len(files) != count:
        raise ValueError(f"it lists {len(files):,} images of {count:,}")
    for path in files:
        if not path.is_file():
            raise FileNotFoundError(f"no file {path}")
    return files


def one_line(error: Exception) -> str:
    """Return an error's message without line breaks, or its type where it has none."""
    return " ".join(str(error).split()) or type(error).__name__


def _advice(files: list[Published]) -> str:
    names = ", ".join(file.path.name for file in files)
    return f"put {names} from {files[0].urls[0].rpartition('/')[0]}/ into {files[0].path.parent}"


def _md5(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()


def _fetch(url: str, file: Published) -> None:
    request = urllib.request.Request(url, headers={"User-Agent": "cluster-based-norm"})
    with urllib.request.urlopen(request, timeout=_TIMEOUT) as response:  # before a folder is made

        def copy(target: BinaryIO) -> None:
            digest = hashlib.md5(usedforsecurity=False)
            length = int(response.headers.get("Content-Length", 0)) or None
            with tqdm(desc=url.rpartition("/")[2], total=length, unit="B", unit_scale=True, disable=None) as bar:
                while chunk := response.read(_CHUNK):
                    digest.update(chunk)
                    target.write(chunk)
                    bar.update(len(chunk))
            if digest.hexdigest() != file.md5:
                raise ValueError(f"{url} gave other content, or less: MD5 {digest.hexdigest()}, expected {file.md5}")

        write_atomic(file.path, copy)


@contextmanager
def _refusing(archive: Path) -> Iterator[None]:
    try:
        yield
    except (ValueError, EOFError, OSError, RuntimeError, tarfile.TarError, zipfile.BadZipFile, zlib.error) as error:
        raise UsageError(f"data.root: {archive} cannot be unpacked ({one_line(error)})") from error
