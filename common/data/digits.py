"""Real handwritten digits that need no download, plain and blended with photographs.

The 1,797 digits of scikit-learn (Alpaydin and Kaynak, Optical Recognition of Handwritten Digits, UCI 1998)
are permuted once. The first 1,000 and next 200 are ``digits``, the other 597 ``digits_m``: the two share no
image.
"""

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits, load_sample_images
from torch import Tensor

from common import seeding
from common.data.image_set import ImageSet, Splits
from common.errors import UsageError

_SEED = 0
_PHOTO_SIDE = 427  # the photographs are 427 x 640
_CLASSES = tuple("0123456789")


def digits(size: int) -> Splits:
    """Return 1,000 training and 200 test digits, grey in 3 channels, size x size."""
    return _splits("digits", size, (0, 1000, 1200))


def digits_m(size: int) -> Splits:
    """Return 400 training and 197 test digits blended with photographs, size x size.

    The MNIST-M recipe (Ganin et al., JMLR 17, 2016): the absolute difference of the digit and a random patch
    of a photograph, in each channel. The patch follows from the digit's index alone.

    Raises:
        UsageError: if a patch would not fit in the photographs.
    """
    if size > _PHOTO_SIDE:
        raise UsageError(
            f"data.size: digits_m cuts patches from photographs, expected at most {_PHOTO_SIDE}, got {size}"
        )
    return _splits("digits_m", size, (1200, 1600, 1797))


def _splits(name: str, size: int, bounds: tuple[int, int, int]) -> Splits:
    data: Any = load_digits()
    labels = torch.from_numpy(data["target"].astype(np.int64))
    order = seeding.permutation(len(labels), _SEED, "digits")

    def split(which: str, start: int, stop: int) -> ImageSet:
        index = order[start:stop]
        images = _enlarge(torch.from_numpy(data["images"])[index], size)
        if name == "digits_m":
            images = _blend(images, index)
        return ImageSet(images, labels[index], _CLASSES, name, which)

    return Splits(split("train", *bounds[:2]), split("test", *bounds[1:]))


def _enlarge(grey: Tensor, size: int) -> Tensor:
    """Bring (N, 8, 8) in 0..16 to uint8 (N, 3, size, size)."""
    scaled = grey.float()[:, None] * (255 / 16)
    large = F.interpolate(scaled, size=(size, size), mode="bilinear", align_corners=False)
    return large.round().clamp(0, 255).to(torch.uint8).repeat(1, 3, 1, 1)


def _blend(images: Tensor, index: Tensor) -> Tensor:
    photos = load_sample_images().images  # two of (427, 640, 3)
    size, (height, width) = images.shape[-1], photos[0].shape[:2]
    which, top, left = (
        (seeding.uniform_per_sample(index, _SEED, "digits_m", part) * count).long().tolist()
        for part, count in (("photo", len(photos)), ("top", height - size + 1), ("left", width - size + 1))
    )
    patches = np.stack([photos[p][y : y + size, x : x + size] for p, y, x in zip(which, top, left, strict=True)])
    background = torch.from_numpy(patches).permute(0, 3, 1, 2)
    return (images.short() - background.short()).abs().to(torch.uint8)
