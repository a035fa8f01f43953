"""Random draws that follow from a seed and a position, never from a generator's history."""

import hashlib

import torch
from torch import Tensor

WORD = 2**32 - 1


def _digest(seed: int, *position: int | str) -> int:
    text = "/".join(f"{type(part).__name__}:{part}" for part in (seed, *position))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1


def generator(seed: int, *position: int | str) -> torch.Generator:
    """Return a fresh generator on the CPU whose stream belongs to this seed and position alone.

    The same as ``common.runtime.seeding.generator``, held here too (and compared with it by a test) so that the
    layers can be installed alone.
    """
    return torch.Generator().manual_seed(_digest(seed, *position))


def key(seed: int, *position: int | str) -> tuple[int, int]:
    """Return two numbers below 2^31 that belong to this seed and position alone, for ``hashes``."""
    high, low = divmod(_digest(seed, *position), 2**32)
    return high, low >> 1


def _mixed(h: Tensor) -> Tensor:
    """Scatter numbers below 2^32, one to one; no product overflows an int64.

    Source: the last steps of SplitMix (Steele, Lea and Flood, "Fast splittable pseudorandom number generators", 2014)
    in 32 bits, with the constants that splitmix32 is known by.
    """
    h = (h ^ (h >> 16)) * 0x21F0AAAD & WORD
    h = (h ^ (h >> 15)) * 0x735A2D97 & WORD
    return h ^ (h >> 15)


def hashes(count: int, words: tuple[int, int], step: Tensor) -> Tensor:
    """Return draws from 0 to 2^32 - 1, int64 (count,), which follow from a key and a step, int64 (), on its device."""
    start = _mixed(_mixed((step & WORD) ^ words[0]) ^ words[1])
    return _mixed((start + 0x9E3779B9 * torch.arange(1, count + 1, device=step.device)) & WORD)


def below(total: Tensor | int, draws: Tensor) -> Tensor:
    """Return numbers below a total of at most 2^31, from draws below 2^32."""
    return draws * total >> 32


def scattered(count: int, total: int, words: tuple[int, int], step: Tensor) -> Tensor:
    """Draw count of total locations, each at most once and each as likely as any other: int64 (count,).

    One in each of count runs of about one length, which lie side by side on a circle that is turned at random: so that
    every sample of a batch has its share, and neighbours in memory are read in turn.
    """
    draws = hashes(count + 1, words, step)
    bounds = torch.arange(count + 1, device=step.device) * total // count
    start, length = bounds[:-1], bounds.diff()
    return (start + below(length, draws[:count]) + below(total, draws[count])) % total
