"""Whether a generator copies its training images: how near its samples lie to them, compared with unseen images."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

EXPECTED = 0.01
"""Share of unseen real images that count as near copies, by definition."""
LIMIT = 0.05
"""Share of generated images from which on, but for chance, they are too many."""
_DEVIATIONS = 3
_BATCH = 2000


@dataclass(frozen=True)
class Nearest:
    """The nearest of other images to each image: distance, float64 (N,), and position, int64 (N,), on the CPU."""

    distance: Tensor
    index: Tensor


@dataclass(frozen=True)
class Copying:
    """How much generated images look like copies of training images.

    Attributes:
        share: of generated images nearer to a training image than all but 1 % of unseen real images are.
        gap: the chance that a generated image is nearer to the training images than an unseen real image is; 1/2 where
            they are as near.
        alarm: ``share`` is above 5 % by more than three standard deviations.
    """

    share: float
    gap: float
    alarm: bool


def nearest(features: Tensor, others: Tensor, *, apart: bool = False, device: torch.device | str = "cpu") -> Nearest:
    """Return the nearest of ``others`` (M, D) to each of ``features`` (N, D), in Euclidean distance.

    With ``apart`` both are the same images, none of which is its own neighbour.
    """
    others = others.to(device)
    found = []
    for start in range(0, len(features), _BATCH):
        batch = features[start : start + _BATCH].to(device)
        distances = torch.cdist(batch, others)
        if apart:
            rows = torch.arange(len(batch), device=distances.device)
            distances[rows, rows + start] = math.inf
        index = distances.argmin(dim=1)
        # cdist multiplies matrices, which leaves copies a little apart
        found.append(((batch.double() - others[index].double()).norm(dim=1).cpu(), index.cpu()))
    return Nearest(*(torch.cat(parts) for parts in zip(*found, strict=True)))


def copying(generated: Tensor, unseen: Tensor) -> Copying:
    """Judge distances to the nearest training image, of generated images (N,) and of real ones not trained on (M,).

    The share counts outright copies; the gap (after Meehan et al. 2020) also sees all images drawn a little nearer.
    """
    ordered = unseen.double().sort().values
    near = ordered[int(EXPECTED * len(ordered))]
    share = float((generated < near).double().mean())
    further = len(ordered) - torch.searchsorted(ordered, generated.double(), right=True)
    level = len(ordered) - torch.searchsorted(ordered, generated.double()) - further
    gap = float((further + level / 2).double().mean() / len(ordered))
    bound = LIMIT + _DEVIATIONS * math.sqrt(LIMIT * (1 - LIMIT) / len(generated))
    return Copying(share, gap, share > bound)
