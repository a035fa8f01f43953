"""The custom operators under Triton's interpreter; run by test_kernels.py in a process of its own."""

import contextlib

import pytest
import torch
from norm_cases import any_norm, batch, inputs, mixture_case, step
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from common.norms import cluster_norm, make_norm, mixture_norm
from common.norms.backends import graphs
from common.norms.backends.triton import cluster_ops, ops

full = pytest.mark.full


def scb_arguments(requires_grad=True):
    x, _, mean, var, g = mixture_case((4, 3, 5), 3, dtype=torch.float32)
    tensors = [t.requires_grad_(requires_grad) for t in (x, mean, var)]
    return tensors[0], torch.tensor([0, 2, 1, 0]), *tensors[1:], g


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # opcheck's own
@pytest.mark.parametrize(("unknown", "linear"), [(True, True), pytest.param(False, False, marks=full)])
def test_scb_operators_are_sound(unknown, linear):
    """Opcheck compares schema, fakes, gradients and tracing with what the operator does."""
    x, cluster, mean, var, g = scb_arguments()
    if unknown:
        cluster[1] = -1
    rows, last = [None] * 4, (1e-5, 1.0, -1, True, unknown)
    if linear:  # tables are transposed, and everything that may be there is
        mean, var = (t.detach().t().contiguous().t().requires_grad_() for t in (mean, var))
        rows = [torch.tensor([0.5, 1.0, 1.5], requires_grad=True) for _ in range(4)]
    torch.library.opcheck(cluster_ops.scb_forward, (x, cluster, mean, var, *rows, *last))
    x, mean, var, *rows = (t if t is None else t.detach() for t in (x, mean, var, *rows[:3]))
    torch.library.opcheck(cluster_ops.scb_backward, (x, g, cluster, mean, var, *rows, *last))


def mixture_arguments(requires_grad=True):
    *tensors, g = mixture_case((4, 4, 3), 2, dtype=torch.float32)
    return [t.requires_grad_(requires_grad) for t in tensors], g


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # opcheck's own
@pytest.mark.parametrize(
    ("groups", "stored", "affine", "parameters"),
    [
        (1, True, True, True),
        pytest.param(4, False, True, False, marks=full),
        pytest.param(4, False, False, False, marks=full),
    ],
)
def test_mixture_operators_are_sound(groups, stored, affine, parameters):
    inputs, _ = mixture_arguments()
    maps = [torch.tensor([0.5, 1.0, 1.5, 2.0], requires_grad=True) if affine else None for _ in range(2)]
    options = (groups, 1e-5, 1.0, -5.0, stored)
    torch.library.opcheck(ops.learned_forward, (*inputs, *maps, *options))
    # A state carries no gradient, which the default check of all outputs cannot know.
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(ops.mixture_forward, (*inputs, *maps, *options), test_utils=checks)
    (x, *mixture), g = mixture_arguments(requires_grad=False)
    weight, bias = (t if t is None else t.detach() for t in maps)
    state = ops.mixture_forward(x, *mixture, weight, bias, *options)[1]
    torch.library.opcheck(ops.learned_backward, (x, g, *mixture, weight, *options, parameters))
    last = (groups, 1e-5, -5.0, stored, parameters)
    torch.library.opcheck(ops.mixture_backward, (x, g, weight, state, *last))
    new, last = ([t.clone() for t in mixture] for _ in range(2))
    before, fits = (mixture[0].clone(), [*new, *last]) if affine else (None, [None] * 6)
    torch.library.opcheck(ops.move_averages, (*mixture, before, state, *fits, 0.1, False, 0.01, True))


@pytest.mark.parametrize(("ready", "before"), [pytest.param(None, 4, marks=full), (True, 4), (False, 4), (True, 5)])
def test_a_fit_is_sound(ready, before):
    """Of five locations of twelve; it is due in every other step, and where there is something to go on from."""
    (x, *mixture), _ = mixture_arguments(requires_grad=False)
    ready = None if ready is None else torch.tensor(ready)
    draws = torch.tensor(before + 1), ready, torch.tensor(before)
    rule = 2, 2, 1e-5, 2, 5, 12, 34, 0.01, 1e-3, 1e-6
    torch.library.opcheck(ops.fit_mixture, (x, *mixture, *draws, *rule))
    found = ops.fit_mixture(x, *mixture, *draws, *rule)
    stays = before % 2 or (ready is not None and not ready)
    for got, old in zip(found, mixture, strict=True):
        assert torch.equal(got, old) is bool(stays)


