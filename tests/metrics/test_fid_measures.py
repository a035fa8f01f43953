"""What else one pass over one set of features gives, and what each number is comparable by."""

from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
from refused_settings import assert_refuses, assert_takes

from common.data import ImageSet, Splits
from common.metrics import Fid, FidConfig, statistics
from common.metrics import fid as module
from common.metrics.features.neighbours import copying, nearest
from common.metrics.features.quality import inception_score, kernel_distance, precision_recall
from common.metrics.features.uncertainty import distance_interval, distance_limit
from common.metrics.fid import other_split
from common.runtime.errors import UsageError


class Pixels:
    """The first four pixels, and logits that are theirs."""

    name, id, resize, dim = "pixels", "pixels-1", "as they are", 4

    def __init__(self, dim: int = 4) -> None:
        self.dim, self.seen = dim, 0

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        self.seen += len(images)
        return images.flatten(1)[:, : self.dim].float()

    def logits(self, features: torch.Tensor) -> torch.Tensor:
        return features[:, :3] / 50


@pytest.fixture
def pixels(monkeypatch) -> Pixels:
    extractor = Pixels()
    monkeypatch.setattr(module, "_extractor", lambda *_: (extractor, None))
    return extractor


def images(count: int, split: str, seed: int) -> ImageSet:
    values = torch.randint(0, 256, (count, 3, 4, 4), generator=torch.Generator().manual_seed(seed))
    return ImageSet(values.to(torch.uint8), None, (), "mine", split)


TRAIN, TEST, FAKE = images(60, "train", 0), images(40, "test", 1), images(50, "generated", 2)


def built(cache, **config) -> Fid:
    return Fid(FidConfig(**config), Splits(TRAIN, TEST), cache, "cpu")


def measured(fid: Fid, *, thorough: bool = False) -> Any:
    return fid.measure(lambda start, n: FAKE.images[start : start + n], len(FAKE), thorough=thorough)


def features(of: ImageSet) -> torch.Tensor:
    return of.images.flatten(1)[:, :4].float()


@pytest.mark.parametrize("reference", ["train", "test"])
def test_every_number_is_of_the_same_features_of_which_each_image_gives_one(pixels, tmp_path, reference):
    fid = built(tmp_path, reference=reference, metrics=["kid", "inception_score", "precision_recall"])
    real = TRAIN if reference == "train" else TEST
    pixels.seen = 0
    result = measured(fid, thorough=True)
    assert pixels.seen == len(FAKE)  # the real ones are known
    near = precision_recall(features(FAKE), features(real))
    assert result.quality == {
        "kid": kernel_distance(features(FAKE), features(real)),
        "inception_score": inception_score(features(FAKE)[:, :3] / 50),
        "precision": near[0],
        "recall": near[1],
    }
    target = features(real) if reference == "test" else statistics(features(real))
    assert result.interval == distance_interval(features(FAKE), target, seed=module.SEED)
    assert result.limit == distance_limit(features(FAKE), statistics(features(real)), seed=module.SEED)
    assert result.neighbours is not None
    assert torch.equal(result.neighbours.index, nearest(features(FAKE), features(TRAIN)).index)
    unseen = nearest(features(TEST), features(TRAIN)).distance
    assert result.copying == copying(nearest(features(FAKE), features(TRAIN)).distance, unseen)
    tag = f"metric/fid_pixels_{'test' if reference == 'train' else 'train'}"
    assert fid.values(result) == {
        "metric/fid_pixels": result.fid, tag: result.other, "metric/fid_pixels_floor": fid.floor,
        **{f"metric/{name}_pixels": value for name, value in result.quality.items()},
        "metric/fid_pixels_centre": result.interval.centre, "metric/fid_pixels_low": result.interval.low,
        "metric/fid_pixels_high": result.interval.high, "metric/fid_pixels_infinity": result.limit,
        "metric/copies_pixels": result.copying.share, "metric/train_gap_pixels": result.copying.gap,
    }  # fmt: skip


def test_a_plain_measurement_has_what_was_asked_for_alone(pixels, tmp_path):
    result = measured(built(tmp_path, metrics=[]))
    assert (result.quality, result.interval, result.limit) == ({}, None, None)
    assert (result.neighbours, result.copying) == (None, None)
    assert list(measured(built(tmp_path)).quality) == ["precision", "recall"]
    assert built(tmp_path).measure(lambda start, n: FAKE.images[start : start + n], 3).quality == {}  # too few


