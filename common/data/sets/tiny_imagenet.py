"""Tiny ImageNet (Stanford CS231n): 200 classes of ImageNet at 64x64."""

from pathlib import Path

import torch

from common.data.config import DataConfig
from common.data.image_set import ImageSet, Splits
from common.data.reading.downloads import Published, obtain_folders, present, reading
from common.data.reading.image_folder import Decoding
from common.data.reading.layout import published_root

URL = "http://cs231n.stanford.edu/tiny-imagenet-200.zip"
# Stanford publishes no checksum. This one stands in a dozen independent loaders of the archive, and in a public log
# of a download of 248,100,043 bytes.
MD5 = "90528d7ca1a48142e341f4ef8d21d0de"
COUNTS = {"train": 100_000, "test": 10_000}
_FOLDER = "tiny-imagenet-200"


def load(config: DataConfig) -> Splits:
    """Load 100,000 training images, and as test images the 10,000 of the validation split.

    The archive's own test images have no labels and are left out. Labels follow the order of the WordNet ids;
    a class is named by the first of its words, and by its id too where two classes share that.
    """
    root = published_root(config)
    folder, how = root / _FOLDER, Decoding(config.size, in_memory=config.in_memory)
    obtain_folders({folder: Published(root / f"{_FOLDER}.zip", MD5, (URL,))}, download=config.download)
    with reading(folder):
        ids = sorted((folder / "wnids.txt").read_text(encoding="utf-8").split())
        words = {wnid: text.split(",")[0] for wnid, text in _rows(folder / "words.txt")}
        first = [words[wnid] for wnid in ids]
        names = tuple(
            f"{name} ({wnid})" if first.count(name) > 1 else name for name, wnid in zip(first, ids, strict=True)
        )
        train = [(path, label) for label, wnid in enumerate(ids) for path in _listed(folder / "train" / wnid)]
        number = {wnid: label for label, wnid in enumerate(ids)}
        test = [
            (folder / "val" / "images" / file, number[wnid])
            for file, wnid, *_ in _rows(folder / "val" / "val_annotations.txt")
        ]
        return Splits(_read(train, how, names, "train"), _read(test, how, names, "test"))


def _read(samples: list[tuple[Path, int]], how: Decoding, names: tuple[str, ...], split: str) -> ImageSet:
    files, labels = zip(*samples, strict=True)
    return ImageSet(how.read(present(list(files), COUNTS[split])), torch.tensor(labels), names, "tiny_imagenet", split)


def _rows(path: Path) -> list[list[str]]:
    return [line.split("\t") for line in path.read_text(encoding="utf-8").splitlines() if line]


def _listed(folder: Path) -> list[Path]:
    """Return the images that a class's list of boxes names: an unpacked folder that lacks some is noticed."""
    return [folder / "images" / file for file, *_ in _rows(folder / f"{folder.name}_boxes.txt")]
