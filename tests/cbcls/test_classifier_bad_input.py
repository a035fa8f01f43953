"""Bad input is one line that names the field, the value and what would be right; nothing is written."""

from pathlib import Path

from PIL import Image
from refusals import refused

import cbcls.train

FLAGS = {
    "--norm.kind foo": ["norm.kind", "foo", "ucb"],
    "--norm.kind scb": ["norm.kind", "scb", "cluster for each image", "clusters.by superclasses"],
    "--model.onehot_cluster --norm.kind bn": ["model.onehot_cluster", "cluster for each image", "clusters.by"],
    "--model.onehot_cluster --norm.kind scb --clusters.by classes": ["model.onehot_cluster", "scb", "bn"],
    "--norm.kind scb --clusters.by classes": ["norm.num_components", "expected 6", "clusters.by classes", "3"],
    "--norm.kind scb --clusters.by superclasses": ["clusters.by", "no superclasses", "data.superclasses"],
    "--norm.kind scb --clusters.by file": ["clusters.file", "a file", "null"],
    "--clusters.file x.json": ["clusters.file", "null for clusters.by none", "x.json"],
    "--clusters.by file --clusters.file x.json": ["clusters.file", "x.json", "cannot be read"],
    "--model.name resnet": ["model.name", "shallow_cnn", "resnet"],
    "--model.position 5": ["model.position", "1 to 4", "5"],
    "--model.name densenet-41-12": ["model.name", "3 n + 4", "densenet-41-12"],
    "--model.name densenet-40-0": ["model.name", "growth", "densenet-40-0"],
    "--model.name timm:nosuchnet": ["model.name", "nosuchnet"],
    "--model.name vit --model.position 2": ["model.position", "2", "vit"],
    "--model.dropout 0.2": ["model.dropout", "0.2", "shallow_cnn"],
    "--model.name densenet-40-12 --model.dropout 1": ["model.dropout", "1"],
    "--model.pretrained": ["model.pretrained", "shallow_cnn"],
    "--model.convert all": ["model.convert", "shallow_cnn"],
    "--model.name timm:test_resnet --model.weights nowhere.pth": ["model.weights", "nowhere.pth"],
    "--model.name timm:test_resnet --model.convert nowhere": ["model.convert", "test_resnet", "nowhere"],
    "--model.name timm:test_resnet --model.convert all --norm.kind in": ["model.convert", "in", "ucb"],
    "--model.name timm:test_vit --model.convert all": ["model.convert", "test_vit", "BatchNorm"],
    "--model.name timm:test_vit --norm.kind none": ["data.size", "test_vit", "8", "16"],
    "--model.name oxford_cnn": ["data.size", "128", "8"],
    "--model.name oxford_cnn --data.size 128 --norm.kind in": ["norm.kind", "oxford_cnn", "in"],
    "--optimizer sgd --decay absolute": ["decay", "of_lr", "sgd"],
    "--recalibrate.images 1": ["recalibrate.images", "at least 2", "1"],
    "--batch_size 2000": ["batch_size", "60", "2000"],
    "--name x --init_from nowhere.pt": ["init_from", "nowhere.pt"],
}
"""Of this application; what all runs refuse is tested in tests/train, tests/data and tests/norms."""


def test_bad_flags_are_one_line_each_and_nothing_is_written(tiny, tmp_path, capsys):
    for flags, parts in FLAGS.items():
        line = refused(capsys, cbcls.train.main, *tiny, *flags.split())
        assert all(part in line for part in parts), line
    assert list(tmp_path.iterdir()) == []


def folder(root: Path, *names: str) -> str:
    """Write one image into each folder, and return their parent."""
    for name in names:
        (root / name).mkdir(parents=True)
        Image.effect_noise((8, 8), 50).convert("RGB").save(root / name / "one.png")
    return str(root)


def test_images_that_no_classifier_can_learn_from(tiny, tmp_path, capsys):
    two = folder(tmp_path / "two", "cat", "dog")
    one, more = (folder(tmp_path / name, "cat") for name in ("one", "more"))
    bare = folder(tmp_path / "bare", ".")
    for train, test, line in (
        (two, "null", "data.test_root"),
        (bare, two, "no labels"),
        (two, bare, "no labels"),
        (one, more, "at least 2 classes"),
    ):
        assert line in refused(capsys, cbcls.train.main, *tiny, "--data.root", train, "--data.test_root", test)
    assert not (tmp_path / "cbcls").exists()
