import errno
import os
import stat
from pathlib import Path

import pytest

from common.runtime import atomic
from common.runtime.atomic import naming, umask, write_atomic, write_text_atomic
from common.train.run_dir import RunFolder


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


def test_files_and_folders_are_as_open_as_the_umask_lets_them_be(tmp_path):
    before = os.umask(0o022)
    try:
        for bits in (0o027, 0):
            os.umask(bits)
            run = RunFolder.create(tmp_path, str(bits), "default", {"config.yaml": "seed: 0\n"})
            run.close()
            write_text_atomic(run.path / "checkpoints" / "a.pt", "x")
            for path in (run.path, *run.path.rglob("*")):
                assert stat.S_IMODE(path.stat().st_mode) == (0o777 if path.is_dir() else 0o666) & ~bits, path
        assert umask() == 0  # asking leaves it
        assert umask() == 0
    finally:
        os.umask(before)


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


def test_only_a_full_disk_that_names_no_file_is_given_its_name(tmp_path):
    with pytest.raises(FileNotFoundError) as caught, naming(tmp_path / "file"):
        (tmp_path / "other").read_text()
    assert caught.value.filename == str(tmp_path / "other")
    with pytest.raises(ConnectionResetError) as reset, naming(tmp_path / "file"):
        raise ConnectionResetError(errno.ECONNRESET, "in words")
    assert reset.value.filename is None


def test_an_interruption_leaves_no_temporary_file(tmp_path, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_atomic(tmp_path / "file", interrupted)
    assert list(tmp_path.iterdir()) == []
    replace = os.replace
    monkeypatch.setattr(os, "replace", lambda *names: interrupted(replace(*names)))  # after the renaming
    with pytest.raises(KeyboardInterrupt):
        write_text_atomic(tmp_path / "a.txt", "whole")
    assert (tmp_path / "a.txt").read_text() == "whole"
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]
