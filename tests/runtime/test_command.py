import errno
import io
import json
import os
import signal
import subprocess
import sys
import threading
import time

import pytest
import torch

from common.runtime import command
from common.runtime.command import StopRequest, run_command
from common.runtime.errors import NonFiniteError, Stopped, UsageError


def ended(capsys, error: BaseException | None) -> tuple[object, list[str]]:
    """Run a command that raises this error; return its status and the lines on stderr."""

    def main():
        print("printed")
        if error is not None:
            raise error

    with pytest.raises(SystemExit) as left:
        run_command(main)
    told = capsys.readouterr()
    assert told.out == "printed\n"
    return left.value.code, told.err.splitlines()


@pytest.fixture(autouse=True)
def thread_hook():
    """Put back what reports on threads, which a command replaces for the rest of its process."""
    before = threading.excepthook
    yield
    threading.excepthook = before


def test_each_end_has_its_status_and_one_line(capsys):
    assert ended(capsys, None) == (0, [])
    assert ended(capsys, UsageError("lr: no")) == (2, ["error: lr: no"])
    assert ended(capsys, NonFiniteError("loss/d")) == (3, ["error: loss/d"])
    assert ended(capsys, Stopped(signal.SIGTERM, "stopped")) == (143, ["stopped"])
    assert ended(capsys, KeyboardInterrupt()) == (130, ["stopped at once; the last checkpoint stands"])
    status, (line,) = ended(capsys, torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB."))
    assert status == 1
    assert line.startswith("error: device: out of memory (CUDA out of memory); ")


def test_a_fault_of_the_program_keeps_its_traceback():
    for error in (RuntimeError("a fault"), ValueError("a fault"), OSError(errno.EIO, "a fault")):
        with pytest.raises(type(error), match="a fault"):
            run_command(lambda error=error: exec("raise error", {"error": error}))


def chained(error: Exception, cause: Exception, *, hidden: bool) -> Exception:
    try:
        try:
            raise cause
        except Exception:
            raise error from None if hidden else cause
    except Exception as raised:
        return raised


def full(code: int = errno.ENOSPC, *names: str) -> OSError:
    return OSError(code, os.strerror(code), *names)


FULL = {
    "with its file": (full(errno.ENOSPC, "/runs/a.pt"), "error: /runs/a.pt: No space left on device; make room"),
    "a quota": (full(errno.EDQUOT, "/runs/a.pt"), "error: /runs/a.pt: Disk quota exceeded; make room"),
    "without a file": (full(), "error: No space left on device; make room"),
    "named on the way": (
        chained(full(), full(errno.ENOSPC, "/runs/a.pt"), hidden=False),
        "error: /runs/a.pt: No space left on device; make room",
    ),
    "torch's": (
        RuntimeError("unable to write to file </torch_1>: No space left on device (28)"),
        "error: No space left on device; make room",
    ),
    "a worker's": (OSError("Caught OSError in worker 0.\nTraceback\n  [Errno 28] No space left on device"),
                   "error: No space left on device; make room"),
    "told as a mistake": (chained(UsageError("out: cannot write"), full(), hidden=True), "error: out: cannot write"),
    "told in words": (UsageError("data.root: a could not be downloaded (No space left on device)"), "error: data.root"),
}  # fmt: skip


def test_a_full_disk_is_one_line_and_status_4(capsys):
    for case, (error, start) in FULL.items():
        status, (line,) = ended(capsys, error)
        assert status == 4, case
        assert line.startswith(start), case


def test_errors_that_caused_each_other_in_a_circle_come_to_an_end(capsys):
    first, second = UsageError("first"), UsageError("second")
    first.__cause__, second.__cause__ = second, first
    assert ended(capsys, first) == (2, ["error: first"])


def test_a_file_that_may_not_be_used_is_one_line_and_status_2(capsys):
    for code in (errno.EACCES, errno.EPERM, errno.EROFS):
        status, (line,) = ended(capsys, full(code, "/runs/a.pt"))
        assert status == 2
        assert line.startswith(f"error: /runs/a.pt: {os.strerror(code)}")


@pytest.mark.parametrize(("code", "reported"), [(errno.ENOSPC, False), (errno.EIO, True)])
def test_a_thread_that_met_a_full_disk_leaves_the_telling_to_the_main_thread(capsys, code, reported):
    def main():
        thread = threading.Thread(target=exec, args=("raise error", {"error": full(code)}))
        thread.start()
        thread.join()
        raise UsageError("main: told")

    with pytest.raises(SystemExit):
        run_command(main)
    lines = capsys.readouterr().err.splitlines()
    assert lines[-1] == "error: main: told"
    assert ("Exception in thread" in lines[0]) is reported
    assert reported or len(lines) == 1


def test_of_several_processes_the_first_tells(capsys, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    assert ended(capsys, UsageError("lr: no")) == (2, [])


COMMAND = """
from common.runtime.command import run_command
run_command(lambda: print("x" * {count}))
"""


PRINTING = """
import sys
from dataclasses import dataclass
from common.runtime.cli import parse
from common.runtime.command import run_command

@dataclass
class Config:
    number: int = 1

run_command(lambda: {})
"""


@pytest.mark.parametrize(("stream", "prints"), [
    ("stdout", "print('x')"),
    ("stdout", "[print('x' * 99) for _ in range(999)]"),
    ("stdout", "parse(Config, ['--help'])"),
    ("stdout", "parse(Config, ['--print_config'])"),
    ("stderr", "print('x', file=sys.stderr)"),
])  # fmt: skip
def test_a_command_whose_reader_has_ended_ends_as_a_shell_expects(monkeypatch, stream, prints):
    monkeypatch.delenv("PYTHONUNBUFFERED", raising=False)
    reading, writing = os.pipe()
    os.close(reading)
    out, err = (writing if name == stream else subprocess.PIPE for name in ("stdout", "stderr"))
    done = subprocess.run([sys.executable, "-c", PRINTING.format(prints)], stdout=out, stderr=err, check=False)
    os.close(writing)
    assert (done.returncode, done.stdout or b"", done.stderr or b"") == (128 + signal.SIGPIPE, b"", b"")


@pytest.mark.parametrize(("count", "errors"), [(1, "kept"), (100_000, "kept"), (1, "full")])
def test_a_full_disk_under_what_is_printed(count, errors):
    with open("/dev/full", "w") as nowhere:
        done = subprocess.run(
            [sys.executable, "-c", COMMAND.format(count=count)],
            stdout=nowhere, stderr=subprocess.PIPE if errors == "kept" else nowhere, text=True, check=False,
        )  # fmt: skip
    assert done.returncode == 4
    if errors == "kept":
        assert done.stderr.count("\n") == 1
        assert done.stderr.startswith("error: No space left on device")


def send(signum: int) -> None:
    os.kill(os.getpid(), signum)
    time.sleep(0.01)  # Python runs the handler between two instructions


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_is_noted_and_the_second_acts_as_before(capsys, signum):
    class Acted(Exception):
        pass

    def act(*_):
        raise Acted

    before = signal.signal(signum, act)
    try:
        with StopRequest() as stop:
            assert not stop
            send(signum)
            assert stop
            assert stop.signum == signum
            with pytest.raises(Acted):
                send(signum)
        with StopRequest() as stop:
            pass
        assert signal.getsignal(signum) is act
        assert not stop
    finally:
        signal.signal(signum, before)
    assert capsys.readouterr().err.count(signal.Signals(signum).name) == 1


# Where another torch is found first, which says what it finds when it is loaded, and ends the process with status 7.
TORCH = """
import json, os
names = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")
print(json.dumps([os.environ.get(name) for name in names]), flush=True)
os._exit(7)
"""
ARGUMENTS = ["--a b", "", "'\"$HOME`*", "-W", "é\n", "--", "-m"]
COMMANDS = sorted(
    f"{package}.{name}" for package in ("common", "cbgan", "cbcls", "cbda") for name in command.commands(package)
)


@pytest.fixture
def loading_torch(tmp_path):
    (tmp_path / "torch.py").write_text(TORCH)

    def run(*argv: str, **settings: str) -> list:
        env = {name: value for name, value in os.environ.items() if name not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
        env["PYTHONPATH"] = os.pathsep.join([str(tmp_path), env["PYTHONPATH"]])
        command = [sys.executable, "-X", "utf8", *argv]
        done = subprocess.run(command, env=env | settings, capture_output=True, text=True, check=False)
        assert (done.returncode, done.stderr) == (7, ""), done.stderr
        return json.loads(done.stdout)

    return run


@pytest.mark.parametrize("command", COMMANDS)
def test_threads_of_a_command_spin_shorter_from_before_torch_is_loaded(loading_torch, command):
    assert loading_torch("-m", command, *ARGUMENTS) == ["100000", None]


def test_so_do_those_of_a_command_that_is_started_in_another_form(loading_torch):
    assert loading_torch("-m", "common", "norms.doctor", *ARGUMENTS) == ["100000", None]
    assert loading_torch("-mcbgan.train") == ["100000", None]


def test_how_threads_wait_stays_as_the_user_has_said(loading_torch):
    assert loading_torch("-m", "common.norms.doctor", GOMP_SPINCOUNT="7") == ["7", None]
    assert loading_torch("-m", "common.norms.doctor", GOMP_SPINCOUNT="") == ["", None]
    assert loading_torch("-m", "common.norms.doctor", OMP_WAIT_POLICY="PASSIVE") == [None, "PASSIVE"]


def test_importing_settles_nothing(loading_torch, tmp_path):
    assert {"cbgan.train", "cbcls.train", "cbda.adamatch", "common.data", "common.norms.doctor"} <= set(COMMANDS)
    for name in ("common.norms", "cbgan.train"):
        assert loading_torch("-c", f"import {name}", "-m", "cbgan.train") == [None, None]
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "__init__.py").write_text("import common.norms")
    assert loading_torch("-m", "mine", *ARGUMENTS) == [None, None]


@pytest.mark.parametrize("command", ["cbgan.train", "common.norms.doctor"])
def test_ctrl_c_while_torch_is_loaded_is_one_line(tmp_path, command):
    (tmp_path / "torch.py").write_text("import os, signal, time; os.kill(os.getpid(), signal.SIGINT); time.sleep(9)")
    path = os.pathsep.join([str(tmp_path), os.environ["PYTHONPATH"]])
    done = subprocess.run(
        [sys.executable, "-m", command],
        env=os.environ | {"PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (130, "stopped at once\n")


@pytest.mark.parametrize(("error", "status"), [(UsageError("lr: no"), 2), (NonFiniteError("loss"), 3)])
def test_what_cannot_be_told_still_has_its_status(monkeypatch, error, status):
    class Full:
        def write(self, _text):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        def flush(self):
            pass

    def main():
        raise error

    monkeypatch.setattr(sys, "stderr", Full())
    with pytest.raises(SystemExit) as left:
        run_command(main)
    assert left.value.code == status


def test_a_name_that_is_no_text_is_printed_escaped(monkeypatch):
    printed = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(printed, encoding="utf-8"))
    with pytest.raises(SystemExit) as left:
        run_command(lambda: print("猫/caf\udce9"))
    assert (left.value.code, printed.getvalue()) == (0, "猫/caf\\udce9\n".encode())
