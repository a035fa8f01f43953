"""MNIST (LeCun, Cortes and Burges 1998) through torchvision, plain and blended with photographs."""

from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.datasets import MNIST

from common.data.image_set import ImageSet, Splits, resize
from common.data.reading.blend import blend, photographs
from common.data.reading.downloads import Published, obtain_unzipped, reading

_SEED = 0
_CLASSES = tuple("0123456789")
_SIDE, _PADDED = 28, 32


def mnist(root: Path, size: int, *, download: bool) -> Splits:
    """Load 60,000 training and 10,000 test digits, grey in 3 channels.

    At 28 the pixels are those of the files. Else two black pixels are put on each side, as AdaMatch does
    (google-research/adamatch, ``record_parse_mnist``), which makes 32, and 32 is resized to any other size.

    Args:
        root: the folder that holds, or will hold, ``MNIST/raw``.
        size: side of the images.
        download: fetch files that are missing.

    Raises:
        UsageError: if a file is missing or damaged, and was not to be or could not be downloaded.
    """
    return _load("mnist", root, size, download, lambda images, _: images)


def mnist_m(root: Path, size: int, source: str, *, download: bool) -> Splits:
    """Load MNIST as `mnist` does, each digit blended with a patch of a photograph (see `blend`).

    These are not the images of the published MNIST-M, which took its patches from BSDS500. The patch of an image
    follows from its split and index, and the photograph shows up to the border: the digits are padded before.

    Args:
        root: as for `mnist`.
        size: side of the images.
        source: a folder of photographs, or "sklearn".
        download: as for `mnist`.

    Raises:
        UsageError: as `mnist` and `photographs` do.
    """
    photos = photographs(source, "mnist_m", size)

    def behind(images: Tensor, split: str) -> Tensor:
        return blend(images, torch.arange(len(images)), photos, _SEED, "mnist_m", split)

    return _load("mnist_m", root, size, download, behind)


def _load(name: str, root: Path, size: int, download: bool, finish: Callable[[Tensor, str], Tensor]) -> Splits:
    raw = root / "MNIST" / "raw"
    files = {
        raw / file.removesuffix(".gz"): Published(raw / file, md5, tuple(mirror + file for mirror in MNIST.mirrors))
        for file, md5 in MNIST.resources
    }
    obtain_unzipped(files, download=download)

    def split(which: str) -> ImageSet:
        with reading(raw):
            data = MNIST(root, train=which == "train")
            images = _bring_to(data.data[:, None], size).repeat(1, 3, 1, 1)
            plain = ImageSet(images, data.targets, _CLASSES, name, which)
        return ImageSet(finish(plain.images, which), plain.labels, _CLASSES, name, which)

    return Splits(split("train"), split("test"))


def _bring_to(grey: Tensor, size: int) -> Tensor:
    if size == grey.shape[-1] == _SIDE:
        return grey
    return resize(F.pad(grey, ((_PADDED - _SIDE) // 2,) * 4), size)
