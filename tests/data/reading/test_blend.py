import gzip
import hashlib
import struct
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_sample_images
from torchvision.datasets import MNIST

from common.data import DataConfig, load
from common.data.reading.blend import blend
from common.runtime.errors import UsageError


def pictures(*shapes):
    generator = np.random.default_rng(5)
    return [generator.integers(0, 256, (*shape, 3), dtype=np.uint8) for shape in shapes]


def digits(count, size):
    return torch.randint(0, 256, (count, 3, size, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def small_mnist(tmp_path, monkeypatch):
    """Write 8 training and 3 test digits with bright corners in the official format."""
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    resources = []
    for part, count in (("train", 8), ("t10k", 3)):
        pixels = np.random.default_rng(count).integers(0, 256, (count, 28, 28), dtype=np.uint8)
        for kind, values in (("images-idx3", pixels), ("labels-idx1", np.zeros(count, dtype=np.uint8))):
            header = struct.pack(f">HBB{values.ndim}I", 0, 8, values.ndim, *values.shape)
            (raw / f"{part}-{kind}-ubyte.gz").write_bytes(content := gzip.compress(header + values.tobytes()))
            resources.append((f"{part}-{kind}-ubyte.gz", hashlib.md5(content).hexdigest()))
    monkeypatch.setattr(MNIST, "resources", resources)
    return tmp_path


def places(blended, image, photos):
    """Find by trying all of them where |image - patch| in whole numbers gives the blended image."""
    size = image.shape[-1]
    first, number = image[:, 0, 0].astype(int), blended.astype(int)
    found = []
    for p, photo in enumerate(photos):
        rows, columns = photo.shape[0] - size + 1, photo.shape[1] - size + 1
        corner = (np.abs(first - photo[:rows, :columns].astype(int)) == number[:, 0, 0]).all(-1)
        for y, x in np.argwhere(corner):
            patch = photo[y : y + size, x : x + size].astype(int).transpose(2, 0, 1)
            if (np.abs(image.astype(int) - patch) == number).all():
                found.append((p, int(y), int(x)))
    return found


def test_every_image_is_its_absolute_difference_with_one_patch():
    photos, images = pictures((20, 31), (9, 8), (40, 12)), digits(60, 8)
    got = blend(images, torch.arange(60), photos, 0, "test")
    found = [places(b, i, photos) for b, i in zip(got.numpy(), images.numpy(), strict=True)]
    assert all(len(each) == 1 for each in found)
    assert {each[0][0] for each in found} == {0, 1, 2}
    # 9 x 8 has two places for an 8 x 8 patch, the last one included
    assert {each[0][1:] for each in found if each[0][0] == 1} == {(0, 0), (1, 0)}
    assert len({each[0] for each in found if each[0][0] == 0}) > 10


def test_a_patch_follows_from_the_index_alone():
    photos, images = pictures((20, 31), (40, 12)), digits(40, 8)
    whole = blend(images, torch.arange(40), photos, 0, "test")
    some = torch.tensor([33, 2, 17])
    assert torch.equal(blend(images[some], some, photos, 0, "test"), whole[some])
    for seed, position in ((1, "test"), (0, "else")):
        other = blend(images, torch.arange(40), photos, seed, position)
        assert (other != whole).flatten(1).any(1).float().mean() > 0.9


@pytest.mark.parametrize("size", [28, 32])
def test_mnist_m_is_mnist_against_photographs_up_to_the_border(small_mnist, size):
    plain: Any = load(DataConfig(name="mnist", root=small_mnist, size=size))
    blended: Any = load(DataConfig(name="mnist_m", root=small_mnist, size=size))
    photos = load_sample_images().images
    for part, reference in ((blended.train, plain.train), (blended.test, plain.test)):
        assert part.labels.tolist() == [0] * len(reference)
        for image, digit in zip(part.images.numpy(), reference.images.numpy(), strict=True):
            assert places(image, digit, photos)
    again = load(DataConfig(name="mnist_m", root=small_mnist, size=size))
    assert again.train.content_hash == blended.train.content_hash
    assert (blended.train.name, blended.train.split) == ("mnist_m", "train")


def test_mnist_m_takes_patches_from_a_folder_of_photographs(small_mnist, tmp_path):
    photos = pictures((40, 50), (60, 33))
    folder = tmp_path / "photographs" / "deep"
    folder.mkdir(parents=True)
    for name, photo in zip(("a.png", "b.PNG"), photos, strict=True):
        Image.fromarray(photo).save(folder / name, "PNG")
    (folder / "notes.txt").write_text("not a photograph")
    got: Any = load(DataConfig(name="mnist_m", root=small_mnist, blend=str(folder.parent))).train
    plain: Any = load(DataConfig(name="mnist", root=small_mnist)).train
    for image, digit in zip(got.images.numpy(), plain.images.numpy(), strict=True):
        assert len(places(image, digit, photos)) == 1


def test_a_source_that_does_not_serve_is_refused_in_one_line(small_mnist):
    for name in ("empty", "small", "broken"):
        (small_mnist / name).mkdir()
    (small_mnist / "file.txt").write_text("x")
    (small_mnist / "broken" / "b.jpg").write_bytes(b"no image")
    Image.fromarray(pictures((31, 40))[0]).save(small_mnist / "small" / "s.png")
    for source, size, message in (
        ("nowhere", 32, r"data\.blend: no folder .*nowhere"),
        ("file.txt", 32, r"data\.blend: .*file\.txt is a file"),
        ("empty", 32, r"data\.blend: no images in .*empty"),
        ("small", 32, r"data\.blend: .*s\.png is 40 x 31 pixels, expected at least data\.size \(32\) each way"),
        ("broken", 32, r"broken/b\.jpg: cannot be read as an image"),
        ("sklearn", 428, r"data\.size: mnist_m cuts patches from photographs, expected at most 427, got 428"),
    ):
        place = source if source == "sklearn" else str(small_mnist / source)
        with pytest.raises(UsageError, match=message) as e:
            load(DataConfig(name="mnist_m", root=small_mnist, size=size, blend=place))
        assert "\n" not in str(e.value)
