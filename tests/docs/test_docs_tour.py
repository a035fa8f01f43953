"""What docs/tour.md shows runs, and does what the page says of it."""

import re
from pathlib import Path

import pytest
import torch

PAGE = Path(__file__).parents[2] / "docs" / "tour.md"
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)


@pytest.fixture(scope="module")
def tour():
    text = PAGE.read_text(encoding="utf-8")
    blocks = list(BLOCK.finditer(text))
    assert len(blocks) == text.count("```python") > 5
    names: dict = {"__name__": "docs.tour"}
    with torch.random.fork_rng():
        for block in blocks:
            code = "\n" * text[: block.start(1)].count("\n") + block[1]  # for the line in a traceback
            exec(compile(code, str(PAGE), "exec"), names)
    return names


def test_the_mixture_finds_both_populations(tour):
    layer = tour["layer"]
    order = layer.mean.flatten().argsort()
    torch.testing.assert_close(layer.mean.flatten()[order], torch.tensor([-3.0, 2.0]), atol=0.15, rtol=0)
    torch.testing.assert_close(layer.log_var.exp().flatten()[order], torch.tensor([0.25, 1.0]), atol=0.15, rtol=0)
    torch.testing.assert_close(layer.log_weights().exp()[order], torch.tensor([0.6, 0.4]), atol=0.03, rtol=0)
    y, bn, low = tour["y"], tour["bn"], tour["low"]
    assert max(abs(y[low].mean()), abs(y[~low].mean())) < 0.05
    assert (round(float(bn[low].mean()), 1), round(float(bn[~low].mean()), 1)) == (-0.8, 1.2)


def test_both_networks_learn_and_conversion_keeps_it(tour):
    assert min(tour["before"], tour["accuracy"](tour["mixture"])) > 0.9
    assert tour["converted_accuracy"] > tour["before"] - 0.01


def test_the_layers_are_healthy_mixtures(tour):
    assert all(state.information > 0.05 and not state.warnings() for state in tour["health"].values())


def test_sources_leave_the_cluster_layer_at_mean_0(tour):
    out, source = tour["out"], tour["source"]
    for k in (0, 1):
        assert abs(out[source == k].mean()) < 1e-5
        assert abs(out[source == k].var() - 1) < 1e-3


def test_the_exported_program_computes_the_same(tour):
    x = tour["images"][:2]
    torch.testing.assert_close(tour["program"].module()(x), tour["mixture"].eval()(x))
