"""The range of pixels that a network takes: signed, from 0 to 1, from 0 to 255, or standardised."""

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
    """The first layer of a network that is given images in [-1, 1] and takes others; see `pixels_of`."""

    def __init__(self, kind: Pixels) -> None:
        super().__init__()
        self.kind: Pixels = kind

    def forward(self, x: Tensor) -> Tensor:
        """Map images (N, 3, H, W) in [-1, 1]."""
        return pixels_of(x, self.kind)

    def extra_repr(self) -> str:
        """Name the range."""
        return self.kind


class Standardised(nn.Module):
    """The first layer of a network that takes images less the mean and by the deviation of its training images.

    Args:
        moments: each channel's mean and deviation in [0, 1], (3,) (`ImageSet.channel_moments`), kept with the weights;
            None where they are loaded. A deviation is at least 1 / 255, so that it can be divided by.
    """

    mean: Tensor
    deviation: Tensor

    def __init__(self, moments: tuple[Tensor, Tensor] | None = None) -> None:
        super().__init__()
        mean, deviation = moments or (torch.zeros(3), torch.ones(3))
        self.register_buffer("mean", mean.float())
        self.register_buffer("deviation", deviation.clamp(min=1 / 255).float())

    def forward(self, x: Tensor) -> Tensor:
        """Map images (N, 3, H, W) in [-1, 1]."""
        mean, deviation = self.mean[:, None, None], self.deviation[:, None, None]
        return ((x + 1) / 2 - mean) / deviation
