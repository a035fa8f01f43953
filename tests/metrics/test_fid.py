from itertools import pairwise

import pytest
import torch
from torchvision.transforms.functional import gaussian_blur

from common.data import DataConfig, ImageSet, Splits, load
from common.metrics import Fid, FidConfig, Interrupted
from common.metrics import fid as module
from common.runtime.errors import UsageError


class Pixels:
    """The first D pixels, as standard scores of 20 around 128, as features."""

    name, id, resize, dim = "pixels", "pixels-1", "none", 6

    def __init__(self):
        self.calls = 0

    def __call__(self, images):
        self.calls += 1
        return (images.flatten(1)[:, : self.dim].float() - 128) / 20


def gaussian(n, seed, shift=0, split="train", side=8):
    noise = torch.randn(n, 3, side, side, generator=torch.Generator().manual_seed(seed))
    images = (noise * 20 + 128 + shift).round().clamp(0, 255).to(torch.uint8)
    return ImageSet(images, None, (), "gaussian", split)


def sampler(images):
    return lambda start, n: images[start : start + n]


@pytest.fixture
def pixels(monkeypatch):
    extractor = Pixels()
    monkeypatch.setattr(module, "_extractor", lambda *arguments: (extractor, None))
    return extractor


def build(splits, cache, **config):
    return Fid(FidConfig(**config), splits, cache, "cpu")


def test_shifted_gaussians_are_at_the_squared_distance_of_their_means(pixels, tmp_path):
    fid = build(Splits(gaussian(20_000, 0, side=2), None), tmp_path, batch_size=999)
    got = fid.measure(sampler(gaussian(20_000, 1, shift=10, side=2).images), 20_000)
    want = pixels.dim * 0.5**2
    # |m + e|^2 with e of variance 2/N in each of 6 dimensions deviates by 2 |m| sqrt(2/N) = 0.025; five of these.
    # The covariance term adds about D^2 / 2N = 0.001, and 8-bit rounding less still.
    assert got.fid == pytest.approx(want, abs=0.13)
    assert (got.count, got.classes) == (20_000, None)


def test_the_batch_size_does_not_matter(pixels, tmp_path):
    real, fake = gaussian(50, 0), gaussian(31, 1, shift=5)
    want = build(Splits(real, None), tmp_path / "31", batch_size=31).measure(sampler(fake.images), 31).fid
    for batch_size in (1, 7, 200):
        fid = build(Splits(real, None), tmp_path / str(batch_size), batch_size=batch_size)
        assert fid.measure(sampler(fake.images), 31).fid == pytest.approx(want, rel=1e-12)


def test_the_real_images_are_read_once_as_long_as_nothing_changes(pixels, tmp_path):
    real = gaussian(50, 0)
    build(Splits(real, None), tmp_path)
    first = pixels.calls
    fid = build(Splits(gaussian(50, 0), None), tmp_path)
    assert pixels.calls == first == 1
    assert fid.measure(sampler(real.images), 50).fid == pytest.approx(0, abs=1e-9)


def test_any_change_of_what_is_measured_is_a_cache_miss(pixels, tmp_path, monkeypatch):
    real = gaussian(50, 0)
    images = real.images.clone()
    images[-1, -1, -1, -1] ^= 1
    other_byte = ImageSet(images, None, (), real.name, real.split)
    other_split = ImageSet(real.images, None, (), real.name, "test")
    for number, each in enumerate((real, other_byte, other_split), 1):
        build(Splits(each, None), tmp_path)
        assert pixels.calls == number
    for number, name in enumerate(("id", "resize"), 4):
        monkeypatch.setattr(pixels, name, "other")
        build(Splits(real, None), tmp_path)
        assert pixels.calls == number
    monkeypatch.setattr(module, "version", lambda package: "9.9")  # of torch-fidelity
    build(Splits(real, None), tmp_path)
    assert pixels.calls == len(list((tmp_path / "fid").iterdir())) == 6


def test_stops_between_batches_when_asked(pixels, tmp_path):
    fid = build(Splits(gaussian(50, 0), None), tmp_path, batch_size=10)
    drawn = []

    def sample(start, n):
        drawn.append(start)
        return gaussian(n, start).images

    with pytest.raises(Interrupted):
        fid.measure(sample, 50, should_stop=lambda: len(drawn) == 2)
    assert drawn == [0, 10]
    answers, before = iter([False, True]), pixels.calls
    splits = Splits(gaussian(50, 1), gaussian(20, 2, split="test"))
    with pytest.raises(Interrupted):
        Fid(FidConfig(), splits, tmp_path, "cpu", should_stop=lambda: next(answers))
    assert pixels.calls == before + 1


