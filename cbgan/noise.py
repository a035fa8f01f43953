"""What generators make images of: noise that follows from a seed and a position, and classes."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from cbgan.config import GanConfig
from common.runtime.seeding import generator

SEED = 314159
"""The noise that generators are measured on is the same for every run, whatever its seed."""


def noise(
    cfg: GanConfig, number: int, rows: int, device: torch.device, rank: int = 0, seed: int | None = None
) -> Tensor:
    """Draw the generator's input from (seed, rank, number of the step's part): N(0, 1), (rows, latent_dim)."""
    source = generator(cfg.seed if seed is None else seed, "noise", rank, number, device=device)
    return torch.randn(rows, cfg.latent_dim, generator=source, device=device)


def fixed_noise(count: int, latent_dim: int, device: torch.device) -> Tensor:
    """Return the noise that generators are measured on, N(0, 1), (count, latent_dim): the same on every device."""
    return torch.randn(count, latent_dim, generator=generator(SEED, "evaluation")).to(device)


def fixed_labels(counts: Sequence[int], count: int, device: torch.device) -> Tensor:
    """Return the classes that generators are measured on, int64 (count,): drawn as often as real images have them."""
    shares = torch.tensor(counts, dtype=torch.float64).cumsum(0)
    draws = torch.rand(count, generator=generator(SEED, "labels"), dtype=torch.float64) * shares[-1]
    return torch.searchsorted(shares, draws, right=True).to(device)


def spread_labels(num_classes: int, count: int, device: torch.device) -> Tensor:
    """Return classes in rising order, each equally often, for pictures, int64 (count,)."""
    return (torch.arange(count) * num_classes // count).to(device)


def recalibration_noise(cfg: GanConfig, counts: Sequence[int], device: torch.device) -> list[tuple[Tensor, ...]]:
    """Return the noise, and of a conditional generator the classes, that statistics are estimated from, in batches.

    Args:
        cfg: the run's configuration, which says how many.
        counts: training images of each class, by which classes are drawn; empty without classes.
        device: where the generator is; the noise is the same on every one.
    """
    how = cfg.recalibrate
    z = torch.randn(how.images, cfg.latent_dim, generator=generator(SEED, "recalibrate")).to(device)
    asked = [fixed_labels(counts, how.images, device)] if counts else []
    batches = list(zip(*(t.split(how.batch_size) for t in (z, *asked)), strict=True))
    return batches[:-1] if len(batches) > 1 and how.images % how.batch_size else batches


def numbered_noise(first: int, count: int, latent_dim: int, seed: int, limit: float | None = None) -> Tensor:
    """Return the noise of images ``first``, ``first + 1``, ... of a seed, float32 (count, latent_dim).

    An image's noise follows from the seed and its number, however many there are.

    Args:
        first: the first image's number.
        count: how many.
        latent_dim: length of the generator's input.
        seed: what they follow from.
        limit: truncate N(0, 1) to [-limit, limit]: each value moves to the same quantile there, so that an image stays
            itself and becomes more typical (the truncation trick of Brock et al., 2019).
    """
    z = torch.stack(
        [torch.randn(latent_dim, generator=generator(seed, "sample", number)) for number in range(first, first + count)]
    )
    if limit is None:
        return z
    tail = 0.5 * math.erfc(limit / math.sqrt(2))
    return torch.special.ndtri(tail + torch.special.ndtr(z.double()) * (1 - 2 * tail)).float().clamp(-limit, limit)


def between(z: Tensor, frames: int) -> Tensor:
    """Walk from each point of noise to the next one and from the last to the first, on the sphere.

    Args:
        z: points (N, D), N >= 2, none 0.
        frames: steps from one point to the next; the first is the point itself.

    Returns:
        (N, frames, D). Directions move along great circles, lengths in proportion, so that what lies between two draws
        of N(0, 1) is as long as they are, which their mean would not be.
    """
    end, share = z.roll(-1, 0), torch.arange(frames).div(frames)[:, None]
    length, to_length = (x.norm(dim=1)[:, None, None] for x in (z, end))
    a, b = z[:, None] / length, end[:, None] / to_length
    angle = (a * b).sum(2, keepdim=True).clamp(-1, 1).acos()
    straight = angle.sin() < 1e-4
    turned = ((1 - share) * angle).sin() * a + (share * angle).sin() * b
    direction = torch.where(straight, torch.lerp(a, b, share), turned / torch.where(straight, 1, angle.sin()))
    return direction * torch.lerp(length, to_length, share)
