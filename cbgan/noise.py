"""What generators make images of: noise that follows from a seed and a position."""

import torch
from torch import Tensor

from cbgan.config import GanConfig
from common.machine.seeding import generator

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
