"""Images in memory: uint8, with their labels and a hash of the content."""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from common.runtime import seeding
from common.runtime.device import memory_format
from common.runtime.errors import UsageError

_CHUNK = 256
_RESIZE_VALUES = 2**24  # floats in memory at once


@dataclass(frozen=True, eq=False)
class ImageSet:
    """Images of one split of one data set.

    Args:
        images: uint8 (N, 3, H, W) on the CPU, N >= 1, or `ImagesOnDisk`.
        labels: int64 (N,) in [0, len(classes)), or None where the data has no labels.
        classes: class names by label; empty without labels.
        name: the data set.
        split: "train", "test" or "validation".
        superclasses: int64 (N,) in [0, len(superclass_names)), or None where nothing is known.
        superclass_names: their names; empty without superclasses.
        clusters: int64 (N,) in [0, len(cluster_names)), which normalization layers take, or None (see
            `common.data.clusters`).
        cluster_names: their names; empty without clusters.

    Raises:
        ValueError: if shapes, types, labels, superclasses or clusters are not as above.
    """

    images: Tensor
    labels: Tensor | None
    classes: tuple[str, ...]
    name: str
    split: str
    superclasses: Tensor | None = None
    superclass_names: tuple[str, ...] = ()
    clusters: Tensor | None = None
    cluster_names: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        images, labels = self.images, self.labels
        if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3 or images.device.type != "cpu":
            got = f"{images.dtype} {tuple(images.shape)} on {images.device}"
            raise ValueError(f"images: expected uint8 (N, 3, H, W) on the CPU, got {got}")
        if not images.numel():
            raise ValueError(f"images: expected at least one, got shape {tuple(images.shape)}")
        _check_numbers("labels", labels, "classes", self.classes, len(images))
        _check_numbers("superclasses", self.superclasses, "superclass_names", self.superclass_names, len(images))
        _check_numbers("clusters", self.clusters, "cluster_names", self.cluster_names, len(images))

    def __len__(self) -> int:
        return len(self.images)

    @property
    def num_classes(self) -> int:
        """Number of class names; 0 without labels."""
        return len(self.classes)

    @cached_property
    def content_hash(self) -> str:
        """SHA-256 over the shape, every pixel, label and superclass, without clusters: 64 hexadecimal digits."""
        digest = hashlib.sha256(f"{tuple(self.images.shape)} {self.labels is not None}".encode())
        for chunk in self.chunks():
            digest.update(_buffer(chunk))
        if self.labels is not None:
            digest.update(_buffer(self.labels))
        if self.superclasses is not None:
            digest.update(b"groups")  # their name when caches were first written
            digest.update(_buffer(self.superclasses))
        return digest.hexdigest()

    @cached_property
    def pixel_hash(self) -> str:
        """SHA-256 over the shape and every pixel: what clusters of these images go by, whatever their labels."""
        digest = hashlib.sha256(f"{tuple(self.images.shape)}".encode())
        for chunk in self.chunks():
            digest.update(_buffer(chunk))
        return digest.hexdigest()

    def chunks(self) -> Iterator[Tensor]:
        """Yield the images in their order, uint8 (B, 3, H, W), a few hundred at once."""
        for first in range(0, len(self), _CHUNK):
            yield self.images[first : first + _CHUNK]

    def channel_moments(self) -> tuple[Tensor, Tensor]:
        """Return each channel's mean and standard deviation in [0, 1] over all pixels, float64 (3,).

        Exact but for one rounding: the 256 values are counted. The deviation divides by the number of pixels.
        """
        counts = torch.zeros(3, 256, dtype=torch.float64)
        for part in self.chunks():
            counts += torch.stack([torch.bincount(part[:, c].flatten(), minlength=256) for c in range(3)])
        values = torch.arange(256, dtype=torch.float64) / 255
        share = counts / counts.sum(1, keepdim=True)
        mean = share @ values
        return mean, (share * (values - mean[:, None]).square()).sum(1).sqrt()

    @cached_property
    def clusters_hash(self) -> str | None:
        """SHA-256 over each image's cluster, or None without clusters."""
        return None if self.clusters is None else hashlib.sha256(_buffer(self.clusters)).hexdigest()

    def clusters_at(self, index: Tensor | slice, device: torch.device) -> Tensor | None:
        """Return the clusters of the images at these positions on a device, or None without clusters."""
        return None if self.clusters is None else self.clusters[index].to(device, non_blocking=True)

    def select(self, index: Tensor) -> "ImageSet":
        """Return the images at these positions, int64 (M,) with M >= 1, in this order."""
        images: Any = self.images
        numbers = {name: getattr(self, name) for name in ("labels", "superclasses", "clusters")}
        return replace(
            self,
            images=images[index] if isinstance(images, Tensor) else images.subset(index),
            **{name: None if own is None else own[index] for name, own in numbers.items()},
        )


