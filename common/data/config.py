"""Which images a run uses."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Which images a run uses.

    Raises:
        ValueError: if a value is out of range, or a folder is given to a data set that reads none.
    """

    name: Literal["digits", "digits_m", "imagefolder", "cifar10", "cifar100"] = "digits"
    """digits: 1,200 real handwritten digits, nothing to download; digits_m: 597 others blended with
    photographs; imagefolder: your own PNG or JPEG files, in one folder or one sub-folder a class."""
    root: Path | None = None
    """Folder of the data set: the images of imagefolder, or where CIFAR is or goes to (null: data)."""
    test_root: Path | None = None
    """imagefolder: images held apart from training, for the FID floor and the classifier's accuracy."""
    size: int = 32
    """Side in pixels that images are brought to: a multiple of 4 from 8 to 1024."""
    download: bool = True
    """Download CIFAR where it is missing."""
    flip: bool = False
    """Mirror each training image left to right with probability 1/2."""
    workers: int = 0
    """Loader processes; 0 gathers batches in the training process."""

    def __post_init__(self) -> None:
        if self.size % 4 or not 8 <= self.size <= 1024:
            raise ValueError(f"data.size: expected a multiple of 4 from 8 to 1024, got {self.size}")
        if self.workers < 0:
            raise ValueError(f"data.workers: expected 0 or more, got {self.workers}")
        if self.root is not None and self.name.startswith("digits"):
            raise ValueError(f"data.root: {self.name} reads no folder, expected null or data.name imagefolder")
        if self.test_root is not None and self.name != "imagefolder":
            raise ValueError(f"data.test_root: {self.name} has its own test images, expected null")
