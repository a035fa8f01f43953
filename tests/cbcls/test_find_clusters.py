import dataclasses
import json
import math
import shlex
from typing import Any

import numpy as np
import pytest
import torch
from refusals import refused
from sklearn.mixture import GaussianMixture

import cbcls.clusters
import cbcls.train
from cbcls.clusters import FindClustersConfig, find_clusters
from common.data import ImageSet, Splits
from common.data.image_set import resize
from common.runtime.errors import UsageError
from common.runtime.seeding import generator

COLOURS = torch.tensor([[200, 30, 30], [30, 200, 30], [30, 30, 200]])


def coloured(groups: list[int], split: str, size: int = 8) -> ImageSet:
    """Make images of noise on a colour of each group; labels know nothing of it."""
    noise = torch.randint(-20, 21, (len(groups), 3, size, size), generator=generator(0, split))
    pixels = (COLOURS[groups][:, :, None, None] + noise).to(torch.uint8)
    labels = torch.arange(len(groups)) % 2
    return ImageSet(pixels, labels, ("even", "odd"), "colours", split)


TRAIN = [0] * 10 + [1] * 30 + [2] * 20
TEST = [2, 2, 0, 1, 2]


@pytest.fixture
def splits() -> Splits:
    return Splits(coloured(TRAIN, "train"), coloured(TEST, "test"), coloured([0, 1, 1], "validation"))


def settings(**changes: Any) -> FindClustersConfig:
    return dataclasses.replace(FindClustersConfig(components=8, restarts=3), **changes)


def test_groups_that_are_far_apart_are_found_the_largest_first():
    for size, seed in ((8, 0), (40, 2)):
        splits = Splits(
            coloured(TRAIN, "train", size), coloured(TEST, "test", size), coloured([0, 1], "validation", size)
        )
        found = dict(find_clusters(splits, settings(seed=seed)).items())
        rank = torch.tensor([2, 0, 1])  # of 10, 30 and 20 images
        for name, groups in (("train", TRAIN), ("test", TEST), ("validation", [0, 1])):
            clusters = found[name].clusters
            assert clusters is not None
            assert clusters.tolist() == rank[groups].tolist()
            assert found[name].cluster_names == ("0", "1", "2")
            assert found[name].classes == ("even", "odd")


def test_clusters_are_those_of_a_mixture_fitted_to_principal_components_by_hand():
    """The same steps in float64, components by a singular value decomposition; the images are smooth noise."""
    coarse = torch.rand(80, 3, 3, 3, generator=generator(0)) * 255
    noise = torch.nn.functional.interpolate(coarse, (40, 40), mode="bilinear").to(torch.uint8)
    splits = Splits(ImageSet(noise[:60], None, (), "x", "train"), ImageSet(noise[60:], None, (), "x", "test"))
    cfg = settings(num_clusters=3, components=5, restarts=4, side=8, seed=2)
    found = find_clusters(splits, cfg)
    x = resize(noise, 8).flatten(1).double().numpy()
    x = (x - x[:60].mean(0)) / x[:60].std(0)
    z = x @ np.linalg.svd(x[:60], full_matrices=False)[2][:5].T
    mixture = GaussianMixture(
        3, covariance_type="diag", n_init=4, init_params="k-means++", max_iter=1000, random_state=2
    )
    said = mixture.fit(z[:60]).predict(z)
    order = sorted(range(3), key=lambda k: (-int((said[:60] == k).sum()), k))
    want = [order.index(k) for k in said]
    assert found.train.clusters is not None
    assert found.train.clusters.tolist() == want[:60]
    assert found.test is not None
    assert found.test.clusters is not None
    assert found.test.clusters.tolist() == want[60:]


def test_what_clusters_say_of_classes_is_counted():
    labels = torch.tensor([0, 0, 1, 1])
    images = ImageSet(torch.zeros(4, 3, 4, 4, dtype=torch.uint8), labels, ("a", "b"), "x", "train", None, (), labels,
                      ("0", "1"))  # fmt: skip
    text = f"images by cluster 2 2; {math.log(2):.3f} nats of mutual information with the class"
    assert cbcls.clusters._described(images) == text
    bare = dataclasses.replace(images, labels=None, classes=())
    assert cbcls.clusters._described(bare) == "images by cluster 2 2"


