"""What is promised of FID's settings, names and protocol, in docs/results.md and in published numbers."""

from importlib.metadata import version
from pathlib import Path

import pytest
import torch
from refused_settings import assert_refuses, assert_takes

from common.data import ImageSet, Splits
from common.metrics import fid as module
from common.metrics.classifier import Classifier
from common.metrics.extractors import weights_hash
from common.metrics.fid import Fid, FidConfig, other_split
from common.metrics.inception import URL, Inception

ABC = "abcdefABCDEF0123456789" + 42 * "0"


class Pixels:
    """The first three pixels."""

    name, id, resize, dim = "pixels", "pixels-1", "as they are", 3

    def __call__(self, images):
        return images.flatten(1)[:, :3].float()


@pytest.fixture
def pixels(monkeypatch):
    monkeypatch.setattr(module, "_extractor", lambda *arguments: (Pixels(), None))


def images(count: int, split: str, seed: int) -> ImageSet:
    pixels = torch.randint(0, 256, (count, 3, 4, 4), generator=torch.Generator().manual_seed(seed))
    return ImageSet(pixels.to(torch.uint8), None, (), "mine", split)


def test_a_range_holds_its_ends():
    for values in (
        {"samples": 2},
        {"batch_size": 1},
        {"final_samples": 2},
        {"final_samples": None},
        {"extractor": "inception", "weights": Path("x"), "weights_sha256": ABC},
    ):
        assert_takes(FidConfig, values)


def test_beyond_them_a_line_names_field_range_and_value():
    for values, line in (
        ({"samples": 1}, "fid.samples: expected 2 or more, got 1"),
        ({"batch_size": 0}, "fid.batch_size: expected 1 or more, got 0"),
        ({"final_samples": 1}, "fid.final_samples: expected null, or 2 or more, got 1"),
        (
            {"weights": "x"},
            "fid.weights: classifier reads none, expected null or fid.extractor inception "
            "or dinov2 or dinov2_base or dinov2_small",
        ),
        ({"weights_sha256": ABC}, "fid.weights_sha256: expected null where fid.weights names no file"),
        *(
            (
                {"extractor": "inception", "weights": "x", "weights_sha256": bad},
                f"fid.weights_sha256: expected 64 hexadecimal digits, got {bad!r}",
            )
            for bad in (ABC[:-1], ABC + "0", ABC[:-1] + "g", "")
        ),
    ):
        assert_refuses(FidConfig, values, line)


@pytest.mark.parametrize(("reference", "count", "split"), [("train", 30, "train"), ("test", 20, "test")])
def test_the_protocol_holds_what_the_page_lists(pixels, tmp_path, reference, count, split):
    splits = Splits(images(30, "train", 0), images(20, "test", 1))
    fid = Fid(FidConfig(reference=reference), splits, tmp_path, "cpu")
    real = getattr(splits, reference)
    assert fid.protocol() == {
        "extractor": "pixels", "extractor_id": "pixels-1", "resize": "as they are",
        "quantisation": "uint8, rounded to nearest, clamped", "data": "mine", "split": split, "n_real": count,
        "content_hash": real.content_hash, "torch_fidelity": version("torch-fidelity"),
    }  # fmt: skip
    other = {"train": "test", "test": "train"}[reference]
    assert other_split(reference) == other
    assert (fid.tag, fid.floor_tag, fid.other_tag) == (
        "metric/fid_pixels", "metric/fid_pixels_floor", f"metric/fid_pixels_{other}")  # fmt: skip


@pytest.mark.parametrize("reference", ["train", "test"])
def test_samples_are_measured_against_either_split(pixels, tmp_path, reference):
    splits = Splits(images(30, "train", 0), images(20, "test", 1))
    assert splits.test is not None
    fid = Fid(FidConfig(reference=reference), splits, tmp_path, "cpu")
    assert fid.floor is not None
    own, other = (splits.train, splits.test) if reference == "train" else (splits.test, splits.train)
    same = fid.measure(lambda start, n: own.images[start : start + n], len(own))
    assert (same.fid, same.other) == (pytest.approx(0, abs=1e-6), pytest.approx(fid.floor, rel=1e-9))
    turned = fid.measure(lambda start, n: other.images[start : start + n], len(other))
    assert (turned.fid, turned.other) == (pytest.approx(fid.floor, rel=1e-9), pytest.approx(0, abs=1e-6))
    assert (turned.count, turned.classes) == (len(other), None)


def test_two_images_have_a_covariance(pixels, tmp_path):
    """Of two points each way the covariance has rank one, d d' / 2, and its square root is d d' / (|d| sqrt 2)."""
    real = torch.zeros(2, 3, 4, 4, dtype=torch.uint8)
    real[1].flatten()[0] = 8
    fid = Fid(FidConfig(), Splits(ImageSet(real, None, (), "mine", "train"), None), tmp_path, "cpu")
    fake = 3 * real
    # Means 4 and 12, standard deviations 8 / sqrt 2 and 24 / sqrt 2: (12 - 4)^2 + (16 / sqrt 2)^2.
    got = fid.measure(lambda start, n: fake[start : start + n], 2)
    assert got.fid == pytest.approx(64 + 128, rel=1e-6)
    assert got.other is None


def test_features_are_as_many_as_published():
    assert (Inception.name, Inception.dim) == ("inception", 2048)  # the pool features of Heusel et al.
    assert "299x299" in Inception.resize
    assert URL.endswith("-6726825d.pth")
    assert (Classifier.name, Classifier.dim) == ("classifier", 64)
    assert Classifier.resize == "bicubic with antialiasing to 32x32 where larger"


def test_a_classifier_is_known_by_its_weights(tmp_path):
    pixels = torch.randint(0, 256, (40, 3, 8, 8), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    data = ImageSet(pixels, torch.arange(40) % 2, ("a", "b"), "mine", "train")
    found = [Classifier(data, None, tmp_path, "cpu", steps) for steps in (1, 2)]
    for each in found:
        assert each.id == f"classifier-{weights_hash(each._network.state_dict())}"
    assert found[0].id != found[1].id
