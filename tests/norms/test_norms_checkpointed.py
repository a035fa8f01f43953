"""Activation checkpointing computes what training without it computes: outputs, gradients and buffers."""

import copy
import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from norm_cases import CLUSTERED, any_norm, in_full, needs_compiler
from norm_cases import batch as activation
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from common.norms import cluster_context, clusters, convert_norms
from common.norms.backends import checkpointing

LAYERS: dict[str, tuple[str, dict[str, Any]]] = {
    "ucb": ("ucb", {"groups": 1, "init": "kmeans++"}),
    "ucb reference": ("ucb", {"backend": "reference"}),
    "ucb reseed": ("ucb", {"reseed": 0.3, "variance": "shared"}),
    "ucb weight": ("ucb", {"update": "weight", "init": "kmeans++"}),
    "ucb compiled": ("ucb", {"backend": "compiled"}),
    "mn": ("mn", {"refit_every": 2}),
    "mn reference": ("mn", {"backend": "reference"}),
    "mn compiled": ("mn", {"backend": "compiled"}),
    "scb": ("scb", {"statistics": "batch", "init": "data"}),
    "scb_base": ("scb_base", {"init": "data"}),
    "dsbn": ("dsbn", {}),
}
ON_EVERY_PUSH = ("ucb reseed", "mn", "scb", "dsbn")
REENTRANT = pytest.mark.parametrize("reentrant", [False, True], ids=["hooks", "reentrant"])
IDS = torch.arange(8) % 3


def batch(seed: int) -> Tensor:
    return torch.randn(8, 3, 5, 5, generator=torch.Generator().manual_seed(seed)).requires_grad_()


class Network(nn.Module):
    """A layer between convolutions, checkpointed or not."""

    def __init__(self, kind: str, **options: Any) -> None:
        super().__init__()
        norm = any_norm(kind, 4, 3, **options)
        self.first, self.norm, self.last = nn.Conv2d(3, 4, 1), norm, nn.Conv2d(4, 2, 1)
        self.ids = (IDS,) if kind in CLUSTERED else ()
        self.run: Callable[..., Tensor] = lambda function, x: function(x)

    def inner(self, x: Tensor) -> Tensor:
        return self.last(self.norm(self.first(x), *self.ids))

    def forward(self, x: Tensor) -> Tensor:
        return self.run(self.inner, x)


def pair(kind: str, reentrant: bool = False, **options: Any) -> tuple[Network, Network]:
    """Return two networks alike, the second checkpointed."""
    torch.manual_seed(0)
    plain = Network(kind, **options)
    checkpointed = copy.deepcopy(plain)
    checkpointed.run = lambda function, x: checkpoint(function, x, use_reentrant=reentrant)
    return plain, checkpointed


def routed() -> nn.Module:
    """Return a converted network whose clusters differ."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Conv2d(4, 2, 1))
    convert_norms(network, "scb", num_components=3)
    nn.init.normal_(network[1].mean)  # pyright: ignore[reportArgumentType]
    return network


def gradients(network: nn.Module, *losses: Tensor, inputs: list[Tensor]) -> list[Tensor]:
    """Run a backward pass for each loss; return what they sum to, with the buffers behind it."""
    network.zero_grad()
    for loss in losses:
        loss.backward()
    found = [t.grad for t in (*inputs, *network.parameters())]
    return [*(t for t in found if t is not None), *(b.clone() for b in network.buffers())]


def steps(network: Network) -> list[Tensor]:
    """Return what three steps show."""
    seen = []
    for seed in range(3):
        x = batch(seed).detach().to(network.first.weight).requires_grad_()
        y = network(x)
        seen += [y.detach(), *gradients(network, y.square().sum(), inputs=[x])]
        with torch.no_grad():
            for p in network.parameters():
                p.sub_(p.grad, alpha=0.01)  # pyright: ignore[reportArgumentType]
    return seen


def assert_same(
    networks: tuple[Network, Network], run: Callable[[Network], list[Tensor]], tolerance: float = 0.0
) -> None:
    """Assert that a run of both networks shows the same, by default to the bit."""
    torch.testing.assert_close(run(networks[1]), run(networks[0]), rtol=tolerance, atol=tolerance)


@REENTRANT
@pytest.mark.parametrize(
    "case",
    [
        *ON_EVERY_PUSH,
        pytest.param("ucb compiled", marks=needs_compiler),
        *in_full(*(name for name in LAYERS if name not in (*ON_EVERY_PUSH, "ucb compiled"))),
    ],
)
def test_a_checkpointed_layer_trains_as_without(case, reentrant):
    kind, options = LAYERS[case]
    assert_same(pair(kind, reentrant, **options), steps)


@REENTRANT
@pytest.mark.parametrize("kind", ["ucb", "mn"])
def test_passes_that_wait_for_their_backward_passes_are_told_apart_by_their_values(kind, reentrant):
    """A GAN's real and fake batches, of one shape; one more pass that has no backward pass; backward passes in turn."""

    def run(network: Network) -> list[Tensor]:
        inputs = [batch(seed) for seed in range(3)]
        first, second = network(inputs[0]).square().sum(), network(inputs[1]).pow(3).sum()
        with torch.no_grad():
            network(batch(3))
        third = network(inputs[2]).sum()
        return gradients(network, first, second + third, inputs=inputs)

    assert_same(pair(kind, reentrant), run, tolerance=1e-6)  # of two sums in another order


