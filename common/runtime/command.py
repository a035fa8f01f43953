"""How a command starts and ends: one line and a status, never a traceback for what a user or the numbers did.

``python -m cbgan`` lists a package's commands, ``python -m cbgan train`` starts one.
"""

import contextlib
import difflib
import errno
import io
import os
import re
import runpy
import signal
import sys
import threading
from collections.abc import Callable, Iterable
from importlib.resources import files
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

from common.runtime.errors import NonFiniteError, RankError, Stopped, UsageError

STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
"""What a user, a scheduler or a closed terminal asks a run to stop by."""
_AGAIN = (signal.SIGINT, signal.SIGTERM)


class StopRequest:
    """Notes the signals of `STOPPING`, so that the loop can finish its step and save.

    A second SIGINT or SIGTERM acts at once; of the others more may come by themselves, as a terminal that is closed
    sends two. A signal that was ignored, as SIGHUP is under nohup, stays ignored. Used as a context manager around the
    loop; the handlers found before are put back at the end.
    """

    def __init__(self) -> None:
        self.signum: int | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "StopRequest":
        for signum in STOPPING:
            if signal.getsignal(signum) is not signal.SIG_IGN:
                self._before[signum] = signal.signal(signum, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        self._put_back(STOPPING)

    def _put_back(self, signums: Iterable[int]) -> None:
        for signum in signums:
            if signum in self._before:
                signal.signal(signum, self._before[signum])

    def _note(self, signum: int, _frame: FrameType | None) -> None:
        if signum in _AGAIN:
            self._put_back(_AGAIN)
        if self.signum is not None:
            return
        self.signum = signum
        again = "; again to stop at once" if signum in _AGAIN else ""
        if os.environ.get("RANK", "0") == "0":
            with contextlib.suppress(OSError):  # the terminal may be gone
                line = f"\n{signal.Signals(signum).name}: finishing this step and saving{again}"
                print(line, file=sys.stderr, flush=True)


def run_command(main: Callable[[], object]) -> NoReturn:
    """Run a command's main function and exit.

    Statuses: 0 done, 1 something unforeseen, 2 usage (among it files that may not be read or written), 3 non-finite,
    4 a full disk, 128 + n stopped by signal n, 141 (128 + SIGPIPE) where what reads its output has ended, as head does.
    """
    threading.excepthook = _unless_the_disk_is_full
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # as stderr: names of files need not be text
    try:
        try:
            main()
        except SystemExit:  # --help
            sys.stdout.flush()
            raise
        sys.stdout.flush()  # a disk that is full only now is reported like any other
    except UsageError as error:
        _fail(str(error), 4 if _full_disk(error) else 2, any_rank=isinstance(error, RankError))
    except NonFiniteError as error:
        _fail(str(error), 3)
    except Stopped as stop:
        _leave(str(stop), 128 + stop.signum)
    except BrokenPipeError:
        _leave("", 128 + signal.SIGPIPE)
    except (OSError, RuntimeError) as error:
        if (full := _full_disk(error)) is not None:
            _fail(f"{full}; make room, then start again (a run goes on with --resume)", 4)
        if isinstance(error, OSError):
            if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS) and error.filename is not None:
                _fail(f"{error.filename}: {error.strerror}; expected a place open to this user", 2)
        elif (line := _foreseen(error)) is not None:
            _fail(line, 2 if line.startswith("memory") else 1, any_rank=True)
        raise
    except KeyboardInterrupt:
        _leave("stopped at once; the last checkpoint stands", 130)
    sys.exit(0)


