import hashlib
import io
import pickle
import tarfile
from typing import Any

import numpy as np
import pytest
import torch
from torchvision.datasets import CIFAR10, CIFAR100

from common.data import DataConfig, load
from common.runtime.errors import UsageError

KINDS = {"cifar10": CIFAR10, "cifar100": CIFAR100}


class OldPickler(pickle.Pickler):
    """Pickles arrays as the official files do: a dtype made with align=0."""

    def reducer_override(self, obj):
        if isinstance(obj, np.dtype):
            return np.dtype, ("u1", 0, 1), (3, "|", None, None, None, -1, -1, 0)
        return NotImplemented


def write_miniature(root, name, monkeypatch):
    """Write 3 images a file in the official layout; return train pixels (N, 3, 32, 32), fine and coarse labels."""
    kind, generator = KINDS[name], np.random.default_rng(0)
    folder = root / kind.base_folder
    folder.mkdir(parents=True)

    def write(file, content):
        buffer = io.BytesIO()
        OldPickler(buffer, 2).dump(content)
        (folder / file).write_bytes(buffer.getvalue())
        return [file, hashlib.md5(buffer.getvalue()).hexdigest()]

    def batch(file):
        data = generator.integers(0, 256, (3, 3072), dtype=np.uint8)
        fine = generator.integers(0, 10, 3).tolist()
        coarse = generator.integers(0, 4, 3).tolist()
        labels = {"labels": fine} if name == "cifar10" else {"fine_labels": fine, "coarse_labels": coarse}
        parts.append((data.reshape(3, 3, 32, 32), fine, coarse))
        return write(file, {"data": data, **labels})

    parts = []
    monkeypatch.setattr(kind, "train_list", [batch(file) for file, _ in kind.train_list])
    train = list(parts)
    monkeypatch.setattr(kind, "test_list", [batch(file) for file, _ in kind.test_list])
    names = {kind.meta["key"]: [f"class {i}" for i in range(10)], "coarse_label_names": ["w", "x", "y", "z"]}
    monkeypatch.setattr(kind, "meta", {**kind.meta, "md5": write(kind.meta["filename"], names)[1]})
    pixels, fine, coarse = zip(*train, strict=True)
    return np.concatenate(pixels), np.concatenate(fine).tolist(), np.concatenate(coarse).tolist()


@pytest.mark.parametrize("name", KINDS)
def test_reads_the_official_files(tmp_path, monkeypatch, name):
    images, labels, _ = write_miniature(tmp_path / "mine", name, monkeypatch)
    splits: Any = load(DataConfig(name=name, root=tmp_path / "mine", download=False))
    assert np.array_equal(splits.train.images.numpy(), images)
    (tmp_path / "other").mkdir()
    above = load(DataConfig(name=name, root=tmp_path, download=False))  # a folder of data sets
    assert above.train.content_hash == splits.train.content_hash
    assert splits.train.labels.tolist() == labels
    assert splits.train.classes[3] == "class 3"
    assert (len(splits.test), splits.test.split) == (3, "test")
    assert (splits.train.name, splits.train.split, splits.test.name) == (name, "train", name)


def test_brings_images_to_the_size_asked_for(tmp_path, monkeypatch):
    images, _, _ = write_miniature(tmp_path, "cifar10", monkeypatch)
    train: Any = load(DataConfig(name="cifar10", root=tmp_path, size=64)).train
    got = train.images
    assert (got.shape, train.superclasses) == ((15, 3, 64, 64), None)
    # enlarging by 2 leaves means nearly alone: bicubic weights sum to 1, only the border and rounding differ
    assert torch.allclose(got.float().mean((1, 2, 3)), torch.from_numpy(images).float().mean((1, 2, 3)), atol=1.5)


@pytest.mark.parametrize("which", ["fine", "coarse"])
def test_superclasses_of_cifar100_are_its_coarse_labels(tmp_path, monkeypatch, which):
    _, fine, coarse = write_miniature(tmp_path, "cifar100", monkeypatch)
    train: Any = load(DataConfig(name="cifar100", root=tmp_path, labels=which)).train
    assert train.labels.tolist() == (fine if which == "fine" else coarse)
    assert train.classes == (tuple(f"class {i}" for i in range(10)) if which == "fine" else ("w", "x", "y", "z"))
    assert (train.superclasses.tolist(), train.superclass_names) == (coarse, ("w", "x", "y", "z"))


def test_unpacks_the_archive_that_was_put_there(tmp_path, monkeypatch):
    write_miniature(tmp_path / "packed", "cifar100", monkeypatch)
    archive = tmp_path / "cifar-100-python.tar.gz"
    with tarfile.open(archive, "w:gz") as file:
        file.add(tmp_path / "packed" / "cifar-100-python", "cifar-100-python")
    monkeypatch.setattr(CIFAR100, "tgz_md5", hashlib.md5(archive.read_bytes()).hexdigest())
    splits: Any = load(DataConfig(name="cifar100", root=tmp_path, download=False))
    assert splits.train.content_hash == load(DataConfig(name="cifar100", root=tmp_path / "packed")).train.content_hash


@pytest.mark.parametrize("download", [False, True])
def test_a_folder_with_changed_files_is_refused_in_one_line(tmp_path, monkeypatch, download):
    write_miniature(tmp_path, "cifar10", monkeypatch)
    (tmp_path / "cifar-10-batches-py" / "data_batch_2").write_bytes(b"other")
    with pytest.raises(
        UsageError, match=r"data\.root: .*batches-py is incomplete or damaged .*checksum.*remove it"
    ) as e:
        load(DataConfig(name="cifar10", root=tmp_path, download=download))
    assert "\n" not in str(e.value)
    assert (tmp_path / "cifar-10-batches-py" / "data_batch_2").read_bytes() == b"other"
