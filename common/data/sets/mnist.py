"""MNIST (LeCun, Cortes and Burges 1998) through torchvision, plain and blended with photographs."""

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.datasets import MNIST

from common.data.config import DataConfig
from common.data.image_set import ImageSet, Splits, resize
from common.data.reading.blend import blend, photographs
from common.data.reading.downloads import Published, obtain_unzipped, reading
from common.data.reading.layout import published_root

_SEED = 0


def load(config: DataConfig) -> Splits:
    """Load 60,000 training and 10,000 test digits, grey in 3 channels; for mnist_m blended with photographs.

    At 28 the pixels are those of the files. Else two black pixels are put on each side, as AdaMatch does
    (google-research/adamatch, ``record_parse_mnist``), which makes 32, and 32 is resized to any other size.

    mnist_m is not the published MNIST-M, which took its patches from BSDS500. The patch of an image follows from its
    split and index (see `blend`), and the photograph shows up to the border: the digits are padded before.
    """
    name = config.name
    photos = photographs(config.blend, name, config.size) if name == "mnist_m" else None
    root = published_root(config)
    raw = root / "MNIST" / "raw"
    files = {
        raw / file.removesuffix(".gz"): Published(raw / file, md5, tuple(mirror + file for mirror in MNIST.mirrors))
        for file, md5 in MNIST.resources
    }
    obtain_unzipped(files, download=config.download)

    def split(which: str) -> ImageSet:
        with reading(raw):
            data = MNIST(root, train=which == "train")
            images = _resized(data.data[:, None], config.size).repeat(1, 3, 1, 1)
            digits = ImageSet(images, data.targets, tuple("0123456789"), name, which)
        if photos is None:
            return digits
        images = blend(images, torch.arange(len(images)), photos, _SEED, name, which)
        return ImageSet(images, digits.labels, digits.classes, name, which)

    return Splits(split("train"), split("test"))


def _resized(grey: Tensor, size: int) -> Tensor:
    return grey if size == 28 else resize(F.pad(grey, (2, 2, 2, 2)), size)
