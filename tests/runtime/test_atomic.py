import errno
import os
import stat
import threading
from pathlib import Path

import pytest

from common.runtime import atomic
from common.runtime.atomic import naming, umask, write_atomic, write_text_atomic
from common.train.run_dir import RunFolder


@pytest.fixture
def mask():
    """Set the umask, and put the one before back at the end."""
    before = os.umask(0o022)
    yield os.umask
    os.umask(before)


def test_content_reaches_the_disk_before_its_name_and_the_name_before_the_return(tmp_path, monkeypatch):
    calls = []
    target = tmp_path / "folder" / "file"

    def named(descriptor):
        path = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
        return "folder" if path == target.parent else path.name if path == target else "temporary"

    fsync, replace = os.fsync, os.replace

    def recorded_fsync(descriptor):
        size = os.fstat(descriptor).st_size if named(descriptor) == "temporary" else None
        calls.append(("fsync", named(descriptor), size))
        fsync(descriptor)

    def recorded_replace(source, destination):
        calls.append(("replace", Path(destination).name, Path(source).stat().st_size))
        replace(source, destination)

    monkeypatch.setattr(atomic.os, "fsync", recorded_fsync)
    monkeypatch.setattr(atomic.os, "replace", recorded_replace)
    write_atomic(target, lambda file: file.write(b"content"))
    assert calls == [("fsync", "temporary", 7), ("replace", "file", 7), ("fsync", "folder", None)]


@pytest.mark.parametrize(("bits", "file", "folder"), [(0o027, 0o640, 0o750), (0, 0o666, 0o777)])
def test_files_and_folders_are_as_open_as_the_umask_lets_them_be(tmp_path, mask, bits, file, folder):
    mask(bits)
    run = RunFolder.create(tmp_path, "run", "default", {"config.yaml": "seed: 0\n"})
    run.close()
    write_text_atomic(run.path / "checkpoints" / "a.pt", "x")
    modes = {path: stat.S_IMODE(path.stat().st_mode) for path in (run.path, *run.path.rglob("*"))}
    assert {path.name: mode for path, mode in modes.items() if path.is_dir()} == {"run": folder, "checkpoints": folder}
    names = {"config.yaml": file, "lock": file, "a.pt": file}
    assert {path.name: mode for path, mode in modes.items() if path.is_file()} == names


def test_asking_for_the_umask_leaves_it(mask):
    mask(0o027)
    assert umask() == 0o027
    assert umask() == 0o027


def test_a_link_is_replaced_and_what_it_showed_stays(tmp_path):
    (tmp_path / "old").write_text("old")
    (tmp_path / "file").symlink_to(tmp_path / "old")
    write_text_atomic(tmp_path / "file", "é\n")
    assert (tmp_path / "file").read_bytes() == "é\n".encode()
    assert not (tmp_path / "file").is_symlink()
    assert (tmp_path / "old").read_text() == "old"


def test_a_reader_sees_old_or_new_and_nothing_between(tmp_path):
    target = tmp_path / "file"
    contents = [bytes([number]) * 200_000 for number in range(2)]
    write_atomic(target, lambda file: file.write(contents[0]))
    seen, done = set(), threading.Event()

    def read():
        while not done.is_set():
            seen.add(target.read_bytes())

    reader = threading.Thread(target=read)
    reader.start()
    for number in range(40):
        write_atomic(target, lambda file, number=number: file.write(contents[number % 2]))
    done.set()
    reader.join()
    assert seen <= set(contents)


@pytest.mark.parametrize(
    ("call", "code"),
    [("write", errno.ENOSPC), ("fsync", errno.EDQUOT), ("chmod", errno.ENOSPC), ("replace", errno.ENOSPC)],
)
def test_a_full_disk_is_named_with_the_file_it_met_and_leaves_the_old_one_alone(tmp_path, monkeypatch, call, code):
    target = tmp_path / "file"
    write_text_atomic(target, "old")

    def full(*_):
        raise OSError(code, os.strerror(code))

    if call != "write":
        monkeypatch.setattr(atomic.os, call, full)
    with pytest.raises(OSError, match=os.strerror(code)) as caught:
        write_atomic(target, full if call == "write" else lambda file: file.write(b"new"))
    assert caught.value.errno == code
    if call in ("write", "fsync"):  # the others name their files themselves
        assert caught.value.filename == str(target)
    assert target.read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_an_error_that_names_its_file_keeps_that_name(tmp_path):
    with pytest.raises(FileNotFoundError) as caught, naming(tmp_path / "file"):
        (tmp_path / "other").read_text()
    assert caught.value.filename == str(tmp_path / "other")


def test_an_error_that_has_nothing_to_do_with_writing_keeps_its_words(tmp_path):
    for error in (OSError("in words"), ConnectionResetError(errno.ECONNRESET, "in words")):
        told = str(error)
        with pytest.raises(OSError, match="in words") as caught, naming(tmp_path / "file"):
            raise error
        assert str(caught.value) == told


def test_an_interruption_leaves_no_temporary_file(tmp_path):
    def interrupted(_):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_atomic(tmp_path / "file", interrupted)
    assert list(tmp_path.iterdir()) == []


def test_an_interruption_after_the_renaming_stays_that_interruption(tmp_path, monkeypatch):
    replace = os.replace

    def interrupted(source, target):
        replace(source, target)
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_text_atomic(tmp_path / "a.txt", "whole")
    assert (tmp_path / "a.txt").read_text() == "whole"
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]
