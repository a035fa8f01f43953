"""What turns images into the features a Fréchet distance compares."""

import hashlib
from collections.abc import Mapping
from typing import Protocol

from torch import Tensor


class Extractor(Protocol):
    """A frozen network, in evaluation mode and without gradients, on a device of its own.

    Attributes:
        name: what charts call it.
        id: identifies the network and its weights; goes into cache keys.
        resize: how images are brought to the size the network reads.
        dim: features D of an image.
    """

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


def weights_hash(state: Mapping[str, Tensor]) -> str:
    """Return the SHA-256 of a state dict's names, shapes and values, wherever its tensors are."""
    digest = hashlib.sha256()
    for name, value in sorted(state.items()):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()
