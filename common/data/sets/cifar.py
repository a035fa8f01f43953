"""CIFAR-10 and CIFAR-100 (Krizhevsky 2009) through torchvision, which verifies the files' checksums."""

import pickle
from pathlib import Path
from typing import Any, Literal

import torch
from torchvision.datasets import CIFAR10, CIFAR100

from common.data.image_set import ImageSet, Splits, resize
from common.data.reading.downloads import Published, obtain_folders, reading

_SETS: dict[str, type[CIFAR10]] = {"cifar10": CIFAR10, "cifar100": CIFAR100}


def cifar(
    name: Literal["cifar10", "cifar100"], root: Path, size: int, labels: Literal["fine", "coarse"], *, download: bool
) -> Splits:
    """Load the official splits. The superclasses of CIFAR-100's images are always its 20 superclasses.

    Args:
        name: which of the two.
        root: the folder that holds, or will hold, the archive's folder.
        size: side that the 32x32 images are brought to.
        labels: for CIFAR-100, "fine" for its 100 classes, "coarse" for the superclasses.
        download: fetch the archive where neither it nor its folder is there.

    Raises:
        UsageError: if files are missing or damaged, and were not to be or could not be downloaded.
    """
    kind = _SETS[name]
    folder = root / kind.base_folder
    obtain_folders({folder: Published(root / kind.filename, kind.tgz_md5, (kind.url,))}, download=download)

    def split(which: str) -> ImageSet:
        data = _verified(kind, root, which)
        images = resize(torch.from_numpy(data.data).permute(0, 3, 1, 2).contiguous(), size)
        fine, classes = torch.tensor(data.targets), tuple(data.classes)
        if name == "cifar10":
            return ImageSet(images, fine, classes, name, which)
        coarse = torch.tensor(_content(folder / which)["coarse_labels"])
        superclasses = tuple(_content(folder / "meta")["coarse_label_names"])
        numbers, names = (fine, classes) if labels == "fine" else (coarse, superclasses)
        return ImageSet(images, numbers, names, name, which, coarse, superclasses)

    with reading(folder):
        return Splits(split("train"), split("test"))


def _verified(kind: type[CIFAR10], root: Path, which: str) -> CIFAR10:
    try:
        return kind(root, train=which == "train")
    except RuntimeError:  # torchvision's message names neither the file nor a setting of ours
        raise ValueError("a file is missing or has another checksum") from None


def _content(path: Path) -> dict[str, Any]:
    """Unpickle a file that torchvision has just compared with its checksum."""
    with open(path, "rb") as file:
        return pickle.load(file, encoding="latin1")
