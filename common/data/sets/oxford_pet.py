"""Oxford-IIIT Pet (Parkhi et al. 2012): 37 breeds of cats and dogs, photographs of any size."""

from pathlib import Path
from typing import Any, Literal

import torch

from common.data.image_set import ImageSet, Splits
from common.data.reading.downloads import Published, obtain_folders, present, reading
from common.data.reading.image_folder import Decoding

URL = "https://www.robots.ox.ac.uk/~vgg/data/pets/data/"
MD5 = {  # as in torchvision's OxfordIIITPet, whose reader keeps the names of the files to itself
    "images": "5c4f3ee8e5d25df40f4fd59a7f44e54c",
    "annotations": "95a8c909bbe2e81eed6a22bccdf3f68f",
}
COUNTS = {"trainval": 3680, "test": 3669}
ALL = 7390
"""Photographs in all; the official splits leave 41 out."""
_FOLDER = "oxford-iiit-pet"
_SEED = 7
_SPECIES = ("cat", "dog")


def oxford_pet(root: Path, how: Decoding, labels: Literal["fine", "coarse"], *, download: bool) -> Splits:
    """Load the official trainval and test splits (3,680 and 3,669 images).

    A breed's name is that of its files; a breed whose name starts with a capital letter is one of cats. The
    superclasses of the images are always cat and dog.

    Args:
        root: the folder that holds, or will hold, ``oxford-iiit-pet``.
        how: how files become images.
        labels: "fine" for breeds, "coarse" for cat and dog.
        download: fetch the archives where neither they nor their folders are there.

    Raises:
        UsageError: if files are missing or damaged, and were not to be or could not be downloaded.
    """
    folder = _folder(root, download)
    with reading(folder):
        names, breeds = zip(*(_listed(folder, official) for official in COUNTS), strict=True)
        return Splits(*(
            _images(folder, of, COUNTS[official], breeds[0], how, labels, split)
            for of, official, split in zip(names, COUNTS, ("train", "test"), strict=True)
        ))  # fmt: skip


def oxford_pet_of_the_paper(root: Path, how: Decoding, labels: Literal["fine", "coarse"], *, download: bool) -> Splits:
    """Load all 7,390 photographs, 5,985 to train, 666 to validate and 739 to test on, as the paper's authors do.

    A tenth of each breed is drawn apart twice, by scikit-learn with seed 7. Arguments as for `oxford_pet`.

    Raises:
        UsageError: likewise.
    """
    from sklearn.model_selection import train_test_split  # noqa: PLC0415 - takes a second, which others need not

    folder = _folder(root, download)
    with reading(folder):
        _, breeds = _listed(folder, "trainval")
        names = sorted(path.stem for path in (folder / "images").glob("[!.]*.jpg"))
        if len(names) != ALL:
            raise ValueError(f"images holds {len(names):,} photographs of {ALL:,}")
        parts: dict[str, list[str]] = {"train": names}
        for split in ("test", "validation"):
            breed = [_breed(name) for name in parts["train"]]
            apart: Any = train_test_split(parts["train"], test_size=0.1, random_state=_SEED, stratify=breed)
            parts["train"], parts[split] = apart
        return Splits(**{
            split: _images(folder, of, len(of), breeds, how, labels, split) for split, of in parts.items()
        })  # fmt: skip


def _folder(root: Path, download: bool) -> Path:
    folder = root / _FOLDER
    archives = {
        folder / part: Published(folder / f"{part}.tar.gz", md5, (f"{URL}{part}.tar.gz",)) for part, md5 in MD5.items()
    }
    obtain_folders(archives, download=download)
    return folder


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
