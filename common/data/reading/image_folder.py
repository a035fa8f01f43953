"""Image files of a folder, whatever their format, mode and size, as one tensor."""

import contextlib
import os
import sys
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, cast

import numpy as np
import torch
from PIL import ExifTags, Image
from torch import Tensor

from common.data.image_set import ImageSet
from common.data.reading.layout import refuse_splits, subfolders
from common.runtime.errors import UsageError

_EXTENSIONS = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".gif")
_FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "TIFF", "GIF")
"""What files are read as, whatever their names say; Pillow's other readers are never tried."""
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""What makes an image upright, by its EXIF orientation."""
_DARK = 4095
"""The largest value of 12 bits, which cameras and scanners keep in files of 16."""


@dataclass(frozen=True)
class Decoding:
    """How files become images.

    Each is turned as its EXIF orientation says and becomes RGB as Pillow's ``convert("RGB")`` makes it: an alpha
    channel is dropped, the colours under it stay. Of an animation the first frame is taken. 16-bit grey keeps the high
    byte, as Pillow does for 16-bit RGB; one line warns of images that are nearly black by that. An image that is
    size x size already is not resized.

    Attributes:
        size: side of the result, in pixels.
        fit: "cut" brings the short side to the size (bicubic, antialiased) and cuts the centre out, "pad" the long
            side, and puts the image between black bars.
        in_memory: decode at once; else whenever images are asked for.
    """

    size: int
    fit: Literal["cut", "pad"] = "cut"
    in_memory: bool = True
    _warned: list[Path] = field(default_factory=list, init=False, repr=False, compare=False)

    def read(self, files: list[Path]) -> Tensor:
        """Return images (N, 3, size, size), uint8, or `ImagesOnDisk`.

        Raises:
            UsageError: naming a file that cannot be read.
        """
        return self.decode(files) if self.in_memory else cast(Tensor, ImagesOnDisk(files, self))

    def decode(self, files: list[Path]) -> Tensor:
        """Return images (N, 3, size, size), uint8; errors as for `read`."""
        images = torch.empty(len(files), 3, self.size, self.size, dtype=torch.uint8)
        target = images.permute(0, 2, 3, 1).numpy()  # a view as Pillow lays pixels out
        square = _cut if self.fit == "cut" else _padded
        dark = [False] * len(files)

        def read_one(i: int) -> None:
            target[i], dark[i] = _decode(files[i], lambda image: square(image, self.size))

        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:  # Pillow decodes without the interpreter lock
            try:
                list(pool.map(read_one, range(len(files))))
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise
        if any(dark) and not self._warned:
            self._warned.append(files[dark.index(True)])
            _say(
                f"warning: {sum(dark):,} of {len(files):,} images, {self._warned[0]} first, have 16 bits a value and "
                f"none above {_DARK:,}, so they are nearly black: of 16 bits the high byte is kept; stretch them to "
                "0..65,535"
            )
        return images


class ImagesOnDisk:
    """The uint8 images (N, 3, S, S) of an `ImageSet`, decoded when they are asked for."""

    dtype, device, ndim = torch.uint8, torch.device("cpu"), 4

    def __init__(self, files: list[Path], how: Decoding) -> None:
        self.files, self.how = files, how
        self.shape = torch.Size((len(files), 3, how.size, how.size))

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: Tensor | slice) -> Tensor:
        return self.how.decode(self.subset(index).files)

    def numel(self) -> int:
        """Return the number of values."""
        return self.shape.numel()

    def subset(self, index: Tensor | slice) -> "ImagesOnDisk":
        """Return the images at some positions, a slice or int64 (M,), without decoding them."""
        files = self.files[index] if isinstance(index, slice) else [self.files[i] for i in index.tolist()]
        return ImagesOnDisk(files, self.how)


def read_folder(
    root: Path,
    how: Decoding,
    *,
    field: str = "data.root",
    split: str = "train",
    classes: tuple[str, ...] | None = None,
) -> ImageSet:
    """Read the images of a folder, in the order of their paths; `images_below` says which.

    Sub-folders are classes by the rule of torchvision's ImageFolder: sorted by name, searched to any depth,
    files beside them ignored. A folder without sub-folders is a set without labels.

    Args:
        root: the folder.
        how: how files become images.
        field: the setting that names the folder, for messages.
        split: "train" or "test".
        classes: the only class names allowed, in the order of their labels; by default the sub-folders found.

    Raises:
        UsageError: if the folder or a class has no images, a folder is reached twice, a file cannot be read, a class is
            unknown, or the sub-folders are splits.
    """
    check_folder(root, field)
    found = [folder.name for folder in subfolders(root)]
    refuse_splits(field, root, found)
    known = classes or tuple(found)
    for name in found:
        if name not in known:
            raise UsageError(f"{field}: class folder {root / name} is not among the training classes")
    if not found:
        return ImageSet(how.read(images_below(root, field)), None, (), root.name, split)
    files, left_out = _search(root, field)
    members: dict[str, list[Path]] = {name: [] for name in found}
    for file in files:
        inner = file.parts[len(root.parts) :]
        if len(inner) == 1:
            left_out["beside the class folders"] += 1
        else:
            members[inner[0]].append(file)
    for name, own in members.items():
        if not own:
            raise _no_images(f"{field}: class folder {root / name} has no images", left_out)
    _report(root, left_out)
    labels = torch.tensor([known.index(name) for name, own in members.items() for _ in own])
    return ImageSet(how.read([file for own in members.values() for file in own]), labels, known, root.name, split)


def check_folder(root: Path, field: str) -> None:
    """Raise UsageError, naming the setting, unless `root` is a folder."""
    if not root.exists():
        raise UsageError(f"{field}: no folder {root}")
    if not root.is_dir():
        raise UsageError(f"{field}: {root} is a file, expected a folder of images")


def images_below(folder: Path, field: str) -> list[Path]:
    """Return the image files at any depth below a folder, in the order of their paths; print how many others there are.

    Files count by extension: .png, .jpg, .jpeg, .webp, .bmp, .tif, .tiff and .gif in any case. Hidden files and
    folders, whose names begin with a dot, are left out. Links are followed.

    Raises:
        UsageError: naming the setting, if there are none, or a folder is reached twice or cannot be read.
    """
    files, left_out = _search(folder, field)
    if not files:
        raise _no_images(f"{field}: no images in {folder}", left_out)
    _report(folder, left_out)
    return files


def _search(root: Path, field: str) -> tuple[list[Path], Counter[str]]:
    """Return the image files at any depth, in the order of their paths, and how many others there are, by kind."""

    def refuse(error: OSError) -> None:
        raise UsageError(f"{field}: {error.filename} cannot be read ({error.strerror})")

    left_out: Counter[str] = Counter()
    places: list[tuple[str, list[str]]] = []
    reached: dict[tuple[int, int], str] = {}
    for place, folders, names in os.walk(root, followlinks=True, onerror=refuse):
        status = os.stat(place)
        before = reached.setdefault((status.st_dev, status.st_ino), place)
        if before != place:
            raise UsageError(f"{field}: {place} is the folder {before} again, by a link; remove one of them")
        visible = [name for name in names if not name.startswith(".")]
        images = sorted(name for name in visible if name.lower().endswith(_EXTENSIONS))
        left_out["hidden"] += len(names) - len(visible) + sum(name.startswith(".") for name in folders)
        left_out["of other formats"] += len(visible) - len(images)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        places.append((place, images))
    return [Path(place) / name for place, images in sorted(places) for name in images], left_out


def _listed(left_out: Counter[str]) -> str:
    return ", ".join(f"{count:,} {kind}" for kind, count in left_out.items() if count)


def _no_images(line: str, left_out: Counter[str]) -> UsageError:
    expected = f"expected {', '.join(_EXTENSIONS)}"
    return UsageError(f"{line}, {expected}" + (f" (left out: {_listed(left_out)})" if left_out.total() else ""))


def _report(root: Path, left_out: Counter[str]) -> None:
    if left_out.total():
        _say(f"note: {root}: files left out: {_listed(left_out)}")


def _say(line: str) -> None:
    if os.environ.get("RANK", "0") == "0":  # of several processes of one run, one tells the user
        print(line, file=sys.stderr)


def read_images(files: list[Path], size: int, fit: Literal["cut", "pad"] = "cut") -> Tensor:
    """Read files as uint8 (N, 3, size, size); arguments and errors as for `Decoding`."""
    return Decoding(size, fit).decode(files)


def read_photograph(path: Path) -> np.ndarray:
    """Read one file at its own size: uint8 (H, W, 3), colours as in `read_folder`."""
    return _decode(path, lambda image: image)[0]


def _decode(path: Path, convert: Callable[[Image.Image], Image.Image]) -> tuple[np.ndarray, bool]:
    """Return what an upright RGB image is converted to, and whether it was 16-bit without a value of more than 12."""
    try:
        with Image.open(path, formats=_FORMATS) as image:
            deep = image.mode.startswith("I") or (image.format in ("PNG", "TIFF") and ";16" in str(image.tile))
            image.load()  # only now all of the metadata is read
            upright = _to_rgb(image)
            orientation = None
            with contextlib.suppress(Exception):  # damaged metadata is no reason to refuse the pixels
                orientation = image.getexif().get(ExifTags.Base.Orientation)
            if orientation in _TURNS:
                upright = upright.transpose(_TURNS[orientation])
            return np.asarray(convert(upright)), deep and int(np.asarray(upright).max()) <= _DARK >> 8
    except Exception as error:  # Pillow's decoders raise a dozen unrelated types for damaged files
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UsageError(f"{path}: cannot be read as an image ({reason}); repair or remove the file") from error


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):  # convert() would clip 16 bits at 255 and turn nearly all white
        values = np.asarray(image)
        if values.min() < 0 or values.max() > 65535:
            raise ValueError(f"it holds values from {values.min()} to {values.max()}, expected 8 or 16 bits")
        return Image.fromarray((values.astype(np.uint32) >> 8).astype(np.uint8)).convert("RGB")
    if image.mode == "F":  # convert() would clip at 0 and 255, and turn 0 to 1 black
        raise ValueError("it holds floating-point numbers, expected 8 or 16 bits")
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
