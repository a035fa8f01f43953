"""Where in a folder that was named the images lie: a published set below it, or train and test images side by side."""

import os
from pathlib import Path
from shlex import quote

from common.data.config import DataConfig
from common.runtime.errors import UsageError

_MARKS = {
    "cifar10": ("cifar-10-batches-py", "cifar-10-python.tar.gz"),
    "cifar100": ("cifar-100-python", "cifar-100-python.tar.gz"),
    "mnist": ("MNIST/raw",),
    "svhn": ("train_32x32.mat",),
    "tiny_imagenet": ("tiny-imagenet-200", "tiny-imagenet-200.zip"),
    "oxford_pet": ("oxford-iiit-pet",),
}
"""What is there, one or the other, where a folder holds a published set."""


def published_root(config: DataConfig) -> Path:
    """Return the folder that a published set is read from: ``root``, or its only sub-folder that holds the set.

    That of several which is called as the set is preferred. Where none holds it, it is ``root``, for the download.

    Raises:
        UsageError: if several sub-folders hold it and none has its name.
    """
    name, root = config.name, config.root or Path("data")
    if _holds(root, name):
        return root
    below = [folder for folder in subfolders(root) if _holds(folder, name)]
    chosen = [folder for folder in below if folder.name.lower() == name] or below
    if len(chosen) > 1:
        names = ", ".join(folder.name for folder in chosen)
        raise UsageError(f"data.root: {root} holds {name} more than once ({names}); name one, {chosen[0]} for instance")
    return chosen[0] if chosen else root


def own_folders(root: Path, test_root: Path | None) -> tuple[Path, Path | None]:
    """Return the folders of training and of test images: a folder that holds train/ and test/ and no other gives both.

    Raises:
        UsageError: if ``root`` holds several data sets.
    """
    below = subfolders(root)
    if test_root is None and {folder.name for folder in below} == {"train", "test"}:
        return root / "train", root / "test"
    published = [name for name in _MARKS if any(_holds(folder, name) for folder in (root, *below))]
    if published:
        raise UsageError(
            f"data.root: {root} holds {', '.join(published)}, not one folder a class; pass --data.name {published[0]} "
            f"--data.root {quote(str(root))}"
        )
    if below and all({"train", "test"} <= {inner.name for inner in subfolders(folder)} for folder in below):
        names = ", ".join(folder.name for folder in below)
        raise UsageError(
            f"data.root: {root} holds data sets ({names}), each with train/ and test/; pass one of them, --data.root "
            f"{quote(str(below[0]))}"
        )
    return root, test_root


def subfolders(root: Path) -> list[Path]:
    """Return the folders in a folder by name, hidden ones left out; none where it is no folder."""
    if not root.is_dir():
        return []
    return sorted(Path(entry.path) for entry in os.scandir(root) if entry.is_dir() and not entry.name.startswith("."))


def refuse_splits(field: str, root: Path, found: list[str]) -> None:
    """Raise UsageError, naming the setting, if sub-folders are splits of a set and not its classes."""
    splits = [name for name in found if name in ("train", "test", "val", "valid", "validation")]
    if not splits or len(splits) < min(2, len(found)):
        return
    first, *others = sorted(splits, key=lambda name: (name != "train", name != "test", name))
    if field == "data.root":
        remedy = f"--data.root {quote(str(root / first))}"
        remedy += f" --data.test_root {quote(str(root / others[0]))}" if others else ""
    else:
        remedy = f"--{field} {quote(str(root / (others[0] if others else first)))}"
    raise UsageError(f"{field}: {root} holds splits ({', '.join(splits)}), not classes; pass {remedy}")


def is_there(path: Path) -> bool:
    """Say whether there is a file, or a folder that holds anything: an empty one is what a failed download leaves."""
    return any(path.iterdir()) if path.is_dir() else path.exists()


def _holds(folder: Path, name: str) -> bool:
    return any(is_there(folder / mark) for mark in _MARKS["mnist" if name == "mnist_m" else name])
