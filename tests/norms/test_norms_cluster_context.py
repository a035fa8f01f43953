"""Cluster ids reach the converted layers of a model that knows nothing of them."""

import contextlib
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from convert_cases import IDS, close, images, small
from torch import nn

from common.norms import DomainBatchNorm, SCBNorm, SCBNormBase, WithClusters, clusters, convert_norms

# torch's tracer looks at .grad of intermediate results, which warns, and warns of every check of a shape.
pytestmark = [
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning"),
    pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning"),
]
OTHERS = torch.tensor([0, 0, 1, 1, 2, 2])
"""Another partition: dsbn ignores a mere renaming in training."""


def manual(model: nn.Module, x: torch.Tensor, ids: torch.Tensor | None) -> torch.Tensor:
    """Run a converted small() with ids given by hand."""
    for module in model.children():
        if isinstance(module, nn.Sequential):
            x = manual(module, x, ids)
        elif isinstance(module, (SCBNorm, SCBNormBase, DomainBatchNorm)):
            x = module(x, ids)
        else:
            x = module(x)
    return x


def routed(kind: str, layers: int | None = None, training: bool = False) -> Any:
    """Return the first layers of a converted small(), with the clusters' rows apart, so that ids matter."""
    model = convert_norms(small().train(training)[:layers], kind)
    rng = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, SCBNorm):
                module.mean.add_(torch.randn(module.mean.shape, generator=rng))
            elif isinstance(module, SCBNormBase):
                module.mean.weight.add_(torch.randn(module.mean.weight.shape, generator=rng))
            elif isinstance(module, DomainBatchNorm):
                for domain in module.domains:
                    domain.running_mean += torch.randn(module.num_features, generator=rng)  # pyright: ignore
    return model


@pytest.mark.parametrize(("kind", "training"), [("scb", True), ("scb_base", False), ("dsbn", True)])
def test_clusters_routes_ids(kind, training):
    model, x = routed(kind, training=training), images()
    for module in model.modules():  # the running statistics move with each call, the outputs in training do not
        if training and isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.momentum = 0.0
    want, other = manual(model, x, IDS), manual(model, x, OTHERS)
    assert not torch.allclose(want, other)
    with clusters(IDS):
        assert torch.equal(model(x), want)
        with clusters(OTHERS):
            assert torch.equal(model(x), other)
        assert torch.equal(model(x), want)


def test_without_ids_training_raises_and_evaluation_takes_them_as_unknown():
    model, x = routed("scb", training=True), images()
    with pytest.raises(ValueError, match="cluster: expected an int64 tensor"):
        model(x)
    model.eval()
    want = manual(model, x, torch.full((6,), -1))
    assert torch.equal(model(x), want)
    with clusters(IDS), clusters(None):
        assert torch.equal(model(x), want)
    mixed = torch.tensor([0, -1, 2, -1, 1, 2])
    inner = model[0](x)
    by_hand = model[1](inner, IDS)
    with clusters(mixed):
        y = model(x)
        assert torch.equal(model[1](inner, IDS), by_hand)  # an explicit id goes first
    assert torch.equal(y[mixed == -1], want[mixed == -1])
    with clusters(torch.tensor([0, 0, 2, 2, 1, 2])):
        assert torch.equal(y[mixed >= 0], model(x)[mixed >= 0])
    with pytest.raises(IndexError, match="cluster"), clusters(IDS + 1):
        model(x)
    assert torch.equal(model(x), want)  # an exception ends the block


@pytest.mark.parametrize("kind", ["scb", "scb_base", "dsbn"])
def test_a_converted_layer_without_ids_says_where_they_come_from(kind):
    with pytest.raises(ValueError, match=r"got None\w*; call the model inside `with clusters\(ids\):`"):
        routed(kind, training=True)(images())


def test_wrong_ids_are_named():
    for wrong in (IDS.float(), IDS.int(), IDS[:, None], [0, 1]):
        with pytest.raises(ValueError, match="ids: expected an int64 tensor"), clusters(wrong):  # pyright: ignore
            pass


def test_threads_have_ids_of_their_own():
    model, x = routed("scb"), images()
    choices = [IDS, IDS.flip(0), None, torch.full((6,), 1)]
    want = [manual(model, x, ids) for ids in choices]
    barrier, wrong = threading.Barrier(len(choices)), []

    def work(i: int) -> None:
        ids = choices[i]
        with clusters(ids) if ids is not None else contextlib.nullcontext():
            for _ in range(5):
                barrier.wait(timeout=30)  # all blocks are open at once
                if not torch.equal(model(x), want[i]):
                    wrong.append(i)

    with clusters(IDS):  # of the starting thread, not of the others
        threads = [threading.Thread(target=work, args=(i,)) for i in range(len(choices))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(timeout=60)
    assert wrong == []


@pytest.mark.parametrize("kind", ["scb", "dsbn"])
def test_compiled_models_see_the_ids_of_each_call(kind):
    model, x = routed(kind, 3), images()  # one converted layer, since each takes seconds to trace
    compiled: Callable[..., torch.Tensor] = torch.compile(model, backend="eager")
    for ids in (IDS, OTHERS) if kind == "dsbn" else (IDS, None, OTHERS):
        with clusters(ids):
            close(compiled(x), manual(model, x, ids))
            with clusters(torch.zeros_like(IDS)):
                close(compiled(x), manual(model, x, torch.zeros_like(IDS)))


def test_a_block_inside_a_compiled_model_keeps_it_one_graph():
    model, x = routed("scb", 3), images()
    run: Callable[..., torch.Tensor] = torch.compile(WithClusters(model), backend="eager", fullgraph=True)
    for ids in (IDS, None):
        want = manual(model, x, ids)
        with clusters(OTHERS):  # hidden by the inner block
            close(run(x, ids), want)


EXPORTS: dict[str, Callable[..., Any]] = {
    "strict": lambda model, *args: torch.export.export(model, args, strict=True).module(),
    "not strict": lambda model, *args: torch.export.export(model, args, strict=False).module(),
    "traced": lambda model, *args: torch.jit.trace(model, args, check_trace=False),
}


@pytest.mark.parametrize(
    ("kind", "how"), [("scb", "strict"), ("scb", "not strict"), ("scb_base", "traced"), ("dsbn", "strict")]
)
def test_an_exported_model_takes_ids_as_an_input_and_never_as_constants(kind, how):
    model, x = routed(kind, 3), images()
    with pytest.raises(Exception, match=r"clusters: .* constants .* WithClusters\(model\)"), clusters(IDS):
        EXPORTS[how](model, x)
    exported = EXPORTS[how](WithClusters(model), x, IDS)
    for ids in (IDS, torch.tensor([2, 2, 0, 2, 1, 2])):  # as many of no cluster
        close(exported(x, ids), manual(model, x, ids))
    with clusters(IDS):  # the graph left nothing behind
        close(model(x), manual(model, x, IDS))
