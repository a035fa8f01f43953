import hashlib

import numpy as np
import pytest
import torch
from PIL import Image

from common.data import ImageSet, to_float, to_uint8
from common.data import image_set as image_set_module
from common.data.image_set import resize


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


def test_to_uint8_rounds_to_nearest_and_clamps():
    x = torch.tensor([-1.5, -1.0, -1.0 + 0.49 / 127.5, -1.0 + 0.51 / 127.5, 0.9999, 1.0, 7.0])
    assert to_uint8(x).tolist() == [0, 0, 0, 1, 255, 255, 255]


def test_conversions_leave_their_input_alone():
    x, y = torch.tensor([0.3, -0.2]), torch.tensor([3, 4], dtype=torch.uint8)
    to_uint8(x)
    to_float(y)
    assert x.tolist() == pytest.approx([0.3, -0.2])
    assert y.tolist() == [3, 4]


def test_content_hash_sees_every_byte_every_label_and_the_shape():
    base = image_set()
    pixel, label = base.images.clone(), torch.tensor([0, 1, 1, 1])
    pixel[3, 2, 7, 7] ^= 1
    variants = [
        base,
        image_set(images=pixel),
        image_set(labels=label),
        image_set(labels=None, classes=()),
        image_set(images=base.images.view(4, 3, 4, 16)),
        image_set(superclasses=torch.tensor([0, 1, 1, 0]), superclass_names=("u", "v")),
        image_set(superclasses=torch.tensor([0, 1, 1, 1]), superclass_names=("u", "v")),
        image_set(superclasses=torch.tensor([0, 1, 1, 0]), superclass_names=("u", "v"), labels=None, classes=()),
    ]
    assert len({v.content_hash for v in variants}) == len(variants)
    assert base.content_hash == image_set(split="test", name="other").content_hash
    assert base.content_hash == image_set(images=base.images.contiguous(memory_format=torch.channels_last)).content_hash


def test_content_hash_of_sets_without_superclasses_stays_what_it_was():
    base = image_set()
    assert base.labels is not None
    text = b"(4, 3, 8, 8) True" + base.images.numpy().tobytes() + base.labels.numpy().tobytes()
    assert base.content_hash == hashlib.sha256(text).hexdigest()


def test_select_takes_superclasses_along():
    chosen = image_set(superclasses=torch.tensor([0, 1, 2, 0]), superclass_names=("u", "v", "w")).select(
        torch.tensor([2, 0, 1])
    )
    assert chosen.superclasses is not None
    assert (chosen.superclasses.tolist(), chosen.superclass_names) == ([2, 0, 1], ("u", "v", "w"))


def test_select_keeps_images_and_labels_together():
    chosen = image_set().select(torch.tensor([2, 0]))
    assert torch.equal(chosen.images, image_set().images[[2, 0]])
    assert chosen.labels is not None
    assert chosen.labels.tolist() == [1, 0]
    assert (len(chosen), chosen.num_classes) == (2, 2)


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
        (
            {"superclasses": torch.tensor([0, 1, 2, 0]), "superclass_names": ("u", "v")},
            "superclasses: expected 0 to 1, got 0 to 2",
        ),
        (
            {"superclasses": torch.zeros(3, dtype=torch.int64), "superclass_names": ("u",)},
            r"superclasses: expected int64 \(4,\)",
        ),
        ({"superclass_names": ("u",)}, "superclass_names: expected none without superclasses"),
    ):
        with pytest.raises(ValueError, match=message):
            image_set(**changes)


def test_resize_keeps_constant_images_constant_and_is_exact_at_the_same_size():
    grey = torch.full((2, 3, 32, 32), 77, dtype=torch.uint8)
    assert torch.equal(resize(grey, 64), torch.full((2, 3, 64, 64), 77, dtype=torch.uint8))
    noise = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    assert resize(noise, 32) is noise


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


def test_channel_moments_are_those_of_numpy(monkeypatch):
    monkeypatch.setattr("common.data.image_set._CHUNK", 3)
    images = torch.randint(0, 256, (7, 3, 4, 4), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    images[:, 1] //= 3
    mean, deviation = ImageSet(images, None, (), "x", "train").channel_moments()
    pixels = images.numpy().astype(np.float64) / 255
    np.testing.assert_allclose(mean, pixels.mean((0, 2, 3)), rtol=1e-12)
    np.testing.assert_allclose(deviation, pixels.std((0, 2, 3)), rtol=1e-12)
