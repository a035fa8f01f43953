"""``common.norms`` and ``cbnorm`` in one process: the same numbers; neither takes the other's layers for its own."""

import re
import sys

import cbnorm
import pytest
import torch
from torch import nn

import common.norms

KINDS = {
    "bn": {},
    "in": {},
    "dsbn": {},
    "mn": {},
    "scb": {"init": "data"},
    "scb_base": {},
    "ucb": {"init": "kmeans++", "reseed": 0.1},
}
X, IDS = torch.randn(12, 4, 5), torch.arange(12) % 3
ADVICE = "use common.norms in the suite and its plug-ins, cbnorm in your own code, and one of them throughout a model"


@pytest.fixture(params=["cbnorm", "common.norms"])
def own_and_other(request):
    pair = [cbnorm, common.norms]
    return pair if request.param == "cbnorm" else pair[::-1]


def test_both_compute_the_same():
    x = X.clone().requires_grad_()
    for kind, options in KINDS.items():
        args = (x, IDS) if kind in ("dsbn", "scb", "scb_base") else (x,)
        results = []
        for package in (common.norms, cbnorm):
            layer = package.make_norm(kind, 4, 3, **options)
            assert type(layer).__module__.startswith(f"{package.__name__}.")
            y = layer(*args)
            gradients = torch.autograd.grad(y.pow(3).sum(), [x, *layer.parameters()], materialize_grads=True)
            results.append([y.detach(), *gradients, *layer.state_dict().values(), layer.eval()(*args).detach()])
        torch.testing.assert_close(*results, rtol=0, atol=0)


def test_each_has_operators_of_its_own_in_a_graph():
    layer, found = cbnorm.make_norm("ucb", 4, 3, init="kmeans++"), []

    def backend(graph, _):
        found.extend(str(node.target) for node in graph.graph.nodes)
        return graph

    plain = common.norms.make_norm("ucb", 4, 3, init="kmeans++")
    torch._dynamo.reset()
    torch.testing.assert_close(torch.compile(layer, fullgraph=True, backend=backend)(X), plain(X))
    assert any("cbnorm" in name for name in found)
    assert not any("common_norms" in name for name in found)


CALLS = {
    "convert_norms": lambda own, model: own.convert_norms(model, "ucb"),
    "converted": lambda own, model: own.converted(model),
    "revert_norms": lambda own, model: own.revert_norms(model),
    "recalibrate": lambda own, model: own.recalibrate(model, [X]),
    "calibrate": lambda own, model: own.calibrate(model, [X]),
    "preserved_statistics": lambda own, model: own.preserved_statistics(model).__enter__(),
    "collect_health": lambda own, model: own.collect_health(model).__enter__(),
    "health": lambda own, model: own.health(model[1][0], X),
    "WithClusters": lambda own, model: own.WithClusters(model),
}


@pytest.mark.parametrize("call", CALLS)
def test_a_model_with_a_layer_of_the_other_is_refused(own_and_other, call):
    own, other = own_and_other
    for kind in KINDS:
        layer = other.make_norm(kind, 4, 3)
        at = "" if call == "health" else " at 1.0"
        line = f"model: expected layers of {own.__name__}, got {other.__name__}.{type(layer).__name__}{at}; {ADVICE}"
        with pytest.raises(ValueError, match=f"^{re.escape(line)}$"):
            CALLS[call](own, nn.Sequential(nn.BatchNorm1d(4), nn.Sequential(layer)))


def test_a_kind_that_makes_layers_of_the_other_or_is_registered_there_is_refused(own_and_other, monkeypatch):
    own, other = own_and_other
    for package in own_and_other:
        registry = sys.modules[f"{package.__name__}.registry"]
        monkeypatch.setattr(registry, "_KINDS", dict(registry._KINDS))
    own.register_norm("mixed", other.UCBNorm)
    with pytest.raises(ValueError, match=f"^model: expected layers of {own.__name__}, got .*; {ADVICE}$"):
        own.make_norm("mixed", 4, 3)
    other.register_norm("mine", other.UCBNorm)
    with pytest.raises(ValueError, match=f"got mine, which is registered with {other.__name__}; {ADVICE}$"):
        own.make_norm("mine", 4, 3)


def test_a_block_of_the_other_gives_no_ids_and_is_refused(own_and_other):
    own, other = own_and_other
    model = own.convert_norms(nn.Sequential(nn.BatchNorm1d(4)), "scb")
    line = f"clusters: expected a block of {own.__name__} around its layer, got one of {other.__name__}; {ADVICE}"
    for training, run in ((True, model), (False, model), (False, torch.compile(model, backend="eager"))):
        model.train(training)
        with other.clusters(IDS), pytest.raises(RuntimeError, match=f"^{re.escape(line)}$"):
            run(X)
        with other.clusters(IDS), own.clusters(IDS):
            torch.testing.assert_close(run(X), model[0](X, IDS))
    run(X)  # outside any block all are unknown
    with pytest.raises(ValueError, match=rf"inside `with clusters\(ids\):`, of {own.__name__}$"):
        model.train()(X)


def test_another_package_of_that_name_is_not_meant():
    theirs = type("UCBNorm", (nn.Module,), {"__module__": "common.norms.layers"})()
    assert cbnorm.converted(nn.Sequential(theirs, nn.BatchNorm1d(4))) == []
