import contextlib
import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch

from common.errors import UsageError
from common.runs.folder import RunConfig, RunFolder, environment, environment_json, note_session

FILES = {"config.yaml": "seed: 0\n"}

HOLD = """
import sys, time
from pathlib import Path
from common.runs.folder import RunFolder
run = RunFolder.reopen(Path(sys.argv[1]))
if len(sys.argv) > 2:  # a child made by fork, as loader workers are, outlives the process
    import os
    if os.fork() == 0:
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
    assert names == ["digits-ucb-seed0", "digits-ucb-seed0-2", "digits-ucb-seed0-3"]
    assert (tmp_path / names[2] / "config.yaml").read_text() == "seed: 0\n"


def test_a_given_name_that_exists_is_refused_and_left_alone(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "file").write_text("precious")
    with pytest.raises(UsageError, match=r"name: .*mine exists; add --resume"):
        RunFolder.create(tmp_path, "mine", "default", FILES)
    assert [p.name for p in (tmp_path / "mine").iterdir()] == ["file"]
    assert [p.name for p in tmp_path.iterdir()] == ["mine"]


def test_a_file_in_the_folders_place_is_one_line(tmp_path):
    (tmp_path / "runs").write_text("")
    with pytest.raises(UsageError, match="out: cannot write to"):
        RunFolder.create(tmp_path / "runs" / "cbgan", None, "default", FILES)


@pytest.mark.parametrize("fork", [False, True], ids=["alone", "with forked child"])
def test_a_lock_refuses_a_second_process_and_dies_with_its_own(tmp_path, fork):
    RunFolder.create(tmp_path, "run", "default", FILES).close()
    command = [sys.executable, "-c", HOLD, str(tmp_path / "run"), *(["fork"] if fork else [])]
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


def test_the_environment_is_recorded_and_checked(tmp_path):
    session = environment(torch.device("cpu"), backend="auto")
    (tmp_path / "environment.json").write_text(environment_json([session]))
    assert session["versions"]["torch"] == torch.__version__
    note_session(tmp_path, session)
    assert len(json.loads((tmp_path / "environment.json").read_text())["sessions"]) == 2
    threads = session["threads"]
    with pytest.raises(UsageError, match=rf"threads: the run used {threads}, .* add --threads {threads}"):
        note_session(tmp_path, session | {"threads": threads + 1})
    with pytest.raises(UsageError, match="backend: the run used auto"):
        note_session(tmp_path, session | {"backend": "reference"})
    assert len(json.loads((tmp_path / "environment.json").read_text())["sessions"]) == 2


@pytest.mark.parametrize(
    ("setting", "value"),
    [("name", ""), ("name", "a/b"), ("name", ".."), ("seed", -1), ("threads", -1), ("log_every", 0)],
)
def test_bad_settings_name_themselves(setting, value):
    with pytest.raises(ValueError, match=f"^{setting}: "):
        RunConfig(**{setting: value})


def test_resuming_needs_a_name():
    with pytest.raises(ValueError, match="--name"):
        RunConfig(resume=True)


def test_the_time_of_a_start_is_utc():
    started = environment(torch.device("cpu"))["started"]
    assert started.startswith(time.strftime("%Y-", time.gmtime()))
    assert started.endswith("+00:00")
