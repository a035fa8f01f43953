"""The paper's numbers are those of its tables, which stand here as they are printed."""

import re

import pytest

from common.data.names import DATA_SETS
from common.norms.registry import kinds
from common.reports.published import PUBLISHED, Published

TABLE_V = """
cifar10
BN-1 0.001 84.34 86.49 86.41 86.90
BN-2 0.005 83.44 84.39 85.65 85.65
MN-1 0.001 84.45 86.60 86.6 87.07
MN-2 0.005 83.47 84.60 85.68 85.80
SCB-Norm-base-1 0.001 85.9 86.93 87.09 87.11
SCB-Norm-base-2 0.005 83.65 85.09 86.28 86.41
SCB-Norm-1 0.001 84.68 86.61 87.38 87.57
SCB-Norm-2 0.005 84.85 86.54 87.07 87.07
UCB-Norm-1 0.001 85.15 85.80 87.97 87.97
UCB-Norm-2 0.005 86.04 86.04 87.49 87.49

cifar100
BN-1 0.001 57.41 59.74 59.82 59.82
BN-2 0.005 55.64 56.97 56.29 56.29
MN-1 0.001 56.90 59.80 59.80 60.10
MN-2 0.005 55.80 55.80 56.56 57.09
SCB-Norm-base-1 0.001 57.74 61.01 61.01 61.01
SCB-Norm-base-2 0.005 55.47 57.06 57.06 57.60
SCB-Norm-1 0.001 58.50 59.25 59.65 61.02
SCB-Norm-2 0.005 55.81 57.68 57.68 57.68
UCB-Norm-1 0.001 59.44 61.10 61.10 61.10
UCB-Norm-2 0.005 58.31 60.29 60.29 60.29

tiny_imagenet
BN-1 0.001 37.17 37.17 37.17 37.17
BN-2 0.005 34.11 34.11 34.11 34.11
MN-1 0.001 38.18 38.17 38.5 38.5
MN-2 0.005 34.56 34.99 35.12 35.27
SCB-Norm-base-1 0.001 38.53 40.08 40.08 40.08
SCB-Norm-base-2 0.005 34.78 35.44 35.44 36.71
SCB-Norm-1 0.001 37.72 39.45 40.29 40.29
SCB-Norm-2 0.005 37.97 38.31 38.31 38.31
UCB-Norm-1 0.001 39.71 39.71 39.71 39.71
UCB-Norm-2 0.005 35.78 37.03 37.03 37.03
"""
"""A layer with 1 or 2 for a learning rate, that rate, and accuracy after 25, 50, 75 and 100 epochs."""
TABLE_VI = """
source
AdaMatch 97.36 87.33 79.39 78.09
AdaMatch+SCB-Norm-base 99.26 99.20 99.32 99.26
AdaMatch+SCB-Norm 98.92 98.93 98.92 98.92
AdaMatch+UCB-Norm 98.9 98.5 98.90 98.95

target
AdaMatch 25.08 31.64 20.46 24.73
AdaMatch+SCB-Norm-base 43.10 53.83 43.10 47.46
AdaMatch+SCB-Norm 54.70 59.74 54.70 54.55
AdaMatch+UCB-Norm 33.4 43.83 40.28 42.87
"""
"""Accuracy, precision, recall and F1."""
TABLE_VII = {"ViT+BN": 55.63, "ViT+SCB-Norm-base": 65.87, "ViT+SCB-Norm": 67.38}
TABLE_VIII = {"OxfordCNN_base 80": 63.12, "OxfordCNN_base 113": 66.55, "OxfordCNN+SCB-Norm-base 80": 64.90,
              "OxfordCNN+SCB-Norm-base 113": 67.52, "OxfordCNN+SCB-Norm 80": 67.92,
              "OxfordCNN+SCB-Norm 113": 73.61}  # fmt: skip
"""Accuracies, with the epoch."""
KINDS = {"BN": "bn", "MN": "mn", "SCB-Norm-base": "scb_base", "SCB-Norm": "scb", "UCB-Norm": "ucb", "AdaMatch": "none",
         "OxfordCNN_base": "none"}  # fmt: skip


def published(start: str, end: str = "") -> Published:
    (found,) = (each for each in PUBLISHED if each.place.startswith(start) and each.place.endswith(end))
    return found


def kind(layer: str) -> str:
    """Return the layer of a row's name: AdaMatch+SCB-Norm, ViT+BN, UCB-Norm-2."""
    return KINDS[re.sub(r"-\d$", "", layer.rsplit("+", maxsplit=1)[-1])]


def test_table_v():
    for block in TABLE_V.strip().split("\n\n"):
        data, *rows = block.splitlines()
        for row in rows:
            layer, rate, *values = row.split()
            found = published(f"Table V: shallow CNN, {data}, learning rate {rate}").values
            assert len(found) == 5 * 4
            assert [found[kind(layer), epoch] for epoch in (25, 50, 75, 100)] == [(float(value),) for value in values]


def test_tables_vi_to_viii():
    for block in TABLE_VI.strip().split("\n\n"):
        domain, *rows = block.splitlines()
        found = published("Table VI:", f"({domain})")
        assert found.values == {(kind(row.split()[0]), None): tuple(map(float, row.split()[1:])) for row in rows}
        assert list(found.tags) == ["accuracy", "precision", "recall", "f1"]
        assert all(f"metric/{domain}_" in tag for tags in found.tags.values() for tag in tags)
    assert published("Table VII:").values == {(kind(layer), None): (value,) for layer, value in TABLE_VII.items()}
    rows = [(*name.split(), value) for name, value in TABLE_VIII.items()]
    assert published("Table VIII:").values == {(kind(layer), int(epoch)): (value,) for layer, epoch, value in rows}


def test_the_text_of_the_paper_states_these_gains():
    target = published("Table VI:", "(target)").values  # section IV-E
    gains = [target[kind, None][0] - target["none", None][0] for kind in ("scb_base", "scb", "ucb")]
    assert gains == pytest.approx([18.02, 29.62, 8.32])
    vit = published("Table VII:").values  # section IV-F: about 12 %
    assert vit["scb", None][0] - vit["bn", None][0] == pytest.approx(12, abs=0.5)


def test_rows_are_of_layers_data_and_columns_that_there_are():
    for each in PUBLISHED:
        assert {layer for layer, _ in each.values} <= {*kinds(), "none"}
        for name in ("data.name", "source.name", "target.name"):
            assert each.settings.get(name, "digits") in DATA_SETS.names()
        assert all(len(row) == len(each.tags) for row in each.values.values())
