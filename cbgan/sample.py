"""Draw what a trained generator makes: ``python -m cbgan.sample --run runs/cbgan/NAME``."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
from PIL import Image

from cbgan.evaluation import save_grid
from cbgan.export import TrainedGenerator, checkpoint_of, load_generator
from cbgan.noise import between, numbered_noise
from common.reports.sheet import save_png
from common.runtime.atomic import write_atomic
from common.runtime.cli import parse
from common.runtime.command import run_command
from common.runtime.device import resolve_device
from common.runtime.errors import UsageError
from common.runtime.paths import refuse_overwriting

_COUNTS = {"grid": 64, "images": 64, "classes": 8, "walk": 6}
_FRAMES = 12
_MILLISECONDS = 80
_LEAST_SIDE = 128
"""Of a moving picture, which no viewer enlarges."""
_CHUNK = 1000


@dataclass(frozen=True, kw_only=True)
class SampleConfig:
    """Draw images of a trained generator: a grid, single files, a row a class, or a walk from image to image.

    Each image follows from the seed and its number, so that the first ten of 10,000 are those of --count 10.
    """

    run: Path | None = None
    """The folder of a run, for instance runs/cbgan/digits-ucb-seed0, or of an exported generator."""
    what: Literal["grid", "images", "classes", "walk"] = "grid"
    """grid: one picture; images: a PNG file each, in a folder a class where there are classes; classes: a row of images
    for each class; walk: from image to image, as a strip and as a moving GIF."""
    count: int | None = None
    """Images: of a class with classes, to walk between with walk; null is 64, 64, 8, 6 in the order of what."""
    classes: list[str] = field(default_factory=list)
    """Names of the classes to ask a conditional generator for, in turn; none draws them as frequent as in training, and
    shows all in a sheet of classes."""
    seed: int = 0
    """What the images follow from."""
    truncation: float | None = None
    """Truncate the noise to so many standard deviations: smaller is more typical and less diverse; null does not."""
    checkpoint: str = "last"
    """Which one of the run: last, best, an epoch that was kept (checkpoint_keep), or a file, which needs no --run."""
    raw: bool = False
    """Take the weights as they were trained, where the run keeps an average of them."""
    out: Path | None = None
    """The file or, of images, folder to write; null is generated.png, or generated."""
    export: Path | None = None
    """Write the generator to this folder, as safetensors, configuration and torch.export program, and draw nothing."""
    force: bool = False
    """Replace a picture that exists."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:n."""

    def __post_init__(self) -> None:
        if self.run is None and checkpoint_of(None, self.checkpoint)[0] is None:
            raise ValueError("run: give the run's folder, --run runs/cbgan/NAME")
        least = 2 if self.what == "walk" else 1
        if self.count is not None and self.count < least:
            raise ValueError(f"count: expected at least {least}, got {self.count}")
        if self.truncation is not None and not 0 < self.truncation < math.inf:
            raise ValueError(f"truncation: expected more than 0, got {self.truncation}")
        if self.seed < 0:
            raise ValueError(f"seed: expected 0 or more, got {self.seed}")


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command.

    Raises:
        UsageError: if the generator cannot be read, is not of the run, has no such classes, or something is in the
            way of the result.
    """
    cfg = parse(SampleConfig, argv, prog="python -m cbgan.sample")
    out = cfg.out or Path("generated" if cfg.what == "images" else "generated.png")
    path, which = checkpoint_of(cfg.run, cfg.checkpoint)
    assert path is not None  # as the configuration has it
    if cfg.export is None:
        _refuse_existing(cfg, out)
    generator = load_generator(path, resolve_device(cfg.device), checkpoint=which, raw=cfg.raw)
    generator.labels(1, cfg.classes)  # refuses what is no class, before anything is written
    if cfg.export is not None:
        generator.save(cfg.export)
        print(f"generator of epoch {generator.epoch} written to {cfg.export}")
        return
    count = cfg.count or _COUNTS[cfg.what]
    if cfg.what == "images":
        count = _write_images(generator, cfg, count, out)
    elif cfg.what == "grid":
        save_grid(generator.sample(count, cfg.seed, cfg.classes, cfg.truncation), out)
    elif cfg.what == "classes":
        count = _write_classes(generator, cfg, count, out)
    else:
        _write_walk(generator, cfg, count, out)
    print(f"{count:,} images of epoch {generator.epoch}, seed {cfg.seed}: {out}")


def _refuse_existing(cfg: SampleConfig, out: Path) -> None:
    if cfg.what == "images":
        if out.exists() and (not out.is_dir() or any(out.iterdir())):
            raise UsageError(f"out: {out} exists and is no empty folder; take another --out")
        return
    refuse_overwriting(out, *([out.with_suffix(".gif")] if cfg.what == "walk" else []), force=cfg.force)
    if out.suffix.lower() != ".png":
        raise UsageError(f"out: expected a file that ends in .png, got {out}")


def _write_images(generator: TrainedGenerator, cfg: SampleConfig, count: int, out: Path) -> int:
    digits = max(6, len(str(count - 1)))
    for first in range(0, count, _CHUNK):
        number = min(_CHUNK, count - first)
        images = generator.sample(number, cfg.seed, cfg.classes, cfg.truncation, first)
        labels = generator.labels(number, cfg.classes, first)
        for i, image in enumerate(images):
            folder = out if labels is None else out / generator.classes[int(labels[i])]
            save_png(image, folder / f"{first + i:0{digits}}.png")
    return count


def _write_classes(generator: TrainedGenerator, cfg: SampleConfig, count: int, out: Path) -> int:
    """Draw a row for each class, from the same noise in every row."""
    classes = cfg.classes or generator.classes
    if not classes:
        raise UsageError("what: classes needs a generator that can be asked for some; expected grid")
    z = numbered_noise(0, count, generator.cfg.latent_dim, cfg.seed, cfg.truncation)
    rows = [generator.images(z, generator.labels(count, [name])) for name in classes]
    save_grid(torch.cat(rows), out, columns=count)
    return count * len(rows)


def _write_walk(generator: TrainedGenerator, cfg: SampleConfig, count: int, out: Path) -> None:
    """Draw a row from each image to the next, and all of them as a GIF that goes round."""
    z = between(numbered_noise(0, count, generator.cfg.latent_dim, cfg.seed, cfg.truncation), _FRAMES)
    labels = generator.labels(1, cfg.classes)  # one class: only the noise changes
    images = generator.images(z.flatten(0, 1), None if labels is None else labels.expand(count * _FRAMES))
    save_grid(images, out, columns=_FRAMES)
    scale = max(1, -(-_LEAST_SIDE // images.shape[-1]))
    large = images.repeat_interleave(scale, 2).repeat_interleave(scale, 3).permute(0, 2, 3, 1)
    first, *others = [Image.fromarray(frame.numpy()) for frame in large]
    write_atomic(
        out.with_suffix(".gif"),
        lambda file: first.save(
            file, "GIF", save_all=True, append_images=others, duration=_MILLISECONDS, loop=0, optimize=False
        ),
    )


if __name__ == "__main__":
    run_command(main)
