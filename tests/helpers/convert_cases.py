"""Models that have BatchNorm, and cluster ids for them, that several tests of conversion share."""

import contextlib
from typing import Any

import torch
from norm_cases import CLUSTERED, batch
from torch import nn

from common.norms import DomainBatchNorm, MixtureNorm, SCBNorm, SCBNormBase, UCBNorm, clusters

EXACT = [
    ("scb", 3, SCBNorm),
    ("scb_base", 3, SCBNormBase),
    ("dsbn", 3, DomainBatchNorm),
    ("ucb", 1, UCBNorm),
    ("mn", 1, MixtureNorm),
]
"""Kinds, and the numbers of components with which they start as the very BatchNorm they replace."""
IDS = torch.tensor([0, 1, 2, 0, 1, 2])


def images(seed: int = 0, n: int = 6, size: int = 8, channels: int = 3) -> torch.Tensor:
    return batch(seed, (n, channels, size, size))


def small() -> Any:
    """A model whose BatchNorms have run: none of their numbers is special."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3),
        nn.BatchNorm2d(4, eps=1e-3, momentum=0.2),
        nn.ReLU(),
        nn.Sequential(nn.Conv2d(4, 5, 3), nn.BatchNorm2d(5)),
        nn.Flatten(),
        nn.Linear(80, 6),
        nn.BatchNorm1d(6),
    )
    return lived(model)


def lived(model: nn.Module, size: int = 8, channels: int = 3) -> Any:
    """Run the model twice, and give its BatchNorms affine maps that are not the identity."""
    rng = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.affine:
                for p in (module.weight, module.bias):
                    p.copy_(torch.rand(p.shape, generator=rng) + 0.5)
        model.train()
        for seed in (8, 9):
            model(images(seed, size=size, channels=channels))
    return model


def routed(kind: str, ids: torch.Tensor = IDS):
    return clusters(ids) if kind in CLUSTERED else contextlib.nullcontext()


def close(a: torch.Tensor, b: torch.Tensor, depth: int = 3) -> None:
    """Equal within float32 rounding of a few layers, each of a few operations on numbers of order one."""
    torch.testing.assert_close(a, b, rtol=0, atol=depth * 2e-6 * float(b.detach().abs().max()))
