"""The Fréchet distance of a run's generated images to its real ones, and what else the same features give."""

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from common.data import ImageSet, Splits
from common.metrics.cache import read_cache, write_cache
from common.metrics.classifier import Classifier
from common.metrics.dinov2 import MODELS, DinoV2
from common.metrics.extractors import EXTRACTORS, Extractor, register_extractor
from common.metrics.features import quality
from common.metrics.features.frechet import Statistics, frechet_distance, statistics
from common.metrics.features.neighbours import Copying, Nearest, copying, nearest
from common.metrics.features.quality import Quality
from common.metrics.features.uncertainty import (
    FEWEST_FOR_LIMIT,
    POINTS,
    REPLICATES,
    Interval,
    distance_interval,
    distance_limit,
    enough,
)
from common.metrics.inception import Inception
from common.metrics.logits import in_batches
from common.runtime.distributed import Env
from common.runtime.errors import Interrupted, UsageError
from common.runtime.paths import texts_to_paths

Sample = Callable[[int, int], Tensor]
ShouldStop = Callable[[], bool]

QUANTISATION = "uint8, rounded to nearest, clamped"
CHEAP = 256
"""Most features of which an interval takes a fraction of a second."""
SEED = 20
"""Seed of the subsets and replicates of a measurement's uncertainty, the same for every run."""
FLAT = 1000
"""Most flat images that features are tried on before precision and recall are measured in them."""
MOST_FLAT = 0.1
"""Share of flat images that may pass as real. In the classifier's features none do of the digits or of MNIST, where it
is right on 97 %; 35 % of SVHN, 76 % of CIFAR-10, 85 % of CIFAR-100, where it is right on 38, 54 and 15 %."""


