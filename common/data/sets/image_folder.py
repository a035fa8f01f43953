"""Images of the user's own: folders of training and test images, with superclasses from a file."""

import json
from dataclasses import replace
from pathlib import Path

import torch

from common.data.config import DataConfig
from common.data.image_set import ImageSet, Splits
from common.data.reading.image_folder import Decoding, read_folder
from common.data.reading.layout import own_folders
from common.runtime.errors import UsageError


def load(config: DataConfig) -> Splits:
    """Read the images of ``config.root`` and ``config.test_root`` (see `read_folder`)."""
    if config.root is None:
        raise UsageError("data.root: expected the folder that holds the images, as in --data.root PATH")
    root, test_root = own_folders(config.root, config.test_root)
    how = Decoding(config.size, config.fit, config.in_memory)
    train, test = read_folder(root, how), None
    if test_root is not None:
        if test_root.resolve() == root.resolve():
            raise UsageError(f"data.test_root: {test_root} is data.root, expected images held apart from it")
        test = read_folder(test_root, how, field="data.test_root", split="test", classes=train.classes or None)
    splits = Splits(train, test)
    if config.superclasses is None:
        return splits
    if train.labels is None:
        raise UsageError(f"data.superclasses: the images in {root} have no classes, expected null")
    superclass_of = _read_superclasses(config.superclasses, train.classes)
    return replace(splits, **{name: _with_superclasses(images, superclass_of) for name, images in splits.items()})


def _read_superclasses(path: Path, classes: tuple[str, ...]) -> dict[str, str]:
    """Read the superclass of each class from a JSON object, ``{"tabby": "cat", "poodle": "dog"}``."""
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
        problem = None
        if not isinstance(superclass, str) or not superclass:
            problem = f"gives class {name} no text, expected the name of its superclass"
        elif found.setdefault(name, superclass) != superclass:
            problem = f"gives class {name} two superclasses, {found[name]} and {superclass}"
        elif name not in classes:
            problem = f"names class {name}, which the images have not"
        if problem is not None:
            raise UsageError(f"data.superclasses: {path} {problem}")
    for name in classes:
        if name not in found:
            raise UsageError(f"data.superclasses: {path} gives class {name} no superclass")
    return found


def _with_superclasses(images: ImageSet, superclass_of: dict[str, str]) -> ImageSet:
    """Add the superclass of each image's class; superclasses are numbered in the order of their names."""
    if images.labels is None:
        return images
    names = tuple(sorted(set(superclass_of.values())))
    number = torch.tensor([names.index(superclass_of[name]) for name in images.classes])
    return replace(images, superclasses=number[images.labels], superclass_names=names)


class _Pairs(list):
    """A JSON object as a list of pairs, in which a name may occur twice."""
