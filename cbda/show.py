"""Look at weak and strong views of a data set: ``python -m cbda.show --name digits_m``."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from common.data import DataConfig, load
from common.data.augmentation import ViewOptions
from common.data.config import fields_without_prefix
from common.reports.sheet import captioned_sheet, save_png
from common.runtime.cli import parse
from common.runtime.command import run_command
from common.runtime.paths import refuse_overwriting
from common.runtime.seeding import permutation

_COUNT = 8
"""Images on the sheet."""


@dataclass(frozen=True, kw_only=True)
class ViewsConfig(ViewOptions, DataConfig):
    """Draw some training images of a data set with weak and strong views of them, as training sees them."""

    seed: int = 0
    """Of the run whose views are drawn."""
    epoch: int = 0
    """Which pass over the images, counted from 0."""
    out: Path = Path(".")
    """Folder for the sheet, views-NAME.png."""
    force: bool = False
    """Write over a sheet that is there."""

    def __post_init__(self) -> None:
        DataConfig.__post_init__(self)
        ViewOptions.__post_init__(self)
        for name in ("seed", "epoch"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}: expected 0 or more, got {getattr(self, name)}")


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command.

    Raises:
        UsageError: if a setting is wrong, the data cannot be loaded, or a sheet is in the way.
    """
    with fields_without_prefix():
        _show(parse(ViewsConfig, argv, prog="python -m cbda.show"))


def _show(config: ViewsConfig) -> None:
    path = config.out / f"views-{config.name}.png"
    refuse_overwriting(path, force=config.force)
    images = load(config).train
    index = permutation(len(images), config.seed, "shown")[:_COUNT]
    originals = images.images[index]
    rows = [("plain", originals)]
    # The keys are those of the first stream of a run, so that a sheet shows what training sees.
    positions: dict[Literal["weak", "strong"], tuple[str | int, ...]] = {"weak": (), "strong": ("view", 1)}
    for name, position in positions.items():
        view = config.view(name, config.size)
        for epoch in range(config.epoch, config.epoch + 3):
            rows.append((f"{name}, epoch {epoch}", view(originals, index, config.seed, *position, epoch)))
    captions = [name for name, row in rows for _ in row]
    sheet = captioned_sheet(torch.cat([row for _, row in rows]), captions, columns=len(index))
    save_png(sheet, path)
    print(f"sheet  {path}")


if __name__ == "__main__":
    run_command(main)
