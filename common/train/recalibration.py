"""Re-estimate the statistics that a network's layers store before it is evaluated, as ``cfg.recalibrate`` says."""

from collections.abc import Callable, Sequence
from typing import TypeVar

from torch import Tensor, nn

from common.norms import MixtureNorm, calibrate, recalibrate, statistics_layers
from common.runtime.errors import NonFiniteError
from common.runtime.seeding import permutation
from common.train.config import RunConfig

T = TypeVar("T")


def recalibrates(cfg: RunConfig, network: nn.Module) -> bool:
    """Return whether a network has statistics that are re-estimated before it is evaluated."""
    layers = statistics_layers(network).values()
    only = MixtureNorm if cfg.recalibrate.layers == "mn" else nn.Module
    return cfg.recalibrate.layers != "none" and any(isinstance(layer, only) for layer in layers)


def recalibrate_network(
    cfg: RunConfig, network: nn.Module, batches: Sequence[T], forward: Callable[[T], object]
) -> None:
    """Re-estimate a network's statistics, if it has any, from ``forward`` passes over batches.

    Raises:
        NonFiniteError: if a layer's input is not finite.
    """
    if not recalibrates(cfg, network):
        return
    estimate = calibrate if cfg.recalibrate.layers == "mn" else recalibrate
    try:
        estimate(network, batches, len(batches), forward=forward)
    except ValueError as error:
        raise NonFiniteError(f"statistics cannot be estimated anew ({error})") from None


def drawn(count: int, images: int, batch_size: int, seed: int, *words: str) -> list[Tensor]:
    """Draw images of ``count`` without repetition, in batches of one size; which ones follows from seed and words.

    A last batch of fewer is left out, unless it is the only one.
    """
    batches = list(permutation(count, seed, "recalibrate", *words)[:images].split(batch_size))
    return batches[:-1] if len(batches) > 1 and len(batches[-1]) < batch_size else batches
