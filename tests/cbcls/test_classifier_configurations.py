"""Every row of Tables V, VII and VIII is put together from files for model, data and norm."""

import torch

import cbcls.config  # noqa: F401 - so that its own files are found by name
from cbcls.config import ClassifierConfig
from cbcls.models import build_classifier
from common.runtime.cli import parse


def composed(*names: str, flags: tuple[str, ...] = ()) -> ClassifierConfig:
    return parse(ClassifierConfig, [*(part for name in names for part in ("--config", name)), *flags])


FILE = ("--clusters.by", "file", "--clusters.file", "clusters.json")
ROWS = [
    *(("shallow", "cifar10", norm, 3, 10) for norm in ("bn", "mn", "scb_base", "scb", "ucb", "paper_ucb")),
    ("shallow", "cifar100", "scb", 3, 100),
    ("shallow", "tiny_imagenet", "ucb", 3, 200),
    *(("densenet40", "cifar100", norm, 5, 100) for norm in ("none", "bn", "mn", "ucb")),
    ("densenet100", "cifar100", "ucb", 5, 100),
    *(("vit", "cifar100_superclasses", norm, 20, 100) for norm in ("bn", "scb_base", "scb", "onehot_baseline")),
    *(("oxford_cnn", "oxford_pet", norm, 2, 37) for norm in ("none", "scb", "onehot_baseline")),
]
"""Models, data, layers, clusters and classes: each layer with some model, each model with every one of its data."""


def test_a_row_of_the_papers_tables_can_be_built():
    for model, data, norm, clusters, classes in ROWS:
        asks = norm in ("scb", "scb_base") and model == "shallow"
        cfg = composed(model, data, norm, flags=FILE if asks else ())
        kind = {"onehot_baseline": "none", "paper_ucb": "ucb"}.get(norm, norm)
        assert (cfg.norm.kind, cfg.norm.num_components) == (kind, clusters)
        assert cfg.model.onehot_cluster == (norm == "onehot_baseline")
        assert cfg.data.name == data.removesuffix("_superclasses")
        assert composed(norm, data, model, flags=FILE if asks else ()).norm.kind == kind  # in any order
        with torch.device("meta"):
            network = build_classifier(cfg, classes, clusters)
        assert network.linear.out_features == classes
        features = {"shallow": 256, "densenet40": 448, "densenet100": 1168, "vit": 1024, "oxford_cnn": 256}[model]
        assert network.linear.in_features == features + clusters * (norm == "onehot_baseline")


def test_the_recipes_are_the_papers():
    shallow = composed("shallow", "cifar10", "ucb")
    assert (shallow.optimizer, shallow.lr, shallow.weight_decay, shallow.decay) == ("adamw", 1e-3, 1e-4, "of_lr")
    assert (shallow.batch_size, shallow.epochs, shallow.data.size, shallow.data.flip) == (256, 100, 32, False)
    assert shallow.data.augment == "none"
    assert (shallow.schedule.kind, shallow.checkpoint_keep) == ("constant", [25, 50, 75, 100])
    for name, depth in (("densenet40", 40), ("densenet100", 100)):
        dense = composed(name, "cifar100", "ucb")
        assert dense.model.dense == (depth, 12, False)
        assert (dense.optimizer, dense.lr, dense.weight_decay) == ("sgd", 0.1, 1e-4)
        assert (dense.batch_size, dense.epochs) == (64, 200)
        assert (dense.schedule.milestones, dense.schedule.factor) == ([100, 150], 0.1)
    vit = composed("vit", "cifar100_superclasses", "scb")
    assert (vit.optimizer, vit.lr, vit.weight_decay, vit.decay) == ("adamw", 1e-3, 1e-4, "absolute")
    assert (vit.batch_size, vit.epochs, vit.best.patience, vit.clusters.by) == (256, 100, 10, "superclasses")
    pets = composed("oxford_cnn", "oxford_pet", "scb")
    assert (pets.optimizer, pets.lr, pets.weight_decay, pets.batch_size, pets.epochs) == ("adam", 1e-4, 0, 32, 200)
    assert (pets.best.by, pets.best.patience) == ("loss/validation", 10)
    assert (pets.data.split, pets.data.fit, pets.data.size, pets.clusters.by) == ("paper", "pad", 256, "superclasses")
    assert composed("smoke") != parse(ClassifierConfig, [])
