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
    with pytest.raises(RuntimeError) as caught:
        torch.empty(10**14)
    wanted = "error: memory: these sizes need 400000000000000 bytes at once, more than there is; take smaller ones"
    assert ended(capsys, caught.value) == (2, [wanted])


def test_a_fault_of_the_program_keeps_its_traceback():
    for error in (RuntimeError("a fault"), ValueError("a fault"), OSError(errno.EIO, "a fault")):
        with pytest.raises(type(error), match="a fault"):
            run_command(lambda error=error: exec("raise error", {"error": error}))


def full(code: int = errno.ENOSPC, *names: str) -> OSError:
    return OSError(code, os.strerror(code), *names)


def caused(error: Exception, cause: Exception) -> Exception:
    error.__cause__ = cause
    return error


FULL = {
    "/runs/a.pt: No space left on device; make room": full(errno.ENOSPC, "/runs/a.pt"),
    "/runs/a.pt: Disk quota exceeded; make room": full(errno.EDQUOT, "/runs/a.pt"),
    "/runs/b.pt: No space left on device; make room": caused(full(), full(errno.ENOSPC, "/runs/b.pt")),
    "No space left on device; make room": RuntimeError("unable to write </torch_1>: No space left on device (28)"),
    "out: cannot write": caused(UsageError("out: cannot write"), full()),
    "data.root: a could not be": UsageError("data.root: a could not be downloaded (No space left on device)"),
}


def test_a_full_disk_is_one_line_and_status_4(capsys):
    for start, error in FULL.items():
        status, (line,) = ended(capsys, error)
        assert status == 4, start
        assert line.startswith(f"error: {start}")


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


@pytest.mark.parametrize("prints", ["print('x')", "print('x' * 100_000)"])
def test_a_full_disk_under_what_is_printed(prints):
    with open("/dev/full", "w") as nowhere:
        command = [sys.executable, "-c", PRINTING.format(prints)]
        done = subprocess.run(command, stdout=nowhere, stderr=subprocess.PIPE, text=True, check=False)
        silent = subprocess.run(command, stdout=nowhere, stderr=nowhere, check=False)
    assert (done.returncode, silent.returncode) == (4, 4)
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
            assert stop.signum is None
            send(signum)
            assert stop.signum == signum
            with pytest.raises(Acted):
                send(signum)
        assert signal.getsignal(signum) is act
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
ARGUMENTS = ["--a b", "", "-W", "é\n", "--", "-m"]
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


@pytest.mark.parametrize("command", [["-m", name, *ARGUMENTS] for name in COMMANDS] + [
    ["-m", "common", "norms.doctor", *ARGUMENTS], ["-mcbgan.train"]], ids=" ".join)  # fmt: skip
def test_threads_of_a_command_spin_shorter_from_before_torch_is_loaded(loading_torch, command):
    assert loading_torch(*command) == ["100000", None]


def test_how_threads_wait_stays_as_the_user_has_said(loading_torch):
    assert loading_torch("-m", "common.norms.doctor", GOMP_SPINCOUNT="") == ["", None]
    assert loading_torch("-m", "common.norms.doctor", OMP_WAIT_POLICY="PASSIVE") == [None, "PASSIVE"]


def test_importing_settles_nothing(loading_torch, tmp_path):
    assert loading_torch("-c", "import common.norms", "-m", "cbgan.train") == [None, None]
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "__init__.py").write_text("import common.norms")
    assert loading_torch("-m", "mine", *ARGUMENTS) == [None, None]


def test_ctrl_c_while_torch_is_loaded_is_one_line(tmp_path):
    (tmp_path / "torch.py").write_text("import os, signal, time; os.kill(os.getpid(), signal.SIGINT); time.sleep(9)")
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), os.environ["PYTHONPATH"]])}
    command = [sys.executable, "-m", "common.norms.doctor"]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (130, "stopped at once\n")


def test_a_name_that_is_no_text_is_printed_escaped(monkeypatch, capsys):
    printed = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(printed, encoding="utf-8"))
    with pytest.raises(SystemExit) as left:
        run_command(lambda: print("猫/caf\udce9"))
    assert (left.value.code, printed.getvalue()) == (0, "猫/caf\\udce9\n".encode())


def test_an_error_is_one_line_whatever_it_quotes(capsys):
    assert ended(capsys, UsageError("lr: a\x1b[31m\nb猫")) == (2, ["error: lr: a\\x1b[31m\\nb猫"])
