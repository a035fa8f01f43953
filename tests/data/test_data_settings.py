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

TAKEN: list[dict[str, Any]] = [
    {"validation": 0.0}, {"validation": math.nextafter(1.0, 0.0)}, {"size": 8}, {"size": 1024}, {"workers": 0},
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


REFUSED: list[tuple[dict[str, Any], str]] = [
    *(({"validation": bad}, f"data.validation: expected 0 up to, not including, 1, or null, got {bad}")
      for bad in (-math.ulp(0.0), 1.0, math.nan)),
    *(({"size": bad}, f"data.size: expected a multiple of 4 from 8 to 1024, got {bad}") for bad in (4, 30, 1028)),
    ({"workers": -1}, "data.workers: expected 0 or more, got -1"),
    ({"root": "x"}, "data.root: expected null, since digits takes none (taken by imagefolder, "
     "cifar10, cifar100, mnist, mnist_m, svhn, tiny_imagenet, oxford_pet), got x"),
    *(({name: value}, f"data.{name}: expected {default}, since digits takes none (taken by {others}), got {value}")
      for name, default, others, value in (
          ("test_root", "null", "imagefolder", "x"), ("labels", "fine", "cifar100, oxford_pet", "coarse"),
          ("superclasses", "null", "imagefolder", "x"), ("blend", "sklearn", "mnist_m", "x"),
          ("split", "official", "oxford_pet", "paper"), ("fit", "cut", "imagefolder, oxford_pet", "pad"),
          ("in_memory", True, "imagefolder, tiny_imagenet, oxford_pet", False))),
]  # fmt: skip


def test_beyond_them_a_line_names_field_range_and_value():
    for values, line in REFUSED:
        assert_refuses(DataConfig, values, line)
