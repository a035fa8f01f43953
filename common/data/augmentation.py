"""Views of images: weak and strong ones, for methods that compare the two (AdaMatch, FixMatch), and classifiers' own.

By albumentations 2.0.8, the last release under the MIT licence. This module alone imports it, and only when the first
view is made: it would look for updates on the network, and OpenCV would start threads of its own.
"""

import functools
import math
import os
import random
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from common.data.streams import PerImage

Strength = Literal["weak", "strong", "zoom", "affine"]


@dataclass(frozen=True)
class Augmentation:
    """Augments one image, uint8 (3, S, S), by what its seed says and nothing else.

    Weak: reflected at the border by an eighth of the side, then a random crop of the old size, mirrored with
    probability 1/2 if ``flip``. Strong: a weak view of its own, two different ones of thirteen operations (rotate by up
    to 15 degrees; shear x, shear y by up to 0.15; translate x, translate y by up to a tenth; invert; solarize;
    posterize to 4 to 8 bits; brightness and contrast by up to 0.6, colour by up to 0.9; autocontrast; nothing), and a
    rectangle of up to half the side cut out. Zoom: height and width scaled apart by 0.8 to 1.2, rotated by up to 7.2
    degrees, as the page of Keras on transformers does. Affine: rotated by up to 30 degrees, moved and scaled by up to
    a tenth, sheared by up to 0.1 degrees, as the paper's authors do with pets (what Keras makes of 0.1).

    ``flip``, ``invert``, ``scale`` and ``blur`` are those of `ViewOptions`; zoom and affine take ``flip`` alone.
    """

    strength: Strength
    size: int
    flip: bool = False
    invert: bool = False
    scale: tuple[float, float] | None = None
    blur: float = 0.0

    def __call__(self, image: Tensor, seed: int) -> Tensor:
        """Return the view, uint8 (3, S, S)."""
        pipeline = _pipeline(self)
        # All transforms draw from one pair of generators; seeded apart, as Compose would, they would draw alike.
        pipeline.set_random_state(np.random.default_rng(seed), random.Random(seed))
        made = pipeline(image=image.permute(1, 2, 0).contiguous().numpy())["image"]
        return torch.from_numpy(np.ascontiguousarray(made.transpose(2, 0, 1)))


@dataclass(frozen=True, kw_only=True)
class ViewOptions:
    """Options of weak and strong views that depend on the data set."""

    flip: bool = False
    """Mirror half of the weak and strong views; not for digits and letters."""
    invert: bool = False
    """Show half of the weak and strong views as negatives, where light on dark may be dark on light in the other
    domain (French, Mackiewicz and Fisher, ICLR 2018, from MNIST to SVHN)."""
    scale: tuple[float, float] | None = None
    """Scale weak and strong views by factors between these two, height and width apart, where objects are of another
    size in the other domain; null does not."""
    blur: float = 0.0
    """Blur half of the weak and strong views by a Gaussian whose deviation in pixels is drawn from 0.1 to this, where
    one domain is sharper (Chen et al., SimCLR, 2020); 0 does not."""

    def __post_init__(self) -> None:
        if self.blur and not 0.1 <= self.blur <= 10:
            raise ValueError(f"data.blur: expected 0, or 0.1 to 10 pixels, got {self.blur}")
        if self.scale is not None and not 0.25 <= self.scale[0] <= self.scale[1] <= 4:
            raise ValueError(f"data.scale: expected two factors in order, from 0.25 to 4, or null, got {self.scale}")

    def view(self, strength: Literal["weak", "strong"], size: int) -> PerImage:
        """Return the weak or strong view of images of a side (see `Augmentation`)."""
        return PerImage(Augmentation(strength, size, self.flip, self.invert, self.scale, self.blur))


@functools.cache
def _pipeline(of: Augmentation) -> Any:
    os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")
    import albumentations as A  # noqa: PLC0415 - see the module's docstring
    import cv2  # noqa: PLC0415

    cv2.setNumThreads(0)
    border = cv2.BORDER_REFLECT_101
    size, mirror = of.size, [A.HorizontalFlip(p=0.5)] if of.flip else []
    if of.strength in ("zoom", "affine"):
        changes: dict[str, Any] = (
            {"scale": {"x": (0.8, 1.2), "y": (0.8, 1.2)}, "rotate": (-7.2, 7.2)}
            if of.strength == "zoom"
            else {
                "scale": {"x": (0.9, 1.1), "y": (0.9, 1.1)},
                "rotate": (-30, 30),
                "translate_percent": {"x": (-0.1, 0.1), "y": (-0.1, 0.1)},
                "shear": {"x": (-0.1, 0.1), "y": (0, 0)},
            }
        )
        return A.Compose([A.Affine(border_mode=border, p=1, **changes), *mirror])
    steps: list[Any] = [A.Pad(size // 8, border_mode=border), A.RandomCrop(size, size), *mirror]
    if of.scale is not None:
        steps.insert(0, A.Affine({"x": of.scale, "y": of.scale}, border_mode=border, p=1))
    if of.invert:
        steps.append(A.InvertImg(p=0.5))
    if of.blur:
        steps.append(A.GaussianBlur(blur_limit=0, sigma_limit=(0.1, of.blur), p=0.5))
    if of.strength == "strong":
        angle = math.degrees(math.atan(0.15))
        same = {"brightness": (1.0, 1.0), "contrast": (1.0, 1.0), "saturation": (1.0, 1.0), "hue": (0.0, 0.0)}
        moved: list[dict[str, Any]] = [
            {"rotate": (-15, 15)},
            {"shear": {"x": (-angle, angle), "y": (0, 0)}},
            {"shear": {"x": (0, 0), "y": (-angle, angle)}},
            {"translate_percent": {"x": (-0.1, 0.1), "y": (0, 0)}},
            {"translate_percent": {"x": (0, 0), "y": (-0.1, 0.1)}},
        ]
        coloured = [{"brightness": (0.4, 1.6)}, {"contrast": (0.4, 1.6)}, {"saturation": (0.1, 1.9)}]
        operations = [
            *(A.Affine(border_mode=border, p=1, **move) for move in moved),
            A.InvertImg(p=1),
            A.Solarize((0, 1), p=1),
            A.Posterize((4, 8), p=1),
            *(A.ColorJitter(p=1, **(same | colour)) for colour in coloured),  # pyright: ignore[reportArgumentType]
            A.AutoContrast(p=1),
            A.NoOp(p=1),
        ]
        cut = A.CoarseDropout((1, 1), (1, size // 2), (1, size // 2), fill=127, p=1)
        steps += [A.SomeOf(operations, n=2, p=1), cut]
    return A.Compose(steps)