def _check_numbers(field: str, numbers: Tensor | None, names_field: str, names: tuple[str, ...], count: int) -> None:
    if numbers is None:
        if names:
            raise ValueError(f"{names_field}: expected none without {field}, got {len(names)}")
        return
    if numbers.dtype != torch.int64 or numbers.shape != (count,) or numbers.device.type != "cpu":
        got = f"{numbers.dtype} {tuple(numbers.shape)} on {numbers.device}"
        raise ValueError(f"{field}: expected int64 ({count},) on the CPU, got {got}")
    low, high = int(numbers.min()), int(numbers.max())
    if low < 0 or high >= len(names):
        raise ValueError(f"{field}: expected 0 to {len(names) - 1}, got {low} to {high}")


def _buffer(tensor: Tensor) -> Any:  # NumPy's stubs do not say that an array is a buffer
    return tensor.contiguous().numpy()


@dataclass(frozen=True)
class Splits:
    """Images to train on and images held apart from them; ``validation`` where the data set itself has such a split."""

    train: ImageSet
    test: ImageSet | None
    validation: ImageSet | None = None

    def items(self) -> list[tuple[str, ImageSet]]:
        """Return the splits that there are, by name."""
        found = (("train", self.train), ("test", self.test), ("validation", self.validation))
        return [(name, images) for name, images in found if images is not None]


def to_float(images: Tensor) -> Tensor:
    """Map uint8 images, 0..255, to float32 in [-1, 1]: ``x / 127.5 - 1``."""
    return images.float().div_(127.5).sub_(1)


def to_input(images: Tensor, device: torch.device, *, channels_last: bool | None) -> Tensor:
    """Bring uint8 images (N, 3, S, S) to a device, in [-1, 1], there as NHWC in memory where asked for."""
    return to_float(images.to(device, non_blocking=True)).contiguous(memory_format=memory_format(channels_last))


def to_uint8(images: Tensor) -> Tensor:
    """Map images in [-1, 1] of any floating type to uint8, 0..255: ``(x + 1) * 127.5``.

    Rounds to the nearest integer (halves to the even one) and clamps what lies outside, so that
    ``to_uint8(to_float(x)) == x`` for every uint8 x. What a NaN becomes is not defined.
    """
    return images.float().add(1).mul_(127.5).round_().clamp_(0, 255).to(torch.uint8)


def resize(images: Tensor, size: int) -> Tensor:
    """Bring square uint8 images (N, 3, H, H) to side `size`: bicubic, antialiased, unchanged at that size."""
    if images.shape[-1] == size:
        return images
    chunk = max(1, _RESIZE_VALUES // (3 * max(size, images.shape[-1]) ** 2))
    chunks = [
        F.interpolate(part.float(), size=(size, size), mode="bicubic", antialias=True)
        .round_()
        .clamp_(0, 255)
        .to(torch.uint8)
        for part in images.split(chunk)
    ]
    return torch.cat(chunks)


def hold_out(images: ImageSet, share: float, seed: int) -> tuple[ImageSet, ImageSet]:
    """Split training images into those to train on and those to validate on, so that choices see no test image.

    Which ones follows from (seed, "validation", class); both keep the set's order. A class of n images gives
    ``round(share * n)``, at least one, to validation. Without labels all images are one class.

    Raises:
        UsageError: if a class has too few images to be in both.
    """
    labels = torch.zeros(len(images), dtype=torch.int64) if images.labels is None else images.labels
    held = torch.zeros(len(images), dtype=torch.bool)
    for label in labels.unique().tolist():
        members = (labels == label).nonzero()[:, 0]
        count = max(1, round(share * len(members)))
        if count >= len(members):
            name = f"class {images.classes[label]}" if images.classes else images.name
            raise UsageError(
                f"data.validation: {share:g} of {name}'s {len(members)} images leaves none to train on; "
                "expected a smaller share, or more images"
            )
        held[members[seeding.permutation(len(members), seed, "validation", label)[:count]]] = True
    validation = replace(images.select(held.nonzero()[:, 0]), split="validation")
    return images.select((~held).nonzero()[:, 0]), validation
