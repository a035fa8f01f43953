"""Each loader reads a miniature in the official format of its data set, which the test writes."""

import gzip
import hashlib
import io
import shutil
import struct
import zipfile
from typing import Any
from urllib.error import URLError

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.io import savemat
from torchvision.datasets import MNIST, SVHN, OxfordIIITPet
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2.functional import center_crop, resize

from common.data import DataConfig, load
from common.data.reading import downloads
from common.data.sets import oxford_pet, tiny_imagenet
from common.runtime.errors import UsageError


def md5(path):
    return hashlib.md5(path.read_bytes()).hexdigest()


def noise(seed, *shape):
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def png(pixels):
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def write_mnist(root, monkeypatch):
    """Write 6 training and 4 test digits as gzipped IDX; return the training images and labels."""
    raw = root / "MNIST" / "raw"
    raw.mkdir(parents=True)
    resources, images, labels = [], {}, {}
    for part, count in (("train", 6), ("t10k", 4)):
        images[part], labels[part] = noise(count, count, 28, 28), np.arange(count, dtype=np.uint8)
        for kind, values in (("images-idx3", images[part]), ("labels-idx1", labels[part])):
            path = raw / f"{part}-{kind}-ubyte.gz"
            header = struct.pack(f">HBB{values.ndim}I", 0, 8, values.ndim, *values.shape)
            path.write_bytes(gzip.compress(header + values.tobytes()))
            resources.append((path.name, md5(path)))
    monkeypatch.setattr(MNIST, "resources", resources)
    return images["train"], labels["train"]


def write_svhn(root, monkeypatch):
    """Write 5 training and 3 test digits as MATLAB files; return the training images (5, 32, 32, 3) and labels."""
    lists, written = {}, {}
    for part, count in (("train", 5), ("test", 3)):
        images, labels = noise(count, 32, 32, 3, count), np.array([1, 10, 9, 10, 2][:count], dtype=np.uint8)[:, None]
        path = root / f"{part}_32x32.mat"
        savemat(path, {"X": images, "y": labels}, do_compression=True)
        lists[part] = [SVHN.split_list[part][0], path.name, md5(path)]
        written[part] = images.transpose(3, 0, 1, 2), labels[:, 0]
    monkeypatch.setattr(SVHN, "split_list", lists)
    return written["train"]


WORDS = {"n01": "goldfish, Carassius auratus", "n02": "crane", "n03": "crane, hoist", "n99": "not in the set"}


def write_tiny_imagenet(root, monkeypatch):
    """Write 3 classes with 2 training images each and 3 validation images; return all pixels by file name."""
    top, pixels, files = "tiny-imagenet-200", {}, {}
    for seed, name in enumerate([f"{wnid}_{i}.JPEG" for wnid in ("n03", "n01", "n02") for i in (0, 1)]):
        wnid = name.split("_")[0]
        pixels[name] = noise(seed, 64, 64) if name == "n01_1.JPEG" else noise(seed, 64, 64, 3)
        files[f"train/{wnid}/images/{name}"] = png(pixels[name])
        files.setdefault(f"train/{wnid}/{wnid}_boxes.txt", b"")
        files[f"train/{wnid}/{wnid}_boxes.txt"] += f"{name}\t0\t0\t63\t63\n".encode()
    for i, wnid in enumerate(("n02", "n03", "n01")):
        pixels[f"val_{i}.JPEG"] = noise(100 + i, 64, 64, 3)
        files[f"val/images/val_{i}.JPEG"] = png(pixels[f"val_{i}.JPEG"])
        files.setdefault("val/val_annotations.txt", b"")
        files["val/val_annotations.txt"] += f"val_{i}.JPEG\t{wnid}\t0\t0\t61\t61\n".encode()
    files["test/images/test_0.JPEG"] = png(noise(7, 64, 64, 3))
    files["wnids.txt"] = b"n03\nn01\nn02"
    files["words.txt"] = "".join(f"{wnid}\t{text}\n" for wnid, text in WORDS.items()).encode()
    with zipfile.ZipFile(root / f"{top}.zip", "w") as archive:
        for name, content in files.items():
            archive.writestr(f"{top}/{name}", content)
    monkeypatch.setattr(tiny_imagenet, "MD5", md5(root / f"{top}.zip"))
    monkeypatch.setattr(tiny_imagenet, "COUNTS", {"train": 6, "test": 3})
    return pixels


