"""The data sets that `data.name` knows; the built-in ones are added in `common.data.sets.registry`."""

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from common.data.image_set import Splits
from common.registry import Registry

OPTIONAL = {
    "root": None, "test_root": None, "labels": "fine", "superclasses": None, "blend": "sklearn", "split": "official",
    "fit": "cut", "in_memory": True,
}  # fmt: skip
"""Settings of `DataConfig` that only some sets take, and what they are with the others."""


class DataSet(NamedTuple):
    """How a data set is loaded, and which of the optional settings it takes."""

    load: Callable[[Any], Splits]
    takes: frozenset[str]


DATA_SETS: Registry[DataSet] = Registry("data.name")


def register_data_set(name: str, load: Callable[[Any], Splits], *, takes: Iterable[str] = ()) -> None:
    """Add a data set, which `data.name` then knows.

    Args:
        name: what it is called: lower-case letters, digits and underscores, a letter first.
        load: from a `DataConfig` to `Splits` of images ``config.size`` pixels a side; what is wrong with files or
            settings raises `common.runtime.errors.UsageError`, one line that names the setting. Import here what takes
            long.
        takes: those of the settings root, test_root, labels, superclasses, blend, split, fit and in_memory that it has
            a use for; the others are refused with it.

    Raises:
        ValueError: the name is taken or none, load is no function, or there is no such setting.
    """
    if not callable(load):
        raise ValueError(f"load: expected a function of a DataConfig, got {type(load).__name__}")
    if unknown := sorted(set(takes) - set(OPTIONAL)):
        raise ValueError(f"takes: expected some of {', '.join(OPTIONAL)}, got {', '.join(unknown)}")
    DATA_SETS.add(name, DataSet(load, frozenset(takes)))
