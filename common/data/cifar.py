"""CIFAR-10 and CIFAR-100 (Krizhevsky 2009) through torchvision, which verifies the files' checksums."""

from pathlib import Path
from typing import Literal

import torch
from torchvision.datasets import CIFAR10, CIFAR100

from common.data.image_set import ImageSet, Splits, resize
from common.errors import UsageError

_SETS: dict[str, type[CIFAR10]] = {"cifar10": CIFAR10, "cifar100": CIFAR100}


def cifar(name: Literal["cifar10", "cifar100"], root: Path, size: int, *, download: bool) -> Splits:
    """Load the official splits; CIFAR-100 with its fine labels.

    Args:
        name: which of the two.
        root: the folder that holds, or will hold, the archive's folder.
        size: side that the 32x32 images are brought to.
        download: fetch the archive where its files are missing or damaged.

    Raises:
        UsageError: if the files are not there, and were not to be or could not be downloaded.
    """
    kind = _SETS[name]
    place = f"unpack {kind.url} so that {root / kind.base_folder} exists"
    try:
        return _load(name, root, size, download=False)
    except (RuntimeError, OSError):  # torchvision's word for missing or damaged files
        if not download:
            raise UsageError(f"data.root: no intact {name} in {root}; {place}, or set data.download true") from None
    try:
        return _load(name, root, size, download=True)
    except (RuntimeError, OSError, EOFError) as error:
        reason = " ".join(str(error).split())
        raise UsageError(f"data.root: {name} could not be downloaded ({reason}); {place}") from None


def _load(name: str, root: Path, size: int, *, download: bool) -> Splits:
    def split(which: str) -> ImageSet:
        data = _SETS[name](root, train=which == "train", download=download)
        images = torch.from_numpy(data.data).permute(0, 3, 1, 2).contiguous()
        return ImageSet(resize(images, size), torch.tensor(data.targets), tuple(data.classes), name, which)

    return Splits(split("train"), split("test"))