PETS = {  # as the official lists give them: class, species (1 cat, 2 dog), breed within the species
    "trainval": {"Abyssinian_1": "1 1 1", "beagle_7": "2 2 1", "Maine_Coon_2": "3 1 2", "american_bulldog_3": "4 2 2"},
    "test": {"Maine_Coon_9": "3 1 2", "american_bulldog_1": "4 2 2", "Abyssinian_22": "1 1 1", "beagle_3": "2 2 1"},
}


def write_oxford_pet(root, monkeypatch):
    """Write 4 + 4 photographs of different shapes, one an RGBA PNG and one a BMP under the name of a JPEG."""
    folder, loose = root / "oxford-iiit-pet", root.parent / f"{root.name} loose"
    for top in ("images", "annotations"):
        (loose / top).mkdir(parents=True)
    for seed, name in enumerate([*PETS["trainval"], *PETS["test"]]):
        pixels = noise(seed, 48 + seed, 60 - seed, 4 if name == "Abyssinian_1" else 3)
        Image.fromarray(pixels).save(loose / "images" / f"{name}.jpg", "BMP" if name == "beagle_3" else "PNG")
    for split, rows in PETS.items():
        (loose / "annotations" / f"{split}.txt").write_text("".join(f"{name} {row}\n" for name, row in rows.items()))
    for top in ("images", "annotations"):
        shutil.make_archive(str(folder / top), "gztar", loose, top)
    shutil.rmtree(loose)
    monkeypatch.setattr(oxford_pet, "MD5", {top: md5(folder / f"{top}.tar.gz") for top in ("images", "annotations")})
    monkeypatch.setattr(oxford_pet, "COUNTS", {"trainval": 4, "test": 4})


WRITERS = {
    "mnist": write_mnist,
    "mnist_m": write_mnist,
    "svhn": write_svhn,
    "tiny_imagenet": write_tiny_imagenet,
    "oxford_pet": write_oxford_pet,
}
FIRST_FILE = {  # what is put where by hand, and a file of it that can be damaged once it is unpacked
    "mnist": ("MNIST/raw/train-images-idx3-ubyte.gz", "MNIST/raw/train-images-idx3-ubyte"),
    "mnist_m": ("MNIST/raw/t10k-labels-idx1-ubyte.gz", "MNIST/raw/t10k-labels-idx1-ubyte"),
    "svhn": ("train_32x32.mat", "train_32x32.mat"),
    "tiny_imagenet": ("tiny-imagenet-200.zip", "tiny-imagenet-200/val/val_annotations.txt"),
    "oxford_pet": ("oxford-iiit-pet/annotations.tar.gz", "oxford-iiit-pet/annotations/test.txt"),
}


def test_mnist_is_padded_with_black_to_32_but_keeps_its_pixels_at_28(tmp_path, monkeypatch):
    images, labels = write_mnist(tmp_path, monkeypatch)
    at: Any = {size: load(DataConfig(name="mnist", root=tmp_path, size=size)) for size in (28, 32, 64)}
    train, test = at[32].train, at[32].test
    assert (len(test), test.split, train.classes) == (4, "test", tuple("0123456789"))
    assert train.labels.tolist() == labels.tolist()
    padded = torch.from_numpy(np.pad(images, ((0, 0), (2, 2), (2, 2))))[:, None]
    assert torch.equal(train.images, padded.expand(-1, 3, -1, -1))
    assert np.array_equal(at[28].train.images[:, 1].numpy(), images)
    want = resize(padded.float(), [64, 64], InterpolationMode.BICUBIC, antialias=True)
    assert torch.equal(at[64].train.images[:, :1], want.round().clamp(0, 255).to(torch.uint8))


def test_svhn_has_label_0_for_the_digit_0(tmp_path, monkeypatch):
    images, labels = write_svhn(tmp_path, monkeypatch)
    splits: Any = load(DataConfig(name="svhn", root=tmp_path, download=False))
    assert np.array_equal(splits.train.images.permute(0, 2, 3, 1).numpy(), images)
    assert splits.train.labels.tolist() == [y % 10 for y in labels.tolist()]
    assert len(splits.test) == 3


