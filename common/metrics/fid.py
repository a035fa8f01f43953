"""FID during a run: real statistics with a cache that knows their content, the floor, and the measurement."""

import json
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from common.data import ImageSet, Splits
from common.errors import Interrupted, UsageError
from common.machine.dist import Env
from common.metrics.cache import read_cache, write_cache
from common.metrics.classifier import Classifier
from common.metrics.extractors import EXTRACTORS, Extractor, register_extractor
from common.metrics.frechet import Statistics, frechet_distance, statistics
from common.metrics.inception import Inception

Sample = Callable[[int, int], Tensor]
ShouldStop = Callable[[], bool]

QUANTISATION = "uint8, rounded to nearest, clamped"


@dataclass(frozen=True, kw_only=True)
class FidConfig:
    """How generated images are measured.

    Raises:
        ValueError: if a value is out of range, or weights are named for an extractor that reads none.
    """

    every: int = 10
    """Epochs between two measurements; 0 never measures."""
    samples: int = 1000
    """Generated images in a measurement; few of them bias the distance upwards."""
    final_samples: int | None = None
    """Generated images in the measurement at the end (null: as samples)."""
    extractor: str = field(default="classifier", metadata={"names": EXTRACTORS.names})
    """inception: the network of published numbers, 96 MB to download, slow on a CPU; classifier: trained in
    seconds on the labelled training images, comparable between runs on the same images only; or one of your own
    (register_extractor)."""
    weights: Path | None = None
    """inception: its weights file (null: download the official one into the cache)."""
    weights_sha256: str | None = None
    """The SHA-256 of fid.weights where it is not the official file, 64 hexadecimal digits."""
    batch_size: int = 200
    """Images that go through generator and extractor at once."""
    reference: Literal["train", "test"] = "train"
    """Which real images generated ones are compared with."""

    def __post_init__(self) -> None:
        reads_weights = EXTRACTORS[self.extractor].reads_weights
        for name, least in (("every", 0), ("samples", 2), ("batch_size", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"fid.{name}: expected {least} or more, got {getattr(self, name)}")
        if self.final_samples is not None and self.final_samples < 2:
            raise ValueError(f"fid.final_samples: expected null, or 2 or more, got {self.final_samples}")
        if self.weights is not None and not reads_weights:
            others = " or ".join(name for name, known in EXTRACTORS.items() if known.reads_weights)
            raise ValueError(f"fid.weights: {self.extractor} reads none, expected null or fid.extractor {others}")
        if self.weights_sha256 is not None:
            if not re.fullmatch(r"[0-9a-fA-F]{64}", self.weights_sha256):
                raise ValueError(f"fid.weights_sha256: expected 64 hexadecimal digits, got {self.weights_sha256!r}")
            if self.weights is None:
                raise ValueError("fid.weights_sha256: expected null where fid.weights names no file")


@dataclass(frozen=True)
class FidResult:
    """One measurement.

    Attributes:
        fid: Fréchet distance to the real images.
        count: generated images it was measured on.
        other: the same images' distance to the other split of the real ones; None where there is none.
        classes: how many of them the classifier puts in each class; None with another extractor.
    """

    fid: float
    count: int
    classes: tuple[int, ...] | None
    other: float | None = None


def other_split(reference: str) -> str:
    """Return the split that is not the reference."""
    return "train" if reference == "test" else "test"


class Fid:
    """Measures generators against the real images of a run.

    The statistics of the real images are kept under a key that names their content, split and number, the
    extractor with its weights, the resizing and torch-fidelity's version: change any of them and they are
    computed anew. A cache file that is damaged is replaced.

    Args:
        config: how to measure.
        splits: the run's images.
        cache: folder for statistics, trained classifiers and downloaded weights.
        device: where the extractor runs.
        should_stop: asked between batches; with several processes it must answer alike on all.
        env: this process among those that share each measurement; by default it measures alone.

    Attributes:
        extractor: the network that gives the features.
        floor: the distance of the training images to the test images, which no generator should beat by
            much; None without test images.
        tag: the name of the distance in charts; `floor_tag` is the floor's, `other_tag` that of the distance to the
            other split.
        warning: why the extractor should not be trusted, or None.

    Raises:
        UsageError: if there are no such reference images, or the extractor cannot be built.
        Interrupted: if `should_stop` said so.
    """

    def __init__(
        self,
        config: FidConfig,
        splits: Splits,
        cache: Path,
        device: torch.device | str,
        should_stop: ShouldStop | None = None,
        env: Env | None = None,
    ) -> None:
        self._env = env or Env()
        if config.reference == "test" and splits.test is None:
            raise UsageError("fid.reference: there are no test images, expected train")
        self.config = config
        # One process trains or downloads, the others find the result in the cache.
        self.extractor, self.warning = self._env.first_then_others(lambda: _extractor(config, splits, cache, device))
        self._cache = cache / "fid"
        self.tag = f"metric/fid_{self.extractor.name}"
        self.floor_tag = f"{self.tag}_floor"
        self.other_tag = f"{self.tag}_{other_split(config.reference)}"
        self._real = splits.test if config.reference == "test" and splits.test else splits.train
        self._statistics = self._of(self._real, should_stop)
        self.floor: float | None = None
        self._others: Statistics | None = None
        if splits.test is not None:
            self._others = self._of(splits.train if self._real is splits.test else splits.test, should_stop)
            self.floor = frechet_distance(self._statistics, self._others)

    def passport(self) -> dict[str, str | int]:
        """Return what two distances must share to be compared, the number of generated images aside."""
        return {
            "extractor": self.extractor.name,
            "extractor_id": self.extractor.id,
            "resize": self.extractor.resize,
            "quantisation": QUANTISATION,
            "data": self._real.name,
            "split": self._real.split,
            "n_real": len(self._real),
            "content_hash": self._real.content_hash,
            "torch_fidelity": version("torch-fidelity"),
        }

    def measure(self, sample: Sample, count: int, should_stop: ShouldStop | None = None) -> FidResult:
        """Measure the distance of `count` generated images.

        Args:
            sample: from (start, n) to n images, uint8 (n, 3, H, W), of the positions start, start + 1, ...;
                noise that follows from the position makes measurements repeatable at any batch size.
            count: generated images, at least 2.
            should_stop: asked before each batch.

        Raises:
            ValueError: if `count` is below 2 or `sample` returns anything else.
            Interrupted: if `should_stop` said so.
        """
        if count < 2:
            raise ValueError(f"count: a covariance takes at least 2 samples, got {count}")
        features = self._features(sample, count, should_stop)
        classes = None
        if isinstance(self.extractor, Classifier):
            found = self.extractor.classify(features).cpu()
            classes = tuple(torch.bincount(found, minlength=self.extractor.num_classes).tolist())
        ours = statistics(features)
        other = None if self._others is None else frechet_distance(ours, self._others)
        return FidResult(frechet_distance(ours, self._statistics), count, classes, other)

    def _features(self, sample: Sample, count: int, should_stop: ShouldStop | None) -> Tensor:
        """Return features (count, D); each process takes every world-th batch, and gets those of the others."""
        size, world = self.config.batch_size, self._env.world
        features = torch.zeros(count, self.extractor.dim)
        for first in range(0, count, size * world):
            if should_stop is not None and should_stop():
                raise Interrupted
            mine = torch.zeros(size, self.extractor.dim)
            start = first + size * self._env.rank
            n = min(size, count - start)
            if n > 0:
                mine[:n] = self._of_batch(sample, start, n)
            for rank, rows in enumerate(self._env.stacked(mine)):
                start = first + size * rank
                features[start : start + size] = rows[: max(0, count - start)]
        return features

    def _of_batch(self, sample: Sample, start: int, n: int) -> Tensor:
        images = sample(start, n)
        if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[:2] != (n, 3):
            got = f"{images.dtype} {tuple(images.shape)}"
            raise ValueError(f"sample: expected uint8 ({n}, 3, H, W), got {got}")
        return self.extractor(images).cpu()

    def _of(self, real: ImageSet, should_stop: ShouldStop | None) -> Statistics:
        if len(real) < 2:
            raise UsageError(f"fid: {real.name} has 1 {real.split} image, expected 2 or more")
        key = json.dumps(
            {
                "content": real.content_hash,
                "split": real.split,
                "count": len(real),
                "extractor": self.extractor.id,
                "resize": self.extractor.resize,
                "torch_fidelity": version("torch-fidelity"),
            }
        )
        found = self._env.lead(lambda: read_cache(self._cache, key))  # or ranks with different caches would part
        if found is None:
            of = statistics(self._features(lambda i, n: real.images[i : i + n], len(real), should_stop))
            found = {"mean": of.mean, "covariance": of.covariance}
            if self._env.first:
                write_cache(self._cache, key, found)
        return Statistics(**found)


def _extractor(
    config: FidConfig, splits: Splits, cache: Path, device: torch.device | str
) -> tuple[Extractor, str | None]:
    extractor = EXTRACTORS[config.extractor].build(config, splits, cache, device)
    if extractor.name != config.extractor:
        raise UsageError(f"fid.extractor: expected {config.extractor} to have that name, it has {extractor.name}")
    return extractor, getattr(extractor, "warning", None)


def _inception(config: FidConfig, _splits: Splits, cache: Path, device: torch.device | str) -> Inception:
    return Inception(config.weights, config.weights_sha256, cache, device)


def _classifier(_config: FidConfig, splits: Splits, cache: Path, device: torch.device | str) -> Classifier:
    return Classifier(splits.train, splits.test, cache, device)


register_extractor("inception", _inception, reads_weights=True)
register_extractor("classifier", _classifier)
