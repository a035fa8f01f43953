"""A run's folder: its name, its lock, and where it ran."""

import errno
import fcntl
import json
import os
import platform
import shlex
import shutil
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from common.norms import machine
from common.runtime.atomic import umask, write_text_atomic
from common.runtime.cli import flatten
from common.runtime.errors import UsageError
from common.runtime.plugins import installed_plugins


class RunFolder:
    """An open run folder, locked against other processes until `close` or the end of this process.

    Holds ``config.yaml``, ``environment.json``, ``metrics.jsonl``, TensorBoard's events, ``samples/`` and
    ``checkpoints/``.
    """

    def __init__(self, path: Path, lock: int) -> None:
        self.path = path
        self._lock = lock

    @classmethod
    def create(cls, parent: Path, name: str | None, default: str, files: Mapping[str, str]) -> "RunFolder":
        """Make a new run folder that appears under its name complete with its first files.

        Args:
            parent: OUT/application.
            name: the run's name, or None to take ``default``, ``default-2``, ... whichever is free.
            default: the name to derive a fresh one from.
            files: text files by name.

        Raises:
            UsageError: if the name is taken, or the folder cannot be written.
        """
        try:
            parent.mkdir(parents=True, exist_ok=True)
            temporary = Path(tempfile.mkdtemp(prefix=".new-", dir=parent))
        except OSError as error:
            raise UsageError(f"out: cannot write to {parent} ({error.strerror})") from None
        try:
            os.chmod(temporary, 0o777 & ~umask())
            lock = _lock(temporary)
            for file, text in files.items():
                write_text_atomic(temporary / file, text)
            number = 1
            while True:
                path = parent / (name or (default if number == 1 else f"{default}-{number}"))
                try:
                    if not os.path.lexists(path):  # renaming onto an empty folder would succeed
                        temporary.rename(path)
                        return cls(path, lock)
                except OSError:
                    if not os.path.lexists(path):
                        raise
                if name is not None:
                    refuse_existing(parent, name)
                number += 1
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise

    @classmethod
    def reopen(cls, path: Path) -> "RunFolder":
        """Open an existing run folder.

        Raises:
            UsageError: if another process has it open, or it cannot be written to.
        """
        return cls(path, _lock(path))

    def close(self) -> None:
        """Release the lock."""
        os.close(self._lock)


def refuse_existing(parent: Path, name: str) -> None:
    """Raise UsageError if a run of this name exists."""
    if os.path.lexists(parent / name):
        raise UsageError(f"name: {parent / name} exists; add --resume to go on with it, or take another --name")


def find_run(parent: Path, name: str) -> Path:
    """Return the folder of a run to go on with, or raise UsageError if there is none."""
    path = parent / name
    if not (path / "config.yaml").is_file():
        runs = sorted(p.parent.name for p in parent.glob("*/config.yaml"))
        known = f"runs there: {', '.join(runs)}" if runs else "there are no runs there"
        raise UsageError(f"name: {path} is not a run that can be resumed; {known}")
    return path


def environment(device: torch.device) -> dict[str, Any]:
    """Describe where a run executes: versions, plugins by entry points, commit, hardware, threads, time and command."""
    return {
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": shlex.join(sys.orig_argv),
        "commit": machine.commit(),
        "python": platform.python_version(),
        "versions": {name: machine.version(name) for name in _PACKAGES} | {"torch": torch.__version__},
        "plugins": installed_plugins(),
        "device": device.type,
        "threads": torch.get_num_threads(),
        "world": int(os.environ.get("WORLD_SIZE", "1")),
        "hardware": {
            "cpu": machine.cpu_model(),
            "cores": os.cpu_count(),
            "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
            "gpu": torch.cuda.get_device_name(device) if device.type == "cuda" else None,
        },
    }