def test_tiny_imagenet_reads_the_official_archive(tmp_path, monkeypatch):
    pixels = write_tiny_imagenet(tmp_path, monkeypatch)
    splits: Any = load(DataConfig(name="tiny_imagenet", root=tmp_path, size=64, download=False))
    assert splits.train.classes == ("goldfish", "crane (n02)", "crane (n03)")
    train = [f"n0{k}_{i}.JPEG" for k in (1, 2, 3) for i in (0, 1)]
    for part, files, labels in (
        (splits.train, train, [0, 0, 1, 1, 2, 2]),
        (splits.test, [f"val_{i}.JPEG" for i in range(3)], [1, 2, 0]),
    ):
        assert part.labels.tolist() == labels
        for file, got in zip(files, part.images.permute(0, 2, 3, 1).numpy(), strict=True):
            want = pixels[file] if pixels[file].ndim == 3 else pixels[file][..., None]  # grey becomes three channels
            assert np.array_equal(got, np.broadcast_to(want, (64, 64, 3)))


@pytest.mark.parametrize("labels", ["fine", "coarse"])
def test_oxford_pet_reads_the_official_archives_as_torchvision_does(tmp_path, monkeypatch, labels):
    write_oxford_pet(tmp_path, monkeypatch)
    splits: Any = load(DataConfig(name="oxford_pet", root=tmp_path, labels=labels, download=False))
    for official, part in (("trainval", splits.train), ("test", splits.test)):
        reference = OxfordIIITPet(tmp_path, official, ("category", "binary-category"))
        targets = [reference[i][1] for i in range(len(reference))]
        assert part.labels.tolist() == [target[labels == "coarse"] for target in targets]
        assert part.superclasses.tolist() == [target[1] for target in targets]  # the lists' own column of species
        assert part.superclass_names == ("cat", "dog")
        names = ("cat", "dog") if labels == "coarse" else ("Abyssinian", "beagle", "Maine_Coon", "american_bulldog")
        assert part.classes == names
        for i, image in enumerate(part.images):
            want = center_crop(resize(reference[i][0], [32], InterpolationMode.BICUBIC), [32])
            assert np.array_equal(image.permute(1, 2, 0).numpy(), np.asarray(want))


def test_the_papers_split_draws_a_tenth_of_each_breed_apart_twice(tmp_path, monkeypatch):
    """Numbers in the pixels tell which photograph is where; counts are the paper's, a tenth rounded up."""
    write_oxford_pet(tmp_path, monkeypatch)
    folder = tmp_path / "oxford-iiit-pet"
    shutil.unpack_archive(folder / "annotations.tar.gz", folder, filter="data")
    (folder / "images").mkdir()
    breeds = ("Abyssinian", "beagle", "Maine_Coon", "american_bulldog")
    for number in range(48):
        name = f"{breeds[number % 4]}_{number}"
        Image.fromarray(np.full((9, 9, 3), 5 * number, np.uint8)).save(folder / "images" / f"{name}.jpg", "PNG")
    config = DataConfig(name="oxford_pet", root=tmp_path, size=8, split="paper", download=False)
    with pytest.raises(UsageError, match="48 photographs of 7,390"):
        load(config)
    monkeypatch.setattr(oxford_pet, "ALL", 48)
    again = dict(load(config).items())
    splits: Any = dict(load(config).items())
    assert {name: len(images) for name, images in splits.items()} == {"train": 38, "test": 5, "validation": 5}
    seen = []
    for name, images in splits.items():
        numbers = [round(float(image.float().mean()) / 5) for image in images.images]
        assert images.labels.tolist() == [number % 4 for number in numbers]
        assert images.superclasses.tolist() == [[0, 1, 0, 1][number % 4] for number in numbers]
        assert (images.split, images.classes) == (name, breeds)
        assert min(images.labels.bincount(minlength=4).tolist()) >= len(images) // 4
        assert images.content_hash == again[name].content_hash
        seen += numbers
    assert sorted(seen) == list(range(48))


