"""Classify a folder of images by a trained model: ``python -m cbcls.predict --run R --images FOLDER``."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from cbcls.export import load_model
from common.classification.predictions import PredictionFiles
from common.classification.stored import check_free
from common.runtime.cli import parse
from common.runtime.command import run_command
from common.runtime.device import resolve_device


@dataclass(frozen=True, kw_only=True)
class PredictConfig:
    """Classify the image files below a folder, and write predictions.csv and predictions.png."""

    run: Path | None = None
    """A run's folder, for instance runs/cbcls/digits-ucb-seed0, or an exported model's."""
    images: Path | None = None
    """The folder of images; sub-folders are searched, their names mean nothing."""
    checkpoint: str = "last"
    """Which checkpoint of the run: last, best, or the number of an epoch that was kept (checkpoint_keep)."""
    out: Path = Path(".")
    """Where the table and the contact sheet go."""
    cluster: str = "unknown"
    """Which cluster the images are taken for, by its name, where the model is given one."""
    export: Path | None = None
    """Write the model to this folder, as safetensors and configuration; without images nothing else is done."""
    force: bool = False
    """Write over predictions that are there."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:n."""

    def __post_init__(self) -> None:
        if self.run is None:
            raise ValueError("run: which model? Give --run runs/cbcls/NAME")
        if self.images is None and self.export is None:
            raise ValueError("images: which images? Give --images FOLDER, or --export FOLDER for the model alone")


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command.

    Raises:
        UsageError: if model or images cannot be read, there is no such cluster, or files are in the way.
    """
    cfg = parse(PredictConfig, argv, prog="python -m cbcls.predict")
    assert cfg.run is not None  # PredictConfig refuses otherwise
    files = None if cfg.images is None else PredictionFiles(cfg.images, cfg.out, force=cfg.force)
    if cfg.export is not None:
        check_free(cfg.export)
    model = load_model(cfg.run, resolve_device(cfg.device), checkpoint=cfg.checkpoint)
    if files is not None:
        model.check_cluster(cfg.cluster)
        images = files.read(model.cfg.data.size, model.cfg.data.fit)
        columns = {"cluster": [cfg.cluster] * len(images)} if model.clusters else {}
        print(f"classified {len(images):,} images{f', their cluster {cfg.cluster}' if model.clusters else ''}")
        files.write(images, model.logits(images, cfg.cluster), model.classes, columns)
    if cfg.export is not None:
        model.save(cfg.export)
        print(f"model      {cfg.export}")


if __name__ == "__main__":
    run_command(main)
