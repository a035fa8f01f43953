"""How a measurement is printed and drawn: its interval, what else was found, and samples beside training images."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from common.data.image_set import ImageSet
from common.metrics.features.neighbours import EXPECTED
from common.metrics.fid import Fid, FidResult, other_split
from common.reports.sheet import captioned_sheet
from common.runtime.atomic import write_atomic

PAIRS = 32
"""Pairs on a sheet, eight a row."""


def nearest_sheet(result: FidResult, generate: Callable[[Tensor], Tensor], train: ImageSet) -> Tensor:
    """Return a sheet of the generated images nearest to training images, each with its own at its right, nearest first.

    Args:
        result: a measurement that found neighbours.
        generate: from positions, int64 (N,), to the generated images there, uint8 (N, 3, H, W).
        train: the training images.
    """
    assert result.neighbours is not None
    found = result.neighbours
    order = found.distance.argsort(stable=True)[:PAIRS]
    generated, real = generate(order).cpu(), train.images[found.index[order]]
    pairs = torch.stack([generated, real], dim=1).flatten(0, 1)
    captions = [text for distance in found.distance[order].tolist() for text in ("generated", f"real  {distance:.3g}")]
    return captioned_sheet(pairs, captions, columns=16)


def save_sheet(sheet: Tensor, path: Path) -> None:
    """Write a sheet, uint8 (3, H, W), as PNG, whole or not at all."""
    picture = Image.fromarray(sheet.permute(1, 2, 0).numpy())
    write_atomic(path, lambda file: picture.save(file, "PNG"))


def recorded(
    fid: Fid, result: FidResult, classes: Mapping[str, int] | None, more: Mapping[str, object] | None = None
) -> dict[str, Any]:
    """Return a measurement as plain values: numbers by tag, each with its protocol, and classes by name.

    Args:
        fid: what measured.
        result: what it found.
        classes: samples that the classifier puts in each class.
        more: what every number depends on besides.
    """
    return {
        "samples": result.count,
        "values": fid.values(result),
        "classes": classes,
        "protocol": fid.protocol(),
        "protocols": {tag: {**protocol, **(more or {})} for tag, protocol in fid.protocols(result).items()},
    }


def measured_lines(
    what: str, fid: Fid, result: FidResult, classes: Mapping[str, int] | None, logged: Sequence[str] = ()
) -> list[str]:
    """Return what is printed of a measurement."""
    lines = [f"{what}: FID ({fid.extractor.name}) {result.fid:.4g} from {result.count:,} samples"]
    if fid.floor is not None:
        lines.append(f"real test images: {fid.floor:.4g}")
    lines += logged
    if classes is not None:
        found = sum(n > 0 for n in classes.values())
        counts = ", ".join(f"{name}: {n}" for name, n in classes.items())
        lines.append(f"classes: {found} of {len(classes)} found; samples of {counts}")
    if result.other is not None:
        lines.append(f"against the {other_split(fid.config.reference)} images: {result.other:.4g}")
    return [*lines, *(f"{name}: {text}" for name, text in uncertainty_rows(result))]


def uncertainty_rows(result: FidResult | None) -> list[tuple[str, str]]:
    """Return what is printed of a measurement besides its distances, a name and a text each."""
    rows: list[tuple[str, str]] = []
    if result is None:
        return rows
    if result.interval is not None:
        text = f"{result.interval.low:.4g} to {result.interval.high:.4g} between the distributions (95 %)"
        rows.append(("FID, last", text if result.limit is None else f"{text}; FID-infinity {result.limit:.4g}"))
    if result.quality:
        named = ", ".join(f"{name.replace('_', ' ')} {value:.3g}" for name, value in result.quality.items())
        rows.append(("quality", named))
    if result.copying is not None:
        rows.append(("copies", copying_line(result)))
    return rows


def copying_line(result: FidResult) -> str:
    """Say how many generated images look like training images, and whether that are too many."""
    found = result.copying
    assert found is not None
    line = f"{found.share:.1%} of the samples are nearer to a training image than {1 - EXPECTED:.0%} of unseen images"
    if not found.alarm:
        return f"{line}; no sign of memorisation"
    return f"{line}: the generator gives back its training images; look at samples/nearest.png"
