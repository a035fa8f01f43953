import hashlib
import io
import os
import tarfile
import zipfile

import pytest

from common.data.reading import downloads
from common.data.reading.downloads import Published, obtain, obtain_folders, obtain_unzipped, unpack
from common.data.reading.layout import own_folders, published_root
from common.runtime.errors import UsageError

CONTENT = b"what the authors published" * 100_000


def md5(content):
    return hashlib.md5(content).hexdigest()


def published(tmp_path, *, content=CONTENT, expected=CONTENT, mirrors=()):
    source = tmp_path / "server" / "file.bin"
    source.parent.mkdir()
    source.write_bytes(content)
    return Published(tmp_path / "data" / "file.bin", md5(expected), (*mirrors, source.as_uri()))


def everything_below(folder):
    return sorted(
        os.path.relpath(os.path.join(place, name), folder) for place, _, names in os.walk(folder) for name in names
    )


def write_tar(path, members):
    with tarfile.open(path, "w:gz") as file:
        for name, content in members:
            info = tarfile.TarInfo(name)
            if isinstance(content, bytes):
                info.size = len(content)
                file.addfile(info, io.BytesIO(content))
            else:
                info.type, info.linkname = content
                file.addfile(info)


def write_zip(path, members):
    with zipfile.ZipFile(path, "w") as file:
        for name, content in members:
            info = zipfile.ZipInfo(name)
            if not isinstance(content, bytes):
                info.external_attr = 0o120777 << 16  # a symbolic link as Info-ZIP stores it
            file.writestr(info, content if isinstance(content, bytes) else content[1])


WRITERS = {"a.tar.gz": write_tar, "a.zip": write_zip}


def test_a_missing_file_is_fetched_and_an_intact_one_left_alone(tmp_path):
    file = published(tmp_path)
    obtain(file, download=True)
    assert file.path.read_bytes() == CONTENT
    (tmp_path / "server" / "file.bin").unlink()
    obtain(file, download=True)
    obtain(file, download=False)


def test_a_server_is_told_who_asks_and_has_a_minute_to_answer(tmp_path, monkeypatch):
    asked = []

    def urlopen(request, timeout):
        asked.append((request.full_url, dict(request.header_items()), timeout))
        raise TimeoutError("timed out")

    monkeypatch.setattr(downloads.urllib.request, "urlopen", urlopen)
    files = Published(tmp_path / "file.bin", md5(CONTENT), ("https://a.org/x/file.bin", "https://b.org/y/file.bin"))
    advice = f"put file.bin from https://a.org/x/ into {tmp_path}"
    with pytest.raises(UsageError) as refused:
        obtain(files, download=True)
    assert str(refused.value) == f"data.root: file.bin could not be downloaded (timed out); {advice}"
    assert asked == [(url, {"User-agent": "cluster-based-norm"}, 60) for url in files.urls]


def test_a_server_that_is_not_reached_leaves_no_folder(tmp_path):
    file = Published(tmp_path / "MNIST" / "raw" / "file.bin", md5(CONTENT), ((tmp_path / "nowhere").as_uri(),))
    with pytest.raises(UsageError, match="could not be downloaded"):
        obtain(file, download=True)
    assert list(tmp_path.iterdir()) == []


def test_a_damaged_file_is_fetched_again(tmp_path):
    file = published(tmp_path)
    file.path.parent.mkdir()
    file.path.write_bytes(CONTENT[:-1])
    obtain(file, download=True)
    assert file.path.read_bytes() == CONTENT


def test_the_next_mirror_is_tried(tmp_path):
    file = published(tmp_path, mirrors=[(tmp_path / "nowhere" / "file.bin").as_uri()])
    obtain(file, download=True)
    assert file.path.read_bytes() == CONTENT


def test_a_download_with_another_checksum_leaves_nothing_behind(tmp_path):
    for number, content in enumerate((CONTENT[:-1], b"<html>moved</html>")):
        folder = tmp_path / str(number)
        folder.mkdir()
        file = published(folder, content=content)
        with pytest.raises(
            UsageError, match=rf"file\.bin could not be downloaded \(.*MD5 {md5(content)}.*put file\.bin"
        ) as e:
            obtain(file, download=True)
        assert "\n" not in str(e.value)
        assert everything_below(folder / "data") == []


