"""PNG and JPEG files of a folder, whatever their mode and size, as one tensor."""

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, cast

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from common.data.image_set import ImageSet, Lazy
from common.data.reading.layout import refuse_splits, subfolders
from common.errors import UsageError

_EXTENSIONS = (".png", ".jpg", ".jpeg")


@dataclass(frozen=True)
class Decoding:
    """How files become images.

    Each becomes RGB as Pillow's ``convert("RGB")`` makes it: an alpha channel is dropped, the colours under it stay;
    EXIF orientation is not applied. 16-bit grey keeps the high byte, as Pillow does for 16-bit RGB. An image that is
    size x size already is not touched.

    Attributes:
        size: side of the result, in pixels.
        fit: "cut" brings the short side to the size (bicubic, antialiased) and cuts the centre out, "pad" the long
            side, and puts the image between black bars.
        in_memory: decode at once; else whenever images are asked for.
    """

    size: int
    fit: Literal["cut", "pad"] = "cut"
    in_memory: bool = True

    def read(self, files: list[Path]) -> Tensor:
        """Return images (N, 3, size, size), uint8, or what stands for them and decodes them.

        Raises:
            UsageError: naming a file that cannot be read.
        """
        if self.in_memory:
            return self.decode(files)
        return cast(Tensor, ImagesOnDisk(files, self))

    def decode(self, files: list[Path]) -> Tensor:
        """Return images (N, 3, size, size), uint8.

        Raises:
            UsageError: naming a file that cannot be read.
        """
        images = torch.empty(len(files), 3, self.size, self.size, dtype=torch.uint8)
        target = images.permute(0, 2, 3, 1).numpy()  # a view as Pillow lays pixels out
        square = _cut if self.fit == "cut" else _padded

        def read_one(i: int) -> None:
            target[i] = _decode(files[i], lambda image: square(_to_rgb(image), self.size))

        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:  # Pillow decodes without the interpreter lock
            try:
                list(pool.map(read_one, range(len(files))))
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise
        return images


class ImagesOnDisk(Lazy):
    """Images that are decoded when they are asked for.

    Args:
        files: one an image.
        how: how they become images.
    """

    def __init__(self, files: list[Path], how: Decoding) -> None:
        super().__init__((len(files), 3, how.size, how.size))
        self.files, self.how = files, how

    def __getitem__(self, index: Tensor | slice) -> Tensor:
        """Decode images by their positions."""
        return self.how.decode(self._chosen(index))

    def subset(self, index: Tensor) -> "ImagesOnDisk":
        """Return those at some positions, int64 (M,), without decoding them."""
        return ImagesOnDisk(self._chosen(index), self.how)

    def _chosen(self, index: Tensor | slice) -> list[Path]:
        return self.files[index] if isinstance(index, slice) else [self.files[i] for i in index.tolist()]


def read_folder(
    root: Path,
    how: Decoding,
    *,
    field: str = "data.root",
    split: str = "train",
    classes: tuple[str, ...] | None = None,
) -> ImageSet:
    """Read the images of a folder, in the order of their paths.

    Sub-folders are classes by the rule of torchvision's ImageFolder: sorted by name, searched to any depth,
    files beside them ignored. A folder without sub-folders is a set without labels. Files count by extension
    (.png, .jpg, .jpeg in any case).

    Args:
        root: the folder.
        how: how files become images.
        field: the setting that names the folder, for messages.
        split: what the images are for.
        classes: the only class names allowed, in the order of their labels; by default the sub-folders found.

    Raises:
        UsageError: if the folder or a class has no images, a file cannot be read, a class is unknown, or the
            sub-folders are splits.
    """
    check_folder(root, field)
    found = [folder.name for folder in subfolders(root)]
    if not found:
        files = [Path(entry.path) for entry in sorted(os.scandir(root), key=lambda e: e.name) if _is_image(entry.name)]
        if not files:
            raise UsageError(f"{field}: no PNG or JPEG files in {root}")
        return ImageSet(how.read(files), None, (), root.name, split)
    refuse_splits(field, root, found)
    known = classes or tuple(found)
    files, labels = [], []
    for name in found:
        if name not in known:
            raise UsageError(f"{field}: class folder {root / name} is not among the training classes")
        members = images_below(root / name)
        if not members:
            raise UsageError(f"{field}: class folder {root / name} has no PNG or JPEG files")
        files += members
        labels += [known.index(name)] * len(members)
    return ImageSet(how.read(files), torch.tensor(labels), known, root.name, split)


def check_folder(root: Path, field: str) -> None:
    """Raise UsageError, naming the setting, unless `root` is a folder."""
    if not root.exists():
        raise UsageError(f"{field}: no folder {root}")
    if not root.is_dir():
        raise UsageError(f"{field}: {root} is a file, expected a folder of images")


def _is_image(name: str) -> bool:
    return name.lower().endswith(_EXTENSIONS)


def images_below(folder: Path) -> list[Path]:
    """Return the PNG and JPEG files at any depth below a folder, in the order of their paths."""
    return [
        Path(place) / name
        for place, _, names in sorted(os.walk(folder, followlinks=True))
        for name in sorted(names)
        if _is_image(name)
    ]


def read_images(files: list[Path], size: int, fit: Literal["cut", "pad"] = "cut") -> Tensor:
    """Read files as uint8 (N, 3, size, size), the centre of each, or all of it between bars (see `Decoding`).

    Raises:
        UsageError: naming a file that cannot be read.
    """
    return Decoding(size, fit).decode(files)


def read_photograph(path: Path) -> np.ndarray:
    """Read one file at its own size: uint8 (H, W, 3), colours as in `read_folder`.

    Raises:
        UsageError: if it cannot be read.
    """
    return _decode(path, _to_rgb)


def _decode(path: Path, convert: Callable[[Image.Image], Image.Image]) -> np.ndarray:
    try:
        with Image.open(path) as image:
            return np.asarray(convert(image))
    except Exception as error:  # Pillow's decoders raise a dozen unrelated types for damaged files
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UsageError(f"{path}: cannot be read as an image ({reason}); repair or remove the file") from error


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):  # convert() would clip 16 bits at 255 and turn nearly all white
        return Image.fromarray((np.asarray(image).astype(np.uint32) >> 8).astype(np.uint8)).convert("RGB")
    if image.mode == "P" and "transparency" in image.info:  # a palette with alpha warns unless it is expanded first
        return image.convert("RGBA").convert("RGB")
    return image.convert("RGB")


def _cut(image: Image.Image, size: int) -> Image.Image:
    width, height = image.size
    short = min(width, height)
    if short != size:
        width, height = size * width // short, size * height // short
        image = image.resize((width, height), Image.Resampling.BICUBIC)
    left, top = round((width - size) / 2), round((height - size) / 2)
    return image.crop((left, top, left + size, top + size))


def _padded(image: Image.Image, size: int) -> Image.Image:
    width, height = image.size
    long = max(width, height)
    if long != size:
        width, height = max(1, round(size * width / long)), max(1, round(size * height / long))
        image = image.resize((width, height), Image.Resampling.BICUBIC)
    whole = Image.new("RGB", (size, size))
    whole.paste(image, ((size - width) // 2, (size - height) // 2))
    return whole