@dataclass(frozen=True, kw_only=True)
class FidConfig:
    """How generated images are measured.

    Raises:
        ValueError: if a value is out of range, or weights are named for an extractor that reads none.
    """

    samples: int = 1000
    """Generated images in a measurement; few of them bias the distance upwards."""
    final_samples: int | None = None
    """Generated images of another measurement at the end, whose tags end in _final (null: there is none)."""
    extractor: str = field(default="classifier", metadata={"names": EXTRACTORS.names})
    """inception: the network of published numbers, 96 MB to download, slow on a CPU; dinov2 (ViT-L/14), dinov2_base and
    dinov2_small: 1.2 GB, 350 MB and 90 MB; classifier: trained in seconds on the labelled training images, comparable
    between runs on the same images only; or one of your own (register_extractor)."""
    weights: Path | None = None
    """inception: its weights file; dinov2: timm's safetensors file (null: download the official one into the cache)."""
    weights_sha256: str | None = None
    """The SHA-256 of fid.weights, 64 hexadecimal digits; inception needs it where that is not the official file."""
    batch_size: int = 200
    """Images that go through generator and extractor at once."""
    reference: Literal["train", "test"] = "train"
    """Which real images generated ones are compared with."""
    metrics: list[Quality] = field(default_factory=lambda: ["precision_recall"])
    """What else is computed from the same features: kid, inception_score, precision_recall; the latter not in features
    of a classifier in which images of one colour pass as real."""
    interval: Literal["auto", "every", "last", "never"] = "auto"
    """At which measurements FID-infinity, a 95 % interval and the nearest training images are found too; auto: at every
    one with at most 256 features, as the classifier has, otherwise at the last."""

    def __post_init__(self) -> None:
        texts_to_paths(self)
        reads_weights = EXTRACTORS[self.extractor].reads_weights
        for name, least in (("samples", 2), ("batch_size", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"fid.{name}: expected {least} or more, got {getattr(self, name)}")
        if self.final_samples is not None and self.final_samples < 2:
            raise ValueError(f"fid.final_samples: expected null, or 2 or more, got {self.final_samples}")
        if self.weights is not None and not reads_weights:
            others = " or ".join(name for name, known in EXTRACTORS.items() if known.reads_weights)
            raise ValueError(f"fid.weights: {self.extractor} reads none, expected null or fid.extractor {others}")
        if unknown := [name for name in self.metrics if name not in get_args(Quality)]:
            raise ValueError(f"fid.metrics: expected some of {', '.join(get_args(Quality))}, got {', '.join(unknown)}")
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
        classes: how many of them the classifier puts in each class; None with another extractor.
        other: their distance to the other split of the real images; None where there is none.
        quality: kid, inception_score, precision and recall, those that were asked for.
        interval: of the distance between the distributions; None where it was not asked for, or there are fewer than
            twice as many images as features.
        limit: FID-infinity; None without interval, or with fewer than four times as many images as features.
        neighbours: the training image nearest to each generated one; None where it was not asked for.
        copying: what these say, compared with unseen real images.
    """

    fid: float
    count: int
    classes: tuple[int, ...] | None
    other: float | None = None
    quality: Mapping[str, float] = field(default_factory=dict)
    interval: Interval | None = None
    limit: float | None = None
    neighbours: Nearest | None = None
    copying: Copying | None = None


def other_split(reference: str) -> str:
    """Return the split that is not the reference."""
    return "train" if reference == "test" else "test"


class Fid:
    """Measures generators against the real images of a run.

    Features and statistics of the real images are cached under a key that names their content, split and number, the
    extractor with its weights, the resizing and torch-fidelity's version. A damaged cache file is replaced.

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
        tag: the name of the distance in charts; ``floor_tag`` is the floor's, ``other_tag`` that of the distance to
            the other split.
        warning: why the extractor should not be trusted, or None.
        left_out: why precision and recall, though asked for, are not measured, or None.

    Raises:
        UsageError: if there are no such reference images, or the extractor cannot be built.
        Interrupted: if ``should_stop`` said so.
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
        self.extractor, self.warning = self._env.rank0_first(lambda: _extractor(config, splits, cache, device))
        if "inception_score" in config.metrics and not hasattr(self.extractor, "logits"):
            raise UsageError(f"fid.metrics: inception_score takes logits, which {self.extractor.name} has none of")
        self._cache, self._device = cache / "fid", torch.device(device)
        self.tag = f"metric/fid_{self.extractor.name}"
        self.floor_tag = f"{self.tag}_floor"
        self.other_tag = f"{self.tag}_{other_split(config.reference)}"
        self._splits = splits
        self._real = splits.test if config.reference == "test" and splits.test else splits.train
        self._reference = self._of(self._real, should_stop)
        self.floor: float | None = None
        self._others: _Measured | None = None
        if splits.test is not None:
            self._others = self._of(splits.train if self._real is splits.test else splits.test, should_stop)
            self.floor = frechet_distance(self._reference.statistics, self._others.statistics)
        self.left_out = self._left_out(should_stop)
        self._unseen: Tensor | None = None  # distances of real images not trained on to the training images

    def thorough(self, *, last: bool) -> bool:
        """Say whether `config.interval` asks for everything at a measurement."""
        when = self.config.interval
        if when == "auto":
            when = "every" if self.extractor.dim <= CHEAP else "last"
        return when == "every" or (when == "last" and last)

    def short(self, count: int) -> str | None:
        """Say what is wrong with a distance from so few generated or real images, or return None."""
        dim, name = self.extractor.dim, self.extractor.name
        for what, number, remedy in (
            (f"fid.samples: {count} generated images", count, f"take at least {dim:,}, better five times as many"),
            (f"fid.reference: {len(self._real)} real images", len(self._real), "take fid.extractor classifier"),
        ):
            if number < dim:
                return (
                    f"{what} are fewer than the {dim:,} features of {name}: their covariance is singular and the "
                    f"distance much too large; {remedy}"
                )
        return None

    def protocol(self) -> dict[str, str | int]:
        """Return what two distances must share to be compared, the number of generated images aside."""
        return {
            "extractor": self.extractor.name,
            "extractor_id": self.extractor.id,
            "resize": self.extractor.resize,
            "quantisation": QUANTISATION,
            "data": self._real.name,
            **_identity(self._real),
            "torch_fidelity": version("torch-fidelity"),
        }

    def protocols(self, result: FidResult) -> dict[str, dict[str, str | int]]:
        """Return the protocol of each of `values`, by tag."""
        own = self.protocol() | {"n_generated": result.count}
        found = dict.fromkeys(self.values(result), own)
        if self._others is not None:
            other = self._others.images
            found[self.other_tag] = own | _identity(other)
            found[self.floor_tag] = self.protocol() | {"compared": f"real {other.split} images", "n_generated": 0}
        drawn = "generated and real images" if self.config.reference == "test" else "generated images"
        interval = own | {"seed": SEED, "replicates": REPLICATES, "resampled": drawn}
        near = own | _identity(self._splits.train) | {"split": "train"}
        near |= {"unseen": f"{len(self._splits.test)} test images" if self._splits.test else "each training image"}
        special = {f"{self.tag}_{end}": interval for end in ("centre", "low", "high")}
        special |= {f"{self.tag}_infinity": own | {"seed": SEED, "points": POINTS}}
        special |= {self.tag_of(name): near for name in ("copies", "train_gap")}
        special |= {self.tag_of(name): own | parameters for name, parameters in quality.PARAMETERS.items()}
        return found | {tag: protocol for tag, protocol in special.items() if tag in found}

    def tag_of(self, name: str) -> str:
        """Return the tag of another value than the distance: metric/kid_classifier."""
        return f"metric/{name}_{self.extractor.name}"

    def values(self, result: FidResult) -> dict[str, float]:
        """Return a result's numbers by tag."""
        found = {self.tag: result.fid}
        if result.other is not None and self.floor is not None:
            found |= {self.other_tag: result.other, self.floor_tag: self.floor}
        found |= {self.tag_of(name): value for name, value in result.quality.items()}
        if result.interval is not None:
            ends = {"centre": result.interval.centre, "low": result.interval.low, "high": result.interval.high}
            found |= {f"{self.tag}_{name}": value for name, value in ends.items()}
        if result.limit is not None:
            found[f"{self.tag}_infinity"] = result.limit
        if result.copying is not None:
            found |= {self.tag_of("copies"): result.copying.share, self.tag_of("train_gap"): result.copying.gap}
        return found

    def better(self) -> dict[str, Literal["higher", "lower"]]:
        """Return by tag whether higher or lower is better, but for the floor and the train gap, which have no best."""
        ends = (f"{self.tag}_{end}" for end in ("centre", "low", "high", "infinity"))
        lower = (self.tag, self.other_tag, *ends, self.tag_of("copies"))
        return {**dict.fromkeys(lower, "lower"), **{self.tag_of(name): way for name, way in quality.BETTER.items()}}

    def distances(self, values: Mapping[str, float]) -> list[str]:
        """Return the tags of distances to draw in one chart."""
        return [tag for tag in (self.tag, self.other_tag, self.floor_tag) if tag in values]

    def bands(self, values: Mapping[str, float]) -> dict[str, tuple[str, str, str]]:
        """Return the tags of the interval's centre and ends, by the chart's title, if there is one."""
        centre, low, high = (f"{self.tag}_{end}" for end in ("centre", "low", "high"))
        return {"FID, 95 % interval": (centre, low, high)} if centre in values else {}

    def measure(
        self, sample: Sample, count: int, should_stop: ShouldStop | None = None, *, thorough: bool = False
    ) -> FidResult:
        """Measure the distance of ``count`` generated images.

        Args:
            sample: from (start, n) to n images, uint8 (n, 3, H, W), of the positions start, start + 1, ...;
                noise that follows from the position makes measurements repeatable at any batch size.
            count: generated images, at least 2.
            should_stop: asked before each batch.
            thorough: find the distance's interval and limit and the nearest training images too.

        Raises:
            ValueError: if ``count`` is below 2 or ``sample`` returns anything else.
            Interrupted: if ``should_stop`` said so.
        """
        if count < 2:
            raise ValueError(f"count: a covariance takes at least 2 samples, got {count}")
        features = self._features(sample, count, should_stop)
        classes = None
        if isinstance(self.extractor, Classifier):
            found = self.extractor.classify(features).cpu()
            classes = tuple(torch.bincount(found, minlength=self.extractor.num_classes).tolist())
        ours = statistics(features)
        other = None if self._others is None else frechet_distance(ours, self._others.statistics)
        result = FidResult(
            frechet_distance(ours, self._reference.statistics), count, classes, other, self._quality(features)
        )
        return self._thorough(result, features) if thorough else result

    def _left_out(self, should_stop: ShouldStop | None) -> str | None:
        """Try precision on images of one colour each, the mean of a real image, in which there is nothing to know."""
        if "precision_recall" not in self.config.metrics or not isinstance(self.extractor, Classifier):
            return None
        left_out = "precision and recall are left out; take fid.extractor inception or dinov2"
        if self.warning is not None:
            return f"fid.metrics: the classifier is seldom right, and {left_out}"
        real = self._real.images[:: -(-len(self._real) // FLAT)]
        if len(real) <= quality.NEIGHBOURS:
            return None
        flat = real.float().mean((2, 3), keepdim=True).round().to(torch.uint8).expand_as(real)
        features = self._features(lambda start, n: flat[start : start + n], len(flat), should_stop)
        share, _ = quality.precision_recall(features.to(self._device), self._reference.features.to(self._device))
        if share <= MOST_FLAT:
            return None
        return f"fid.metrics: {share:.0%} of images of one colour pass as real in the classifier's features: {left_out}"

    def _quality(self, features: Tensor) -> dict[str, float]:
        """Compute the metrics that were asked for, as far as there are enough images."""
        wanted, real, found = self.config.metrics, self._reference.features, dict[str, float]()
        if "kid" in wanted:
            found["kid"] = quality.kernel_distance(features, real)
        if "inception_score" in wanted:
            found["inception_score"] = quality.inception_score(self.extractor.logits(features))  # pyright: ignore[reportAttributeAccessIssue]
        few = min(len(features), len(real)) <= quality.NEIGHBOURS
        if "precision_recall" in wanted and not few and self.left_out is None:
            near = quality.precision_recall(features.to(self._device), real.to(self._device))
            found |= dict(zip(("precision", "recall"), near, strict=True))
        return found

    def _thorough(self, result: FidResult, features: Tensor) -> FidResult:
        """Add what is too slow for every measurement."""
        splits, reference, device = self._splits, self._reference, self._device
        train, test = (reference, self._others) if self._real is splits.train else (self._others, reference)
        assert train is not None
        if self._unseen is None:
            own = test is None
            self._unseen = nearest((test or train).features, train.features, apart=own, device=device).distance
        neighbours = nearest(features, train.features, device=device)
        result = replace(result, neighbours=neighbours, copying=copying(neighbours.distance, self._unseen))
        # Training images are what generators are compared with; test images are a sample of more like them.
        of_test, dim = self.config.reference == "test", self.extractor.dim
        real = reference.features if of_test else reference.statistics
        if not enough(result.count, dim) or (of_test and not enough(len(self._real), dim)):
            return result
        result = replace(result, interval=distance_interval(features, real, seed=SEED, device=device))
        if not enough(result.count, dim, FEWEST_FOR_LIMIT):
            return result
        return replace(result, limit=distance_limit(features, reference.statistics, seed=SEED, device=device))

    def _features(self, sample: Sample, count: int, should_stop: ShouldStop | None) -> Tensor:
        """Return features (count, D); each process takes every world-th batch, and gets those of the others."""

        def go_on() -> None:
            if should_stop is not None and should_stop():
                raise Interrupted

        def features(start: int, n: int) -> Tensor:
            images = sample(start, n)
            if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[:2] != (n, 3):
                got = f"{images.dtype} {tuple(images.shape)}"
                raise ValueError(f"sample: expected uint8 ({n}, 3, H, W), got {got}")
            return self.extractor(images)

        size = self.config.batch_size
        return in_batches(features, count, self.extractor.dim, batch_size=size, env=self._env, go_on=go_on)

    def _of(self, real: ImageSet, should_stop: ShouldStop | None) -> "_Measured":
        if len(real) < 2:
            raise UsageError(f"fid: {real.name} has 1 {real.split} image, expected 2 or more")
        key = json.dumps({
            "content": real.content_hash, "split": real.split, "count": len(real), "extractor": self.extractor.id,
            "resize": self.extractor.resize, "torch_fidelity": version("torch-fidelity"),
        })  # fmt: skip
        found = self._env.on_rank0(lambda: read_cache(self._cache, key))  # or ranks with different caches would part
        if found is None:
            features = self._features(lambda i, n: real.images[i : i + n], len(real), should_stop)
            of = statistics(features)
            found = {"mean": of.mean, "covariance": of.covariance, "features": features}
            if self._env.first:
                write_cache(self._cache, key, found)
        return _Measured(real, Statistics(found["mean"], found["covariance"]), found["features"])


class _Measured(NamedTuple):
    """Real images with their features (N, D) and these features' statistics."""

    images: ImageSet
    statistics: Statistics
    features: Tensor


def _identity(images: ImageSet) -> dict[str, str | int]:
    return {"split": images.split, "n_real": len(images), "content_hash": images.content_hash}


def _extractor(
    config: FidConfig, splits: Splits, cache: Path, device: torch.device | str
) -> tuple[Extractor, str | None]:
    extractor = EXTRACTORS[config.extractor].build(config, splits, cache, device)
    if extractor.name != config.extractor:
        raise UsageError(f"fid.extractor: expected {config.extractor} to have that name, it has {extractor.name}")
    return extractor, getattr(extractor, "warning", None)


def _with_weights(kind: Callable[..., Extractor], *first: str) -> Callable[..., Extractor]:
    return lambda config, _splits, *rest: kind(*first, config.weights, config.weights_sha256, *rest)


register_extractor("inception", _with_weights(Inception), reads_weights=True)
for _name in MODELS:
    register_extractor(_name, _with_weights(DinoV2, _name), reads_weights=True)
register_extractor("classifier", lambda _config, splits, *rest: Classifier(splits.train, splits.test, *rest))