PRODUCTS = [torch.ops.aten.mm.default, torch.ops.aten.bmm.default, torch.ops.aten.convolution.default]
ARITHMETIC = [*(getattr(torch.ops.aten, name).Tensor for name in ("add", "sub", "mul", "div"))]
ARITHMETIC += [torch.ops.aten.where.self, torch.ops.aten.exp.default, torch.ops.aten.log.default]
ARITHMETIC += [torch.ops.aten.sum.dim_IntList, torch.ops.aten.cat.default, torch.ops.aten.clone.default]


@pytest.mark.parametrize("saved", [PRODUCTS, ARITHMETIC], ids=["products", "arithmetic"])
@pytest.mark.parametrize(
    "case",
    [*ON_EVERY_PUSH, *in_full(*(name for name in LAYERS if name not in ON_EVERY_PUSH and "compiled" not in name))],
)
def test_a_selective_checkpoint_saves_operators_of_the_model_alone(case, saved):
    """It pairs what it saves by order; a fit multiplies matrices too, and averages are arithmetic."""
    kind, options = LAYERS[case]
    if saved is ARITHMETIC and kind != "dsbn":  # which eager writes to
        options = {**options, "backend": "reference"}
    networks = pair(kind, **options)
    contexts = functools.partial(create_selective_checkpoint_contexts, saved)
    networks[1].run = lambda function, x: checkpoint(function, x, use_reentrant=False, context_fn=contexts)
    assert_same(networks, steps)


def test_passes_over_the_same_values_are_refused():
    _, network = pair("ucb")
    x = batch(0)
    both = network(x).sum() + network(x).square().sum()
    with pytest.raises(RuntimeError, match="2 forward passes of UCBNorm over the same values wait for a backward pass"):
        both.backward()
    _, network = pair("ucb")
    for _ in range(2):  # one after the other
        network(x).square().sum().backward()


def test_a_pass_that_was_not_kept_is_refused():
    _, network = pair("ucb", reentrant=True)
    waiting = [network(batch(seed)).square().sum() for seed in range(checkpointing.MOST + 1)]
    waiting[-1].backward()
    with pytest.raises(RuntimeError, match="a backward pass runs UCBNorm over values that are not those"):
        waiting[0].backward()
    model = routed()
    with clusters(IDS):
        waiting = [
            checkpoint(model, batch(seed), use_reentrant=False).sum() for seed in range(cluster_context.MOST + 1)
        ]
    with clusters(IDS.flip(0)):
        waiting[-1].backward()
        with pytest.raises(RuntimeError, match="a backward pass runs RoutedSCBNorm over values that are not"):
            waiting[0].backward()


@pytest.mark.parametrize("stale", ["without gradients", "graph given up", "loss replaced"])
def test_a_pass_whose_backward_never_comes_is_passed_over(stale):
    """Over the same values as the next one, which then is repeated under its own mixture."""

    def run(network: Network) -> list[Tensor]:
        x = batch(0)
        if stale == "without gradients":
            with torch.no_grad():
                network(x)
        elif stale == "graph given up":
            network(x).detach()
        else:
            loss = network(x).sum()
        loss = network(x).square().sum()
        return gradients(network, loss, inputs=[x])

    for kind in ("ucb", "mn"):
        assert_same(pair(kind), run)


