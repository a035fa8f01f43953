"""What a network sees of pixels: signed, from 0 to 1, from 0 to 255, or standardised."""

from collections.abc import Iterable
from typing import Literal

import torch
from torch import Tensor, nn

Pixels = Literal["signed", "unit", "raw", "imagenet"]

_IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


def pixels_of(signed: Tensor, kind: Pixels) -> Tensor:
    """Map images (N, 3, H, W) in [-1, 1] to [-1, 1], [0, 1], [0, 255], or less ImageNet's mean and by its deviation."""
    if kind == "signed":
        return signed
    unit = (signed + 1) / 2
    if kind == "unit":
        return unit
    if kind == "raw":
        return unit * 255
    mean, deviation = (torch.tensor(values, device=signed.device)[:, None, None] for values in _IMAGENET)
    return (unit - mean) / deviation


class PixelScale(nn.Module):
    """The first step of a network that is handed signed images; see `pixels_of`."""

    def __init__(self, kind: Pixels) -> None:
        super().__init__()
        self.kind: Pixels = kind

    def forward(self, x: Tensor) -> Tensor:
        """Map images (N, 3, H, W) in [-1, 1]."""
        return pixels_of(x, self.kind)

    def extra_repr(self) -> str:
        """Return what the repr says."""
        return self.kind


class Standardised(nn.Module):
    """The first step of a network whose images are standardised as those it was trained on were.

    Args:
        images: uint8 (B, 3, H, W) each, whose mean and deviation of each channel are taken; None where they are loaded.

    Attributes:
        mean: of each channel in [0, 1], (3,); kept with the weights.
        deviation: likewise.
    """

    mean: Tensor
    deviation: Tensor

    def __init__(self, images: Iterable[Tensor] | None = None) -> None:
        super().__init__()
        mean, deviation = (torch.zeros(3), torch.ones(3)) if images is None else moments(images)
        self.register_buffer("mean", mean)
        self.register_buffer("deviation", deviation)

    def forward(self, x: Tensor) -> Tensor:
        """Map images (N, 3, H, W) in [-1, 1]."""
        mean, deviation = self.mean[:, None, None], self.deviation[:, None, None]
        return ((x + 1) / 2 - mean) / deviation


def moments(images: Iterable[Tensor]) -> tuple[Tensor, Tensor]:
    """Return mean and deviation (3,) of the channels of uint8 images (B, 3, H, W), as parts of 255.

    A channel without deviation has 1 / 255 instead, so that it can be divided by.
    """
    counts = torch.zeros(3, 256, dtype=torch.float64)
    for part in images:
        counts += torch.stack([torch.bincount(part[:, c].flatten(), minlength=256) for c in range(3)])
    values = torch.arange(256, dtype=torch.float64) / 255
    share = counts / counts.sum(1, keepdim=True)
    mean = share @ values
    variance = (share * (values - mean[:, None]).square()).sum(1)
    return mean.float(), variance.sqrt().clamp(min=1 / 255).float()
