import hashlib

import numpy as np
import pytest
import torch
from PIL import Image

from common.data import ImageSet, hold_out, to_float, to_uint8
from common.data import image_set as image_set_module
from common.data.image_set import resize
from common.runtime.errors import UsageError


def image_set(**changes):
    fields = {
        "images": torch.arange(4 * 3 * 8 * 8).remainder(256).to(torch.uint8).view(4, 3, 8, 8),
        "labels": torch.tensor([0, 1, 1, 0]),
        "classes": ("a", "b"),
        "name": "toy",
        "split": "train",
    }
    return ImageSet(**(fields | changes))


def test_every_byte_survives_the_way_to_floats_and_back():
    every = torch.arange(256, dtype=torch.uint8)
    floats = to_float(every)
    torch.testing.assert_close(floats.double(), torch.linspace(-1, 1, 256, dtype=torch.float64), atol=1e-6, rtol=0)
    assert floats.dtype == torch.float32
    assert torch.equal(to_uint8(floats), every)
    assert torch.equal(to_float(every), floats)  # neither changed its input


def test_to_uint8_rounds_to_nearest_and_clamps():
    x = torch.tensor([-1.5, -1.0, -1.0 + 0.49 / 127.5, -1.0 + 0.51 / 127.5, 0.9999, 1.0, 7.0])
    assert to_uint8(x).tolist() == [0, 0, 0, 1, 255, 255, 255]


def test_content_hash_sees_every_byte_every_label_and_the_shape():
    base = image_set()
    pixel = base.images.clone()
    pixel[3, 2, 7, 7] ^= 1
    variants = [
        base,
        image_set(images=pixel),
        image_set(labels=torch.tensor([0, 1, 1, 1])),
        image_set(labels=None, classes=()),
        image_set(images=base.images.view(4, 3, 4, 16)),
        image_set(superclasses=torch.tensor([0, 1, 1, 0]), superclass_names=("u", "v")),
        image_set(superclasses=torch.tensor([0, 1, 1, 1]), superclass_names=("u", "v")),
        image_set(superclasses=torch.tensor([0, 1, 1, 0]), superclass_names=("u", "v"), labels=None, classes=()),
    ]
    assert len({v.content_hash for v in variants}) == len(variants)
    assert base.content_hash == image_set(split="test", name="other").content_hash
    assert base.content_hash == image_set(images=base.images.contiguous(memory_format=torch.channels_last)).content_hash
    assert base.labels is not None
    text = b"(4, 3, 8, 8) True" + base.images.numpy().tobytes() + base.labels.numpy().tobytes()
    assert base.content_hash == hashlib.sha256(text).hexdigest()  # as files of earlier runs have it


def test_select_takes_labels_and_superclasses_along():
    whole = image_set(superclasses=torch.tensor([0, 1, 2, 0]), superclass_names=("u", "v", "w"))
    chosen = whole.select(torch.tensor([2, 0]))
    assert torch.equal(chosen.images, whole.images[[2, 0]])
    assert chosen.labels is not None
    assert chosen.superclasses is not None
    assert (chosen.labels.tolist(), chosen.superclasses.tolist()) == ([1, 0], [2, 0])
    assert (len(chosen), chosen.num_classes, chosen.superclass_names) == (2, 2, ("u", "v", "w"))


def test_refuses_what_is_not_an_image_set():
    for changes, message in (
        ({"images": torch.zeros(4, 3, 8, 8)}, "images: expected uint8"),
        ({"images": torch.zeros(4, 1, 8, 8, dtype=torch.uint8)}, "images: expected uint8"),
        ({"images": torch.zeros(0, 3, 8, 8, dtype=torch.uint8)}, "at least one"),
        ({"images": torch.zeros(4, 3, 8, 8, dtype=torch.uint8, device="meta")}, "images: expected .* on the CPU"),
        ({"labels": torch.zeros(4)}, "labels: expected int64"),
        ({"labels": torch.zeros(3, dtype=torch.int64)}, "labels: expected int64"),
        ({"labels": torch.tensor([0, 1, 2, 0])}, "expected 0 to 1, got 0 to 2"),
        ({"labels": torch.tensor([0, -1, 1, 0])}, "expected 0 to 1, got -1 to 1"),
        ({"labels": None}, "classes: expected none"),
        ({"superclasses": torch.zeros(4, dtype=torch.int64)}, "superclasses: expected 0 to -1, got 0 to 0"),
        ({"cluster_names": ("u",)}, "cluster_names: expected none without clusters"),
    ):
        with pytest.raises(ValueError, match=message):
            image_set(**changes)


