"""What a network sees of pixels: signed, from 0 to 1, from 0 to 255, or standardised."""

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
        moments: their channels' mean and deviation (`ImageSet.channel_moments`); None where they are loaded. A channel
            without deviation gets 1 / 255 instead, so that it can be divided by.

    Attributes:
        mean: of each channel in [0, 1], (3,); kept with the weights.
        deviation: likewise.
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
