import pytest
from torch import nn

from common.norms import make_norm
from common.training.optimisation import parameter_groups


@pytest.mark.parametrize("kind", ["bn", "in", "dsbn", "mn", "scb", "scb_base", "ucb"])
def test_norm_parameters_and_biases_do_not_decay(kind):
    options = {"ucb": {"update": "weight"}, "in": {"affine": True}}.get(kind, {})
    norm = make_norm(kind, 8, 2, **options)
    model = nn.ModuleDict({"conv": nn.Conv2d(3, 8, 3), "norm": norm, "head": nn.Linear(8, 2)})
    decaying, kept = parameter_groups(model, 0.1)
    assert decaying["weight_decay"] == 0.1
    assert kept["weight_decay"] == 0
    assert {id(p) for p in decaying["params"]} == {id(model["conv"].weight), id(model["head"].weight)}
    assert len(list(norm.parameters())) > 0
    everything = [id(p) for p in [*decaying["params"], *kept["params"]]]
    assert sorted(everything) == sorted(id(p) for p in model.parameters())