def test_test_images_have_no_part_in_what_the_clusters_are(splits):
    other = Splits(splits.train, coloured([0, 0, 0, 0], "test"))
    ours, theirs = (find_clusters(each, settings()).train.clusters for each in (splits, other))
    assert ours is not None
    assert theirs is not None
    assert torch.equal(ours, theirs)


def test_too_few_images_are_refused(splits):
    with pytest.raises(UsageError, match=r"^components: expected at most 60, for 60 images of 192 values, got 64"):
        find_clusters(splits, settings(components=64))
    small = Splits(coloured([0, 1, 2] * 3, "train", 4), None)
    with pytest.raises(UsageError, match=r"^num_clusters: expected at most 9, as many as training images, got 10"):
        find_clusters(small, settings(components=2, num_clusters=10))
    alike = Splits(dataclasses.replace(small.train, images=small.train.images[:1].repeat(9, 1, 1, 1)), None)
    with pytest.raises(UsageError, match=r"^data\.name: the training images of colours are all the same"):
        find_clusters(alike, settings(components=2))


@pytest.fixture
def flags(pictures, tmp_path) -> list[str]:
    return ["--data.name", "imagefolder", "--data.root", str(pictures / "train"), "--data.test_root",
            str(pictures / "test"), "--data.size", "8", "--components", "4", "--restarts", "2",
            "--out", str(tmp_path / "found clusters.json")]  # fmt: skip


def test_a_file_is_found_again_and_never_written_over(flags, tmp_path, capsys):
    cbcls.clusters.main([*flags, "--num_clusters", "2"])
    out, path = capsys.readouterr().out, tmp_path / "found clusters.json"
    content, written = json.loads(path.read_text()), path.stat().st_mtime_ns
    counts = [content["clusters"]["train"].count(k) for k in (0, 1)]
    assert sum(counts) == 60
    assert counts[0] >= counts[1]
    assert f"images by cluster {counts[0]} {counts[1]}; " in out
    assert content["configuration"] == {"method": "gaussian mixture", "num_clusters": 2, "components": 4, "restarts": 2,
                                        "side": 32, "seed": 0}  # fmt: skip
    cbcls.clusters.main([*flags, "--num_clusters", "2"])
    assert "were there" in capsys.readouterr().out
    assert path.stat().st_mtime_ns == written
    assert "holds other clusters" in refused(capsys, cbcls.clusters.main, *flags, "--num_clusters", "3")
    cbcls.clusters.main([*flags, "--num_clusters", "3", "--force"])
    assert json.loads(path.read_text())["configuration"]["num_clusters"] == 3
    path.write_text("no clusters")
    assert "holds other clusters" in refused(capsys, cbcls.clusters.main, *flags)


def test_training_goes_by_the_clusters_that_were_found(flags, tiny, tmp_path, capsys):
    cbcls.clusters.main([*flags, "--num_clusters", "2"])
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("use "))
    flags_found = shlex.split(line.split("cbcls.train ")[1])
    cbcls.train.main([*tiny, *flags_found, "--epochs", "1", "--name", "run"])
    assert "loss/test" in (tmp_path / "cbcls" / "run" / "metrics.jsonl").read_text()
    other = [*tiny, *flags_found, "--data.size", "12"]
    assert "clusters.file" in refused(capsys, cbcls.train.main, *other, "--name", "other")


def test_settings_out_of_range():
    for name, least in {"num_clusters": 2, "components": 1, "restarts": 1, "side": 4, "seed": 0}.items():
        with pytest.raises(ValueError, match=f"^{name}: expected at least {least}, got {least - 1}"):
            settings(**{name: least - 1})
    assert str(FindClustersConfig().path) == "clusters/digits-32-k3-seed0.json"
