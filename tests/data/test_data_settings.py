"""What settings of images may be, to the ends of their ranges, and the line that refuses the next value."""

import math
from pathlib import Path
from typing import Any, cast

import pytest
from refused_settings import assert_refuses, assert_takes

from cbcls.config import ClassifierConfig, ModelConfig
from cbda.config import SourceConfig
from common.data import load
from common.data.clusters import ClustersConfig
from common.data.config import DataConfig
from common.metrics.fid import FidConfig
from common.runtime.errors import UsageError

BELOW_1 = math.nextafter(1.0, 0.0)


TAKEN: list[dict[str, Any]] = [
    {"validation": 0.0}, {"validation": BELOW_1}, {"validation": None}, {"size": 8}, {"size": 1024},
    {"workers": 0},
    *({"name": name, "labels": "coarse"} for name in ("cifar100", "oxford_pet")),
    {"name": "imagefolder", "root": Path("a"), "test_root": Path("b"), "superclasses": Path("c.json")},
    {"name": "mnist_m", "blend": "photographs"}, {"name": "oxford_pet", "split": "paper"},
    *({"name": name, "fit": "pad"} for name in ("imagefolder", "oxford_pet")),
    *({"name": name, "in_memory": False} for name in ("imagefolder", "tiny_imagenet", "oxford_pet")),
]  # fmt: skip


def test_a_range_holds_its_ends():
    for values in TAKEN:
        assert_takes(DataConfig, values)


def test_paths_may_be_given_as_text(tmp_path):
    (tmp_path / "x.png").write_bytes(b"")
    cfg = DataConfig(name="imagefolder", root=cast(Any, str(tmp_path)))
    assert cfg == DataConfig(name="imagefolder", root=tmp_path)
    with pytest.raises(UsageError, match=r"x\.png: cannot be read as an image"):
        load(cfg)
    cases: list[tuple[Any, dict[str, str]]] = [
        (ClassifierConfig, {"out": "a", "cache": "b", "init_from": "c"}),
        (ModelConfig, {"name": "timm:x", "weights": "w"}),
        (SourceConfig, {"name": "imagefolder", "root": "a", "test_root": "b"}),
        (FidConfig, {"extractor": "inception", "weights": "w"}),
        (ClustersConfig, {"by": "file", "file": "f"}),
    ]
    for cls, values in cases:
        names = values.keys() - {"name", "by", "extractor"}
        made = cls(**values)
        assert {name: getattr(made, name) for name in names} == {name: Path(values[name]) for name in names}


SIZE = "data.size: expected a multiple of 4 from 8 to 1024, got"
REFUSED: list[tuple[dict[str, Any], str]] = [
    *(({"validation": bad}, f"data.validation: expected 0 up to, not including, 1, or null, got {bad}")
      for bad in (-math.ulp(0.0), 1.0, math.nan)),
    *(({"size": bad}, f"{SIZE} {bad}") for bad in (4, 0, -8, 30, 1028)),
    ({"workers": -1}, "data.workers: expected 0 or more, got -1"),
    *(({"name": name, "root": "x"}, f"data.root: expected null, since {name} takes none (taken by imagefolder, "
       "cifar10, cifar100, mnist, mnist_m, svhn, tiny_imagenet, oxford_pet), got x")
      for name in ("digits", "digits_m")),
    ({"test_root": "x"}, "data.test_root: expected null, since digits takes none (taken by imagefolder), got x"),
    ({"labels": "coarse"},
     "data.labels: expected fine, since digits takes none (taken by cifar100, oxford_pet), got coarse"),
    ({"superclasses": "x"},
     "data.superclasses: expected null, since digits takes none (taken by imagefolder), got x"),
    ({"blend": "x"}, "data.blend: expected sklearn, since digits takes none (taken by mnist_m), got x"),
    ({"split": "paper"}, "data.split: expected official, since digits takes none (taken by oxford_pet), got paper"),
    ({"fit": "pad"}, "data.fit: expected cut, since digits takes none (taken by imagefolder, oxford_pet), got pad"),
    ({"in_memory": False}, "data.in_memory: expected True, since digits takes none (taken by imagefolder, "
     "tiny_imagenet, oxford_pet), got False"),
]  # fmt: skip


def test_beyond_them_a_line_names_field_range_and_value():
    for values, line in REFUSED:
        assert_refuses(DataConfig, values, line)
