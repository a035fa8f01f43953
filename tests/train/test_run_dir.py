import contextlib
import errno
import fcntl
import json
import os
import platform
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from common.norms import machine
from common.runtime.errors import UsageError
from common.train import run_dir as module
from common.train.run_dir import (
    RunFolder,
    environment,
    environment_json,
    find_run,
    note_session,
    recorded_threads,
)

FILES = {"config.yaml": "seed: 0\n"}

HOLD = """
import os, sys, time
from pathlib import Path
from common.train.run_dir import RunFolder
run = RunFolder.reopen(Path(sys.argv[1]))
if os.fork() == 0:  # a child, as loader workers are, outlives the process
    time.sleep(60)
    os._exit(0)
print("locked", flush=True)
time.sleep(60)
"""


def test_fresh_names_count_up(tmp_path):
    names = []
    for _ in range(3):
        run = RunFolder.create(tmp_path, None, "digits-ucb-seed0", FILES)
        names.append(run.path.name)
        run.close()
        (tmp_path / "digits-ucb-seed0-2").mkdir(exist_ok=True)  # empty, and somebody's
    assert names == ["digits-ucb-seed0", "digits-ucb-seed0-3", "digits-ucb-seed0-4"]
    assert not list((tmp_path / "digits-ucb-seed0-2").iterdir())
    assert (tmp_path / names[2] / "config.yaml").read_text() == "seed: 0\n"


def test_a_given_name_that_exists_is_refused_and_left_alone(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "file").write_text("precious")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    for name in ("mine", "link"):
        with pytest.raises(UsageError, match=rf"name: .*{name} exists; add --resume"):
            RunFolder.create(tmp_path, name, "default", FILES)
    assert [p.name for p in (tmp_path / "mine").iterdir()] == ["file"]
    assert {p.name for p in tmp_path.iterdir()} == {"mine", "link"}
    with pytest.raises(UsageError, match="out: cannot write to"):
        RunFolder.create(tmp_path / "mine" / "file" / "cbgan", None, "default", FILES)


def test_a_run_that_could_not_be_made_leaves_nothing(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(module, "write_text_atomic", full)
    with pytest.raises(OSError, match="No space left"):
        RunFolder.create(tmp_path, None, "default", FILES)
    assert list(tmp_path.iterdir()) == []


def test_a_lock_refuses_a_second_process_and_dies_with_its_own_whatever_its_children_do(tmp_path):
    RunFolder.create(tmp_path, "run", "default", FILES).close()
    command = [sys.executable, "-c", HOLD, str(tmp_path / "run")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "locked\n"
            with pytest.raises(UsageError, match="in use by another process"):
                RunFolder.reopen(tmp_path / "run")
            process.send_signal(signal.SIGKILL)
            process.wait()
            RunFolder.reopen(tmp_path / "run").close()
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)


SESSION = {
    "device": "cpu",
    "threads": 2,
    "world": 1,
    "python": "3.11.7",
    "versions": {"torch": "2.11.0", "triton": None},
    "hardware": {"cpu": "A", "cores": 2, "memory_gib": 8, "gpu": None},
    "backend": "eager",
    "commit": "abc",
}


def changed(field: str, value: object) -> dict:
    group, _, name = field.partition(".")
    return SESSION | ({group: SESSION[group] | {name: value}} if name else {group: value})


def write_sessions(folder, *sessions):
    (folder / "environment.json").write_text(environment_json(list(sessions)))


def sessions(folder) -> list[dict]:
    return json.loads((folder / "environment.json").read_text())["sessions"]


def test_a_session_like_the_last_one_is_appended_without_a_word(tmp_path):
    session = environment(torch.device("cpu"))
    write_sessions(tmp_path, session)
    assert note_session(tmp_path, session) == []
    assert sessions(tmp_path) == [session, session]


ELSEWHERE = {"device": "cuda", "threads": 7, "python": "3.12.1", "versions.triton": "3.4.0", "hardware.gpu": "C"}


def test_a_run_goes_on_elsewhere_with_a_line_for_what_differs(tmp_path):
    for field, value in ELSEWHERE.items():
        write_sessions(tmp_path, SESSION)
        session = changed(field, value)
        (line,) = note_session(tmp_path, session)
        before = (SESSION | SESSION["versions"] | SESSION["hardware"])[field.split(".")[-1]]
        assert line.startswith(f"{field}: the run used {before}, this process has {value}; ")
        assert sessions(tmp_path) == [SESSION, session]
        assert note_session(tmp_path, session) == []  # as the last session, if not as the first
    for field, value in (("hardware.cores", 64), ("commit", "def")):
        write_sessions(tmp_path, SESSION)
        assert note_session(tmp_path, changed(field, value)) == []  # what no result depends on


def test_another_backend_of_the_layers_is_refused_on_the_same_kind_of_device(tmp_path):
    compiled = changed("backend", "compiled")
    write_sessions(tmp_path, SESSION)
    with pytest.raises(UsageError, match=r"^backend: the run's .* by eager, .* by compiled; start it with CXX=none"):
        note_session(tmp_path, compiled)
    assert sessions(tmp_path) == [SESSION]
    lines = note_session(tmp_path, changed("backend", "triton") | {"device": "cuda"})
    assert [line.split(":")[0] for line in lines] == ["device", "backend"]
    write_sessions(tmp_path, compiled)
    with pytest.raises(UsageError, match=r"^backend: .* by compiled, .* by eager; install the C\+\+ compiler"):
        note_session(tmp_path, SESSION)


def test_another_number_of_processes_is_refused(tmp_path):
    write_sessions(tmp_path, SESSION)
    with pytest.raises(UsageError, match=r"^world: the run used 1, .* has 4; .* torchrun --nproc-per-node 1$"):
        note_session(tmp_path, changed("world", 4))
    assert sessions(tmp_path) == [SESSION]


def test_the_threads_to_keep_are_those_of_the_last_session(tmp_path):
    write_sessions(tmp_path, SESSION, changed("threads", 5))
    assert recorded_threads(tmp_path) == 5


BAD_SESSIONS = [
    b"", b'{"sessions": [{"wor', b"\xff\xfe", b"[" * 100_000, b"[]", b"{}", b'{"sessions": 3}', b'{"sessions": []}',
    b'{"sessions": [1]}', b'{"sessions": [{"world": 1}]}', b'{"sessions": [{"world": 1, "threads": "two"}]}',
    b'{"sessions": [{"world": 1, "threads": 0}]}',
]  # fmt: skip


def test_an_environment_of_another_form_is_one_line_that_names_it(tmp_path):
    file = tmp_path / "environment.json"
    for content in [None, *BAD_SESSIONS]:
        if content is not None:
            file.write_bytes(content)
        with pytest.raises(UsageError, match=f"^name: {file} .* expected {{") as caught:
            note_session(tmp_path, SESSION)
        assert "\n" not in str(caught.value)
        assert not file.exists() if content is None else file.read_bytes() == content


def test_a_folder_that_may_only_be_read_is_one_line_and_a_full_disk_is_another_matter(tmp_path, monkeypatch):
    write_sessions(tmp_path, SESSION)
    opened = os.open
    uses = {"lock": RunFolder.reopen, "environment.json": lambda path: note_session(path, SESSION)}
    for name, use in uses.items():
        for code in (errno.EROFS, errno.EACCES, errno.ENOSPC):

            def refuse(path, flags, *mode, name=name, code=code, **options):
                if name in str(path) and flags & (os.O_WRONLY | os.O_RDWR):
                    raise OSError(code, os.strerror(code), path)
                return opened(path, flags, *mode, **options)

            line = rf"^name: cannot write to {tmp_path} \({os.strerror(code)}\); .*--out"
            full = code == errno.ENOSPC
            with monkeypatch.context() as patch:
                patch.setattr(os, "open", refuse)
                with pytest.raises(OSError if full else UsageError, match="No space left" if full else line):
                    use(tmp_path)
            assert sessions(tmp_path) == [SESSION]


def test_a_file_system_without_locks_is_told_apart_from_a_run_in_use(tmp_path, monkeypatch):
    def no_locks(*_):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "lockf", no_locks)
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(UsageError, match=f"^name: {tmp_path} cannot be locked \\(No locks available\\)"):
        RunFolder.reopen(tmp_path)
    assert len(os.listdir("/proc/self/fd")) == before


