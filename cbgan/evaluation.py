"""What is measured of a generator: FID against real images, classes found, pictures."""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from shlex import quote
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from cbgan.collapse import verdict_gap
from cbgan.config import GanConfig
from cbgan.measurement import copying_line, nearest_sheet, recorded, save_sheet, uncertainty_rows
from cbgan.networks.dcgan import Generator
from cbgan.noise import SEED, fixed_labels, fixed_noise, recalibration_noise, spread_labels
from common.data.image_set import ImageSet, Splits, to_uint8
from common.metrics.classifier import Classifier
from common.metrics.fid import Fid, FidResult, other_split
from common.runtime.atomic import write_atomic, write_text_atomic
from common.runtime.device import autocast
from common.runtime.distributed import Env
from common.runtime.seeding import permutation
from common.train.logging import FINAL, read_metrics
from common.train.recalibration import recalibrate_network
from common.train.task import Better, EvalContext

GRID = 64
"""Images in a grid, eight a row."""
_CHARTS = {"gradient variance": [f"gradient/{name}" for name in ("d_variance", "g_variance", "g_variance_shared")]}
CLASSES = "classes.json"
"""In the folder of a conditional run: names, and numbers of training images, of the classes."""


class Evaluator:
    """Measures generators.

    Args:
        cfg: the run's configuration; with ``evaluate_every`` 0 nothing but pictures is made.
        images: the run's real images by split.
        device: where the generator is.
        should_stop: asked between batches of real images; it answers alike on all ranks.
        env: this process among those of the run; they share each measurement.

    Attributes:
        warnings: why what is measured should not be trusted, printed with the first measurement.
        most: the largest value so far of what was measured, by tag.

    Raises:
        UsageError: if the feature extractor cannot be had.
        Interrupted: if ``should_stop`` says so while the real images are measured.
    """

    def __init__(
        self,
        cfg: GanConfig,
        images: Mapping[str, ImageSet],
        device: torch.device,
        should_stop: Callable[[], bool] | None = None,
        env: Env | None = None,
    ) -> None:
        self.cfg, self.images, self.device = cfg, images, device
        self.env = env or Env()
        splits = Splits(images["train"], images.get("test"))
        self.fid = Fid(cfg.fid, splits, cfg.cache, device, should_stop, self.env) if cfg.evaluate_every else None
        self.warnings = self.fid_warnings(min(cfg.fid.samples, cfg.fid.final_samples or cfg.fid.samples))
        self.latest: FidResult | None = None
        self.most: dict[str, float] = {}

    def fid_warnings(self, count: int) -> list[str]:
        """Return why a distance of so many images should not be trusted, and what is not measured."""
        found = () if self.fid is None else (self.fid.warning, self.fid.left_out, self.fid.short(count))
        return [line for line in found if line is not None]

    def protocol(self) -> Mapping[str, object]:
        """Return what a FID of this run is comparable by."""
        if self.fid is None:
            return {}
        return {**self.fid.protocol(), "recalibrated": self.cfg.recalibrate.protocol}

    def better(self) -> Mapping[str, Better]:
        """Return whether higher or lower is better of each measured value that has a best, by tag."""
        if self.fid is None:
            return {}
        of_samples: dict[str, Better] = {**self.fid.better(), "metric/classes_found": "higher"}
        final: dict[str, Better] = {f"{tag}{FINAL}": way for tag, way in of_samples.items()}
        return {**of_samples, **final, f"{self.fid.tag}_raw": "lower", "metric/class_accuracy": "higher"}

    def class_counts(self) -> list[int]:
        """Return how many training images each class has; nothing where no class is asked for."""
        labels = self.images["train"].labels if self.cfg.conditional else None
        return [] if labels is None else torch.bincount(labels, minlength=self.cfg.norm.num_components).tolist()

    def labels(self, count: int) -> Tensor | None:
        """Return the classes that ``count`` images are asked for, as frequent as in training; None without classes."""
        return fixed_labels(counts, count, self.device) if (counts := self.class_counts()) else None

    def note_extractor(self, before: object) -> None:
        """Compare the extractor with the one that measured the run before."""
        if self.fid is not None and before not in (None, self.fid.extractor.id):
            self.warnings.append(
                "fid: the classifier was trained anew and its weights differ from those that measured this run "
                "before; values before and after differ in their last digits"
            )

    def measure(
        self, g: Generator, count: int, should_stop: Callable[[], bool] | None = None, *, thorough: bool = False
    ) -> FidResult:
        """Measure FID (and classes, where the extractor knows them) on ``count`` images in evaluation mode.

        With ``thorough`` its interval, FID-infinity and the nearest training images too.

        Raises:
            Interrupted: if ``should_stop`` says so on the way.
        """
        assert self.fid is not None
        z, labels = fixed_noise(count, g.latent_dim, self.device), self.labels(count)

        def sample(start: int, n: int) -> Tensor:
            return self.sample(g, z[start : start + n], None if labels is None else labels[start : start + n])

        training = g.training
        try:
            with self.env.buffers_of_first(g):  # running averages differ between ranks
                return self.fid.measure(sample, count, should_stop, thorough=thorough)
        finally:
            g.train(training)

    @torch.no_grad()
    def sample(self, g: Generator, z: Tensor, labels: Tensor | None = None) -> Tensor:
        """Generate uint8 images (N, 3, S, S) in evaluation mode from noise (N, latent_dim), of classes (N,)."""
        g.eval()
        with autocast(self.device, self.cfg.precision):
            images = g(z, labels)
        return to_uint8(images)

    def grid(self, g: Generator) -> Tensor:
        """Generate the images of a grid, from the same noise every time, of classes in rising order."""
        asked = spread_labels(self.cfg.norm.num_components, GRID, self.device) if self.cfg.conditional else None
        return self.sample(g, fixed_noise(GRID, g.latent_dim, self.device), asked)

    def run(self, g: Generator, context: EvalContext, raw: Generator | None = None) -> dict[str, float]:
        """Measure and draw; return what is to be logged.

        Args:
            g: the generator that counts.
            context: when it is measured.
            raw: the same one without averages of its weights, whose FID is logged beside it.

        Raises:
            Interrupted: if ``context.should_stop`` says so on the way; nothing is drawn then.
        """
        values: dict[str, float] = {}
        while self.warnings:
            context.report(self.warnings.pop(0))
        if self.fid is not None:
            last, count = context.epoch >= self.cfg.epochs, self.cfg.fid.samples
            more = self.cfg.fid.final_samples if last else None
            thorough = self.fid.thorough(last=last and more is None)
            self.latest = result = self.measure(g, count, context.should_stop, thorough=thorough)
            values |= self._values(result)
            if raw is not None:
                values[f"{self.fid.tag}_raw"] = self.measure(raw, count, context.should_stop).fid
            if more is not None:
                thorough = self.fid.thorough(last=True)
                self.latest = result = self.measure(g, more, context.should_stop, thorough=thorough)
                final = self._values(result)
                values |= {f"{tag}{FINAL}": value for tag, value in final.items() if tag != self.fid.floor_tag}
            if context.epoch == 0:
                context.log.charts({"FID": self.fid.distances(values)} | _CHARTS, self.fid.bands(values))
            if last and result.copying is not None:
                if result.copying.alarm:
                    context.report(copying_line(result))
                if self.env.first:
                    self._draw_nearest(g, result, context)
        training = g.training
        values |= self.env.on_rank0(lambda: self._draw(g, context))
        g.train(training)
        self.most, gap = self.env.on_rank0(lambda: of_log(read_metrics(context.folder), context.rewound_to))
        return values | gap

    def _values(self, result: FidResult) -> dict[str, float]:
        assert self.fid is not None
        found = {} if result.classes is None else {"metric/classes_found": float(sum(n > 0 for n in result.classes))}
        return self.fid.values(result) | found

    def summary_line(self, values: Mapping[str, float]) -> list[str]:
        """Return what is printed of a measurement: the distance, its interval, precision, recall; the log has all."""
        if self.fid is None or self.fid.tag not in values:
            return []
        lines, tag, end = [f"FID ({self.fid.extractor.name}) {values[self.fid.tag]:.4g}"], self.fid.tag, ""
        if f"{tag}{FINAL}" in values:
            end = FINAL
            lines.append(f"of {self.cfg.fid.final_samples:,} samples {values[f'{tag}{end}']:.4g}")
        if f"{tag}_low{end}" in values:
            low, high = values[f"{tag}_low{end}"], values[f"{tag}_high{end}"]
            lines.append(f"between the distributions {low:.4g} to {high:.4g}")
        shown = {name: values.get(self.fid.tag_of(name)) for name in ("precision", "recall")}
        return lines + [f"{name} {value:.3g}" for name, value in shown.items() if value is not None]

    def named_classes(self, result: FidResult) -> dict[str, int] | None:
        """Return how many samples the classifier puts in each class, by name; None with another extractor."""
        if result.classes is None:
            return None
        return dict(zip(self.images["train"].classes, result.classes, strict=True))

    def record(self, result: FidResult) -> dict[str, Any]:
        """Return a measurement as plain values: FIDs by tag, classes by name, and what it is comparable by."""
        assert self.fid is not None
        own, protocol = self.fid.protocol(), self.protocol()
        more = {name: value for name, value in protocol.items() if name not in own} | {"noise_seed": SEED}
        return recorded(self.fid, result, self.named_classes(result), more) | {"protocol": protocol}

    def nearest(self, g: Generator, result: FidResult) -> Tensor:
        """Return the sheet of the generated images that are nearest to training images, each beside its own."""
        z, labels = fixed_noise(result.count, g.latent_dim, self.device), self.labels(result.count)

        def generate(index: Tensor) -> Tensor:
            at = index.to(self.device)
            return self.sample(g, z[at], None if labels is None else labels[at])

        return nearest_sheet(result, generate, self.images["train"])

    def _draw_nearest(self, g: Generator, result: FidResult, context: EvalContext) -> None:
        training = g.training
        sheet = self.nearest(g, result)
        g.train(training)
        save_sheet(sheet, context.folder / "samples" / "nearest.png")
        context.log.image(context.step, "samples/nearest", sheet)

    def _draw(self, g: Generator, context: EvalContext) -> dict[str, float]:
        """Write a grid of generated images, from the same noise every time, as PNG and to TensorBoard.

        Returns:
            How much its images differ, and the share whose class is the one that was asked for, by tag.
        """
        samples, train = context.folder / "samples", self.images["train"]
        real = train.images[permutation(len(train), SEED, "diversity")[:GRID]]  # files may be sorted by class
        if not (samples / "real.png").exists():
            save_grid(real, samples / "real.png")
            if self.cfg.conditional:
                known = json.dumps({"classes": train.classes, "counts": self.class_counts()}, ensure_ascii=False)
                write_text_atomic(context.folder / CLASSES, known + "\n")
        images = self.grid(g)
        grid = save_grid(images, samples / f"epoch-{context.epoch:04d}.png")
        context.log.image(context.step, "samples/generated", grid)
        values = {"metric/diversity": distance(images) / (distance(real) or math.nan)}  # copies of one do not differ
        if self.cfg.conditional and self.fid is not None and isinstance(self.fid.extractor, Classifier):
            values["metric/class_accuracy"] = self._share_as_asked(g, self.fid.extractor)
        return values

    def _share_as_asked(self, g: Generator, classifier: Classifier) -> float:
        """Return the share of images that a classifier sees as of the class that was asked for."""
        count, size = self.cfg.fid.samples, self.cfg.fid.batch_size
        z, labels = fixed_noise(count, g.latent_dim, self.device), self.labels(count)
        assert labels is not None
        parts = zip(z.split(size), labels.split(size), strict=True)
        return sum(int((classifier.predict(self.sample(g, *part)) == part[1]).sum()) for part in parts) / count

    def summary_rows(self, lines: list[dict[str, Any]], folder: Path) -> list[tuple[str, str]]:
        """Return what a finished run tells its user."""
        rows = [("FID", "not measured (evaluate_every is 0)")]
        if self.fid is not None:
            series = fid_series(lines, self.fid.tag)
            (first_epoch, first), (last_epoch, last) = series[0], series[-1]
            best_epoch, best = min(series, key=lambda pair: pair[1])
            text = f"first {first:.4g} (epoch {first_epoch}), best {best:.4g} ({best_epoch}), "
            text += f"last {last:.4g} ({last_epoch})"
            others = dict(fid_series(lines, self.fid.other_tag))
            if best_epoch in others:
                text += f"; the best against the {other_split(self.cfg.fid.reference)} images {others[best_epoch]:.4g}"
            if self.fid.floor is not None:
                text += f"; real test images {self.fid.floor:.4g}"
            rows = [(f"FID ({self.fid.extractor.name})", text)]
            for epoch, value in fid_series(lines, f"{self.fid.tag}{FINAL}")[-1:]:
                rows.append(("FID, final", f"{value:.4g} (epoch {epoch}) from {self.cfg.fid.final_samples:,} samples"))
            rows += uncertainty_rows(self.latest)
        if self.latest is not None and self.latest.classes is not None:
            classes = self.latest.classes
            found = sum(n > 0 for n in classes)
            rows.append(("classes", f"{found} of {len(classes)} found among {sum(classes):,} samples"))
        return [
            *rows,
            ("pictures", str(folder / "samples")),
            ("evaluate", f"python -m cbgan.evaluate --run {quote(str(folder))}"),
            ("paper's run", "python -m cbgan.train --config paper_ucb --device cuda"),
        ]


