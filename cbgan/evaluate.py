"""Measure a trained generator: ``python -m cbgan.evaluate --run runs/cbgan/NAME``."""

from common.cli.command import start

if __name__ == "__main__":
    start("cbgan.evaluate")  # before torch is loaded, since it settles how threads wait; does not return

import errno
import hashlib
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from torch import nn

from cbgan.config import GanConfig
from cbgan.evaluation import Evaluation, calibrated, fid_series, save_grid
from cbgan.networks.dcgan import Generator
from cbgan.train import Gan
from common.cli.arguments import parse
from common.errors import UsageError
from common.machine.atomic import write_text_atomic
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
    force: bool = False
    """Replace a grid that exists."""
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
        UsageError: if there is no such run or checkpoint, it is no GAN's, the run measures no FID, or a picture is in
            the way of the grid.
        SystemExit: with status 1 if ``check`` fails.
    """
    options = parse(EvaluateConfig, argv, prog="python -m cbgan.evaluate")
    folder = options.run
    assert folder is not None  # EvaluateConfig refuses otherwise
    if not (folder / "config.yaml").is_file():
        raise UsageError(f"run: {folder} is not a run's folder (it holds no config.yaml)")
    if options.grid is not None and options.grid.exists() and not options.force:
        raise UsageError(f"grid: {options.grid} exists; add --force to replace it, or take another --grid")
    state = upgraded(_load(folder, options.checkpoint))
    if "g" not in state["networks"]:
        held = ", ".join(state["networks"])
        raise UsageError(f"run: {folder} is no run of a GAN (its networks: {held}); expected one of runs/cbgan")
    cfg = stored_config(GanConfig, folder)
    if not cfg.fid.every:
        raise UsageError("run: its fid.every is 0, so there is no FID to compare with")
    set_threads(cfg.threads)
    device = resolve_device(options.device)
    images = Gan.load(cfg)
    g = Gan(cfg, images, device).build()["g"].to(device)
    assert isinstance(g, Generator)
    g.load_state_dict(state["averages"].get("g", state["networks"]["g"]))
    evaluation, at, stored = Evaluation(cfg, images, device), state["at"], _digest(g)
    g = calibrated(g, cfg, device)
    result = evaluation.measure(g, options.samples or evaluation.count(at["epoch"]))
    series = fid_series(read_metrics(folder), evaluation.fid.tag) if evaluation.fid else []
    print(f"epoch {at['epoch']}: FID ({cfg.fid.extractor}) {result.fid:.4g} from {result.count:,} samples")
    if evaluation.fid is not None and evaluation.fid.floor is not None:
        print(f"real test images: {evaluation.fid.floor:.4g}")
    if series:
        print("logged: " + ", ".join(f"{fid:.4g} (epoch {epoch})" for epoch, fid in series))
    classes = evaluation.named_classes(result)
    if classes is not None:
        found = sum(n > 0 for n in classes.values())
        counts = ", ".join(f"{name}: {n}" for name, n in classes.items())
        print(f"classes: {found} of {len(classes)} found; samples of {counts}")
    if options.grid is not None:
        save_grid(evaluation.grid(g), options.grid)
    record = {"epoch": at["epoch"], "step": at["step"], "weights": stored, **evaluation.record(result)}
    _note(folder, record | {"device": str(device)})
    if options.check:
        first, missing = series[0][1], 0 if result.classes is None else result.classes.count(0)
        learnt = result.fid < first / _FALL
        verb = "is" if learnt else "is not"
        print(f"check: FID {result.fid:.4g} {verb} below a tenth of {first:.4g}; {missing} classes missing")
        if not learnt or missing:
            sys.exit(1)


def _note(folder: Path, record: dict[str, Any]) -> None:
    """Write a measurement beside the run; what is measured again alike has the same file.

    The name ends in a hash of all that the measurement follows from, so that no other one is overwritten.
    """
    follows = json.dumps({name: record[name] for name in ("weights", "samples", "passport")}, sort_keys=True)
    key = hashlib.sha256(follows.encode()).hexdigest()[:8]
    file = folder / "evaluations" / f"epoch-{record['epoch']:04d}-{record['samples']}-samples-{key}.json"
    try:
        write_text_atomic(file, json.dumps(record, indent=2, ensure_ascii=False) + "\n")
    except OSError as error:
        if error.errno not in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise
        print(f"warning: not written to {file} ({error.strerror})", file=sys.stderr)
    else:
        print(f"written: {file}")


def _digest(network: nn.Module) -> str:
    """Return the SHA-256 of a network's names and tensors."""
    digest = hashlib.sha256()
    for name, tensor in network.state_dict().items():
        digest.update(name.encode())
        digest.update(tensor.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def _load(folder: Path, which: str) -> dict[str, Any]:
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
