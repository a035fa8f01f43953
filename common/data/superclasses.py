"""Superclasses for any labelled images, from a file that the user writes."""

import json
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import torch

from common.data.image_set import ImageSet
from common.runtime.errors import UsageError


def read_superclasses(path: Path, classes: Iterable[str]) -> dict[str, str]:
    """Read the superclass of each class from a JSON object, ``{"tabby": "cat", "poodle": "dog"}``.

    Raises:
        UsageError: if the file cannot be read, is not such an object, or names other classes than these.
    """
    try:
        pairs = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=_Pairs)
    except OSError as error:
        raise UsageError(f"data.superclasses: {path} cannot be read ({error.strerror})") from None
    except (ValueError, RecursionError) as error:  # UnicodeDecodeError and JSONDecodeError are ValueErrors
        raise UsageError(f"data.superclasses: {path} is not JSON ({' '.join(str(error).split())})") from None
    if not isinstance(pairs, _Pairs):
        raise UsageError(f'data.superclasses: {path} holds no object, expected {{"class": "superclass", ...}}')
    found: dict[str, str] = {}
    for name, superclass in pairs:
        if not isinstance(superclass, str) or not superclass:
            raise UsageError(
                f"data.superclasses: {path} gives class {name} no text, expected the name of its superclass"
            )
        if found.setdefault(name, superclass) != superclass:
            raise UsageError(
                f"data.superclasses: {path} gives class {name} two superclasses, {found[name]} and {superclass}"
            )
    known = list(classes)
    for name in found:
        if name not in known:
            raise UsageError(f"data.superclasses: {path} names class {name}, which the images have not")
    for name in known:
        if name not in found:
            raise UsageError(f"data.superclasses: {path} gives class {name} no superclass")
    return found


def with_superclasses(image_set: ImageSet, superclass_of: dict[str, str]) -> ImageSet:
    """Return the same images with the superclass of each one's class; without labels they stay without superclasses.

    Superclasses are numbered in the order of their names.
    """
    if image_set.labels is None:
        return image_set
    names = tuple(sorted(set(superclass_of.values())))
    number = torch.tensor([names.index(superclass_of[name]) for name in image_set.classes])
    return replace(image_set, superclasses=number[image_set.labels], superclass_names=names)


class _Pairs(list):
    """A JSON object as it is written, with names that occur twice."""
