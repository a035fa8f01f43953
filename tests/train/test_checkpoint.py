import errno
import os
import pickle
import stat

import pytest
import torch

from common.runtime.atomic import write_atomic
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
    assert checkpoint.load(tmp_path / "a.pt", "meta")["weights"].device.type == "meta"


def test_a_file_that_cannot_be_read_is_damaged_and_says_why(tmp_path):
    with pytest.raises(DamagedCheckpoint, match=r"missing\.pt: No such file or directory$"):
        checkpoint.load(tmp_path / "missing.pt")
    (tmp_path / "config.yaml").write_text("lr: 1\n")
    with pytest.raises(DamagedCheckpoint, match=r"config\.yaml: File is not a zip file$"):
        checkpoint.load(tmp_path / "config.yaml")


def test_the_newest_two_and_the_best_are_kept(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    for step in (10, 20, 30, 40):
        checkpoints.save(step, state(step), best=step == 20)
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["best.pt", "step-00000030.pt", "step-00000040.pt"]
    assert checkpoint.load(checkpoints.best)["run"] == {"step": 20}


def damage_cut(data: bytes) -> bytes:
    return data[: len(data) // 2]


def damage_bit(data: bytes) -> bytes:
    middle = len(data) // 2  # inside the tensor's record
    return data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :]


def damage_all(_: bytes) -> bytes:
    return b""


def test_a_damaged_newest_one_is_reported_and_the_one_before_used(tmp_path):
    for number, damage in enumerate((damage_cut, damage_bit, damage_all)):
        folder = tmp_path / str(number)
        folder.mkdir()
        checkpoints = Checkpoints(folder)
        checkpoints.save(10, state(10))
        newest = checkpoints.save(20, state(20))
        newest.write_bytes(damage(newest.read_bytes()))
        loaded, reports = checkpoints.load_latest()
        assert loaded is not None
        assert loaded["run"] == {"step": 10}
        assert len(reports) == 1
        assert newest.name in reports[0]


def test_no_flipped_bit_passes_for_the_truth(tmp_path):
    path = tmp_path / "a.pt"
    checkpoint.save(path, state(3))
    sound, found = path.read_bytes(), 0
    for position in range(0, len(sound), 37):
        path.write_bytes(sound[:position] + bytes([sound[position] ^ 4]) + sound[position + 1 :])
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
    loaded, reports = checkpoints.load_latest()
    assert loaded is not None
    assert (loaded["run"], reports) == ({"step": 10}, [])
    assert {path.name for path in tmp_path.iterdir()} == {"step-00000010.pt", "step-extra.pt", "notes.txt"}


def test_kept_epochs_are_found_by_number(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    assert checkpoints.epochs() == []
    for step, epoch in ((10, 2), (20, None), (30, 12)):
        checkpoints.save(step, state(step), epoch=epoch)
    assert checkpoints.epochs() == [2, 12]
    assert checkpoint.load(checkpoints.of_epoch(2))["run"] == {"step": 10}


def test_the_newest_is_the_one_of_the_largest_step(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    for step in (9, 10, 100):
        checkpoints.save(step, state(step))
    loaded, _ = checkpoints.load_latest()
    assert loaded is not None
    assert loaded["run"] == {"step": 100}
    assert [path.name for path in checkpoints.paths()] == ["step-00000010.pt", "step-00000100.pt"]


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


def test_nothing_saved_yet_is_not_an_error_but_all_damaged_is(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    assert checkpoints.load_latest() == (None, [])
    checkpoints.save(10, state(10)).write_bytes(b"PK")
    with pytest.raises(UsageError, match="every checkpoint"):
        checkpoints.load_latest()


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


def test_a_foreign_file_is_refused(tmp_path):
    torch.save({"weights": 1}, tmp_path / "foreign.pt")
    with pytest.raises(DamagedCheckpoint, match="not a checkpoint of this project"):
        checkpoint.load(tmp_path / "foreign.pt")


@pytest.mark.parametrize("layout", [checkpoint.SCHEMA - 1, checkpoint.SCHEMA + 1])
def test_another_layout_is_refused_and_no_file_before_it_taken(tmp_path, layout):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(10, state(10))
    torch.save({"schema": layout}, checkpoints.path(20))
    own = f"has layout {layout}, this version reads layout {checkpoint.SCHEMA} alone"
    line = rf"^.*step-00000020\.pt: {own}; use the version that .*$"
    with pytest.raises(UsageError, match=line):
        checkpoints.load_latest()


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "file"
    write_atomic(path, lambda file: file.write(b"old"))

    def fail(file):
        file.write(b"half")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_atomic(path, fail)
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_state_that_cannot_be_serialised_leaves_the_old_file(tmp_path):
    checkpoint.save(tmp_path / "a.pt", state(1))
    with pytest.raises((AttributeError, pickle.PicklingError)):
        checkpoint.save(tmp_path / "a.pt", {"function": lambda: None})
    assert checkpoint.load(tmp_path / "a.pt")["run"] == {"step": 1}
    assert [path.name for path in tmp_path.iterdir()] == ["a.pt"]


def test_a_good_checkpoint_and_those_of_asked_epochs_stay(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(10, state(10), keep=[10], epoch=1)
    for step in (20, 30, 40):
        checkpoints.save(step, state(step), keep=[10, None])
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"epoch-0001.pt", "step-00000010.pt", "step-00000030.pt", "step-00000040.pt"}
    assert checkpoint.load(tmp_path / "epoch-0001.pt")["run"] == {"step": 10}
    loaded, _ = checkpoints.load_latest(30)
    assert loaded is not None
    assert loaded["run"] == {"step": 30}
    checkpoints.drop_after(10)
    assert {path.name for path in tmp_path.iterdir()} == {"epoch-0001.pt", "step-00000010.pt"}
