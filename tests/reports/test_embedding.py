"""What is collected, where points come to lie, what is drawn."""

import re
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from common.reports.embedding import Panel, class_colours, collect_features, draw_panels, pairs, project
from common.reports.figures import COLOURS


class Backwards(nn.Module):
    """A network whose last linear layer was made first."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(12, 3)
        self.neck = nn.Linear(5, 12)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.neck(x).relu())


def test_features_are_what_the_last_linear_layer_is_given_in_each_run():
    network, x = Backwards().double(), torch.randn(7, 5, dtype=torch.float64)
    with collect_features(network) as found:
        network(x)
        network(x[:2])
    want = network.neck(x).relu()
    assert [each.shape for each in found] == [(7, 12), (2, 12)]
    assert torch.equal(found[0], want.detach().float())
    assert not found[0].requires_grad
    network(x)
    assert len(found) == 2


def test_an_exception_takes_the_hooks_away_and_a_network_without_linear_layer_is_refused():
    network = Backwards()
    with pytest.raises(RuntimeError, match="mat1"), collect_features(network):
        network(torch.randn(2, 4))
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in network.modules())
    with pytest.raises(ValueError, match="network: Sequential has no linear layer"), collect_features(nn.Sequential()):
        pass


def clouds(count: int, dimensions: int = 6) -> tuple[Tensor, Tensor]:
    """Three clouds far from each other, and which of them a point is from."""
    member = torch.arange(count) % 3
    noise = torch.randn(count, dimensions, generator=torch.Generator().manual_seed(1))
    return 30.0 * torch.eye(3, dimensions)[member] + noise, member


def test_principal_components_are_those_of_the_singular_value_decomposition():
    features = torch.randn(40, 7, generator=torch.Generator().manual_seed(0)) * torch.arange(1.0, 8)
    points = project(features, method="pca", components=5).double()
    centred = features.double() - features.double().mean(0)
    _, _, axes = np.linalg.svd(centred.numpy(), full_matrices=False)
    want = centred.numpy() @ axes[:5].T
    assert points.shape == (40, 5)
    np.testing.assert_allclose(points.abs(), np.abs(want), atol=1e-4)


def test_tsne_keeps_clouds_together_and_repeats():
    features, member = clouds(60, 60)
    points = project(features, perplexity=5, seed=3)
    assert points.shape == (60, 2)
    distance = torch.cdist(points, points) + torch.eye(60) * 1e9
    assert (member[distance.argmin(1)] == member).float().mean() == 1
    assert torch.equal(project(features, perplexity=5, seed=3), points)


def test_what_cannot_be_drawn_is_refused_in_one_line():
    pca = {"method": "pca", "components": 5}
    cases: list[tuple[Tensor, dict[str, Any], str]] = [
        (
            torch.randn(16, 4),
            {"perplexity": 5},
            "t-SNE of perplexity 5 needs at least 17 points, got 16; take more or a",
        ),
        (torch.randn(5, 8), pca, "5 principal components needs at least 6 .*, got 5"),
        (torch.randn(99), {}, r"features: expected \(N, D\) with D of at least 2, got \(99,\)"),
        (torch.randn(99, 4), pca, r"at least 5, got \(99, 4\)"),
        (torch.full((99, 4), 2.0), {}, "all points are the same"),
        (torch.full((99, 4), torch.nan), {}, "finite"),
        (torch.randn(99, 4), {"perplexity": 0.5}, "perplexity: expected at least 1, got 0.5"),
    ]
    for features, options, message in cases:
        with pytest.raises(ValueError, match=message):
            project(features, **options)
    assert project(torch.randn(17, 4), perplexity=5).shape == (17, 2)
    assert project(torch.randn(6, 8), method="pca", components=5).shape == (6, 5)


def marks(svg: Path, colour: str) -> int:
    """Count the points of a colour, the one in the legend among them."""
    return len(re.findall(rf"<use [^>]*fill: {colour}", svg.read_text()))


def words(svg: Path) -> list[str]:
    return [line.strip() for line in re.findall(r"<!--(.*?)-->", svg.read_text())]


def test_every_point_has_the_colour_of_its_class_and_every_class_its_name(tmp_path):
    points = torch.randn(12, 2)
    labels = torch.tensor([0] * 5 + [1] * 4 + [-1] * 3)
    png, svg = draw_panels(tmp_path / "f", [Panel(points, labels, ["cat", "dog"], "test")], title="UCB")
    assert [marks(svg, colour.lower()) for colour in COLOURS[:2]] == [6, 5]
    assert marks(svg, "#bfbfbf") == 4
    assert set(words(svg)) == {"cat", "dog", "not known", "test", "UCB"}
    draw_panels(tmp_path / "g", [Panel(points[:9], labels[:9], ["cat", "dog"])])
    assert set(words(tmp_path / "g.svg")) == {"cat", "dog"}
    again, _ = draw_panels(tmp_path / "h", [Panel(points, labels, ["cat", "dog"], "test")], title="UCB")
    assert again.read_bytes() == png.read_bytes()


def test_panels_share_a_legend_where_they_share_names_and_many_classes_have_none(tmp_path):
    def panel(count: int, name: str) -> Panel:
        return Panel(torch.randn(count, 2), torch.arange(count), [f"{name}{i}" for i in range(count)], "p")

    _, svg = draw_panels(tmp_path / "same", [panel(3, "a"), panel(3, "a")])
    assert words(svg).count("a1") == 1
    _, svg = draw_panels(tmp_path / "other", [panel(3, "a"), panel(2, "b")])
    assert (words(svg).count("a1"), words(svg).count("b1"), words(svg).count("p")) == (1, 1, 2)
    assert "a23" in words(draw_panels(tmp_path / "24", [panel(24, "a")])[1])
    assert words(draw_panels(tmp_path / "25", [panel(25, "a")])[1]) == ["p"]


def test_panels_stand_in_rows(tmp_path):
    def shape(columns: int | None) -> float:
        panels = [Panel(torch.randn(3, 2), torch.zeros(3).long(), ["a"])] * 4
        svg = draw_panels(tmp_path / "f", panels, columns=columns)[1].read_text()
        width, height = re.findall(r'viewBox="0 0 ([\d.]+) ([\d.]+)"', svg)[0]
        return float(width) / float(height)

    assert shape(None) > 2 > shape(2) > 0.8 > shape(1)


def test_classes_differ_in_colour():
    for count in (1, 7, 8, 10, 11, 20, 21, 100):
        assert len(set(class_colours(count))) == len(class_colours(count)) == count


def test_pairs_are_drawn_below_the_diagonal_and_densities_on_it(tmp_path):
    points = torch.randn(40, 3, generator=torch.Generator().manual_seed(0))
    png, svg = pairs(tmp_path / "p", points, torch.arange(40) % 2, ["fish", "trees"], title="ViT")
    axes = {f"component {i}": 2 for i in (1, 2, 3)}
    assert Counter(words(svg)) == {**axes, "fish": 1, "trees": 1, "ViT": 1}
    assert [marks(svg, colour.lower()) for colour in COLOURS[:2]] == [3 * 20 + 1] * 2
    text = svg.read_text()
    assert text.count('<g id="axes_') == 6
    assert len(re.findall(r"fill: none; stroke: #009e73", text)) == 3
    again, _ = pairs(tmp_path / "q", points, torch.arange(40) % 2, ["fish", "trees"], title="ViT")
    assert again.read_bytes() == png.read_bytes()
