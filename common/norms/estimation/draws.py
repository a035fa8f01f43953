"""Random draws that follow from a seed and a position, never from a generator's history."""

import hashlib

import torch


def generator(seed: int, *position: int | str) -> torch.Generator:
    """Return a fresh generator on the CPU whose stream belongs to this seed and position alone.

    The same as ``common.machine.seeding.generator``, held here too (and compared with it by a test) so that the
    layers can be copied into another code base.
    """
    text = "/".join(f"{type(part).__name__}:{part}" for part in (seed, *position))
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)