def test_a_backward_pass_may_be_repeated():
    def run(network: Network) -> list[Tensor]:
        x = batch(0)
        loss = network(x).square().sum()
        loss.backward(retain_graph=True)
        loss.backward()
        assert x.grad is not None
        return [x.grad, *network.buffers()]

    assert_same(pair("mn"), run)


@pytest.mark.parametrize("kind", ["mn", "scb", *in_full("ucb")])
def test_a_graph_that_holds_a_checkpoint_trains_as_without(kind):
    """Through the partitioner that decides what a backward graph computes again."""
    torch._dynamo.reset()
    options = {"ucb": {}, "mn": {"eps": 1.0, "em_steps": 2}, "scb": {"statistics": "batch"}}  # of steps that are small
    networks = pair(kind, **options[kind])
    for network in networks:
        network.double()
    networks[1].compile(fullgraph=True, backend="aot_eager_decomp_partition")
    with torch._dynamo.config.patch(skip_fwd_side_effects_in_bwd_under_checkpoint=kind == "mn"):
        assert_same(networks, steps, tolerance=1e-9)


def test_a_checkpoint_around_a_graph_is_refused():
    _, network = pair("ucb")
    network.norm.compile(backend="aot_eager")
    loss = network(batch(0)).sum()
    with pytest.raises(RuntimeError, match="compile what holds the checkpoint"):
        loss.backward()


def test_only_a_backward_pass_makes_a_pass_a_repeated_one():
    """What torch says of it is private."""
    seen = []

    class Probe(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            seen.append(checkpointing.running())
            return x.clone()

        @staticmethod
        def backward(ctx: Any, *grads: Tensor) -> Any:
            seen.append(checkpointing.running())
            return grads[0]

    x = torch.ones(2, requires_grad=True)
    (Probe.apply(x).sum() * 2).backward()  # pyright: ignore[reportAttributeAccessIssue]
    assert [*seen, checkpointing.running()] == [False, True, False]


@pytest.mark.parametrize("backend", ["reference", "eager", pytest.param("compiled", marks=needs_compiler)])
@pytest.mark.parametrize("kind", ["ucb", "mn"])
def test_training_leaves_the_gradient_of_an_evaluation_as_it_is(kind, backend):
    for size in (3, 65):  # in one chunk, and in several
        layer, x = any_norm(kind, 4, 3, backend=backend), activation(0, (8, 4, size, size))
        layer(x.detach())
        x.requires_grad_()
        want = torch.autograd.grad(layer.eval()(x).square().sum(), x)
        loss = layer(x).square().sum()
        layer.train()(x.detach() + 1)
        assert torch.equal(torch.autograd.grad(loss, x)[0], want[0])


@REENTRANT
@pytest.mark.parametrize(("kind", "training"), [("scb", True), ("scb", False), ("dsbn", True)])
def test_what_is_computed_again_has_the_ids_of_its_block(kind, training, reentrant):
    """Also after the block, or inside another one."""
    network = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Conv2d(4, 2, 1))
    convert_norms(network, kind, num_components=3)
    with torch.no_grad():
        for p in network.parameters():
            p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(1)))
    network.train(training)

    def gradient(run: Callable[[Tensor], Tensor]) -> list[Tensor]:
        x, other = batch(0), batch(1)
        with clusters(IDS):
            loss = run(x).square().sum()
        with clusters(IDS.flip(0)):
            loss = loss + run(other).square().sum()
            loss.backward()
        return [t.grad for t in (x, other)]  # pyright: ignore[reportReturnType]

    want = gradient(network)
    for a, b in zip(want, gradient(lambda x: checkpoint(network, x, use_reentrant=reentrant)), strict=True):
        assert torch.equal(a, b)


@REENTRANT
@pytest.mark.parametrize("evaluation", ["before, with other ids", "after, without ids"])
def test_an_evaluation_keeps_its_own_ids(evaluation, reentrant):
    found = []
    for run in (lambda f, x: f(x), lambda f, x: checkpoint(f, x, use_reentrant=reentrant)):
        network, x = routed(), batch(0)
        if evaluation.startswith("before"):
            with torch.no_grad():
                for ids in (torch.full_like(IDS, -1), None):
                    with clusters(ids):
                        network.eval()(x)
        with clusters(IDS):
            run(network.train(), x).square().sum().backward()
        if evaluation.startswith("after"):
            run(network.eval(), x).square().sum().backward()
        found.append(x.grad)
    assert torch.equal(*found)
