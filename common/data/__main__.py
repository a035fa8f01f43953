"""Look at a data set before training on it: ``python -m common.data``."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torchvision.utils import make_grid

from common.data.config import DataConfig, fields_without_prefix
from common.data.image_set import ImageSet, resize
from common.data.sets.registry import load
from common.runtime.atomic import write_atomic
from common.runtime.cli import parse
from common.runtime.command import run_command
from common.runtime.errors import UsageError

_TILES, _COLUMNS = 64, 8
_TILE = (64, 128)  # smaller images are enlarged to the first or nearly so, larger ones reduced to the second
_NAMES = 5  # of classes, at most


@dataclass(frozen=True, kw_only=True)
class InspectConfig(DataConfig):
    """Print what a data set holds and draw some of its training images."""

    out: Path = Path(".")
    """Folder for the contact sheet, contact-NAME-CONTENT.png: other images have another one."""
    plugins: list[str] = field(default_factory=list)
    """Modules to import first, by the names that import takes, which add data sets of your own."""


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command.

    Raises:
        UsageError: if a setting is wrong, the data cannot be loaded, or the contact sheet cannot be written.
    """
    with fields_without_prefix():
        config = parse(InspectConfig, argv, prog="python -m common.data")
        if config.out.exists() and not config.out.is_dir():
            raise UsageError(f"out: {config.out} is a file, expected a folder")
        splits = load(config)
    train, test = splits.train, splits.test
    mean, deviation = train.channel_moments()
    rows = [(config.name, f"{config.size} x {config.size} pixels")]
    rows += [(part.split, f"{len(part):,} images, content {part.content_hash}") for part in (train, test) if part]
    if test is None:
        rows.append(("test", "none"))
    rows.append(("classes", _names(train.classes)))
    rows.append(("superclasses", _names(train.superclass_names)))
    rows.append(("mean", f"{_numbers(mean)} (red, green, blue of the training images, in [0, 1])"))
    rows.append(("std", _numbers(deviation)))
    print("\n".join(f"{key:15}{value}" for key, value in rows))
    sheet = config.out / f"contact-{config.name}-{train.content_hash[:8]}.png"
    picture = Image.fromarray(contact_sheet(train).permute(1, 2, 0).numpy())
    try:
        write_atomic(sheet, lambda file: picture.save(file, "PNG"))
    except OSError as error:
        raise UsageError(f"out: {sheet} cannot be written ({error.strerror or error})") from None
    print(f"{'contact sheet':15}{sheet}")


def contact_sheet(images: ImageSet) -> Tensor:
    """Return up to 64 images in rows of 8, spread evenly over the set in the order of its classes: uint8 (3, H, W)."""
    order = torch.arange(len(images)) if images.labels is None else images.labels.argsort(stable=True)
    tiles = images.images[order[torch.linspace(0, len(images) - 1, min(_TILES, len(images))).long()]]
    tiles = resize(tiles, min(tiles.shape[-1], _TILE[1]))
    tiles = F.interpolate(tiles, scale_factor=max(1, _TILE[0] // tiles.shape[-1]), mode="nearest")
    return make_grid(tiles, nrow=_COLUMNS, padding=2, pad_value=255)


def _names(names: tuple[str, ...]) -> str:
    if not names:
        return "none"
    more = ", ..." if len(names) > _NAMES else ""
    return f"{len(names)}: {', '.join(names[:_NAMES])}{more}"


def _numbers(values: Tensor) -> str:
    return " ".join(f"{value:.5f}" for value in values.tolist())


if __name__ == "__main__":
    run_command(main)
