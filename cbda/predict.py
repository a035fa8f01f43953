"""Classify a folder of images by an adapted model: ``python -m cbda.predict --run R --images FOLDER``."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from cbda.evaluation import clusters_of
from cbda.export import AdaptedModel, load_model
from common.classification.predictions import PredictionFiles
from common.classification.stored import check_free
from common.runtime.cli import parse
from common.runtime.command import run_command
from common.runtime.device import resolve_device


@dataclass(frozen=True, kw_only=True)
class PredictConfig:
    """Classify the image files below a folder, and write predictions.csv and predictions.png."""

    run: Path | None = None
    """A run's folder, for instance runs/cbda/digits-digits_m-scb-seed0, or an exported model's."""
    images: Path | None = None
    """The folder of images; sub-folders are searched, their names mean nothing."""
    checkpoint: str = "last"
    """Which checkpoint of the run: last, best, or the number of an epoch that was kept (checkpoint_keep)."""
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
    assert cfg.run is not None  # PredictConfig refuses otherwise
    files = None if cfg.images is None else PredictionFiles(cfg.images, cfg.out, force=cfg.force)
    if cfg.export is not None:
        check_free(cfg.export)
    model = load_model(cfg.run, resolve_device(cfg.device), checkpoint=cfg.checkpoint)
    if files is not None:
        _predict(model, cfg, files)
    if cfg.export is not None:
        model.save(cfg.export)
        print(f"model      {cfg.export}")


def _predict(model: AdaptedModel, cfg: PredictConfig, files: PredictionFiles) -> None:
    images = files.read(model.cfg.data.size)
    logits = model.logits(images, cfg.cluster)
    best, predicted = logits.softmax(1).max(1)
    above = best >= model.threshold
    columns = {
        "above_threshold": ["yes" if sure else "no" for sure in above.tolist()],
        "cluster": [cfg.cluster] * len(images),
    }
    for name in clusters_of(model.cfg.norm.kind) if cfg.all_clusters else ():
        if name != cfg.cluster:
            under = model.logits(images, name).softmax(1).gather(1, predicted[:, None])[:, 0]
            columns[f"probability_as_{name}"] = [f"{value:.6f}" for value in under.tolist()]
    print(f"classified {len(images):,} images as {cfg.cluster}, {int(above.sum()):,} above the threshold "
          f"{model.threshold:.3f}")  # fmt: skip
    files.write(images, logits, model.classes, columns)


if __name__ == "__main__":
    run_command(main)
