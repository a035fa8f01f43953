"""Oxford-IIIT Pet (Parkhi et al. 2012): 37 breeds of cats and dogs, photographs of any size."""

from pathlib import Path
from typing import Literal

import torch

from common.data.image_set import ImageSet, Splits
from common.data.reading.downloads import Published, obtain_folders, present, reading
from common.data.reading.image_folder import read_images

URL = "https://www.robots.ox.ac.uk/~vgg/data/pets/data/"
MD5 = {  # as in torchvision's OxfordIIITPet, whose reader keeps the names of the files to itself
    "images": "5c4f3ee8e5d25df40f4fd59a7f44e54c",
    "annotations": "95a8c909bbe2e81eed6a22bccdf3f68f",
}
COUNTS = {"trainval": 3680, "test": 3669}
_FOLDER = "oxford-iiit-pet"
_SPECIES = ("cat", "dog")


def oxford_pet(root: Path, size: int, labels: Literal["fine", "coarse"], *, download: bool) -> Splits:
    """Load the official trainval and test splits (3,680 and 3,669 images), as `read_folder` reads images.

    A breed's name is that of its files; a breed whose name starts with a capital letter is one of cats. The
    superclasses of the images are always cat and dog.

    Args:
        root: the folder that holds, or will hold, ``oxford-iiit-pet``.
        size: side of the squares that images are brought to.
        labels: "fine" for breeds, "coarse" for cat and dog.
        download: fetch the archives where neither they nor their folders are there.

    Raises:
        UsageError: if files are missing or damaged, and were not to be or could not be downloaded.
    """
    folder = root / _FOLDER
    archives = {
        folder / part: Published(folder / f"{part}.tar.gz", md5, (f"{URL}{part}.tar.gz",)) for part, md5 in MD5.items()
    }
    obtain_folders(archives, download=download)
    with reading(folder):
        return Splits(_split(folder, "trainval", size, labels), _split(folder, "test", size, labels))


def _split(folder: Path, official: str, size: int, labels: str) -> ImageSet:
    lines = (folder / "annotations" / f"{official}.txt").read_text(encoding="utf-8").splitlines()
    rows = [line.split() for line in lines if line and not line.startswith("#")]  # name, class, species, breed
    breeds = dict(sorted((int(label) - 1, name.rpartition("_")[0]) for name, label, *_ in rows))
    if list(breeds) != list(range(len(breeds))):
        raise ValueError(f"{official}.txt does not number its classes from 1 on")
    fine = torch.tensor([int(label) - 1 for _, label, *_ in rows])
    coarse = torch.tensor([0 if name[0].isupper() else 1 for name, *_ in rows])
    files = present([folder / "images" / f"{name}.jpg" for name, *_ in rows], COUNTS[official])
    images = read_images(files, size)
    numbers, names = (fine, tuple(breeds.values())) if labels == "fine" else (coarse, _SPECIES)
    split = "test" if official == "test" else "train"
    return ImageSet(images, numbers, names, "oxford_pet", split, coarse, _SPECIES)
