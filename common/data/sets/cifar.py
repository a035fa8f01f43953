"""CIFAR-10 and CIFAR-100 (Krizhevsky 2009) through torchvision, which verifies the files' checksums."""

import pickle
from pathlib import Path
from typing import Any

import torch
from torchvision.datasets import CIFAR10, CIFAR100

from common.data.config import DataConfig
from common.data.image_set import ImageSet, Splits, resize
from common.data.reading.downloads import Published, obtain_folders, reading
from common.data.reading.layout import published_root


def load(config: DataConfig) -> Splits:
    """Load the official splits. The superclasses of CIFAR-100's images are always its 20 superclasses."""
    name, root = config.name, published_root(config)
    kind = CIFAR10 if name == "cifar10" else CIFAR100
    folder = root / kind.base_folder
    archive = Published(root / kind.filename, kind.tgz_md5, (kind.url,))
    obtain_folders({folder: archive}, download=config.download)

    def split(which: str) -> ImageSet:
        try:
            data = kind(root, train=which == "train")
        except RuntimeError:  # torchvision's message names neither the file nor a setting of ours
            raise ValueError("a file is missing or has another checksum") from None
        images = resize(torch.from_numpy(data.data).permute(0, 3, 1, 2).contiguous(), config.size)
        fine, classes = torch.tensor(data.targets), tuple(data.classes)
        if name == "cifar10":
            return ImageSet(images, fine, classes, name, which)
        coarse = torch.tensor(_content(folder / which)["coarse_labels"])
        superclasses = tuple(_content(folder / "meta")["coarse_label_names"])
        labels, names = (fine, classes) if config.labels == "fine" else (coarse, superclasses)
        return ImageSet(images, labels, names, name, which, coarse, superclasses)

    with reading(folder):
        return Splits(split("train"), split("test"))


def _content(path: Path) -> dict[str, Any]:
    """Unpickle a file that torchvision has just compared with its checksum."""
    with open(path, "rb") as file:
        return pickle.load(file, encoding="latin1")
