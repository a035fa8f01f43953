import hashlib
import io
import pickle
from urllib.error import URLError

import numpy as np
import pytest
import torch
from torchvision.datasets import CIFAR10, CIFAR100

from common.data import DataConfig, load
from common.errors import UsageError

KINDS = {"cifar10": CIFAR10, "cifar100": CIFAR100}


class OldPickler(pickle.Pickler):
    """Pickles arrays as the official files do: a dtype made with align=0."""

    def reducer_override(self, obj):
        if isinstance(obj, np.dtype):
            return np.dtype, ("u1", 0, 1), (3, "|", None, None, None, -1, -1, 0)
        return NotImplemented


def write_miniature(root, name, monkeypatch):
    """Write 3 images a file in the official layout; return train pixels (N, 3, 32, 32) and fine labels."""
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
        labels = {"labels": fine} if name == "cifar10" else {"fine_labels": fine, "coarse_labels": [0, 0, 0]}
        parts.append((data.reshape(3, 3, 32, 32), fine))
        return write(file, {"data": data, **labels})

    parts = []
    monkeypatch.setattr(kind, "train_list", [batch(file) for file, _ in kind.train_list])
    train = list(parts)
    monkeypatch.setattr(kind, "test_list", [batch(file) for file, _ in kind.test_list])
    names = write(kind.meta["filename"], {kind.meta["key"]: [f"class {i}" for i in range(10)]})
    monkeypatch.setattr(kind, "meta", {**kind.meta, "md5": names[1]})
    return np.concatenate([p for p, _ in train]), [y for _, fine in train for y in fine]


@pytest.mark.parametrize("name", KINDS)
def test_reads_the_official_files(tmp_path, monkeypatch, name):
    images, labels = write_miniature(tmp_path, name, monkeypatch)
    splits = load(DataConfig(name=name, root=tmp_path, download=False))
    assert np.array_equal(splits.train.images.numpy(), images)
    assert splits.train.labels is not None
    assert splits.train.labels.tolist() == labels
    assert splits.train.classes[3] == "class 3"
    assert splits.test is not None
    assert (len(splits.test), splits.test.split) == (3, "test")


def test_brings_images_to_the_size_asked_for(tmp_path, monkeypatch):
    images, _ = write_miniature(tmp_path, "cifar10", monkeypatch)
    got = load(DataConfig(name="cifar10", root=tmp_path, size=64)).train.images
    assert got.shape == (15, 3, 64, 64)
    # enlarging by 2 leaves means nearly alone: bicubic weights sum to 1, only the border and rounding differ
    assert torch.allclose(got.float().mean((1, 2, 3)), torch.from_numpy(images).float().mean((1, 2, 3)), atol=1.5)


@pytest.mark.parametrize("damage", ["missing", "changed"])
def test_says_which_file_to_put_where(tmp_path, monkeypatch, damage):
    if damage == "changed":
        write_miniature(tmp_path, "cifar10", monkeypatch)
        (tmp_path / "cifar-10-batches-py" / "data_batch_2").write_bytes(b"other")
    with pytest.raises(UsageError, match=r"data\.root: no intact cifar10 .*cifar-10-python\.tar\.gz .*batches-py") as e:
        load(DataConfig(name="cifar10", root=tmp_path, download=False))
    assert "\n" not in str(e.value)


def test_says_what_to_do_when_the_download_fails(tmp_path, monkeypatch):
    def fail(self):
        raise URLError("no route to host")

    monkeypatch.setattr(CIFAR10, "download", fail)
    with pytest.raises(UsageError, match=r"could not be downloaded \(.*no route.*\).*cifar-100-python\.tar\.gz"):
        load(DataConfig(name="cifar100", root=tmp_path))