def test_the_commit_is_that_of_the_code_and_marked_where_the_code_has_changed(tmp_path, monkeypatch):
    def git(*arguments: str) -> str:
        command = ["git", "-c", "user.name=A", "-c", "user.email=a@example.org", *arguments]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True).stdout.strip()

    def commit() -> str | None:
        return environment(torch.device("cpu"))["commit"]

    monkeypatch.setattr(machine, "__file__", str(tmp_path / "code.py"))
    assert commit() is None
    (tmp_path / "code.py").write_text("1")
    git("init")
    git("add", "code.py")
    git("commit", "-m", "First")
    git("tag", "-a", "v1", "-m", "v1")  # a commit's number stays what is noted
    assert commit() == git("rev-parse", "HEAD")
    assert len(git("rev-parse", "HEAD")) == 40
    (tmp_path / "code.py").write_text("2")
    assert commit() == git("rev-parse", "HEAD") + "+changes"


def test_a_session_tells_how_it_was_started_and_on_what(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    monkeypatch.setattr(sys, "orig_argv", ["python", "-m", "cbgan.train", "--out", "my runs"])
    monkeypatch.setattr(torch, "get_num_threads", lambda: 6)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"card {device.index}")
    session = environment(torch.device("cuda", 1))
    assert session["command"] == "python -m cbgan.train --out 'my runs'"
    assert (session["world"], session["threads"], session["device"]) == (3, 6, "cuda")
    assert session["started"].startswith(time.strftime("%Y-", time.gmtime()))
    assert session["started"].endswith("+00:00")
    assert session["versions"]["torch"] == torch.__version__
    assert session["hardware"]["gpu"] == "card 1"
    memory = next(line for line in Path("/proc/meminfo").read_text().splitlines() if line.startswith("MemTotal:"))
    assert session["hardware"]["memory_gib"] == pytest.approx(int(memory.split()[1]) / 2**20, rel=0.05)
    assert environment(torch.device("cpu"))["hardware"]["gpu"] is None
    models = re.findall(r"^model name\s*: (.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    assert session["hardware"]["cpu"] in (models or [platform.machine()])


def test_a_run_to_go_on_with_is_found_or_those_that_are_there_are_named(tmp_path):
    with pytest.raises(UsageError, match=r"^name: .*ghost is not a run that can be resumed; there are no runs there$"):
        find_run(tmp_path, "ghost")
    for name in ("two", "one"):
        RunFolder.create(tmp_path, name, "default", FILES).close()
    (tmp_path / "ghost").mkdir()
    assert find_run(tmp_path, "one") == tmp_path / "one"
    with pytest.raises(UsageError, match=r"; runs there: one, two$"):
        find_run(tmp_path, "ghost")
