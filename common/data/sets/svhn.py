"""Street View House Numbers, cropped digits (Netzer et al. 2011), through torchvision."""

import numpy as np
import torch
from torchvision.datasets import SVHN

from common.data.config import DataConfig
from common.data.image_set import ImageSet, Splits, resize
from common.data.reading.downloads import Published, obtain, reading
from common.data.reading.layout import published_root


def load(config: DataConfig) -> Splits:
    """Load 73,257 training and 26,032 test digits, 32x32 in colour; label 0 is the digit 0."""
    root, files = published_root(config), {}
    for which in ("train", "test"):
        url, file, md5 = SVHN.split_list[which]
        files[which] = Published(root / file, md5, (url,))
    obtain(*files.values(), download=config.download)

    def split(which: str) -> ImageSet:
        with reading(files[which].path):
            data = SVHN(str(root), which)
            images = resize(torch.from_numpy(np.ascontiguousarray(data.data)), config.size)
            return ImageSet(images, torch.from_numpy(data.labels), tuple("0123456789"), "svhn", which)

    return Splits(split("train"), split("test"))