def _foreseen(error: RuntimeError) -> str | None:
    """Say what went wrong if it is one of torch's errors that a user can do something about."""
    if (wanted := re.search(r"can't allocate memory.*?(\d+ bytes)", str(error))) is not None:
        return f"memory: these sizes need {wanted[1]} at once, more than there is; take smaller ones"
    reason = str(error).split(". ", maxsplit=1)[0]
    if reason.startswith("DataLoader worker (pid"):  # torch raises it whatever the trainer is busy with
        return (
            f"workers: {reason}, usually because memory ran out; take fewer workers, or give it more memory, and "
            "/dev/shm too, then start again (a run goes on with --resume)"
        )
    if re.search(r"gloo/transport/.*(by peer|Broken pipe)", reason):
        return (
            "world: another process of this run has ended; what it printed says why (if nothing, it was killed); start "
            "again (a run goes on with --resume)"
        )
    import torch  # noqa: PLC0415 - a mistyped flag is answered without it

    if isinstance(error, torch.OutOfMemoryError):
        return f"device: out of memory ({reason}); reduce batch_size or width, or use --precision bf16"
    return None


def _full_disk(error: BaseException | None) -> str | None:
    """Say which file met a full disk or quota if that is what went wrong, whatever it was turned into on its way."""
    found, seen = None, set()
    while error is not None and error not in seen:
        seen.add(error)
        for code in (errno.ENOSPC, errno.EDQUOT):
            reason = os.strerror(code)
            if getattr(error, "errno", None) == code or reason in str(error):  # torch's are RuntimeErrors with a text
                if isinstance(file := getattr(error, "filename", None), str):
                    return f"{file}: {reason}"
                found = found or reason
        error = error.__cause__ or error.__context__
    return found


def _unless_the_disk_is_full(thread: threading.ExceptHookArgs) -> None:
    """Report what ended a thread, but for a full disk: TensorBoard's writer raises that again where it is used."""
    if _full_disk(thread.exc_value) is None:
        threading.__excepthook__(thread)


def _fail(line: str, status: int, *, any_rank: bool = False) -> NoReturn:
    """Print one line, in which whatever would break it or move a terminal's cursor is escaped."""
    plain = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in line)
    _leave(f"error: {plain}", status, any_rank=any_rank)


def _leave(line: str, status: int, *, any_rank: bool = False) -> NoReturn:
    if line and (any_rank or os.environ.get("RANK", "0") == "0"):  # of several processes of one run, one tells the user
        with contextlib.suppress(OSError):  # where what is printed goes to the full disk, the status alone can tell
            print(line, file=sys.stderr, flush=True)
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:  # the interpreter would try again and end with 120
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
    sys.exit(status)


_FIRST_LINE = re.compile(r'"""(.+?): ``python -m ([\w.]+)')
"""A command's module begins with what it does and how it is started."""


def commands(package: str) -> dict[str, str]:
    """Return the commands of an imported package, ``norms.doctor`` or ``train``, with a line each of what they do."""
    root, found = Path(str(files(package))), {}
    for path in sorted(root.rglob("*.py")):
        with path.open(encoding="utf-8") as file:
            match = _FIRST_LINE.match(file.readline())
        name = ".".join([package, *path.relative_to(root).with_suffix("").parts]).removesuffix(".__main__")
        if match and match[2] == name:
            found[name.removeprefix(f"{package}.")] = match[1]
    return found


def list_or_start(package: str) -> None:
    """List a package's commands, or start the one that the command line names; does not return.

    Raises:
        SystemExit: with the command's status; 2 if there is no such command.
    """
    name = sys.argv[1] if len(sys.argv) > 1 else "--help"
    known = commands(package)
    if name in known:
        del sys.argv[1]
        runpy.run_module(f"{package}.{name}", run_name="__main__", alter_sys=True)
    run_command(lambda: _list(package, known, name))


def _list(package: str, known: dict[str, str], name: str) -> None:
    if name not in ("-h", "--help"):
        near = difflib.get_close_matches(name, known, n=1)
        hint = f"; did you mean python -m {package}.{near[0]}?" if near else ""
        raise UsageError(f"{name}: no such command of python -m {package}; there are {', '.join(known)}{hint}")
    width = max(map(len, known), default=0) + len(f"python -m {package}.")
    for command, what in known.items():
        print(f"{f'python -m {package}.{command}':{width}}  {what}")
    print("Each takes --help.")
