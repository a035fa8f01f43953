"""Networks that turn images into the features a Fréchet distance compares, by name."""

import hashlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol

from torch import Tensor

from common.registry import Registry


class Extractor(Protocol):
    """A frozen network, in evaluation mode and without gradients, on a device of its own.

    Attributes:
        name: what charts call it, and ``fid.extractor``.
        id: identifies the network and its weights; goes into cache keys.
        resize: how images are brought to the size the network reads.
        dim: features D of an image.

    One that has ``logits(features)``, from (B, D) to (B, C), has an Inception Score too.
    """

    # Read-only, so that classes may give them as attributes of theirs.
    @property
    def name(self) -> str: ...  # noqa: D102
    @property
    def id(self) -> str: ...  # noqa: D102
    @property
    def resize(self) -> str: ...  # noqa: D102
    @property
    def dim(self) -> int: ...  # noqa: D102
    def __call__(self, images: Tensor) -> Tensor:
        """Map uint8 images (B, 3, H, W), on any device, to features float32 (B, D)."""
        ...


class Known(NamedTuple):
    """How an extractor is made, and whether it reads ``fid.weights``."""

    build: Callable[..., Extractor]
    reads_weights: bool


EXTRACTORS: Registry[Known] = Registry("fid.extractor")


def register_extractor(name: str, build: Callable[..., Any], *, reads_weights: bool = False) -> None:
    """Add a feature extractor, which `fid.extractor` then knows; its distance is logged as metric/fid_NAME.

    Args:
        name: as its own ``name``: lower-case letters, digits and underscores, a letter first.
        build: called as ``build(config, splits, cache, device)`` with the `FidConfig`, the run's images, a folder that
            runs share, and a device; returns an `Extractor`. Where that has a ``warning`` other than None, the user
            is given it.
        reads_weights: it reads ``config.weights``, which is refused with the others.

    Raises:
        ValueError: the name is taken or invalid, or build is no function.
    """
    if not callable(build):
        raise ValueError(f"build: expected a function that makes an extractor, got {type(build).__name__}")
    EXTRACTORS.add(name, Known(build, reads_weights))


def weights_hash(state: Mapping[str, Tensor]) -> str:
    """Return the SHA-256 of a state dict's names, shapes and values, wherever its tensors are."""
    digest = hashlib.sha256()
    for name, value in sorted(state.items()):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()