def test_each_number_has_its_protocol(pixels, tmp_path):
    fid = built(tmp_path, metrics=["kid", "inception_score", "precision_recall"])
    result = measured(fid, thorough=True)
    found = fid.protocols(result)
    assert found.keys() == fid.values(result).keys()
    assert fid.protocol() == {
        "extractor": "pixels", "extractor_id": "pixels-1", "resize": "as they are",
        "quantisation": "uint8, rounded to nearest, clamped", "data": "mine", "split": "train", "n_real": 60,
        "content_hash": TRAIN.content_hash, "torch_fidelity": version("torch-fidelity"),
    }  # fmt: skip
    own = fid.protocol() | {"n_generated": 50}
    other = {"split": "test", "n_real": 40, "content_hash": TEST.content_hash}
    interval = {"seed": module.SEED, "replicates": 20, "resampled": "generated images"}
    precision = {"seed": 2020, "neighbours": 3, "at_most": 10_000}
    for name, wanted in {
        "fid_pixels": own,
        "fid_pixels_test": own | other,
        "fid_pixels_floor": own | {"n_generated": 0, "compared": "real test images"},
        "fid_pixels_low": own | interval, "fid_pixels_centre": own | interval, "fid_pixels_high": own | interval,
        "fid_pixels_infinity": own | {"seed": module.SEED, "points": 15},
        "kid_pixels": own | {"seed": 2020, "subsets": 100, "subset_size": 1000, "kernel": "(x'y / D + 1)^3"},
        "inception_score_pixels": own | {"seed": 2020, "splits": 10},
        "precision_pixels": own | precision, "recall_pixels": own | precision,
        "copies_pixels": own | {"unseen": "40 test images"}, "train_gap_pixels": own | {"unseen": "40 test images"},
    }.items():  # fmt: skip
        assert found.pop(f"metric/{name}") == wanted, name
    assert not found
    turned = built(tmp_path, reference="test")
    found = turned.protocols(measured(turned, thorough=True))
    assert turned.protocol() == fid.protocol() | other
    assert found["metric/fid_pixels_low"]["resampled"] == "generated and real images"
    assert found["metric/copies_pixels"]["content_hash"] == TRAIN.content_hash
    assert found["metric/fid_pixels_train"]["content_hash"] == TRAIN.content_hash


def test_without_test_images_training_images_are_held_against_each_other(pixels, tmp_path):
    fid = Fid(FidConfig(), Splits(TRAIN, None), tmp_path, "cpu")
    result = measured(fid, thorough=True)
    unseen = nearest(features(TRAIN), features(TRAIN), apart=True).distance
    assert result.copying == copying(nearest(features(FAKE), features(TRAIN)).distance, unseen)
    assert fid.protocols(result)["metric/copies_pixels"]["unseen"] == "each training image"
    assert "metric/fid_pixels_test" not in fid.values(result)


def test_an_interval_takes_twice_as_many_samples_as_features_and_the_limit_four_times(pixels, tmp_path):
    for reference in ("train", "test"):
        for count, interval, limit in ((7, False, False), (8, True, False), (15, True, False), (16, True, True)):
            fid = built(tmp_path, reference=reference)
            result = fid.measure(lambda start, n: FAKE.images[start : start + n], count, thorough=True)
            assert (result.interval is not None, result.limit is not None) == (interval, limit)
            assert (f"{fid.tag}_low" in fid.values(result), f"{fid.tag}_infinity" in fid.values(result)) == (
                interval, limit)  # fmt: skip
            assert fid.protocols(result).keys() == fid.values(result).keys()
            assert result.copying is not None
    few = Fid(FidConfig(reference="test"), Splits(TRAIN, images(7, "test", 1)), tmp_path, "cpu")
    assert measured(few, thorough=True).interval is None


def test_when_everything_is_measured(pixels, tmp_path):
    for interval, dim, at, last in (
        ("auto", 256, True, True),
        ("auto", 257, False, True),
        ("every", 9000, True, True),
        ("last", 4, False, True),
        ("never", 4, False, False),
    ):
        fid = built(tmp_path, interval=interval)
        pixels.dim = dim
        assert (fid.thorough(last=False), fid.thorough(last=True)) == (at, last)


