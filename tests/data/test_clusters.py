import json
from pathlib import Path

import pytest
import torch

from common.data.clusters import ClustersConfig, with_clusters, write_clusters
from common.data.image_set import ImageSet, Splits
from common.runtime.errors import UsageError
from common.runtime.seeding import generator

LABELS = torch.tensor([2, 0, 1, 2, 2, 0])
SUPER = torch.tensor([1, 0, 0, 1, 1, 0])


def images(split: str, count: int = 6, seed: int = 0) -> ImageSet:
    pixels = torch.randint(0, 256, (count, 3, 4, 4), generator=generator(seed, split), dtype=torch.uint8)
    return ImageSet(pixels, LABELS[:count], ("a", "b", "c"), "shapes", split, SUPER[:count], ("round", "sharp"))


@pytest.fixture
def splits() -> Splits:
    return Splits(images("train"), images("test", 4))


@pytest.mark.parametrize(
    ("by", "numbers", "names"), [("superclasses", SUPER, ("round", "sharp")), ("classes", LABELS, ("a", "b", "c"))]
)
def test_clusters_are_what_the_data_set_says(splits, by, numbers, names):
    found = with_clusters(splits, ClustersConfig(by=by))
    assert [name for name, _ in found.items()] == ["train", "test"]
    for _, part in found.items():
        assert part.clusters is not None
        assert torch.equal(part.clusters, numbers[: len(part)])
        assert part.cluster_names == names
    assert found.train.content_hash == splits.train.content_hash  # the images are the same
    assert ClustersConfig(by=by).tells_labels
    bare = ImageSet(torch.zeros(2, 3, 4, 4, dtype=torch.uint8), None, (), "bare", "train")
    with pytest.raises(UsageError, match=rf"^clusters.by: the train images of bare have no {by}"):
        with_clusters(Splits(bare, None), ClustersConfig(by=by))


def test_clusters_go_where_the_images_go(splits):
    found = with_clusters(splits, ClustersConfig(by="classes")).train
    some = found.select(torch.tensor([4, 1]))
    assert some.clusters is not None
    assert some.clusters.tolist() == [2, 0]
    assert some.clusters_hash != found.clusters_hash
    at = found.clusters_at(torch.tensor([5, 2]), torch.device("cpu"))
    assert at is not None
    assert at.tolist() == [0, 1]
    assert with_clusters(splits, ClustersConfig()) is splits
    assert splits.train.clusters_at(slice(None), torch.device("cpu")) is None
    assert splits.train.clusters_hash is None


@pytest.fixture
def file(splits, tmp_path):
    """Write clusters of the images, 0 to 4 of five, and return the file and the images with them."""

    def given(images: ImageSet, first: int) -> ImageSet:
        clusters = (torch.arange(len(images)) + first) % 5
        return ImageSet(images.images, images.labels, images.classes, "", "", None, (), clusters, tuple("vwxyz"))

    written = Splits(given(splits.train, 0), given(splits.test, 3))
    path = tmp_path / "clusters.json"
    write_clusters(path, written, {"method": "by hand"})
    return path, written


def test_a_file_holds_what_was_written(splits, file):
    path, written = file
    cfg = ClustersConfig(by="file", file=path)
    found = with_clusters(splits, cfg)
    for name, part in found.items():
        assert part.clusters is not None
        assert torch.equal(part.clusters, dict(written.items())[name].clusters)
        assert (part.cluster_names, part.classes) == (tuple("vwxyz"), ("a", "b", "c"))
    assert json.loads(path.read_text())["configuration"] == {"method": "by hand"}
    assert not cfg.tells_labels
    relabelled = ImageSet(splits.train.images, SUPER, ("x", "y"), "shapes", "train")
    assert with_clusters(Splits(relabelled, splits.test), cfg).train.clusters is not None


def test_a_file_of_other_images_is_refused(splits, file):
    for other, split in (
        (Splits(images("train", seed=1), splits.test), "train"),
        (Splits(splits.train, splits.test.select(torch.tensor([1, 0, 2, 3]))), "test"),
    ):
        with pytest.raises(UsageError, match=rf"^clusters.file: .* was made of other {split} images than shapes"):
            with_clusters(other, ClustersConfig(by="file", file=file[0]))


def test_a_damaged_file_is_refused(splits, file):
    path, _ = file
    content = json.loads(path.read_text())
    parts, train = content["clusters"], content["clusters"]["train"]
    for damaged, message in (
        (content | {"clusters": parts | {"train": [*train, 0]}}, "is damaged"),
        (content | {"clusters": parts | {"train": [5, *train[1:]]}}, "is damaged"),
        (content | {"clusters": parts | {"train": ["x"]}}, "holds no clusters"),
        ({name: value for name, value in content.items() if name != "names"}, "holds no clusters"),
        ([1, 2], "holds no clusters; python -m cbcls.clusters writes one"),
    ):
        path.write_text(json.dumps(damaged))
        with pytest.raises(UsageError, match=rf"^clusters.file: .* {message}"):
            with_clusters(splits, ClustersConfig(by="file", file=path))


def test_a_file_is_named_where_it_is_needed_and_nowhere_else():
    with pytest.raises(ValueError, match=r"^clusters.file: expected a file for clusters.by file, got null"):
        ClustersConfig(by="file")
    with pytest.raises(ValueError, match=r"^clusters.file: expected null for clusters.by classes, got x"):
        ClustersConfig(by="classes", file=Path("x"))
