"""Images of a domain, whose class can be seen and whose tint is the domain's."""

from pathlib import Path

import torch
from PIL import Image

from common.runtime.seeding import generator

CLASSES = ("cat", "dog", "fox")


def write_domain(root: Path, tint: int, count: int = 12, classes=CLASSES) -> Path:
    """Write images whose class shows as the row of a bright stripe, on a ground of noise of a tint."""
    for label, name in enumerate(classes):
        (root / name).mkdir(parents=True)
        for i in range(count):
            ground = torch.randint(0, 60, (8, 8, 3), generator=generator(label, str(tint), i), dtype=torch.uint8) + tint
            ground[2 * label + 1 : 2 * label + 3] = 255 - tint
            Image.fromarray(ground.numpy()).save(root / name / f"{i}.png")
    return root
