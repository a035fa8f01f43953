"""Real handwritten digits that need no download, plain and blended with photographs.

The 1,797 digits of scikit-learn (Alpaydin and Kaynak, Optical Recognition of Handwritten Digits, UCI 1998)
are permuted once. The first 1,000 and next 200 are ``digits``, the other 597 ``digits_m``: the two share no
image.
"""

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor

from common.data.config import DataConfig
from common.data.image_set import ImageSet, Splits
from common.data.reading.blend import Photographs, blend, photographs
from common.runtime import seeding

_SEED = 0


def load(config: DataConfig) -> Splits:
    """Load `digits`, or as digits_m 400 training and 197 test digits, each blended with a photograph by its index."""
    if config.name == "digits":
        return digits(config.size)
    photos = photographs("sklearn", "digits_m", config.size)
    return _splits("digits_m", config.size, (1200, 1600, 1797), photos)


def digits(size: int) -> Splits:
    """Return 1,000 training and 200 test digits, grey in 3 channels, size x size."""
    return _splits("digits", size, (0, 1000, 1200))


def _splits(name: str, size: int, bounds: tuple[int, int, int], photos: Photographs | None = None) -> Splits:
    data: Any = load_digits()
    labels = torch.from_numpy(data["target"].astype(np.int64))
    order = seeding.permutation(len(labels), _SEED, "digits")

    def split(which: str, start: int, stop: int) -> ImageSet:
        index = order[start:stop]
        images = _enlarge(torch.from_numpy(data["images"])[index], size)
        if photos is not None:
            images = blend(images, index, photos, _SEED, name)
        return ImageSet(images, labels[index], tuple("0123456789"), name, which)

    return Splits(split("train", *bounds[:2]), split("test", *bounds[1:]))


def _enlarge(grey: Tensor, size: int) -> Tensor:
    """Bring (N, 8, 8) in 0..16 to uint8 (N, 3, size, size)."""
    scaled = grey.float()[:, None] * (255 / 16)
    large = F.interpolate(scaled, size=(size, size), mode="bilinear", align_corners=False)
    return large.round().clamp(0, 255).to(torch.uint8).repeat(1, 3, 1, 1)
