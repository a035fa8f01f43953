"""Which images a run uses, and the data sets that `data.name` knows."""

import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, NamedTuple

from common.data.image_set import Splits
from common.registry import Registry
from common.runtime.errors import UsageError
from common.runtime.fields import MAY_CHANGE
from common.runtime.paths import texts_to_paths

OPTIONAL = {
    "root": None, "test_root": None, "labels": "fine", "superclasses": None, "blend": "sklearn", "split": "official",
    "fit": "cut", "in_memory": True,
}  # fmt: skip
"""Settings of `DataConfig` that only some sets take, and what they are with the others."""


class DataSet(NamedTuple):
    """How a data set is loaded, and which of the optional settings it takes."""

    load: "Callable[[DataConfig], Splits]"
    takes: frozenset[str]


DATA_SETS: Registry[DataSet] = Registry("data.name")


def register_data_set(name: str, load: "Callable[[DataConfig], Splits]", *, takes: Iterable[str] = ()) -> None:
    """Add a data set, which `data.name` then knows.

    Args:
        name: lower-case letters, digits and underscores, a letter first.
        load: from a `DataConfig` to `Splits` of images ``config.size`` pixels a side; what is wrong with files or
            settings raises `common.runtime.errors.UsageError`, one line that names the setting. Import here what takes
            long.
        takes: those of the settings root, test_root, labels, superclasses, blend, split, fit and in_memory that it has
            a use for; the others are refused with it.

    Raises:
        ValueError: the name is taken or invalid, load is no function, or there is no such setting.
    """
    if not callable(load):
        raise ValueError(f"load: expected a function of a DataConfig, got {type(load).__name__}")
    if unknown := sorted(set(takes) - set(OPTIONAL)):
        raise ValueError(f"takes: expected some of {', '.join(OPTIONAL)}, got {', '.join(unknown)}")
    DATA_SETS.add(name, DataSet(load, frozenset(takes)))


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Which images a run uses.

    Raises:
        ValueError: if a value is out of range, or a setting is given to a data set that has no use for it.
    """

    name: str = field(default="digits", metadata={"names": DATA_SETS.names})
    """digits: 1,200 real handwritten digits, nothing to download; digits_m: 597 others blended with
    photographs; imagefolder: your own images, in one folder or one sub-folder a class; mnist_m: MNIST
    blended with photographs; the others as published (docs/data.md), or a set of your own (register_data_set)."""
    root: Path | None = field(default=None, metadata=MAY_CHANGE)
    """Folder of the data set: the images of imagefolder, or train/ and test/ with them; or where a published set is,
    there or in a sub-folder, or goes to (null: data)."""
    test_root: Path | None = field(default=None, metadata=MAY_CHANGE)
    """imagefolder: images held apart from training, for the FID floor and the classifier's accuracy."""
    size: int = 32
    """Side in pixels that images are brought to: a multiple of 4 from 8 to 1024."""
    labels: Literal["fine", "coarse"] = "fine"
    """cifar100: 100 classes or 20 superclasses; oxford_pet: 37 breeds, or cat and dog."""
    superclasses: Path | None = None
    """imagefolder: a JSON file that gives each class a superclass, {"tabby": "cat", "poodle": "dog"}."""
    blend: str = "sklearn"
    """mnist_m: a folder of photographs to blend the digits with, or sklearn for scikit-learn's two."""
    split: Literal["official", "paper"] = "official"
    """oxford_pet: trainval and test as published, 3,680 and 3,669 images; or as in the paper 5,985 to train, 666 to
    validate and 739 to test on, a tenth of each breed apart twice."""
    fit: Literal["cut", "pad"] = "cut"
    """imagefolder, oxford_pet: of images that are not square, the centre; or all of it between black bars."""
    in_memory: bool = field(default=True, metadata=MAY_CHANGE)
    """imagefolder, tiny_imagenet, oxford_pet: keep all images decoded in memory; false decodes files when they are
    drawn, in the workers where there are any, to the same bits (classifiers)."""
    download: bool = field(default=True, metadata=MAY_CHANGE)
    """Download a published data set where it is missing."""
    flip: bool = False
    """Mirror each training image left to right with probability 1/2."""
    workers: int = field(default=0, metadata=MAY_CHANGE)
    """Loader processes; 0 gathers the next batch in a thread of the training process."""
    validation: float | None = None
    """Share of each class of the training images held out of training, for early stopping and the best checkpoint;
    null is 0.1 where one of them reads it, else 0."""

    def __post_init__(self) -> None:
        texts_to_paths(self)
        takes = DATA_SETS[self.name].takes
        if self.validation is not None and not 0 <= self.validation < 1:
            raise ValueError(f"data.validation: expected 0 up to, not including, 1, or null, got {self.validation}")
        if self.size % 4 or not 8 <= self.size <= 1024:
            raise ValueError(f"data.size: expected a multiple of 4 from 8 to 1024, got {self.size}")
        if self.workers < 0:
            raise ValueError(f"data.workers: expected 0 or more, got {self.workers}")
        for name, default in OPTIONAL.items():
            if name not in takes and (value := getattr(self, name)) != default:
                others = ", ".join(other for other, data_set in DATA_SETS.items() if name in data_set.takes)
                raise ValueError(
                    f"data.{name}: expected {'null' if default is None else default}, since {self.name} takes "
                    f"none (taken by {others}), got {value}"
                )


@contextmanager
def fields_without_prefix() -> Iterator[None]:
    """Let a UsageError name data's fields as this command's flags do, not as a training command's, ``data.``."""
    try:
        yield
    except UsageError as error:
        raise UsageError(re.sub(r"(^|--|or set )data\.", r"\1", str(error))) from None