class Watching(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen.append(func.name())
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("kind", "options", "training"),
    [
        ("ucb", {}, True),
        pytest.param("ucb", {"update": "weight", "groups": 1}, True, marks=full),
        ("ucb", {}, False),
        pytest.param("mn", {"em_steps": 2}, True, marks=full),
        ("scb", {"affine": True}, True),
    ],
)
def test_bodies_do_what_operators_do_which_run_where_something_watches(kind, options, training):
    (x, *_), g = mixture_arguments(requires_grad=False)
    x, *ids = inputs(kind, x, 2)
    found, names = [], []
    for mode in (Watching(), contextlib.nullcontext(Watching())):
        layer = any_norm(kind, 4, 2, backend="triton", **options).train(training)
        before = [t._version for t in layer.buffers()]
        with mode as watching:
            shown = step(layer, x, g, *ids)
        changed = [t._version > old for t, old in zip(layer.buffers(), before, strict=True)]
        found.append(([*shown, *layer.state_dict().values()], changed))
        names.append({name for name in watching.seen if name.startswith("common_norms")})
    assert names[0]
    assert not names[1]
    (first, moved), (second, also_moved) = found
    assert moved == also_moved
    assert any(moved) == (training and kind != "scb" and "update" not in options)
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b)


@pytest.mark.filterwarnings("ignore:`torch.jit.trace` is deprecated")
def test_what_is_watched_is_known_by_tensor_and_surroundings():
    x = torch.zeros(2)
    seen = []

    def look(x):
        seen.append(graphs.watched(x))
        return x.sum()

    look(x)
    look(torch.nn.Parameter(x))
    assert seen == [False, False]
    with Watching():
        look(x)
    look(FakeTensorMode().from_tensor(x))
    torch.jit.trace(look, x, check_trace=False)
    assert seen[2:] == [True] * 3
    assert torch.compile(lambda x: x + graphs.watched(x), fullgraph=True, backend="eager")(x).tolist() == [1, 1]
    look(x)
    assert not seen[-1]


@pytest.mark.parametrize("name", ["clusters", "learned", pytest.param("batch", marks=full)])
def test_functions_compile_whole_with_their_gradients(name):
    if name == "clusters":
        x, cluster, mean, var, g = scb_arguments()
        given = [x, mean, var]
    else:
        cluster, (given, g) = None, mixture_arguments()

    def run(*given):
        if cluster is not None:
            return 2 * cluster_norm(given[0], cluster, *given[1:], backend="triton")
        return 2 * mixture_norm(*given, statistics=name, backend="triton")[0]  # pyright: ignore[reportArgumentType]

    want, got = run(*given), torch.compile(run, fullgraph=True, backend="aot_eager")(*given)
    assert torch.equal(got, want)
    for a, b in zip(*(torch.autograd.grad(y, given, g) for y in (got, want)), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("kind", "options"), [("ucb", {}), pytest.param("mn", {"em_steps": 2}, marks=full)], ids=["ucb", "mn"]
)
def test_a_layer_trains_in_a_graph_as_it_does_outside_of_one(kind, options):
    """Its averages move in place, before the backward pass."""
    layers = [any_norm(kind, 4, 2, backend="triton", **options) for _ in range(2)]
    (x, *_), g = mixture_arguments(requires_grad=False)
    runs = (layers[0], torch.compile(layers[1], fullgraph=True, backend="aot_eager"))
    for _ in range(2):
        found = []
        for run, layer in zip(runs, layers, strict=True):
            given = x.clone().requires_grad_()
            y = run(given)
            found.append([y, *torch.autograd.grad(y, [given, *layer.parameters()], g), *layer.buffers()])
        for a, b in zip(*found, strict=True):
            assert torch.equal(a, b)
    assert not torch.equal(layers[0].mean, any_norm(kind, 4, 2).mean)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["scb", "ucb", "mn"])
def test_layers_export_in_evaluation_mode(kind):
    layer, x = make_norm(kind, 3, 2, backend="triton").eval(), batch(0, (4, 3, 5))
    cluster = (torch.tensor([0, 1, -1, 0]),) if kind == "scb" else ()
    exported = torch.export.export(layer, (x, *cluster))
    assert "common_norms." in exported.graph_module.print_readable(print_output=False)
    torch.testing.assert_close(exported.module()(x, *cluster), layer(x, *cluster))


@pytest.mark.parametrize(("kind", "training"), [("scb", False), ("ucb", True)])
def test_a_second_derivative_names_the_backend_that_has_one(kind, training):
    layer = make_norm(kind, 3, 2, backend="triton").train(training)
    x, *ids = inputs(kind, batch(0, (4, 3, 5)).requires_grad_(), 2)
    (grad,) = torch.autograd.grad(layer(x, *ids).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match='backend="reference"'):
        grad.square().sum().backward()


@pytest.mark.parametrize("kind", ["scb", "ucb"])
def test_autocast_changes_nothing(kind):
    layer = make_norm(kind, 3, 2, backend="triton").eval()  # training moves averages
    x, *ids = inputs(kind, batch(0, (4, 3, 5)), 2)
    want = layer(x, *ids)
    with torch.autocast("cpu", torch.bfloat16):
        got = layer(x, *ids)
        assert layer(x.bfloat16(), *ids).dtype == torch.bfloat16
    assert torch.equal(got, want)
