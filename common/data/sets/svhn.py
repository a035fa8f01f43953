"""Street View House Numbers, cropped digits (Netzer et al. 2011), through torchvision."""

from pathlib import Path

import numpy as np
import torch
from torchvision.datasets import SVHN

from common.data.image_set import ImageSet, Splits, resize
from common.data.reading.downloads import Published, obtain, reading


def svhn(root: Path, size: int, *, download: bool) -> Splits:
    """Load 73,257 training and 26,032 test digits, 32x32 in colour; label 0 is the digit 0.

    Args:
        root: the folder that holds, or will hold, ``train_32x32.mat`` and ``test_32x32.mat``.
        size: side that images are brought to.
        download: fetch files that are missing or damaged.

    Raises:
        UsageError: if a file is missing or damaged, and was not to be or could not be downloaded.
    """
    files = {}
    for which in ("train", "test"):
        url, file, md5 = SVHN.split_list[which]
        files[which] = Published(root / file, md5, (url,))
    obtain(*files.values(), download=download)

    def split(which: str) -> ImageSet:
        with reading(files[which].path):
            data = SVHN(str(root), which)
            images = torch.from_numpy(np.ascontiguousarray(data.data))
            labels = torch.from_numpy(data.labels)
            return ImageSet(resize(images, size), labels, tuple("0123456789"), "svhn", which)

    return Splits(split("train"), split("test"))
