import gzip
import hashlib
import io
import os
import tarfile
import zipfile

import pytest

from common.data import DataConfig
from common.data.reading import downloads
from common.data.reading.downloads import Published, obtain, obtain_folders, obtain_unzipped, unpack
from common.data.reading.layout import own_folders, published_root
from common.runtime.errors import UsageError

CONTENT = b"what the authors published" * 100_000


def md5(content):
    return hashlib.md5(content).hexdigest()


def published(folder, *, content=CONTENT, mirrors=()):
    source = folder / "server" / "file.bin"
    source.parent.mkdir(parents=True)
    source.write_bytes(content)
    return Published(folder / "data" / "file.bin", md5(CONTENT), (*mirrors, source.as_uri()))


def files_below(folder):
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def write_tar(path, members):
    with tarfile.open(path, "w:gz") as file:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            file.addfile(info, io.BytesIO(content))


def write_zip(path, members):
    with zipfile.ZipFile(path, "w") as file:
        for name, content in members:
            file.writestr(name, content)


WRITERS = {"a.tar.gz": write_tar, "a.zip": write_zip}


def test_missing_and_damaged_files_are_fetched_from_any_mirror_and_intact_ones_left_alone(tmp_path):
    file = published(tmp_path, mirrors=[(tmp_path / "nowhere" / "file.bin").as_uri()])
    for before in (None, CONTENT[:-1]):
        if before is not None:
            file.path.write_bytes(before)
        obtain(file, download=True)
        assert file.path.read_bytes() == CONTENT
    (tmp_path / "server" / "file.bin").unlink()
    obtain(file, download=True)
    obtain(file, download=False)


def test_each_mirror_has_a_minute_to_answer_and_the_error_says_what_to_put_where(tmp_path, monkeypatch):
    asked = []

    def urlopen(request, timeout):
        asked.append((request.full_url, dict(request.header_items()), timeout))
        raise TimeoutError("timed out")

    monkeypatch.setattr(downloads.urllib.request, "urlopen", urlopen)
    urls = ("https://a.org/x/file.bin", "https://b.org/y/file.bin")
    files = Published(tmp_path / "deep" / "file.bin", md5(CONTENT), urls)
    advice = f"put file.bin from https://a.org/x/ into {tmp_path / 'deep'}"
    with pytest.raises(UsageError) as refused:
        obtain(files, download=True)
    assert str(refused.value) == f"data.root: file.bin could not be downloaded (timed out); {advice}"
    assert asked == [(url, {"User-agent": "cluster-based-norm"}, 60) for url in files.urls]
    assert list(tmp_path.iterdir()) == []


def test_a_download_with_another_checksum_leaves_nothing_behind(tmp_path):
    for number, content in enumerate((CONTENT[:-1], b"<html>moved</html>")):
        file = published(tmp_path / str(number), content=content)
        with pytest.raises(UsageError, match=rf"file\.bin could not be downloaded \(.*MD5 {md5(content)}") as e:
            obtain(file, download=True)
        assert "\n" not in str(e.value)
        assert files_below(file.path.parent) == []


def test_an_interrupted_download_leaves_nothing_behind(tmp_path, monkeypatch):
    class Interrupting:
        def __enter__(self):
            return self

        def __exit__(self, *_): ...
        def update(self, _):
            raise KeyboardInterrupt

    monkeypatch.setattr(downloads, "tqdm", lambda **_: Interrupting())
    with pytest.raises(KeyboardInterrupt):
        obtain(published(tmp_path), download=True)
    assert files_below(tmp_path / "data") == []


def test_without_download_the_line_says_what_to_put_where(tmp_path):
    file = published(tmp_path)
    file.path.parent.mkdir()
    for state in ("no file.bin", "damaged file.bin"):
        with pytest.raises(UsageError) as e:
            obtain(file, download=False)
        source, place = f"{(tmp_path / 'server').as_uri()}/", tmp_path / "data"
        want = f"data.root: {state}; put file.bin from {source} into {place}, or set data.download true"
        assert str(e.value) == want
        file.path.write_bytes(b"half")


@pytest.mark.parametrize("name", WRITERS)
def test_an_archive_is_unpacked_whole(tmp_path, name):
    WRITERS[name](tmp_path / name, [("top/a.txt", b"1"), ("./top/deep/b.txt", b"22"), ("other", b"3")])
    unpack(tmp_path / name, tmp_path / "top")
    assert files_below(tmp_path) == sorted([name, "top/a.txt", "top/deep/b.txt"])
    assert (tmp_path / "top" / "deep" / "b.txt").read_bytes() == b"22"


@pytest.mark.parametrize("name", WRITERS)
def test_an_archive_that_is_damaged_or_of_something_else_is_refused(tmp_path, name):
    WRITERS[name](tmp_path / name, [("holidays/a", b"1")])
    whole = (tmp_path / name).read_bytes()
    for content, reason in ((whole, "it holds no folder top"), (whole[:60], ".")):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UsageError, match=rf"data\.root: .*{name} cannot be unpacked \({reason}") as e:
            unpack(tmp_path / name, tmp_path / "top")
        assert "\n" not in str(e.value)
        assert os.listdir(tmp_path) == [name]


@pytest.mark.parametrize("name", WRITERS)
def test_no_archive_writes_outside_its_folder(tmp_path, name):
    (tmp_path / "data").mkdir()
    for member in ("../evil", f"{tmp_path}/evil"):
        WRITERS[name](tmp_path / "data" / name, [(member, b"x")])
        with pytest.raises(UsageError):
            unpack(tmp_path / "data" / name, tmp_path / "data" / "top")
        assert files_below(tmp_path) == [f"data/{name}"]


def test_a_folder_that_another_process_finished_first_is_kept(tmp_path, monkeypatch):
    write_tar(tmp_path / "a.tar.gz", [("top/a", b"mine")])

    def rename(source, target):
        target.mkdir()
        (target / "a").write_bytes(b"theirs")
        real(source, target)

    real = os.rename
    monkeypatch.setattr(downloads.os, "rename", rename)
    unpack(tmp_path / "a.tar.gz", tmp_path / "top")
    assert (tmp_path / "top" / "a").read_bytes() == b"theirs"
    assert sorted(os.listdir(tmp_path)) == ["a.tar.gz", "top"]


def test_a_folder_that_holds_something_needs_no_archive_and_an_empty_one_does(tmp_path):
    archives = {tmp_path / "top": Published(tmp_path / "a.zip", "0" * 32, ("file:///nowhere/a.zip",))}
    (tmp_path / "top").mkdir()
    with pytest.raises(UsageError, match=r"data\.root: no a\.zip"):
        obtain_folders(archives, download=False)
    (tmp_path / "top" / "a").touch()
    obtain_folders(archives, download=False)


def test_what_a_failed_download_left_is_no_data_set(tmp_path):
    for folder in ("digits/MNIST/raw", "photos/cats", "photos/dogs"):
        (tmp_path / folder).mkdir(parents=True)
    assert published_root(DataConfig(name="mnist", root=tmp_path)) == tmp_path
    assert own_folders(tmp_path, None) == (tmp_path, None)


def test_damaged_gzip_is_refused_and_leaves_nothing(tmp_path):
    for content in (b"plain", gzip.compress(CONTENT)[:-9]):
        (tmp_path / "a.gz").write_bytes(content)
        file = Published(tmp_path / "a.gz", md5(content), ("file:///nowhere/a.gz",))
        with pytest.raises(UsageError, match=r"a\.gz cannot be unpacked"):
            obtain_unzipped({tmp_path / "a": file}, download=False)
        assert os.listdir(tmp_path) == ["a.gz"]
