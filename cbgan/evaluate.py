"""Measure a trained generator: ``python -m cbgan.evaluate --run runs/cbgan/NAME``."""

from common.cli.command import start

if __name__ == "__main__":
    start("cbgan.evaluate")  # before torch is loaded, since it settles how threads wait; does not return

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from cbgan.config import GanConfig
from cbgan.evaluation import GRID, Evaluation, fid_series, save_grid
from cbgan.models import Generator
from cbgan.noise import fixed_noise
from cbgan.train import Gan
from common.cli.arguments import parse
from common.errors import UsageError
from common.machine.device import resolve_device, set_threads
from common.runs.checkpoint import Checkpoints, DamagedCheckpoint, load
from common.runs.log import read_metrics
from common.training.config import stored_config
from common.training.parts import upgraded

_FALL = 10
"""A run counts as having learnt when its last FID is below its first by this factor."""


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """Measure FID and the classes found by a trained generator."""

    run: Path | None = None
    """The run's folder, for instance runs/cbgan/digits-ucb-seed0."""
    checkpoint: Literal["last", "best"] = "last"
    """Which checkpoint to measure."""
    samples: int | None = None
    """Images to generate; null takes as many as the run itself did."""
    grid: Path | None = None
    """Write a grid of 64 generated images to this PNG file."""
    check: bool = False
    """Exit with status 1 unless the last FID is below a tenth of the first and every class was found."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:n."""

    def __post_init__(self) -> None:
        if self.run is None:
            raise ValueError("run: give the run's folder, --run runs/cbgan/NAME")
        if self.samples is not None and self.samples < 2:
            raise ValueError(f"samples: expected at least 2, got {self.samples}")


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command.

    Raises:
        UsageError: if there is no such run or checkpoint, or the run measures no FID.
        SystemExit: with status 1 if ``check`` fails.
    """
    options = parse(EvaluateConfig, argv, prog="python -m cbgan.evaluate")
    folder = options.run
    assert folder is not None  # EvaluateConfig refuses otherwise
    if not (folder / "config.yaml").is_file():
        raise UsageError(f"run: {folder} is not a run's folder (it holds no config.yaml)")
    cfg = stored_config(GanConfig, folder)
    if not cfg.fid.every:
        raise UsageError("run: its fid.every is 0, so there is no FID to compare with")
    set_threads(cfg.threads)
    device = resolve_device(options.device)
    state = upgraded(_load(folder, options.checkpoint))
    images = Gan.load(cfg)
    g = Gan(cfg, images, device).build()["g"].to(device)
    assert isinstance(g, Generator)
    g.load_state_dict(state["averages"].get("g", state["networks"]["g"]))
    evaluation, epoch = Evaluation(cfg, images, device), state["at"]["epoch"]
    result = evaluation.measure(g, options.samples or evaluation.count(epoch))
    series = fid_series(read_metrics(folder), evaluation.fid.tag) if evaluation.fid else []
    print(f"epoch {epoch}: FID ({cfg.fid.extractor}) {result.fid:.4g} from {result.count:,} samples")
    if evaluation.fid is not None and evaluation.fid.floor is not None:
        print(f"real test images: {evaluation.fid.floor:.4g}")
    if series:
        print("logged: " + ", ".join(f"{fid:.4g} (epoch {epoch})" for epoch, fid in series))
    if result.classes is not None:
        found = sum(n > 0 for n in result.classes)
        print(f"classes: {found} of {len(result.classes)} found; counts {', '.join(map(str, result.classes))}")
    if options.grid is not None:
        save_grid(evaluation.sample(g, fixed_noise(GRID, cfg.latent_dim, device)), options.grid)
    if options.check:
        first, missing = series[0][1], 0 if result.classes is None else result.classes.count(0)
        learnt = result.fid < first / _FALL
        verb = "is" if learnt else "is not"
        print(f"check: FID {result.fid:.4g} {verb} below a tenth of {first:.4g}; {missing} classes missing")
        if not learnt or missing:
            sys.exit(1)


def _load(folder: Path, which: str) -> dict[str, object]:
    checkpoints = Checkpoints(folder / "checkpoints")
    if which == "best":
        try:
            return load(checkpoints.best)
        except DamagedCheckpoint as error:
            raise UsageError(f"checkpoint: {error}") from None
    state, reports = checkpoints.load_latest()
    for report in reports:
        print(f"warning: {report}", file=sys.stderr)
    if state is None:
        raise UsageError(f"run: {folder} has no checkpoint yet")
    return state
