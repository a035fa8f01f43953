"""Bad input is one line that names the field, the value and what would be right; nothing is written."""

from pathlib import Path

import pytest
from PIL import Image
from refusals import refused

import cbcls.train

FLAGS = {
    "--norm.kind foo": ["norm.kind", "foo", "ucb"],
    "--norm.kind scb": ["norm.kind", "scb", "cluster for each image", "clusters.by superclasses"],
    "--norm.kind dsbn": ["norm.kind", "dsbn", "cluster for each image"],
    "--model.cluster_input --norm.kind bn": ["model.cluster_input", "cluster for each image", "clusters.by"],
    "--model.cluster_input --norm.kind scb --clusters.by classes": ["model.cluster_input", "scb", "bn"],
    "--norm.kind scb --clusters.by classes": ["norm.num_components", "expected 6", "clusters.by classes", "3"],
    "--norm.kind scb --clusters.by classes --norm.num_components 7": ["norm.num_components", "expected 6", "7"],
    "--norm.kind scb --clusters.by superclasses": ["clusters.by", "no superclasses", "data.superclasses"],
    "--norm.kind scb --clusters.by file": ["clusters.file", "a file", "null"],
    "--clusters.file x.json": ["clusters.file", "null for clusters.by none", "x.json"],
    "--clusters.by file --clusters.file x.json": ["clusters.file", "x.json", "cannot be read"],
    "--model.name resnet": ["model.name", "shallow_cnn", "resnet"],
    "--model.position 5": ["model.position", "1 to 4", "5"],
    "--model.name densenet-41-12": ["model.name", "3 n + 4", "densenet-41-12"],
    "--model.name densenet-bc-43-12": ["model.name", "6 n + 4", "densenet-bc-43-12"],
    "--model.name densenet-40-0": ["model.name", "growth", "densenet-40-0"],
    "--model.name timm:nosuchnet": ["model.name", "nosuchnet"],
    "--model.name vit --model.position 2": ["model.position", "2", "vit"],
    "--model.dropout 0.2": ["model.dropout", "0.2", "shallow_cnn"],
    "--model.name densenet-40-12 --model.dropout 1": ["model.dropout", "1"],
    "--model.pretrained": ["model.pretrained", "shallow_cnn"],
    "--model.convert all": ["model.convert", "shallow_cnn"],
    "--model.name timm:test_resnet --model.weights nowhere.pth": ["model.weights", "nowhere.pth"],
    "--model.name timm:test_resnet --model.convert nowhere": ["model.convert", "test_resnet", "nowhere"],
    "--model.name timm:test_resnet --model.convert nowhere --norm.kind bn": ["model.convert", "test_resnet", "nowhere"],
    "--model.name timm:test_resnet --model.convert all --norm.kind in": ["model.convert", "in", "ucb"],
    "--model.name timm:test_vit --model.convert all": ["model.convert", "test_vit", "BatchNorm"],
    "--model.name timm:test_vit --model.convert all --norm.kind bn": ["model.convert", "test_vit", "BatchNorm"],
    "--model.name timm:test_vit --norm.kind none": ["data.size", "test_vit", "8", "16"],
    "--model.name oxford_cnn": ["data.size", "128", "8"],
    "--model.name oxford_cnn --data.size 128 --norm.kind in": ["norm.kind", "oxford_cnn", "in"],
    "--data.augment crazy": ["data.augment", "weak", "crazy"],
    "--data.normalise mean": ["data.normalise", "dataset", "mean"],
    "--data.split paper": ["data.split", "expected official", "oxford_pet", "paper"],
    "--data.name digits --data.root null --data.test_root null --data.fit pad": [
        "data.fit",
        "cut",
        "imagefolder",
        "pad",
    ],
    "--optimizer lion": ["optimizer", "adamw", "lion"],
    "--optimizer sgd --decay absolute": ["decay", "of_lr", "sgd"],
    "--norm.num_components 0": ["norm.num_components", "at least 1", "0"],
    "--norm.groups 7": ["norm.groups", "7"],
    "--norm.kind bn --norm.init uniform": ["norm.init", "uniform", "bn"],
    "--calibration_batches 0": ["calibration_batches", "at least 1", "0"],
    "--epochs 0": ["epochs", "at least 1", "0"],
    "--epochs many": ["epochs", "int", "many"],
    "--batch_size 1": ["batch_size", "at least 2", "1"],
    "--batch_size 2000": ["batch_size", "60", "2000"],
    "--lr 0": ["lr", "more than 0"],
    "--weight_decay -1": ["weight_decay", "0 or more", "-1"],
    "--data.size 33": ["data.size", "33"],
    "--data.root nowhere": ["data.root", "nowhere"],
    "--data.workers -1": ["data.workers", "-1"],
    "--device tpu": ["device", "tpu", "cuda"],
    "--precision fp8": ["precision", "fp8", "bf16"],
    "--seed -1": ["seed", "0 or more", "-1"],
    "--name a/b": ["name", "a/b"],
    "--resume": ["resume", "--name"],
    "--name ghost --resume": ["name", "ghost", "no runs"],
    "--name x --init_from nowhere.pt": ["init_from", "nowhere.pt"],
    "--epohcs 3": ["--epohcs", "--epochs"],
    "--config nowhere.yaml": ["config", "nowhere.yaml"],
}


@pytest.mark.parametrize("flags", FLAGS)
def test_bad_flags(tiny, tmp_path, capsys, flags):
    line = refused(capsys, cbcls.train.main, *tiny, *flags.split())
    for part in FLAGS[flags]:
        assert part in line, line
    assert list(tmp_path.iterdir()) == []


def folder(root: Path, *names: str) -> str:
    """Write one image into each folder, and return their parent."""
    for name in names:
        (root / name).mkdir(parents=True)
        Image.effect_noise((8, 8), 50).convert("RGB").save(root / name / "one.png")
    return str(root)


@pytest.mark.parametrize("dry", [[], ["--dry_run"]])
def test_images_that_no_classifier_can_learn_from(tiny, tmp_path, capsys, dry):
    two = folder(tmp_path / "two", "cat", "dog")
    one, more = (folder(tmp_path / name, "cat") for name in ("one", "more"))
    bare = folder(tmp_path / "bare", ".")
    flags = [*tiny, *dry]
    assert "data.test_root" in refused(capsys, cbcls.train.main, *flags, "--data.root", two, "--data.test_root", "null")
    assert "no labels" in refused(capsys, cbcls.train.main, *flags, "--data.root", bare, "--data.test_root", two)
    assert "no labels" in refused(capsys, cbcls.train.main, *flags, "--data.root", two, "--data.test_root", bare)
    assert "at least 2 classes" in refused(
        capsys, cbcls.train.main, *flags, "--data.root", one, "--data.test_root", more
    )
    assert not (tmp_path / "cbcls").exists()
