"""Classify a folder of images by an adapted model: ``python -m cbda.predict --run R --images FOLDER``."""

from common.cli.command import start

if __name__ == "__main__":
    start("cbda.predict")  # before torch is loaded, since it settles how threads wait; does not return

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from PIL import Image

from cbda.evaluation import clusters_of
from cbda.export import AdaptedModel, load_model
from common.cli.arguments import parse
from common.data import check_folder, images_below, read_images
from common.errors import UsageError
from common.machine.atomic import write_atomic, write_text_atomic
from common.machine.device import resolve_device
from common.reports.sheet import captioned_sheet

_SHOWN = 64


@dataclass(frozen=True, kw_only=True)
class PredictConfig:
    """Classify the PNG and JPEG files below a folder, and write predictions.csv and predictions.png."""

    run: Path | None = None
    """A run's folder, for instance runs/cbda/digits-digits_m-scb-seed0, or an exported model's."""
    images: Path | None = None
    """The folder of images; sub-folders are searched, their names mean nothing."""
    out: Path = Path(".")
    """Where the table and the contact sheet go."""
    cluster: Literal["source", "target", "unknown"] = "target"
    """Which cluster the images are taken for, where the layer asks for one."""
    all_clusters: bool = False
    """Add the probability of the predicted class under each of the other clusters."""
    export: Path | None = None
    """Write the model to this folder, as safetensors and configuration; without images nothing else is done."""
    force: bool = False
    """Write over predictions that are there."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:n."""

    def __post_init__(self) -> None:
        if self.run is None:
            raise ValueError("run: give the run's folder, --run runs/cbda/NAME")
        if self.images is None and self.export is None:
            raise ValueError("images: give the folder of images to classify, --images FOLDER")


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command.

    Raises:
        UsageError: if model or images cannot be read, the layer knows no such cluster, or files are in the way.
    """
    cfg = parse(PredictConfig, argv, prog="python -m cbda.predict")
    table, sheet = cfg.out / "predictions.csv", cfg.out / "predictions.png"
    if cfg.images is not None:
        check_folder(cfg.images, "images")
        if not cfg.force and (there := next((path for path in (table, sheet) if path.exists()), None)):
            raise UsageError(f"out: {there} exists; choose another folder, or write over it with --force")
    assert cfg.run is not None  # PredictConfig refuses otherwise
    model = load_model(cfg.run, resolve_device(cfg.device))
    if cfg.images is not None:
        _predict(model, cfg, cfg.images, table, sheet)
    if cfg.export is not None:
        model.save(cfg.export)
        print(f"model      {cfg.export}")


def _predict(model: AdaptedModel, cfg: PredictConfig, root: Path, table: Path, sheet: Path) -> None:
    files = images_below(root)
    if not files:
        raise UsageError(f"images: no PNG or JPEG files in {root}")
    images = read_images(files, model.cfg.data.size)
    best, said = model.logits(images, cfg.cluster).softmax(1).max(1)
    others = [name for name in clusters_of(model.cfg.norm.kind) if name != cfg.cluster] if cfg.all_clusters else []
    under = {
        f"probability_as_{name}": model.logits(images, name).softmax(1).gather(1, said[:, None])[:, 0].tolist()
        for name in others
    }
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["file", "class", "probability", "above_threshold", "cluster", *under])
    for row, file in enumerate(files):
        name, value = model.classes[int(said[row])], float(best[row])
        more = [f"{values[row]:.6f}" for values in under.values()]
        above = "yes" if value >= model.threshold else "no"
        writer.writerow([file.relative_to(root), name, f"{value:.6f}", above, cfg.cluster, *more])
    write_text_atomic(table, text.getvalue())
    captions = [f"{model.classes[int(k)]} {100 * p:.0f} %" for k, p in zip(said[:_SHOWN], best[:_SHOWN], strict=True)]
    picture = Image.fromarray(captioned_sheet(images[:_SHOWN], captions).permute(1, 2, 0).numpy())
    write_atomic(sheet, lambda file: picture.save(file, "PNG"))
    sure = int((best >= model.threshold).sum())
    print(f"classified {len(files):,} images as {cfg.cluster}, {sure:,} above the threshold {model.threshold:.3f}")
    print(f"table      {table}\nsheet      {sheet}")
