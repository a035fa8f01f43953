"""Random draws that follow from a seed and a position, never from a generator's history."""

import contextlib
import hashlib
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor


def derive(seed: int, *position: int | str) -> int:
    """Hash a seed and a position to a new seed in [0, 2**63).

    The position says what is drawn and where: ``derive(seed, "noise", rank, step)``. The hash is BLAKE2b of
    the text form, so it is the same on every machine and Python version.
    """
    text = "/".join(f"{type(part).__name__}:{part}" for part in (seed, *position))
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def generator(seed: int, *position: int | str, device: torch.device | str = "cpu") -> torch.Generator:
    """Return a fresh generator whose stream belongs to this seed and position alone."""
    return torch.Generator(device).manual_seed(derive(seed, *position))


@contextlib.contextmanager
def drawing(seed: int, *position: int | str) -> Iterator[None]:
    """Let torch's global generators, which dropout draws from, start from a seed and a position inside the block.

    Afterwards those of the CPU and of the current GPU go on where they were before.
    """
    gpu = [torch.cuda.current_device()] if torch.cuda.is_initialized() else []
    with torch.random.fork_rng(gpu):
        torch.manual_seed(derive(seed, *position))
        yield


def permutation(n: int, seed: int, *position: int | str) -> Tensor:
    """Return a permutation of range(n), int64 (n,), that follows from the seed and the position."""
    return torch.randperm(n, generator=generator(seed, *position))


def uniform_per_sample(index: Tensor, seed: int, *position: int | str) -> Tensor:
    """Draw one number in [0, 1) for each sample, from (seed, position, its index) and nothing else.

    The draws do not depend on which samples share a batch, so any batching, sharding or number of loader
    workers sees the same augmentation. A counter-based generator (SplitMix64, Steele et al. 2014) is evaluated
    at ``key + index * golden_gamma``, without a loop over the samples.

    Args:
        index: sample indices in the data set, int64 (N,).
        seed: the run's seed.
        position: what is drawn, and when (for instance ``"flip", epoch``).

    Returns:
        float32 (N,).
    """
    with np.errstate(over="ignore"):  # arithmetic modulo 2**64 is the algorithm
        z = np.uint64(derive(seed, *position)) + (index.numpy().astype(np.uint64) + np.uint64(1)) * np.uint64(
            0x9E3779B97F4A7C15
        )
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        z = z ^ (z >> np.uint64(31))
    return torch.from_numpy((z >> np.uint64(40)).astype(np.float32) * np.float32(2**-24))
