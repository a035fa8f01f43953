import numpy as np
import torch
from PIL import Image

from common.reports.diagrams import by_layer, confusion, reliability


def dark(path, box) -> float:
    """Return how dark a share of a picture is, 0 white to 1 black."""
    with Image.open(path) as image:
        wide, high = image.size
        left, top, right, bottom = (int(v * s) for v, s in zip(box, (wide, high) * 2, strict=True))
        part = image.convert("L").crop((left, top, right, bottom))
    return 1 - float(np.asarray(part).mean()) / 255


def test_a_confusion_matrix_is_shaded_where_classes_are_taken_for_each_other(tmp_path):
    names, counts = list("abcd"), torch.diag(torch.tensor([5, 5, 5, 5]))
    png, svg = confusion(tmp_path / "right", counts, names, "title")
    wrong, _ = confusion(tmp_path / "wrong", counts.flip(0), names, "title")
    assert (png.suffix, svg.suffix) == (".png", ".svg")
    for name in ("title", "taken for", "true class"):
        assert name in svg.read_text()
    corner = (0.75, 0.7, 0.88, 0.82)  # the last class taken for itself
    assert dark(png, corner) > 0.5 > dark(wrong, corner)


def test_letters_that_the_font_lacks_are_escaped_and_others_drawn(tmp_path):
    counts = torch.eye(3, dtype=torch.int64)
    png, _ = confusion(tmp_path / "names", counts, ["猫 ж", "caf\udce9", "a\nb"], "犬 é")
    spelt, _ = confusion(tmp_path / "spelt", counts, [r"\u732b ж", r"caf\udce9", r"a\nb"], r"\u72ac é")
    other, _ = confusion(tmp_path / "other", counts, [r"\u732b д", r"caf\udce9", r"a\nb"], r"\u72ac é")
    assert png.read_bytes() == spelt.read_bytes() != other.read_bytes()


def test_reliability_has_a_bar_for_each_bin_that_is_not_empty(tmp_path):
    counts = torch.tensor([0, 3, 0, 2])
    _, svg = reliability(tmp_path / "r", counts, torch.tensor([0.0, 0.5, 0.0, 1.0]), 0.123, "target")
    text = svg.read_text()
    assert "target, ECE 0.123" in text
    assert text.count("#56b4e9") == 2


def test_a_number_of_each_layer_is_drawn_in_its_order_on_a_logarithmic_axis(tmp_path):
    _, svg = by_layer(tmp_path / "layers", {"stem": 0.5, "norm": 20.0, "linear": 2.0}, "divergence", "by layer")
    text = svg.read_text()
    places = [text.index(name) for name in ("stem", "norm", "linear")]
    assert places == sorted(places)
    for word in ("divergence", "by layer"):
        assert word in text
    assert "mathdefault" not in text
