"""Differentiable augmentation of what the discriminator sees (Zhao et al., 2020): colour, translation, cutout."""

from collections.abc import Collection

import torch
from torch import Tensor

KINDS = ("color", "translation", "cutout")
_DRAWS = 7
_SHIFT = 1 / 8
_CUT = 1 / 2


def augment(images: Tensor, kinds: Collection[str], source: torch.Generator) -> Tensor:
    """Change images at random, each in its own way; gradients flow through.

    Args:
        images: (N, 3, S, S) in [-1, 1].
        kinds: of `KINDS`, done in that order. "color": brightness by up to 0.5 either way, saturation by a factor of 0
            to 2, contrast by one of 0.5 to 1.5. "translation": by whole pixels, up to S / 8 along each side, filled
            with 0. "cutout": a square of side S / 2, its middle anywhere, becomes 0.
        source: gives the draws; all of an image's are drawn whatever the kinds, so that one kind's do not depend on
            the others being there.
    """
    draws = torch.rand(len(images), _DRAWS, generator=source, device=images.device).T[:, :, None, None, None]
    brightness, saturation, contrast, down, right, row, column = draws
    size = images.shape[-1]
    place = torch.arange(size, device=images.device)
    if "color" in kinds:
        images = images + (brightness - 0.5)
        grey = images.mean(1, keepdim=True)
        images = (images - grey) * (2 * saturation) + grey
        mean = images.mean((1, 2, 3), keepdim=True)
        images = (images - mean) * (contrast + 0.5) + mean
    if "translation" in kinds:
        most = round(size * _SHIFT)
        y, x = ((draw * (2 * most + 1)).long() - most for draw in (down, right))
        with torch.autocast(images.device.type, enabled=False):
            # Products with matrices that hold a single 1 a row: exact, and deterministic in every backward pass.
            rows = (place[:, None] - y == place).to(images.dtype)  # (N, 1, S, S)
            columns = (place[:, None] == place - x).to(images.dtype)
            images = rows @ images @ columns
    if "cutout" in kinds:
        side = round(size * _CUT)
        top, left = ((draw * (size + 1)).long() - side // 2 for draw in (row, column))
        inside = (place[:, None] >= top) & (place[:, None] < top + side) & (place >= left) & (place < left + side)
        images = images * ~inside
    return images
