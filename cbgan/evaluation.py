"""What is measured of a generator: FID against real images, classes found, pictures."""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cbgan.collapse import past_values
from cbgan.config import GanConfig
from cbgan.networks.dcgan import Generator
from cbgan.noise import SEED, fixed_labels, fixed_noise, recalibration_noise, spread_labels
from common.data.image_set import ImageSet, Splits, to_uint8
from common.metrics.classifier import Classifier
from common.metrics.features.neighbours import EXPECTED
from common.metrics.fid import Fid, FidResult
from common.metrics.logits import evaluating
from common.reports.sheet import captioned_sheet, save_png
from common.runtime.atomic import write_text_atomic
from common.runtime.device import autocast
from common.runtime.distributed import Env
from common.runtime.seeding import permutation
from common.train.logging import FINAL, read_metrics
from common.train.recalibration import recalibrate_network
from common.train.task import EvalContext

GRID = 64
"""Images in a grid, eight a row."""
PAIRS = 32
"""Pairs on a sheet of the nearest training images, eight a row."""
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
        fewest = min(cfg.fid.samples, cfg.fid.final_samples or cfg.fid.samples)
        self.warnings = [] if self.fid is None else fid_warnings(self.fid, fewest)
        self.latest: FidResult | None = None
        self.most: dict[str, float] = {}

    def protocol(self) -> Mapping[str, object]:
        """Return what a FID of this run is comparable by."""
        if self.fid is None:
            return {}
        return {**self.fid.protocol(), "recalibrated": self.cfg.recalibrate.protocol}

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
        inputs = self.inputs(g, count)

        def sample(start: int, n: int) -> Tensor:
            return self.sample(g, *(each[start : start + n] for each in inputs))

        with self.env.buffers_of_first(g):  # running averages differ between ranks
            return self.fid.measure(sample, count, should_stop, thorough=thorough)

    def inputs(self, g: Generator, count: int) -> tuple[Tensor, ...]:
        """Return the noise (count, latent_dim), and of a conditional generator the classes, that it is measured on."""
        z, labels = fixed_noise(count, g.latent_dim, self.device), self.labels(count)
        return (z,) if labels is None else (z, labels)

    def sample(self, g: Generator, z: Tensor, labels: Tensor | None = None) -> Tensor:
        """Generate uint8 images (N, 3, S, S) in evaluation mode from noise (N, latent_dim), of classes (N,)."""
        with evaluating(g), autocast(self.device, self.cfg.precision):
            return to_uint8(g(z, labels))

    def grid(self, g: Generator) -> Tensor:
        """Generate the images of a grid, from the same noise every time, of classes in rising order."""
        labels = spread_labels(self.cfg.norm.num_components, GRID, self.device) if self.cfg.conditional else None
        return self.sample(g, fixed_noise(GRID, g.latent_dim, self.device), labels)

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
                    sheet = self.nearest(g, result)
                    save_png(sheet, context.folder / "samples" / "nearest.png")
                    context.log.image(context.step, "samples/nearest", sheet)
        values |= self.env.on_rank0(lambda: self._draw(g, context))
        # The log is cut back where a run is resumed or rewound.
        self.most, gap = self.env.on_rank0(lambda: past_values(read_metrics(context.folder), context.rewound_to))
        return values | gap

    def _values(self, result: FidResult) -> dict[str, float]:
        assert self.fid is not None
        found = {} if result.classes is None else {"metric/classes_found": float(sum(n > 0 for n in result.classes))}
        return self.fid.values(result) | found

    def record(self, result: FidResult) -> dict[str, Any]:
        """Return a measurement as plain values: FIDs by tag, classes by name, and what it is comparable by."""
        assert self.fid is not None
        own, protocol = self.fid.protocol(), self.protocol()
        more = {name: value for name, value in protocol.items() if name not in own} | {"noise_seed": SEED}
        return recorded(self.fid, result, self.images["train"].classes, more) | {"protocol": protocol}

    def nearest(self, g: Generator, result: FidResult) -> Tensor:
        """Return the sheet of the generated images that are nearest to training images, each beside its own."""
        inputs = self.inputs(g, result.count)

        def generate(index: Tensor) -> Tensor:
            return self.sample(g, *(each[index.to(self.device)] for each in inputs))

        return nearest_sheet(result, generate, self.images["train"])

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
        batches = zip(*(each.split(size) for each in self.inputs(g, count)), strict=True)
        return sum(int((classifier.predict(self.sample(g, z, asked)) == asked).sum()) for z, asked in batches) / count


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


def fid_warnings(fid: Fid, count: int) -> list[str]:
    """Return why a distance of so many images should not be trusted, and what is not measured."""
    return [line for line in (fid.warning, fid.left_out, fid.short(count)) if line is not None]


def recorded(
    fid: Fid, result: FidResult, classes: Sequence[str], more: Mapping[str, object] | None = None
) -> dict[str, Any]:
    """Return a measurement as plain values: numbers by tag, each with its protocol, and classes by name.

    Args:
        fid: what measured.
        result: what it found.
        classes: names of the classes, each of which gets the number of samples that the classifier puts in it.
        more: what every number depends on besides.
    """
    return {
        "samples": result.count,
        "values": fid.values(result),
        "classes": None if result.classes is None else dict(zip(classes, result.classes, strict=True)),
        "protocol": fid.protocol(),
        "protocols": {tag: {**protocol, **(more or {})} for tag, protocol in fid.protocols(result).items()},
    }


def uncertainty_rows(result: FidResult) -> list[tuple[str, str]]:
    """Return what is printed of a measurement besides its distances, a name and a text each."""
    rows: list[tuple[str, str]] = []
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


def distance(images: Tensor) -> float:
    """Return the mean Euclidean distance between two of some images (N, ...), N >= 2."""
    return float(torch.pdist(images.float().flatten(1)).mean())


def fid_series(lines: list[dict[str, Any]], tag: str) -> list[tuple[int, float]]:
    """Return (epoch, FID) pairs in the order measured."""
    return [(line["epoch"], line[tag]) for line in lines if line.get(tag) is not None]


def save_grid(images: Tensor, path: Path, columns: int | None = None) -> Tensor:
    """Write uint8 images (N, 3, S, S) as a grid and return it, uint8 (3, H, W); without columns a near-square one."""
    from torchvision.utils import make_grid  # noqa: PLC0415 - takes long, and --help need not

    grid = make_grid(images.cpu(), nrow=columns or math.ceil(math.sqrt(len(images))), padding=1)
    save_png(grid, path)
    return grid