def test_fewer_images_than_features_are_warned_of(pixels, tmp_path):
    fid = built(tmp_path)
    assert fid.short(4) is None
    line = fid.short(3)
    assert line is not None
    assert line.startswith("fid.samples: 3 generated images are fewer than the 4 features of pixels: ")
    assert "singular" in line
    few = Fid(FidConfig(), Splits(images(3, "train", 0), None), tmp_path, "cpu").short(100)
    assert few is not None
    assert few.startswith("fid.reference: 3 real images are fewer than the 4 features of pixels: ")


def test_an_inception_score_takes_logits(pixels, tmp_path, monkeypatch):
    monkeypatch.delattr(Pixels, "logits")
    with pytest.raises(UsageError, match=r"^fid\.metrics: inception_score takes logits, which pixels has none of$"):
        built(tmp_path, metrics=["inception_score"])


def test_tags_of_a_chart_and_its_band(pixels, tmp_path):
    fid = built(tmp_path)
    values = fid.values(measured(fid, thorough=True))
    assert fid.distances(values) == ["metric/fid_pixels", "metric/fid_pixels_test", "metric/fid_pixels_floor"]
    (band,) = fid.bands(values).values()
    assert band == ("metric/fid_pixels_centre", "metric/fid_pixels_low", "metric/fid_pixels_high")
    assert fid.bands({"metric/fid_pixels": 1.0}) == {}


@pytest.mark.parametrize("reference", ["train", "test"])
def test_samples_are_measured_against_either_split(pixels, tmp_path, reference):
    fid = built(tmp_path, reference=reference)
    own, other = (TRAIN, TEST) if reference == "train" else (TEST, TRAIN)
    same = fid.measure(lambda start, n: own.images[start : start + n], len(own))
    assert (same.fid, same.other) == (pytest.approx(0, abs=1e-6), pytest.approx(fid.floor, rel=1e-9))
    turned = fid.measure(lambda start, n: other.images[start : start + n], len(other))
    assert (turned.fid, turned.other) == (pytest.approx(fid.floor, rel=1e-9), pytest.approx(0, abs=1e-6))
    assert other_split(reference) == other.split


def test_two_images_have_a_covariance(pixels, tmp_path):
    """Of two points each way the covariance has rank one, d d' / 2, and its square root is d d' / (|d| sqrt 2)."""
    real = torch.zeros(2, 3, 4, 4, dtype=torch.uint8)
    real[1].flatten()[0] = 8
    fid = Fid(FidConfig(), Splits(ImageSet(real, None, (), "mine", "train"), None), tmp_path, "cpu")
    fake = 3 * real
    # Means 4 and 12, standard deviations 8 / sqrt 2 and 24 / sqrt 2: (12 - 4)^2 + (16 / sqrt 2)^2.
    got = fid.measure(lambda start, n: fake[start : start + n], 2)
    assert got.fid == pytest.approx(64 + 128, rel=1e-6)
    assert (got.other, fid.floor) == (None, None)


ABC = "abcdefABCDEF0123456789" + 42 * "0"


def test_settings_name_field_range_and_value():
    for values in (
        {"samples": 2, "batch_size": 1, "final_samples": 2, "metrics": []},
        {"extractor": "inception", "weights": Path("x"), "weights_sha256": ABC},
    ):
        assert_takes(FidConfig, values)
    readers = "inception or dinov2 or dinov2_base or dinov2_small"
    for values, line in (
        ({"samples": 1}, "fid.samples: expected 2 or more, got 1"),
        ({"batch_size": 0}, "fid.batch_size: expected 1 or more, got 0"),
        ({"final_samples": 1}, "fid.final_samples: expected null, or 2 or more, got 1"),
        ({"weights": "x"}, f"fid.weights: classifier reads none, expected null or fid.extractor {readers}"),
        ({"weights_sha256": ABC}, "fid.weights_sha256: expected null where fid.weights names no file"),
        *(
            (
                {"extractor": "inception", "weights": "x", "weights_sha256": bad},
                f"fid.weights_sha256: expected 64 hexadecimal digits, got {bad!r}",
            )
            for bad in (ABC[:-1], ABC + "0", ABC[:-1] + "g")
        ),
        (
            {"metrics": ["kid", "ppl", "fid"]},
            "fid.metrics: expected some of kid, inception_score, precision_recall, got ppl, fid",
        ),
    ):
        assert_refuses(FidConfig, values, line)
