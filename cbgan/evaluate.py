"""Measure a generator or a folder of images: ``python -m cbgan.evaluate``."""

import errno
import hashlib
import json
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from cbgan.config import GanConfig
from cbgan.evaluation import (
    GRID,
    Evaluator,
    fid_series,
    fid_warnings,
    nearest_sheet,
    recalibrate,
    recorded,
    save_grid,
    uncertainty_rows,
)
from cbgan.export import checkpoint_of
from cbgan.models import build_generator
from cbgan.task import GanTask
from common.classification.stored import Stored, read_stored
from common.data import DataConfig, Decoding, load, read_folder
from common.metrics.extractors import weights_hash
from common.metrics.fid import Fid, FidConfig, FidResult, other_split
from common.reports.sheet import save_png
from common.runtime.atomic import write_text_atomic
from common.runtime.cli import parse, read, to_dict, to_yaml
from common.runtime.command import run_command
from common.runtime.device import resolve_device, set_threads
from common.runtime.errors import UsageError
from common.runtime.paths import expanded, refuse_overwriting
from common.train.logging import FINAL, METRICS, read_metrics

_FALL = 10
"""A run counts as having learnt when its last FID is below its first by this factor."""
_PROG = "python -m cbgan.evaluate"


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """Measure images against real ones: those of a trained generator, or of a folder.

    With a run, data, fid, cache and plugins are those of the run where nothing else is said here.
    """

    run: Path | None = None
    """The folder of a run, for instance runs/cbgan/digits-ucb-seed0, or of an exported generator."""
    checkpoint: str = "last"
    """Which one of the run: last, best, an epoch that was kept (checkpoint_keep), or a file, which needs no --run."""
    raw: bool = False
    """Measure the weights as they were trained, where the run keeps an average of them."""
    images: Path | None = None
    """A folder of images to measure in place of a generator's, brought to data.size."""
    samples: int | None = None
    """Images to generate, or to take of the folder; null: fid.samples, or all."""
    out: Path | None = None
    """Folder for the JSON file and the pictures; null: evaluations, in the run's folder or here."""
    grid: Path | None = None
    """Write a grid of 64 of the images to this PNG file too."""
    force: bool = False
    """Replace a grid that exists."""
    check: bool = False
    """Exit with status 1 unless the last FID is below a tenth of the first and every class was found."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:n."""
    cache: Path = Path("~/.cache/cluster-based-norm")
    """Folder for features of real images, feature extractors and downloads."""
    plugins: list[str] = field(default_factory=list)
    """Modules to import first, by the names that import takes."""
    data: DataConfig = field(default_factory=DataConfig)
    fid: FidConfig = field(default_factory=FidConfig)

    def __post_init__(self) -> None:
        if self.run is None and self.images is None:
            raise ValueError("run: give the run's folder, --run runs/cbgan/NAME, or a folder of images, --images PATH")
        if self.run is not None and self.images is not None:
            raise ValueError(f"images: expected null with a run, got {self.images}")
        if self.images is not None and self.check:
            raise ValueError("check: expected false with --images, whose first FID is not known")
        if self.samples is not None and self.samples < 2:
            raise ValueError(f"samples: expected at least 2, got {self.samples}")
        if not self.data.in_memory:
            raise ValueError("data.in_memory: expected true, since the FID reads real images as a whole, got false")


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command.

    Raises:
        UsageError: if there is no such run, checkpoint or folder, they do not fit what they are to be measured
            against, or a picture is in the way of the grid.
        SystemExit: with status 1 if ``check`` fails.
    """
    given = list(sys.argv[1:] if argv is None else argv)
    flags = read(EvaluateConfig, given, prog=_PROG)
    path, which = checkpoint_of(None if flags["run"] is None else Path(flags["run"]), flags["checkpoint"])
    if path is None or flags["images"] is not None:
        if path is not None:
            given += ["--run", str(path)]
        options = parse(EvaluateConfig, given, prog=_PROG)
        if not any(argument.startswith(("--data", "--config")) for argument in given):
            raise UsageError(
                "data.name: say which real images to measure against, as --data.name cifar10, or --data.name "
                "imagefolder --data.root PATH"
            )
        _refuse_grid(options)
        _measure_folder(options)
        return
    stored = read_stored(GanConfig, expanded(path, "run"), "g", which, average=not flags["raw"])
    options = _with_settings_of(stored.cfg, [*given, "--run", str(stored.folder)])
    _refuse_grid(options)
    _measure_run(options, stored)


def _refuse_grid(options: EvaluateConfig) -> None:
    if options.grid is not None:
        refuse_overwriting(options.grid, force=options.force, field="grid")


def _with_settings_of(cfg: GanConfig, given: Sequence[str]) -> EvaluateConfig:
    """Read the command line over those settings of a run that the command has too."""
    own = {name: value for name, value in to_dict(cfg).items() if name in ("data", "fid", "cache", "plugins")}
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "run.yaml"
        file.write_text(to_yaml(own), encoding="utf-8")
        return parse(EvaluateConfig, ["--config", str(file), *given], prog=_PROG)


def _measure_run(options: EvaluateConfig, stored: Stored[GanConfig]) -> None:
    folder, was = stored.folder, stored.cfg
    if options.data.size != was.data.size:
        size = was.data.size
        raise UsageError(f"data.size: the run makes images of {size} pixels, expected {size}, got {options.data.size}")
    same = options.data == was.data and options.fid.reference == was.fid.reference and (folder / METRICS).is_file()
    cfg = replace(was, data=options.data, fid=options.fid, evaluate_every=1, cache=options.cache)
    set_threads(cfg.threads)
    device = resolve_device(options.device)
    cfg.check_backend(device)
    images = GanTask.load_images(cfg)
    g = build_generator(cfg).to(device)
    stored.load_into(g)
    evaluation, weights = Evaluator(cfg, images, device), weights_hash(g.state_dict())
    fid = evaluation.fid
    assert fid is not None
    lines, count = read_metrics(folder) if same else [], options.samples or options.fid.samples
    series = fid_series(lines, fid.tag)
    if options.check and not (series and count == was.fid.samples):
        raise UsageError(f"check: {folder} logged no {fid.tag} of {count:,} samples to compare with; leave it out")
    if not stored.recalibrated:
        recalibrate(cfg, g, evaluation.class_counts(), device)
    at = {"epoch": stored.fact("epoch", int), "step": None} if stored.exported else stored.state["run"]
    _warn(fid, count)
    result = evaluation.measure(g, count, thorough=True)
    logged = [
        f"logged, of {number:,} samples: " + ", ".join(f"{value:.4g} (epoch {epoch})" for epoch, value in found)
        for number, found in ((was.fid.samples, series), (was.fid.final_samples, fid_series(lines, fid.tag + FINAL)))
        if found
    ]
    record = {"epoch": at["epoch"], "step": at["step"], "weights": weights, **evaluation.record(result)}
    print("\n".join(_measured_lines(f"epoch {at['epoch']}", fid, result, record["classes"], logged)))
    pictures: dict[str, Callable[[Path], object]] = {
        "grid": lambda path: save_grid(evaluation.grid(g), path),
        "nearest": lambda path: save_png(evaluation.nearest(g, result), path),
    }
    _write(options, f"epoch-{at['epoch']:04d}", record | {"device": str(device)}, pictures)
    if options.check:
        first, missing = series[0][1], 0 if result.classes is None else result.classes.count(0)
        learnt = result.fid < first / _FALL
        verb = "is" if learnt else "is not"
        print(f"check: FID {result.fid:.4g} {verb} below a tenth of {first:.4g}; {missing} classes missing")
        if not learnt or missing:
            sys.exit(1)


def _measure_folder(options: EvaluateConfig) -> None:
    assert options.images is not None
    set_threads(0)
    device = resolve_device(options.device)
    how = Decoding(options.data.size, options.data.fit)
    given = read_folder(options.images, how, field="images", split="generated")
    if len(given) < (options.samples or 2):
        line = f"{options.images} has {len(given)}, expected at least {options.samples or 2}"
        raise UsageError(f"images: {line}" if options.samples is None else f"samples: {line}, or fewer samples")
    found, count = given.images, options.samples or len(given)
    splits = load(options.data)
    fid = Fid(options.fid, splits, options.cache, device)
    _warn(fid, count)
    result = fid.measure(lambda start, n: found[start : start + n], count, thorough=True)
    measured = recorded(fid, result, splits.train.classes)
    record = {"images": str(options.images), "weights": given.content_hash, **measured}
    print("\n".join(_measured_lines(str(options.images), fid, result, record["classes"])))
    pictures: dict[str, Callable[[Path], object]] = {
        "grid": lambda path: save_grid(found[: min(GRID, count)], path),
        "nearest": lambda path: save_png(nearest_sheet(result, lambda index: found[index], splits.train), path),
    }
    _write(options, options.images.resolve().name, record | {"device": str(device)}, pictures)


def _measured_lines(
    what: str, fid: Fid, result: FidResult, classes: Mapping[str, int] | None, logged: Sequence[str] = ()
) -> list[str]:
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


def _warn(fid: Fid, count: int) -> None:
    for line in fid_warnings(fid, count):
        print(f"warning: {line}", file=sys.stderr)


def _write(
    options: EvaluateConfig, what: str, record: dict[str, Any], pictures: dict[str, Callable[[Path], object]]
) -> None:
    """Write a measurement and its pictures; what is measured again alike has the same files.

    Their name ends in a hash of all that the measurement follows from, so that no other one is overwritten.
    """
    if options.grid is not None:
        pictures["grid"](options.grid)
    follows = {name: record[name] for name in ("weights", "samples", "protocol")} | {"values": sorted(record["values"])}
    key = hashlib.sha256(json.dumps(follows, sort_keys=True).encode()).hexdigest()[:8]
    folder = options.out or (options.run or Path()) / "evaluations"
    file = folder / f"{what}-{record['samples']}-samples-{key}.json"
    try:
        for name, save in pictures.items():
            save(file.with_name(f"{file.stem}-{name}.png"))
        write_text_atomic(file, json.dumps(record, indent=2, ensure_ascii=False) + "\n")
    except OSError as error:
        if error.errno not in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise
        print(f"warning: not written to {file} ({error.strerror})", file=sys.stderr)
    else:
        print(f"written: {file}")


if __name__ == "__main__":
    run_command(main)