class Labelled(Pixels):
    """A classifier whose features are the deviations of the channels, in which no flat image is near a real one."""

    name, dim, num_classes, warning = "classifier", 3, 1, None

    def __init__(self, *_):
        super().__init__()

    def __call__(self, images):
        return images.float().std(dim=(2, 3))

    def classify(self, features):
        return torch.zeros(len(features), dtype=torch.int64)


class Colours(Labelled):
    """One whose features are the means of the channels: a flat image has those of the real one it was made of."""

    def __call__(self, images):
        return images.float().mean((2, 3)).round()


@pytest.mark.parametrize(
    ("classifier", "warning", "left_out"),
    [
        (Labelled, None, None),
        (Labelled, "it says little", "fid.metrics: the classifier is seldom right, and precision and recall are left"),
        (Colours, None, "fid.metrics: 100% of images of one colour pass as real in the classifier's features: "),
    ],
)
def test_precision_and_recall_are_left_out_where_a_classifier_cannot_tell(
    tmp_path, monkeypatch, classifier, warning, left_out
):
    monkeypatch.setattr(module, "Classifier", classifier)
    monkeypatch.setattr(module, "MOST_FLAT", 0.1)  # which the quick classifier of the GAN's tests does without
    monkeypatch.setattr(classifier, "warning", warning)
    fid = build(Splits(gaussian(1500, 0), None), tmp_path)
    quality = fid.measure(sampler(gaussian(40, 1).images), 40).quality
    if left_out is None:
        assert fid.left_out is None
        assert quality.keys() == {"precision", "recall"}
    else:
        assert (fid.left_out or "").startswith(left_out)
        assert quality == {}
    assert build(Splits(gaussian(1500, 0), None), tmp_path, metrics=["kid"]).left_out is None


def test_refuses_samples_that_are_not_what_was_asked_for(pixels, tmp_path):
    fid = build(Splits(gaussian(50, 0), None), tmp_path, batch_size=10)
    with pytest.raises(ValueError, match=r"expected uint8 \(10, 3, H, W\)"):
        fid.measure(lambda start, n: torch.zeros(9, 3, 8, 8, dtype=torch.uint8), 20)
    with pytest.raises(ValueError, match=r"got torch\.float32"):
        fid.measure(lambda start, n: torch.zeros(10, 3, 8, 8), 20)


def test_refuses_too_few_images(pixels, tmp_path):
    with pytest.raises(UsageError, match="fid: gaussian has 1 train image"):
        build(Splits(gaussian(1, 0), None), tmp_path)
    with pytest.raises(ValueError, match="count: a covariance takes at least 2"):
        build(Splits(gaussian(9, 0), None), tmp_path).measure(sampler(gaussian(9, 0).images), 1)
    with pytest.raises(UsageError, match=r"fid\.reference: there are no test images, expected train"):
        build(Splits(gaussian(9, 0), None), tmp_path, reference="test")


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    splits = load(DataConfig(size=16))
    return splits, build(splits, tmp_path_factory.mktemp("cache"))


def noisy(images, labels, strength):
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(0))
    return (images + 200 * strength * noise).round().clamp(0, 255).to(torch.uint8)


def blurred(images, labels, strength):
    return gaussian_blur(images, [9, 9], [2.5 * strength, 2.5 * strength]) if strength else images


def fewer_classes(images, labels, strength):
    return images[labels < round(10 - 8 * strength)]


def test_the_distance_grows_as_images_get_worse(digits):
    splits, fid = digits

    def distance(images):
        return fid.measure(sampler(images), len(images)).fid

    same = distance(splits.train.images)
    assert same == pytest.approx(0, abs=1e-6)
    for spoil in (noisy, blurred, fewer_classes):
        spoilt = [distance(spoil(splits.train.images, splits.train.labels, strength)) for strength in (0.25, 0.5, 1)]
        assert all(a < b for a, b in pairwise([same, *spoilt])), (spoil, spoilt)
        assert spoilt[-1] > 10 * fid.floor
    assert 0 < fid.floor < distance(torch.randint(0, 256, (200, 3, 16, 16), dtype=torch.uint8)) / 10


def test_class_counts_show_a_collapse(digits):
    splits, fid = digits
    threes = splits.train.images[splits.train.labels == 3]
    classes = fid.measure(sampler(threes), len(threes)).classes
    assert len(classes) == 10
    assert sum(classes) == len(threes)
    assert classes[3] > 0.95 * len(threes)
