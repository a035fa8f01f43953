import errno
import os
import pickle
import stat

import pytest
import torch

from common.runtime.errors import UsageError
from common.train import checkpoint
from common.train.checkpoint import Checkpoints, DamagedCheckpoint


def state(step: int) -> dict:
    return {"run": {"step": step}, "weights": torch.arange(1000.0) + step}


def test_a_state_comes_back_bit_for_bit(tmp_path):
    checkpoint.save(tmp_path / "a.pt", state(3))
    loaded = checkpoint.load(tmp_path / "a.pt")
    assert loaded["schema"] == checkpoint.SCHEMA
    assert loaded["run"] == {"step": 3}
    assert torch.equal(loaded["weights"], state(3)["weights"])


def test_a_file_that_is_no_checkpoint_is_damaged_and_says_why(tmp_path):
    (tmp_path / "config.yaml").write_text("lr: 1\n")
    torch.save({"weights": 1}, tmp_path / "foreign.pt")
    reasons = {"missing.pt": "No such file or directory", "config.yaml": "File is not a zip file",
               "foreign.pt": "not a checkpoint of this project"}  # fmt: skip
    for name, reason in reasons.items():
        with pytest.raises(DamagedCheckpoint, match=rf"{name}: {reason}$"):
            checkpoint.load(tmp_path / name)


def test_the_newest_two_the_best_and_those_that_were_asked_for_are_kept(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(9, state(9), keep=[9], epoch=12)
    for step, epoch in ((10, 2), (20, None), (100, None)):
        checkpoints.save(step, state(step), best=step == 20, keep=[9, None], epoch=epoch)
    names = sorted(path.name for path in tmp_path.iterdir())
    steps = ["step-00000009.pt", "step-00000020.pt", "step-00000100.pt"]
    assert names == ["best.pt", "epoch-0002.pt", "epoch-0012.pt", *steps]
    assert checkpoints.epochs() == [2, 12]
    assert checkpoint.load(checkpoints.of_epoch(2))["run"] == {"step": 10}
    assert checkpoint.load(checkpoints.best)["run"] == {"step": 20}
    for most, step in ((None, 100), (99, 20), (9, 9)):
        assert step_of(checkpoints.load_latest(most)) == step
    checkpoints.drop_after(9)
    assert [path.name for path in checkpoints.paths()] == steps[:1]


def step_of(found: tuple[dict | None, list[str]]) -> int:
    loaded, reports = found
    assert loaded is not None
    assert reports == []
    return loaded["run"]["step"]


def test_a_damaged_newest_one_is_reported_and_the_one_before_used(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    assert checkpoints.load_latest() == (None, [])
    checkpoints.save(10, state(10))
    for damage in (lambda data: data[: len(data) // 2], lambda _: b""):
        newest = checkpoints.save(20, state(20))
        newest.write_bytes(damage(newest.read_bytes()))
        loaded, (report,) = checkpoints.load_latest()
        assert loaded is not None
        assert loaded["run"] == {"step": 10}
        assert newest.name in report
    checkpoints.path(10).write_bytes(b"PK")
    with pytest.raises(UsageError, match="every checkpoint"):
        checkpoints.load_latest()


def test_no_flipped_bit_passes_for_the_truth(tmp_path):
    path = tmp_path / "a.pt"
    checkpoint.save(path, state(3))
    whole, found = path.read_bytes(), 0
    for position in range(0, len(whole), 37):
        path.write_bytes(whole[:position] + bytes([whole[position] ^ 4]) + whole[position + 1 :])
        try:
            loaded = checkpoint.load(path)
        except (DamagedCheckpoint, UsageError):
            found += 1
            continue
        assert loaded["run"] == {"step": 3}  # padding and time stamps may change, content may not
        assert torch.equal(loaded["weights"], state(3)["weights"])
    assert found > 100


def test_what_a_killed_write_left_is_removed_and_nothing_else(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(10, state(10))
    for name in (".step-00000020.pt.abc.tmp", ".best.pt.def.tmp"):
        (tmp_path / name).write_bytes(b"half")
    for name in ("step-extra.pt", "notes.txt"):  # not ours
        (tmp_path / name).write_bytes(b"kept")
    checkpoints.load_latest()  # reading alone must not take a file away from a process that is writing it
    assert len(list(tmp_path.iterdir())) == 5
    checkpoints.remove_leftovers()
    assert step_of(checkpoints.load_latest()) == 10
    assert {path.name for path in tmp_path.iterdir()} == {"step-00000010.pt", "step-extra.pt", "notes.txt"}


@pytest.mark.parametrize("failing", [1, 2], ids=["numbered", "best"])
def test_a_full_disk_leaves_the_earlier_checkpoints_whole(tmp_path, monkeypatch, failing):
    checkpoints = Checkpoints(tmp_path)
    for step in (10, 20):
        checkpoints.save(step, state(step), best=step == 10)
    fsync, calls = os.fsync, []

    def full(descriptor):
        if not stat.S_ISDIR(os.fstat(descriptor).st_mode):
            calls.append(descriptor)
            if len(calls) == failing:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left") as caught:
        checkpoints.save(30, state(30), best=True)
    assert caught.value.filename == str(tmp_path / ("step-00000030.pt" if failing == 1 else "best.pt"))
    monkeypatch.undo()
    assert checkpoint.load(checkpoints.best)["run"] == {"step": 10}
    steps = [10, 20] if failing == 1 else [10, 20, 30]
    assert [checkpoint.load(path)["run"]["step"] for path in checkpoints.paths()] == steps
    assert len(list(tmp_path.iterdir())) == len(steps) + 1


class Command:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_code_in_a_file_is_not_run(tmp_path):
    torch.save({"schema": checkpoint.SCHEMA, "x": Command(str(tmp_path / "made"))}, tmp_path / "a.pt")
    (tmp_path / "b.pt").write_bytes(pickle.dumps(Command(str(tmp_path / "made"))))
    for name in ("a.pt", "b.pt"):
        with pytest.raises(DamagedCheckpoint):
            checkpoint.load(tmp_path / name)
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize("layout", [checkpoint.SCHEMA - 1, checkpoint.SCHEMA + 1])
def test_another_layout_is_refused_and_no_file_before_it_taken(tmp_path, layout):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(10, state(10))
    torch.save({"schema": layout}, checkpoints.path(20))
    own = f"has layout {layout}, this version reads layout {checkpoint.SCHEMA} alone"
    line = rf"^.*step-00000020\.pt: {own}; use the version that .*$"
    with pytest.raises(UsageError, match=line):
        checkpoints.load_latest()


def test_a_state_that_cannot_be_serialised_leaves_the_old_file(tmp_path):
    checkpoint.save(tmp_path / "a.pt", state(1))
    with pytest.raises((AttributeError, pickle.PicklingError)):
        checkpoint.save(tmp_path / "a.pt", {"function": lambda: None})
    assert checkpoint.load(tmp_path / "a.pt")["run"] == {"step": 1}
    assert [path.name for path in tmp_path.iterdir()] == ["a.pt"]
