"""A data set of one's own, by name."""

from typing import Any, cast

import pytest
import torch

from common.data import DataConfig, ImageSet, Splits, load, register_data_set
from common.data.config import DATA_SETS
from common.runtime.errors import UsageError


@pytest.fixture(autouse=True)
def as_before(monkeypatch):
    monkeypatch.setattr(DATA_SETS, "_known", dict(DATA_SETS._known))


def grey(side: int) -> Splits:
    images = torch.full((4, 3, side, side), 128, dtype=torch.uint8)
    return Splits(ImageSet(images, torch.tensor([0, 1, 0, 1]), ("a", "b"), "grey", "train"), None)


def test_a_set_of_ones_own_is_loaded_by_its_name_with_the_settings_it_takes(tmp_path):
    asked = []
    register_data_set("grey", lambda config: asked.append(config) or grey(config.size), takes=("root", "labels"))
    config = DataConfig(name="grey", root=tmp_path, labels="coarse", size=8)
    assert load(config).train.images.shape == (4, 3, 8, 8)
    assert asked == [config]
    cases: list[tuple[dict[str, Any], str]] = [
        (
            {"name": "grey", "blend": "x"},
            r"data\.blend: expected sklearn, since grey takes none .*, got x$",
        ),
        ({"labels": "coarse"}, r"data\.labels: .* \(taken by cifar100, oxford_pet, grey\), got coarse$"),
        ({"name": "gray"}, r"data\.name: expected one of digits, .*, grey, got gray; did you mean grey\?$"),
    ]
    for values, line in cases:
        with pytest.raises(ValueError, match=f"^{line}"):
            DataConfig(**values)


def test_what_a_set_gives_is_compared_with_what_was_asked_for():
    register_data_set("small", lambda config: grey(8))
    register_data_set("odd", cast(Any, lambda config: grey(config.size).train))
    with pytest.raises(UsageError, match=r"^data\.size: expected 16 x 16 of small, got 8 x 8$"):
        load(DataConfig(name="small", size=16))
    with pytest.raises(UsageError, match=r"^data\.name: expected odd to load Splits of images, got ImageSet$"):
        load(DataConfig(name="odd", size=8))


def test_a_wrong_registration_adds_nothing():
    before = DATA_SETS.names()
    wrong: Any = 3
    loads: Any = grey
    for name, load_set, takes, message in (
        ("digits", loads, (), "name: digits is taken"),
        ("mine", wrong, (), "load: expected a function of a DataConfig, got int"),
        ("mine", loads, ("root", "colour"), "takes: expected some of root, .*, blend, .*, got colour"),
    ):
        with pytest.raises(ValueError, match=f"^{message}"):
            register_data_set(name, load_set, takes=takes)
    assert DATA_SETS.names() == before
