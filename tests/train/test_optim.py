import pytest
import torch
from torch import nn

from common.norms import make_norm
from common.train.optim import make_optimizer, parameter_groups


def test_norm_parameters_and_biases_do_not_decay():
    for kind in ("bn", "in", "dsbn", "mn", "scb", "scb_base", "ucb"):
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


def steps(kind, gradients, **options) -> tuple[float, float]:
    """Return a weight and a bias, both 1 before, after steps with these gradients."""
    map = nn.Linear(1, 1)
    nn.init.ones_(map.weight)
    nn.init.ones_(map.bias)
    optimizer = make_optimizer(kind, map, **options)
    for gradient in gradients:
        map.weight.grad, map.bias.grad = torch.full((1, 1), gradient), torch.full((1,), gradient)
        optimizer.step()
    assert isinstance(optimizer, {"sgd": torch.optim.SGD, "adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[kind])
    assert all(group["fused"] for group in optimizer.param_groups)
    return map.weight.item(), map.bias.item()


def test_sgd_has_momentum_and_decays_through_the_gradient():
    plain, bias = steps("sgd", [2.0, 1.0], lr=0.1, weight_decay=0.5)
    first = 1 - 0.1 * 2.5
    assert plain == pytest.approx(first - 0.1 * (0.9 * 2.5 + 1 + 0.5 * first))
    assert bias == pytest.approx(1 - 0.1 * 2 - 0.1 * (0.9 * 2 + 1))
    nesterov, bias = steps("sgd", [2.0, 1.0], lr=0.1, nesterov=True)
    assert nesterov == bias == pytest.approx(1 - 0.1 * (2 + 0.9 * 2) - 0.1 * (1 + 0.9 * (0.9 * 2 + 1)))


def test_adam_moves_by_the_rate_and_adamw_decays_beside_it():
    for kind, decayed in (("adam", 0.9), ("adamw", (1 - 0.1 * 0.5) - 0.1)):  # Adam's decay is part of the gradient
        weight, bias = steps(kind, [2.0], lr=0.1, weight_decay=0.5)
        assert weight == pytest.approx(decayed)
        assert bias == pytest.approx(0.9)
        weight, _ = steps(kind, [2.0], lr=0.1, eps=2.0)
        assert weight == pytest.approx(1 - 0.1 * 2 / (2 + 2))
