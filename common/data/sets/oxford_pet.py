"""Oxford-IIIT Pet (Parkhi et al. 2012): 37 breeds of cats and dogs, photographs of any size."""

from pathlib import Path
from typing import Any

import torch

from common.data.config import DataConfig
from common.data.image_set import ImageSet, Splits
from common.data.reading.downloads import Published, obtain_folders, present, reading
from common.data.reading.image_folder import Decoding
from common.data.reading.layout import published_root

URL = "https://www.robots.ox.ac.uk/~vgg/data/pets/data/"
MD5 = {  # as in torchvision's OxfordIIITPet, whose reader keeps the names of the files to itself
    "images": "5c4f3ee8e5d25df40f4fd59a7f44e54c",
    "annotations": "95a8c909bbe2e81eed6a22bccdf3f68f",
}
COUNTS = {"trainval": 3680, "test": 3669}
ALL = 7390
"""Photographs in all; the official splits leave 41 out."""
_SEED = 7
_SPECIES = ("cat", "dog")


def load(config: DataConfig) -> Splits:
    """Load the official trainval and test splits (3,680 and 3,669 images), or those of the paper's authors.

    The latter are of all 7,390 photographs, 5,985 to train, 666 to validate and 739 to test on: a tenth of each breed
    is drawn apart twice, by scikit-learn with seed 7.

    A breed's name is that of its files; a breed whose name starts with a capital letter is one of cats. The
    superclasses of the images are always cat and dog.
    """
    folder = published_root(config) / "oxford-iiit-pet"
    archives = {
        folder / part: Published(folder / f"{part}.tar.gz", md5, (f"{URL}{part}.tar.gz",)) for part, md5 in MD5.items()
    }
    obtain_folders(archives, download=config.download)
    how = Decoding(config.size, config.fit, config.in_memory)
    with reading(folder):
        trainval, breeds = _listed(folder, "trainval")
        if config.split == "official":
            names = {"train": trainval, "test": _listed(folder, "test")[0]}
            counts = dict(zip(names, COUNTS.values(), strict=True))
        else:
            names = _papers_split(folder)
            counts = {split: len(own) for split, own in names.items()}
        return Splits(**{
            split: _images(folder, names[split], counts[split], breeds, how, config.labels, split) for split in names
        })  # fmt: skip


def _papers_split(folder: Path) -> dict[str, list[str]]:
    from sklearn.model_selection import train_test_split  # noqa: PLC0415 - takes a second, which others need not

    names = sorted(path.stem for path in (folder / "images").glob("[!.]*.jpg"))
    if len(names) != ALL:
        raise ValueError(f"images holds {len(names):,} photographs of {ALL:,}")
    found: dict[str, list[str]] = {"train": names}
    for split in ("test", "validation"):
        breed = [_breed(name) for name in found["train"]]
        apart: Any = train_test_split(found["train"], test_size=0.1, random_state=_SEED, stratify=breed)
        found["train"], found[split] = apart
    return found


def _listed(folder: Path, official: str) -> tuple[list[str], list[str]]:
    """Return the names of a split's photographs, and its breeds in the order of their numbers."""
    lines = (folder / "annotations" / f"{official}.txt").read_text(encoding="utf-8").splitlines()
    rows = [line.split() for line in lines if line and not line.startswith("#")]  # name, class, species, breed
    breeds = dict(sorted((int(label) - 1, _breed(name)) for name, label, *_ in rows))
    if list(breeds) != list(range(len(breeds))):
        raise ValueError(f"{official}.txt does not number its classes from 1 on")
    return [name for name, *_ in rows], list(breeds.values())


def _breed(name: str) -> str:
    return name.rpartition("_")[0]


def _images(
    folder: Path, names: list[str], count: int, breeds: list[str], how: Decoding, labels: str, split: str
) -> ImageSet:
    fine = torch.tensor([breeds.index(_breed(name)) for name in names])
    coarse = torch.tensor([0 if name[0].isupper() else 1 for name in names])
    images = how.read(present([folder / "images" / f"{name}.jpg" for name in names], count))
    numbers, classes = (fine, tuple(breeds)) if labels == "fine" else (coarse, _SPECIES)
    return ImageSet(images, numbers, classes, "oxford_pet", split, coarse, _SPECIES)
