import json
from typing import Any

import numpy as np
import pytest
from PIL import Image

from common.data import DataConfig, load
from common.runtime.errors import UsageError

SPECIES = {"beagle": "dog", "Abyssinian": "cat", "pug": "dog"}


def write_images(root, classes):
    for name in classes:
        (root / name).mkdir(parents=True)
        Image.fromarray(np.zeros((8, 8, 3), dtype=np.uint8)).save(root / name / "1.png")


def config(tmp_path, content, **changes):
    file = tmp_path / "superclasses.json"
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    return DataConfig(name="imagefolder", root=tmp_path / "train", superclasses=file, size=8, **changes)


def test_each_image_gets_the_superclass_of_its_class(tmp_path):
    write_images(tmp_path / "train", SPECIES)
    write_images(tmp_path / "test", ["pug", "Abyssinian"])
    splits: Any = load(config(tmp_path, json.dumps(SPECIES), test_root=tmp_path / "test"))
    assert splits.train.classes == ("Abyssinian", "beagle", "pug")
    for part, superclasses in ((splits.train, "cat dog dog"), (splits.test, "cat dog")):
        assert " ".join(part.superclass_names[i] for i in part.superclasses) == superclasses
        assert [SPECIES[part.classes[i]] for i in part.labels] == superclasses.split()
    flat: Any = load(config(tmp_path, json.dumps(SPECIES), test_root=tmp_path / "test" / "pug")).test
    assert flat.superclasses is None


def test_superclasses_are_numbered_in_the_order_of_their_names(tmp_path):
    superclass_of = {f"class {number}": f"superclass {number * 7 % 10}" for number in range(10)}
    write_images(tmp_path / "train", superclass_of)
    train: Any = load(config(tmp_path, json.dumps(superclass_of))).train
    assert train.superclass_names == tuple(f"superclass {number}" for number in range(10))


def test_a_file_that_does_not_serve_is_refused_in_one_line(tmp_path):
    write_images(tmp_path / "train", SPECIES)
    for content, message in (
        (json.dumps({"beagle": "dog", "pug": "dog"}), "gives class Abyssinian no superclass"),
        (json.dumps(SPECIES | {"tabby": "cat"}), "names class tabby, which the images have not"),
        (json.dumps(SPECIES | {"pug": 3}), "gives class pug no text, expected the name of its superclass"),
        (json.dumps(SPECIES | {"pug": ""}), "gives class pug no text"),
        (json.dumps(SPECIES)[:-1] + ', "pug": "cat"}', "gives class pug two superclasses, dog and cat"),
        (json.dumps(list(SPECIES)), "holds no object, expected {"),
        (b"\xff\xfe\x00", "is not JSON"),
        ("[" * 100_000, "is not JSON"),
    ):
        with pytest.raises(UsageError, match=rf"^data\.superclasses: .*superclasses\.json {message}") as e:
            load(config(tmp_path, content))
        assert "\n" not in str(e.value)
    with pytest.raises(UsageError, match=r"^data\.superclasses: .* cannot be read \(.+\)$"):
        load(DataConfig(name="imagefolder", root=tmp_path / "train", superclasses=tmp_path, size=8))


def test_images_without_classes_take_no_superclasses(tmp_path):
    write_images(tmp_path, ["train"])
    with pytest.raises(UsageError, match=r"data\.superclasses: the images in .*train have no classes"):
        load(config(tmp_path, "{}"))
