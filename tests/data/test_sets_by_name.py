"""A data set of one's own, by name."""

from typing import Any, cast

import pytest
import torch

from common.data import DataConfig, ImageSet, Splits, load, register_data_set
from common.data.names import DATA_SETS
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
    with pytest.raises(
        ValueError, match=r"^data\.blend: expected sklearn, since grey takes none \(taken by mnist_m\), got x$"
    ):
        DataConfig(name="grey", blend="x")
    with pytest.raises(ValueError, match=r"^data\.labels: .* \(taken by cifar100, oxford_pet, grey\), got coarse$"):
        DataConfig(labels="coarse")


def test_a_wrong_name_lists_the_known_ones_and_the_nearest():
    register_data_set("grey", lambda config: grey(config.size))
    for name, hint in (("gray", "; did you mean grey?"), ("cifar1", "; did you mean cifar10?")):
        with pytest.raises(ValueError, match=r"^data\.name: expected one of digits, .*, oxford_pet, grey, got ") as it:
            DataConfig(name=name)
        assert str(it.value).endswith(f"got {name}{hint}")


def test_what_a_set_gives_is_held_against_what_was_asked_for():
    register_data_set("small", lambda config: grey(8))
    odd: Any = lambda config: grey(config.size).train  # noqa: E731
    register_data_set("odd", odd)
    with pytest.raises(UsageError, match=r"^data\.size: expected 16 x 16 of small, got 8 x 8$"):
        load(DataConfig(name="small", size=16))
    with pytest.raises(UsageError, match=r"^data\.name: expected odd to load Splits of images, got ImageSet$"):
        load(DataConfig(name="odd", size=8))


def test_a_wrong_registration_is_one_line_and_adds_nothing():
    before, wrong = DATA_SETS.names(), cast(Any, 3)
    for register, message in (
        (
            lambda: register_data_set("digits", grey),
            "name: digits is taken; for data.name there are digits, digits_m, ",
        ),
        (
            lambda: register_data_set("My set", grey),
            "name: expected lower-case letters, digits and underscores, a letter first, got 'My set'",
        ),
        (lambda: register_data_set("mine", wrong), "load: expected a function of a DataConfig, got int"),
        (
            lambda: register_data_set("mine", grey, takes=("root", "colour")),
            "takes: expected some of root, .*, blend, .*, got colour",
        ),
    ):
        with pytest.raises(ValueError, match=f"^{message}") as caught:
            register()
        assert "\n" not in str(caught.value)
    assert DATA_SETS.names() == before