@pytest.mark.parametrize("name", WRITERS)
def test_what_is_missing_damaged_or_cut_off_is_refused_in_one_line(tmp_path, monkeypatch, name):
    WRITERS[name](tmp_path, monkeypatch)
    config = DataConfig(name=name, root=tmp_path, size=8, download=False)
    archive, unpacked = (tmp_path / file for file in FIRST_FILE[name])
    content = archive.read_bytes()
    advice = f"put {archive.name} from http\\S+/ into {archive.parent}, or set data.download true"
    archive.unlink()
    with pytest.raises(UsageError, match=f"^data.root: no {archive.name}; {advice}$"):
        load(config)
    archive.write_bytes(content[:-1])
    with pytest.raises(UsageError, match=f"^data.root: damaged {archive.name}; {advice}$"):
        load(config)
    archive.write_bytes(content)
    for split, images in load(config).items():
        assert (images.name, images.split) == (name, split)
    if archive != unpacked:
        unpacked.write_bytes(unpacked.read_bytes()[:-20])  # of a list, the last line: what is left of it reads well
        with pytest.raises(UsageError, match=r"^data\.root: .* is incomplete or damaged \(.*\); remove it, .*$"):
            load(config)


@pytest.mark.parametrize("name", [*WRITERS, "cifar10", "cifar100"])
def test_without_network_the_line_says_which_file_to_put_where(tmp_path, monkeypatch, name):
    def fail(*_, **__):
        raise URLError("no route to host")

    monkeypatch.setattr(downloads.urllib.request, "urlopen", fail)
    with pytest.raises(
        UsageError, match=r"^data\.root: \S+ could not be downloaded \(.*no route.*\); put \S+.* from "
    ) as e:
        load(DataConfig(name=name, root=tmp_path))
    assert str(tmp_path) in str(e.value)
    assert "\n" not in str(e.value)
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("tiny_imagenet", "tiny-imagenet-200/train/n02/images/n02_1.JPEG"),
        ("oxford_pet", "oxford-iiit-pet/images/beagle_3.jpg"),
    ],
)
def test_an_unpacked_folder_needs_no_archive_and_all_of_its_images(tmp_path, monkeypatch, name, file):
    WRITERS[name](tmp_path, monkeypatch)
    config = DataConfig(name=name, root=tmp_path, download=False)
    before = load(config).train.content_hash
    for archive in [*tmp_path.rglob("*.zip"), *tmp_path.rglob("*.gz")]:
        archive.unlink()
    assert load(config).train.content_hash == before
    (tmp_path / file).unlink()
    with pytest.raises(UsageError, match=rf"is incomplete or damaged \(no file .*{file}\); remove it"):
        load(config)


def test_of_mnist_either_the_compressed_or_the_unpacked_files_suffice(tmp_path, monkeypatch):
    write_mnist(tmp_path, monkeypatch)
    config = DataConfig(name="mnist", root=tmp_path, download=False)
    before = load(config).train.content_hash
    (tmp_path / FIRST_FILE["mnist"][1]).unlink()
    assert load(config).train.content_hash == before
    for path in (tmp_path / "MNIST" / "raw").glob("*.gz"):
        path.unlink()
    assert load(config).train.content_hash == before


@pytest.mark.parametrize("name", WRITERS)
def test_a_set_is_found_in_a_folder_of_data_sets(tmp_path, monkeypatch, name):
    (tmp_path / "other" / "images").mkdir(parents=True)
    (tmp_path / "mine").mkdir()
    WRITERS[name](tmp_path / "mine", monkeypatch)
    direct = load(DataConfig(name=name, root=tmp_path / "mine", download=False)).train
    above = DataConfig(name=name, root=tmp_path, download=False)
    assert load(above).train.content_hash == direct.content_hash
    shutil.copytree(tmp_path / "mine", tmp_path / "copy")
    with pytest.raises(UsageError, match=rf"^data\.root: \S+ holds {name} more than once \(copy, mine\); name one, "):
        load(above)
    (tmp_path / "copy").rename(tmp_path / name)  # called as the set: that is the one
    for path in (tmp_path / "mine").rglob("*.*"):
        if path.is_file():
            path.write_bytes(b"")  # would be refused
    assert load(above).train.content_hash == direct.content_hash
