from typing import Any

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits, load_sample_images
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2.functional import resize

from common.data import DataConfig, load
from common.runtime.errors import UsageError


def test_digits_are_scikit_learns_digits_with_their_labels():
    splits: Any = load(DataConfig(size=8))
    assert (len(splits.train), len(splits.test)) == (1000, 200)
    data: Any = load_digits()
    known = {
        (image * 255 / 16).round().astype(np.uint8).tobytes(): int(y)
        for image, y in zip(data.images, data.target, strict=True)
    }
    for part in (splits.train, splits.test):
        found = [known[image[0].numpy().tobytes()] for image in part.images]
        assert found == part.labels.tolist()
        assert torch.equal(part.images[:, 0], part.images[:, 2])


def test_no_image_is_in_two_splits():
    for name in ("digits", "digits_m"):
        splits: Any = load(DataConfig(name=name, size=8))
        seen = [image.numpy().tobytes() for part in (splits.train, splits.test) for image in part.images]
        assert len(set(seen)) == len(seen)


def test_digits_are_enlarged_bilinearly():
    small, large = (load(DataConfig(size=s)).train.images for s in (8, 32))
    want = resize(small[:50].float(), [32, 32], InterpolationMode.BILINEAR, antialias=False)
    # both sides round once: the small image to whole numbers, then the large one
    assert (large[:50].float() - want).abs().max() <= 1.0


def test_digits_m_is_a_digit_against_a_patch_of_a_photograph():
    splits: Any = load(DataConfig(name="digits_m", size=32))
    assert (len(splits.train), len(splits.test)) == (400, 197)
    photos = np.stack(load_sample_images().images).astype(int)
    grey = np.arange(256)[:, None, None, None]
    for image in splits.train.images[:3].permute(0, 2, 3, 1).numpy().astype(int):
        corner = (photos[:, :396, :609] == image[0, 0]).all(-1)  # digits leave their corners black
        patches = (photos[p, y : y + 32, x : x + 32] for p, y, x in np.argwhere(corner))
        patch = max(patches, key=lambda b: int((b == image).all(-1).sum()))
        # one grey value d explains |d - b| in all three channels of every pixel
        assert (np.abs(grey - patch) == image).all(-1).any(0).all()
        assert 0.02 < (patch != image).any(-1).mean() < 0.98


def test_digits_m_patches_differ_between_images_and_fit_the_photographs():
    corners = load(DataConfig(name="digits_m")).train.images[:, :, 0, 0]
    assert len(corners.unique(dim=0)) > 200
    with pytest.raises(UsageError, match=r"data\.size: digits_m .* at most 427, got 512"):
        load(DataConfig(name="digits_m", size=512))
