"""Images on a sheet, each with a line of text below it and a frame that says how it went."""

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from common.runtime.atomic import write_atomic

Verdict = Literal["right", "wrong", "open"]
_COLOURS = {"right": (46, 125, 50), "wrong": (198, 40, 40), "open": (97, 97, 97)}
_SIDE, _FRAME, _TEXT, _GAP, _POINTS = 64, 3, 14, 4, 9


def captioned_sheet(
    images: Tensor, captions: Sequence[str], verdicts: Sequence[Verdict] | None = None, columns: int = 8
) -> Tensor:
    """Return a sheet of images in rows, uint8 (3, H, W).

    Args:
        images: uint8 (N, 3, S, S), N >= 1; brought to 64 pixels, small ones without smoothing.
        captions: a line for each, cut where it does not fit; letters without a glyph are escaped.
        verdicts: green, red and grey frames; by default all grey.
        columns: images in a row.
    """
    grey: Verdict = "open"
    frames = verdicts or [grey] * len(images)
    side = _SIDE + 2 * _FRAME
    wide, high = side + _GAP, side + _TEXT + _GAP
    rows = -(-len(images) // columns)
    sheet = Image.new("RGB", (_GAP + wide * min(columns, len(images)), _GAP + high * rows), (255, 255, 255))
    draw = ImageDraw.Draw(sheet)
    resampling = Image.Resampling.NEAREST if images.shape[-1] <= _SIDE else Image.Resampling.BICUBIC
    for number, (image, caption, verdict) in enumerate(zip(images, captions, frames, strict=True)):
        left, top = _GAP + wide * (number % columns), _GAP + high * (number // columns)
        draw.rectangle((left, top, left + side - 1, top + side - 1), fill=_COLOURS[verdict])
        tile = Image.fromarray(image.permute(1, 2, 0).numpy()).resize((_SIDE, _SIDE), resampling)
        sheet.paste(tile, (left + _FRAME, top + _FRAME))
        font = None
        if not (caption.isascii() and caption.isprintable()):  # Pillow's own font has no other letters
            from common.reports.figures import FONT, drawable  # noqa: PLC0415 - matplotlib takes a second

            caption, font = drawable(caption), ImageFont.truetype(FONT, _POINTS)  # noqa: PLW2901
        while caption and draw.textlength(caption, font) > side:
            caption = caption[:-1]  # noqa: PLW2901
        draw.text((left + 1, top + side + 1), caption, fill=_COLOURS[verdict], font=font)
    return torch.from_numpy(np.array(sheet)).permute(2, 0, 1)


def save_png(image: Tensor, path: Path) -> None:
    """Write an image, uint8 (3, H, W), as PNG, whole or not at all."""
    picture = Image.fromarray(image.permute(1, 2, 0).numpy())
    write_atomic(path, lambda file: picture.save(file, "PNG"))