def note_session(path: Path, session: Mapping[str, Any]) -> list[str]:
    """Append a session, an `environment` with the layers' ``backend``, to a run's environment.json.

    Returns:
        A line for each difference to the session before that may change the last bits of results.

    Raises:
        UsageError: if the number of processes is not the run's (they share its images and noise), if on the same kind
            of device the layers would be computed by another backend, or if the file cannot be read or written.
    """
    sessions = _sessions(path)
    before, now = dict(flatten(sessions[-1])), dict(flatten(session))
    if before.get("world") != now.get("world"):
        raise UsageError(
            f"world: the run used {before.get('world')}, this process has {now.get('world')}; start it with "
            f"torchrun --nproc-per-node {before.get('world')}"
        )
    had, has = before.get("backend"), now.get("backend")
    if before.get("device") == now.get("device") and had != has:
        remedy = _REMEDIES.get((had, has), "go on where the run's is to be had, or start a new run by another --name")
        raise UsageError(f"backend: the run's layers were computed by {had}, here they would be by {has}; {remedy}")
    with _writable(path):
        write_text_atomic(path / "environment.json", environment_json([*sessions, dict(session)]))
    names = dict.fromkeys(name for name in (*before, *now) if name.startswith(_TOUCHES_LAST_BITS))
    return [
        f"{name}: the run used {before.get(name)}, this process has {now.get(name)}; results may differ in their last "
        "bits from those of an uninterrupted run"
        for name in names
        if before.get(name) != now.get(name)
    ]


_REMEDIES: dict[tuple[Any, Any], str] = {
    ("compiled", "eager"): "install the C++ compiler that the run had, or set CXX to it",
    ("eager", "compiled"): "start it with CXX=none, which hides the C++ compiler that the run did not have",
    ("triton", "eager"): "install triton, as the run had it",
}


def recorded_threads(path: Path) -> int:
    """Return the number of CPU threads of a run's last session, which a resumed run keeps."""
    return _sessions(path)[-1]["threads"]


def environment_json(sessions: list[dict[str, Any]]) -> str:
    """Return the text of environment.json."""
    return json.dumps({"sessions": sessions}, indent=2) + "\n"


def missing_plugins(path: Path) -> list[str]:
    """Return what a run's last session had of plugins by entry points, with versions, and this process has not."""
    try:
        noted = _sessions(path)[-1].get("plugins", {})
    except UsageError:
        return []
    return [f"{name} {version}" for name, version in noted.items() if name not in installed_plugins()]


_TOUCHES_LAST_BITS = ("device", "hardware.cpu", "hardware.gpu", "threads", "backend", "python", "versions.", "plugins.")


def _sessions(path: Path) -> list[dict[str, Any]]:
    file = path / "environment.json"
    try:
        sessions = json.loads(file.read_text(encoding="utf-8"))["sessions"]
        if not sessions or min(session[name] for session in sessions for name in ("world", "threads")) < 1:
            raise ValueError("no sessions")
    except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
        expected = 'expected {"sessions": [{"world": 1, "threads": 2, ...}]}, as the run wrote it; restore it'
        raise UsageError(f"name: {file} cannot be read ({error}); {expected}") from None
    return sessions


@contextmanager
def _writable(folder: Path) -> Iterator[None]:
    """Raise UsageError where a run folder is read-only."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.EROFS, errno.EACCES, errno.EPERM):
            raise
        raise UsageError(
            f"name: cannot write to {folder} ({error.strerror}); make it writable, or copy it and give its --out"
        ) from None


_PACKAGES = ("cluster-based-norm", "torch", "torchvision", "torch-fidelity", "numpy", "scikit-learn", "triton")


def _lock(folder: Path) -> int:
    """Lock a folder. POSIX locks end with their process and, unlike flock's, do not pass to forked loader workers."""
    with _writable(folder):
        descriptor = os.open(folder / "lock", os.O_RDWR | os.O_CREAT, 0o666)
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(descriptor)
        if error.errno not in (errno.EACCES, errno.EAGAIN):  # such as ENOLCK: a file system without locks
            raise UsageError(f"name: {folder} cannot be locked ({error.strerror}); move it to another disk") from None
        raise UsageError(f"name: {folder} is in use by another process; wait for it or take another --name") from None
    return descriptor