def test_resize_agrees_with_pillow_whatever_the_chunks(monkeypatch):
    # Pillow rounds and clamps between its two passes: the noise stays clear of 0 and 255, and stripes, which a cubic
    # overshoots, have edges in one pass alone.
    noise = torch.randint(64, 192, (5, 3, 40, 40), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    noise[4] = 255 * (torch.arange(40) // 10 % 2)
    for size in (16, 100):
        for values in (1, 2 * 3 * 40 * 40):
            monkeypatch.setattr(image_set_module, "_RESIZE_VALUES", values)
            for image, got in zip(noise, resize(noise, size), strict=True):
                pillow = Image.fromarray(image.permute(1, 2, 0).numpy()).resize((size, size), Image.Resampling.BICUBIC)
                assert np.abs(np.asarray(pillow).astype(int) - got.permute(1, 2, 0).numpy()).max() <= 1
    assert resize(noise, 40) is noise


def test_channel_moments_are_those_of_numpy(monkeypatch):
    monkeypatch.setattr("common.data.image_set._CHUNK", 3)
    images = torch.randint(0, 256, (7, 3, 4, 4), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    images[:, 1] //= 3
    mean, deviation = ImageSet(images, None, (), "x", "train").channel_moments()
    pixels = images.numpy().astype(np.float64) / 255
    np.testing.assert_allclose(mean, pixels.mean((0, 2, 3)), rtol=1e-12)
    np.testing.assert_allclose(deviation, pixels.std((0, 2, 3)), rtol=1e-12)


def numbered(counts: list[int]) -> ImageSet:
    """Make images whose first pixel is their number, so many of each class, in any order."""
    labels = torch.cat([torch.full((n,), k) for k, n in enumerate(counts)])[torch.randperm(sum(counts))]
    images = torch.arange(sum(counts), dtype=torch.uint8)[:, None, None, None].repeat(1, 3, 8, 8)
    return ImageSet(images, labels, tuple("abc"[: len(counts)]), "toy", "train")


def numbers(part: ImageSet) -> list[int]:
    return part.images[:, 0, 0, 0].tolist()


def test_a_share_of_each_class_is_held_out_and_nothing_is_lost():
    whole = numbered([40, 10, 3])
    train, held = hold_out(whole, 0.2, seed=0)
    assert whole.labels is not None
    assert held.labels is not None
    assert held.labels.bincount().tolist() == [8, 2, 1]  # round(0.6) is 1; a class gives at least one
    assert sorted(numbers(train) + numbers(held)) == list(range(53))
    assert numbers(train) == sorted(numbers(train))  # the order of the set
    assert (train.split, held.split) == ("train", "validation")
    assert held.labels.tolist() == whole.labels[torch.tensor(numbers(held))].tolist()
    one, again, other = (numbers(hold_out(whole, 0.2, seed)[1]) for seed in (0, 0, 1))
    assert one == again
    assert one != other


def test_images_without_labels_are_one_class():
    train, held = hold_out(ImageSet(numbered([30]).images, None, (), "toy", "train"), 0.1, seed=0)
    assert (len(train), len(held), held.labels) == (27, 3, None)


def test_a_class_that_would_not_be_trained_on_is_named():
    with pytest.raises(UsageError, match=r"data\.validation: 0\.5 of class b's 1 images leaves none"):
        hold_out(numbered([8, 1]), 0.5, seed=0)