def test_an_interrupted_download_leaves_nothing_behind(tmp_path, monkeypatch):
    class Interrupting:
        def __enter__(self):
            return self

        def __exit__(self, *_): ...
        def update(self, _):
            raise KeyboardInterrupt

    monkeypatch.setattr(downloads, "tqdm", lambda **_: Interrupting())
    file = published(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        obtain(file, download=True)
    assert everything_below(tmp_path / "data") == []


def test_without_download_the_line_says_what_to_put_where(tmp_path):
    for number, (here, state) in enumerate(((None, "no file.bin"), (b"half", "damaged file.bin"))):
        folder = tmp_path / str(number)
        folder.mkdir()
        file = published(folder)
        file.path.parent.mkdir()
        if here:
            file.path.write_bytes(here)
        with pytest.raises(UsageError) as e:
            obtain(file, download=False)
        source, place = f"{(folder / 'server').as_uri()}/", folder / "data"
        want = f"data.root: {state}; put file.bin from {source} into {place}, or set data.download true"
        assert str(e.value) == want


@pytest.mark.parametrize("name", WRITERS)
def test_an_archive_is_unpacked_whole(tmp_path, name):
    members = [("top/", (tarfile.DIRTYPE, ""))] if name.endswith("gz") else []
    WRITERS[name](tmp_path / name, [*members, ("top/a.txt", b"1"), ("./top/deep/b.txt", b"22"), ("other", b"3")])
    unpack(tmp_path / name, tmp_path / "top")
    assert everything_below(tmp_path) == sorted([name, "top/a.txt", "top/deep/b.txt"])
    assert (tmp_path / "top" / "deep" / "b.txt").read_bytes() == b"22"


OUTSIDE = [
    ("../evil", b"x"),
    ("top/../../evil", b"x"),
    ("/tmp/evil-absolute", b"x"),
    ("C:/evil", b"x"),
    ("top\\..\\..\\evil", b"x"),
    ("top/link", (tarfile.SYMTYPE, "/etc")),
]


@pytest.mark.parametrize("name", WRITERS)
def test_an_archive_that_reaches_outside_is_refused_and_writes_nothing(tmp_path, name):
    folder = tmp_path / "data"
    folder.mkdir()
    for member, content in OUTSIDE:
        WRITERS[name](folder / name, [("top/a.txt", b"1"), (member, content)])
        with pytest.raises(UsageError, match=rf"data\.root: .*{name} cannot be unpacked \(it holds .*") as e:
            unpack(folder / name, folder / "top")
        assert "\n" not in str(e.value)
        assert everything_below(tmp_path) == [f"data/{name}"]
        assert sorted(os.listdir(folder)) == [name]


def test_hard_links_and_devices_are_refused(tmp_path):
    for kind in (tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE):
        write_tar(tmp_path / "a.tar.gz", [("top/a", b"1"), ("top/b", (kind, "top/a"))])
        with pytest.raises(UsageError, match="neither a plain file nor a folder"):
            unpack(tmp_path / "a.tar.gz", tmp_path / "top")
        assert os.listdir(tmp_path) == ["a.tar.gz"]


@pytest.mark.parametrize("name", WRITERS)
def test_a_damaged_archive_is_refused_and_leaves_nothing(tmp_path, name):
    path = tmp_path / name
    WRITERS[name](path, [("top/a", bytes(range(256)) * 400)])
    whole = path.read_bytes()
    middle = len(whole) // 2
    flipped = whole[:middle] + bytes([whole[middle] ^ 0xFF]) + whole[middle + 1 :]
    for damaged in (whole[:middle], b"not an archive", flipped):
        path.write_bytes(damaged)
        with pytest.raises(UsageError, match=r"data\.root: .* cannot be unpacked") as e:
            unpack(path, tmp_path / "top")
        assert "\n" not in str(e.value)
        assert os.listdir(tmp_path) == [name]


@pytest.mark.parametrize("name", WRITERS)
def test_an_archive_of_something_else_is_refused(tmp_path, name):
    WRITERS[name](tmp_path / name, [("holidays/a", b"1")])
    with pytest.raises(UsageError, match="it holds no folder top"):
        unpack(tmp_path / name, tmp_path / "top")


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
    assert published_root("mnist", tmp_path) == tmp_path
    assert own_folders(tmp_path, None) == (tmp_path, None)


def test_a_file_that_is_not_gzip_is_refused(tmp_path):
    (tmp_path / "a.gz").write_bytes(b"plain")
    file = Published(tmp_path / "a.gz", md5(b"plain"), ("file:///nowhere/a.gz",))
    with pytest.raises(UsageError, match=r"a\.gz cannot be unpacked"):
        obtain_unzipped({tmp_path / "a": file}, download=False)
    assert os.listdir(tmp_path) == ["a.gz"]