def recalibrate(
    cfg: GanConfig,
    g: nn.Module,
    counts: Sequence[int],
    device: torch.device,
    go_on: Callable[[], None] = lambda: None,
) -> None:
    """Estimate anew what a generator stores, from samples that are the same for every run.

    Args:
        cfg: the run's configuration, which says whether and how.
        g: on the device.
        counts: training images of each class that it can be asked for; empty where it cannot.
        device: where the generator is.
        go_on: called between batches.

    Raises:
        NonFiniteError: if a layer is fed what is not finite.
    """

    def forward(given: tuple[Tensor, ...]) -> None:
        go_on()
        with autocast(device, cfg.precision):
            g(*given)

    recalibrate_network(cfg, g, recalibration_noise(cfg, counts, device), forward)


def distance(images: Tensor) -> float:
    """Return the mean Euclidean distance between two of some images (N, ...), N >= 2."""
    return float(torch.pdist(images.float().flatten(1)).mean())


def largest(lines: list[dict[str, Any]]) -> dict[str, float]:
    """Return the largest value of each ``metric/`` tag in the lines of a log."""
    found: dict[str, float] = {}
    for line in lines:
        for tag, value in line.items():
            if tag.startswith("metric/") and value is not None:
                found[tag] = max(value, found.get(tag, value))
    return found


def of_log(lines: list[dict[str, Any]], rewound_to: int) -> tuple[dict[str, float], dict[str, float]]:
    """Return what a collapse shows by in the lines of a log, which is cut back where a run is resumed or rewound."""
    return largest(lines), verdict_gap(lines, rewound_to)


def fid_series(lines: list[dict[str, Any]], tag: str) -> list[tuple[int, float]]:
    """Return (epoch, FID) pairs in the order measured."""
    return [(line["epoch"], line[tag]) for line in lines if line.get(tag) is not None]


def save_grid(images: Tensor, path: Path, columns: int | None = None) -> Tensor:
    """Write uint8 images (N, 3, S, S) as a grid and return it, uint8 (3, H, W); without columns a near-square one."""
    from torchvision.utils import make_grid  # noqa: PLC0415 - takes long, and --help need not

    grid = make_grid(images.cpu(), nrow=columns or math.ceil(math.sqrt(len(images))), padding=1)
    picture = Image.fromarray(grid.permute(1, 2, 0).numpy())
    write_atomic(path, lambda file: picture.save(file, "PNG"))
    return grid
