"""What else one pass over one set of features gives, and what each number is comparable by."""

import json
from typing import Any

import pytest
import torch
from refused_settings import assert_refuses, assert_takes

from common.data import ImageSet, Splits
from common.metrics import Fid, FidConfig, FidResult, statistics
from common.metrics import fid as module
from common.metrics.features.neighbours import copying, nearest
from common.metrics.features.quality import inception_score, kernel_distance, precision_recall
from common.metrics.features.uncertainty import distance_interval, distance_limit
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
    real, other = (TRAIN, TEST) if reference == "train" else (TEST, TRAIN)
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
    assert len(other) != len(real)


def test_a_plain_measurement_has_what_was_asked_for_alone(pixels, tmp_path):
    result = measured(built(tmp_path, metrics=[]))
    assert (result.quality, result.interval, result.limit) == ({}, None, None)
    assert (result.neighbours, result.copying) == (None, None)
    assert list(measured(built(tmp_path)).quality) == ["precision", "recall"]


def test_each_number_has_its_protocol(pixels, tmp_path):
    fid = built(tmp_path, metrics=["kid", "inception_score", "precision_recall"])
    result = measured(fid, thorough=True)
    found = fid.protocols(result)
    assert found.keys() == fid.values(result).keys()
    common = {"extractor": "pixels", "extractor_id": "pixels-1", "resize": "as they are", "data": "mine",
              "quantisation": "uint8, rounded to nearest, clamped"}  # fmt: skip
    for protocol in found.values():
        assert common.items() <= protocol.items()
    own = {"split": "train", "n_real": 60, "content_hash": TRAIN.content_hash, "n_generated": 50}
    for tag in found.keys() - {"metric/fid_pixels_test", "metric/fid_pixels_floor"}:
        assert own.items() <= found[tag].items()
    there = {"split": "test", "n_real": 40, "content_hash": TEST.content_hash, "n_generated": 50}
    assert there.items() <= found["metric/fid_pixels_test"].items()
    floor = found["metric/fid_pixels_floor"]
    assert (floor["compared"], floor["n_generated"], floor["n_real"]) == ("real test images", 0, 60)
    for end in ("centre", "low", "high"):
        protocol = found[f"metric/fid_pixels_{end}"]
        assert (protocol["seed"], protocol["replicates"]) == (module.SEED, 20)
        assert protocol["resampled"] == "generated images"
    assert (found["metric/fid_pixels_infinity"]["seed"], found["metric/fid_pixels_infinity"]["points"]) == (20, 15)
    assert found["metric/kid_pixels"]["subsets"] == 100
    assert (found["metric/recall_pixels"]["neighbours"], found["metric/precision_pixels"]["neighbours"]) == (3, 3)
    assert found["metric/inception_score_pixels"]["splits"] == 10
    assert found["metric/copies_pixels"]["unseen"] == found["metric/train_gap_pixels"]["unseen"] == "40 test images"
    json.dumps(found)
    turned = built(tmp_path, reference="test")
    result = measured(turned, thorough=True)
    found = turned.protocols(result)
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


def test_copied_training_images_are_found_out_and_test_images_are_not(pixels, tmp_path):
    fid = built(tmp_path)

    def judged(of: ImageSet) -> Any:
        return fid.measure(lambda start, n: of.images[start : start + n], len(of), thorough=True).copying

    copied = judged(TRAIN)
    assert (copied.share, copied.gap, copied.alarm) == (1, 1, True)
    assert not judged(images(200, "fresh", 9)).alarm


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


def test_few_test_images_have_no_interval_as_a_sample(pixels, tmp_path):
    fid = Fid(FidConfig(reference="test"), Splits(TRAIN, images(7, "test", 1)), tmp_path, "cpu")
    assert measured(fid, thorough=True).interval is None


def test_precision_and_recall_are_left_out_of_three_images(pixels, tmp_path):
    assert built(tmp_path).measure(lambda start, n: FAKE.images[start : start + n], 3).quality == {}
    assert built(tmp_path).measure(lambda start, n: FAKE.images[start : start + n], 4).quality


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


def test_metrics_are_those_there_are():
    assert_takes(FidConfig, {"metrics": []})
    assert_refuses(
        FidConfig,
        {"metrics": ["kid", "ppl", "fid"]},
        "fid.metrics: expected some of kid, inception_score, precision_recall, got ppl, fid",
    )


def test_tags_of_a_chart_and_its_band(pixels, tmp_path):
    fid = built(tmp_path)
    values = fid.values(measured(fid, thorough=True))
    assert fid.distances(values) == ["metric/fid_pixels", "metric/fid_pixels_test", "metric/fid_pixels_floor"]
    (band,) = fid.bands(values).values()
    assert band == ("metric/fid_pixels_centre", "metric/fid_pixels_low", "metric/fid_pixels_high")
    assert fid.bands({"metric/fid_pixels": 1.0}) == {}


def test_what_was_not_measured_is_none():
    result = FidResult(1.0, 10, None)
    assert (result.other, result.interval, result.limit, result.neighbours, result.copying) == (None,) * 5
    assert result.quality == {}
