"""Digits in front of photographs: the MNIST-M recipe (Ganin et al., JMLR 17, 2016)."""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from common.data.reading.image_folder import check_folder, images_below, read_photograph
from common.runtime import seeding
from common.runtime.errors import UsageError
from common.runtime.paths import expanded

_SAMPLE_SIDE = 427
"""Shorter side in pixels of scikit-learn's two photographs, which are 427 x 640."""


class PhotographFolder:
    """Photographs of a folder, each read when it is taken: together they may not fit in memory."""

    def __init__(self, root: Path, size: int) -> None:
        check_folder(root, "data.blend")
        self.size, self.files = size, images_below(root, "data.blend")

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, number: int) -> np.ndarray:
        photo = read_photograph(self.files[number])
        height, width = photo.shape[:2]
        if min(height, width) < self.size:
            raise UsageError(
                f"data.blend: {self.files[number]} is {width} x {height} pixels, expected at least data.size "
                f"({self.size}) each way"
            )
        return photo


Photographs = list[np.ndarray] | PhotographFolder


def blend(images: Tensor, index: Tensor, photographs: Photographs, seed: int, *position: int | str) -> Tensor:
    """Return ``|image - patch|`` in each channel, the patch cut at random from a random photograph.

    Which photograph and where follows from (seed, position) and the image's own index, whatever the other images.

    Args:
        images: uint8 (N, 3, S, S).
        index: int64 (N,), the images' indices.
        photographs: uint8 (H, W, 3), H and W at least S; each that is used is taken once.
        seed: what the draws follow from, with ``position``.
        position: what is drawn.

    Returns:
        uint8 (N, 3, S, S).
    """
    size = images.shape[-1]
    which, top, left = (seeding.uniform_per_sample(index, seed, *position, part) for part in ("photo", "top", "left"))
    which = (which * len(photographs)).long()
    blended = torch.empty_like(images)
    for number in which.unique().tolist():
        photo = photographs[number]
        members = (which == number).nonzero()[:, 0]
        rows = (top[members] * (photo.shape[0] - size + 1)).long().tolist()
        columns = (left[members] * (photo.shape[1] - size + 1)).long().tolist()
        patches = np.stack([photo[y : y + size, x : x + size] for y, x in zip(rows, columns, strict=True)])
        background = torch.from_numpy(patches).permute(0, 3, 1, 2)
        blended[members] = (images[members].short() - background.short()).abs().to(torch.uint8)
    return blended


def photographs(source: str, name: str, size: int) -> Photographs:
    """Return the photographs of a folder, or scikit-learn's two for "sklearn" (``data.blend``).

    Raises:
        UsageError: if the folder has no images, or patches of side ``size`` do not fit; for a folder, some of it when
            an image is taken.
    """
    if source != "sklearn":
        return PhotographFolder(expanded(source, "data.blend"), size)
    if size > _SAMPLE_SIDE:
        raise UsageError(
            f"data.size: {name} cuts patches from photographs, expected at most {_SAMPLE_SIDE}, got {size}"
        )
    from sklearn.datasets import load_sample_images  # noqa: PLC0415 - takes a second, and a folder needs none of it

    return load_sample_images().images
