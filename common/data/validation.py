"""Images held out of training, so that choices between epochs never see the test images."""

from dataclasses import replace

import torch

from common.data.image_set import ImageSet
from common.runtime import seeding
from common.runtime.errors import UsageError


def hold_out(images: ImageSet, share: float, seed: int) -> tuple[ImageSet, ImageSet]:
    """Split training images into those to train on and those to validate on, a share of each class.

    Which ones follows from (seed, "validation", class); both keep the set's order. A class of n images gives
    ``round(share * n)``, at least one, to validation. Without labels all images are one class.

    Args:
        images: the training images.
        share: of each class, between 0 and 1.
        seed: the run's seed.

    Raises:
        UsageError: if a class has too few images to be in both parts.
    """
    labels = torch.zeros(len(images), dtype=torch.int64) if images.labels is None else images.labels
    held = torch.zeros(len(images), dtype=torch.bool)
    for label in labels.unique().tolist():
        members = (labels == label).nonzero()[:, 0]
        count = max(1, round(share * len(members)))
        if count >= len(members):
            name = f"class {images.classes[label]}" if images.classes else images.name
            raise UsageError(
                f"data.validation: {share:g} of {name}'s {len(members)} images leaves none to train on; "
                "expected a smaller share, or more images"
            )
        held[members[seeding.permutation(len(members), seed, "validation", label)[:count]]] = True
    validation = replace(images.select(held.nonzero()[:, 0]), split="validation")
    return images.select((~held).nonzero()[:, 0]), validation
