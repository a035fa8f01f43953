import pytest
import torch

from common.data import DataConfig, ImageSet, load, to_float
from common.metrics import classifier as module
from common.metrics.classifier import Classifier
from common.metrics.extractors import weights_hash
from common.runtime.errors import UsageError


@pytest.fixture(scope="module")
def splits():
    return load(DataConfig(size=8))


def build(train, test, cache, steps=8):
    return Classifier(train, test, cache, "cpu", steps)


@pytest.fixture
def training(monkeypatch):
    """Counts how often a network is trained."""
    calls, train = [], module._train

    def counted(*arguments):
        calls.append(1)
        train(*arguments)

    monkeypatch.setattr(module, "_train", counted)
    return calls


def test_learns_digits(tmp_path):
    digits = load(DataConfig(size=16))
    assert digits.test is not None
    assert digits.test.labels is not None
    got = Classifier(digits.train, digits.test, tmp_path, "cpu")
    assert got.accuracy >= 0.95
    assert got.warning is None
    found = torch.tensor([a == b for a, b in zip(got.predict(digits.test.images), digits.test.labels, strict=True)])
    assert float(found.float().mean()) == pytest.approx(got.accuracy, abs=1e-6)


def test_same_images_give_the_same_network_and_nothing_global_changes(splits, tmp_path):
    torch.manual_seed(3)
    before, threads = torch.get_rng_state(), torch.get_num_threads()
    torch.set_num_threads(2)
    ids = {build(splits.train, splits.test, tmp_path / str(i)).id for i in range(2)}
    assert len(ids) == 1
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.get_num_threads() == 2
    torch.set_num_threads(threads)
    torch.manual_seed(4)
    with torch.no_grad():  # as a caller may be who measures
        assert build(splits.train, splits.test, tmp_path / "2").id in ids


def test_the_second_time_it_is_read_from_the_cache(splits, tmp_path, training):
    first, second = (build(splits.train, splits.test, tmp_path) for _ in range(2))
    assert len(training) == 1
    assert (first.id, first.accuracy) == (second.id, second.accuracy)
    images = splits.train.images[:5]
    assert torch.equal(first(images), second(images))
    other = build(splits.train, splits.test, tmp_path, steps=9)
    assert other.id == f"classifier-{weights_hash(other._network.state_dict())}" != first.id
    assert (Classifier.name, Classifier.dim) == ("classifier", 64)


def test_any_change_of_images_training_or_torch_trains_anew(splits, tmp_path, training, monkeypatch):
    def changed(images):
        pixels = images.images.clone()
        pixels[7, 1, 2, 3] ^= 1
        return ImageSet(pixels, images.labels, images.classes, images.name, images.split)

    for number, (train, test, steps) in enumerate((
        (splits.train, splits.test, 2), (changed(splits.train), splits.test, 2), (splits.train, None, 2),
        (splits.train, changed(splits.test), 2), (splits.train, splits.test, 3),
    ), 1):  # fmt: skip
        build(train, test, tmp_path, steps)
        assert len(training) == number
    monkeypatch.setattr(torch, "__version__", "9.9")
    build(splits.train, splits.test, tmp_path, 3)
    assert len(training) == 6


def test_it_trains_on_one_thread_so_that_its_sums_are_the_same_on_any_machine(splits, tmp_path, monkeypatch):
    seen, before = [], torch.get_num_threads()
    monkeypatch.setattr(module, "to_float", lambda images: seen.append(torch.get_num_threads()) or to_float(images))
    torch.set_num_threads(3)
    try:
        monkeypatch.setattr(module, "_predict", lambda network, images: torch.zeros(len(images)))
        build(splits.train, splits.test, tmp_path, steps=2)
        assert seen == [1, 1]
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)


def test_a_damaged_cache_file_is_replaced(splits, tmp_path, training):
    first = build(splits.train, splits.test, tmp_path)
    (path,) = (tmp_path / "classifier").iterdir()
    path.write_bytes(path.read_bytes()[:-1])
    for _ in range(2):
        assert build(splits.train, splits.test, tmp_path).id == first.id
        assert len(training) == 2


def unlabelled(images: ImageSet) -> ImageSet:
    return ImageSet(images.images, None, (), images.name, images.split)


def test_without_test_images_to_compare_with_a_tenth_is_held_out(splits, monkeypatch, tmp_path):
    seen = []
    monkeypatch.setattr(module, "_train", lambda network, data, steps: seen.append(data))
    monkeypatch.setattr(module, "_predict", lambda network, images: seen.append(images) or torch.zeros(len(images)))
    build(splits.train, None, tmp_path / "none")
    build(splits.train, unlabelled(splits.test), tmp_path / "unlabelled")
    fit, held_out, *again = seen
    assert torch.equal(again[0].images, fit.images)
    assert torch.equal(again[1], held_out)
    assert (len(fit), len(held_out)) == (900, 100)
    rows = {image.numpy().tobytes() for image in splits.train.images}
    parts = [{image.numpy().tobytes() for image in part} for part in (fit.images, held_out)]
    assert parts[0] | parts[1] == rows
    assert not parts[0] & parts[1]


def test_refuses_images_that_cannot_be_classified(tmp_path):
    for labels, message in ((None, "has none"), (torch.zeros(10, dtype=torch.int64), "has 1")):
        images = torch.zeros(10, 3, 8, 8, dtype=torch.uint8)
        data = ImageSet(images, labels, () if labels is None else ("a", "b"), "mine", "train")
        with pytest.raises(UsageError, match=rf"fid\.extractor: classifier needs .*mine.* {message}") as caught:
            build(data, None, tmp_path)
        assert "\n" not in str(caught.value)


def test_the_warning_is_below_three_times_chance_or_half_way_to_certainty():
    for classes, least in ((2, 0.75), (3, 2 / 3), (5, 0.6), (100, 0.03)):
        assert module._warning(least + 1e-6, classes) is None
        assert f"expected at least {least:.1%} where chance is" in (module._warning(least - 1e-6, classes) or "")


def test_reads_images_of_any_size_in_any_batch(tmp_path, splits):
    got = build(splits.train, splits.test, tmp_path, steps=2)
    for size in (8, 28, 64):
        images = load(DataConfig(size=size)).train.images[:6]
        features = got(images)
        assert features.shape == (6, got.dim)
        assert features.dtype == torch.float32
        assert not features.requires_grad
        # evaluation mode: an image's features do not depend on its batch; kernels may round differently
        torch.testing.assert_close(torch.cat([got(images[:1]), got(images[1:])]), features, atol=1e-5, rtol=1e-5)
