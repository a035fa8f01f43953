"""The layers inside somebody else's graph: torch.compile, torch.export, ONNX and torch.fx, against the plain layers."""

import copy
from typing import Any

import pytest
import torch
from norm_cases import (
    CLUSTERED,
    any_norm,
    assert_state,
    assert_within_budget,
    in_full,
    mixture_case,
    mixture_run,
    state,
)
from torch import Tensor, nn
from torch._dynamo import lookup_backend
from torch._dynamo.utils import counters
from torch._inductor import config as inductor
from torchvision.models.feature_extraction import create_feature_extractor
from torchvision.models.resnet import BasicBlock, ResNet

from common.norms import MixtureNorm, SCBNorm, UCBNorm, clusters, convert_norms

pytestmark = pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")  # of every check of a shape
LAYERS = {
    "bn": ("bn", {}),
    "dsbn": ("dsbn", {}),
    "dsbn, mean of all batches": ("dsbn", {"momentum": None, "affine": False}),
    "dsbn, no statistics": ("dsbn", {"track_running_stats": False}),
    "mn": ("mn", {}),
    "mn, each channel, refit": ("mn", {"groups": None, "refit_every": 2, "init": "uniform"}),
    "scb": ("scb", {"affine": True, "init": "data"}),
    "scb batch": ("scb", {"statistics": "batch"}),
    "scb instance": ("scb", {"statistics": "instance", "init": "data"}),
    "scb_base": ("scb_base", {"init": "data"}),
    "ucb": ("ucb", {}),
    "ucb compiled": ("ucb", {"groups": 1, "init": "kmeans++", "backend": "compiled"}),
    "ucb reference": ("ucb", {"groups": 2, "backend": "reference", "affine": False}),
    "ucb reseed": ("ucb", {"groups": 1, "reseed": 0.3, "variance": "shared"}),
    "ucb weight": ("ucb", {"update": "weight"}),
    "ucb learned": ("ucb", {"update": "weight", "statistics": "learned", "init": "kmeans++"}),
}
COMPILED = ("dsbn", "dsbn, mean of all batches", "mn, each channel, refit", "scb", "scb batch", "scb instance",
            "scb_base", "ucb compiled", "ucb reseed", "ucb learned")  # fmt: skip
EXPORTED = ("dsbn", "mn", "scb", "scb_base", "ucb compiled", "ucb reseed", "ucb learned")
IN_EVALUATION = ("dsbn", "mn", "scb", "scb instance", "ucb compiled")
"""Every kind of this package, and what computes in another way."""
SHAPE = (9, 4, 500)  # 4,500 locations, more than a fit takes


@pytest.fixture(autouse=True)
def nothing_compiled_before():
    torch._dynamo.reset()


def takes_ids(case: str) -> bool:
    return LAYERS[case][0] in CLUSTERED


def fresh(case: str) -> nn.Module:
    kind, options = LAYERS[case]
    return any_norm(kind, 4, 3, **options, dtype=torch.float64)


def plain_copy(layer: nn.Module) -> Any:
    """Return a copy that runs outside graphs, without a C++ compiler."""
    plain = copy.deepcopy(layer)
    for module in plain.modules():
        if getattr(module, "backend", None) == "compiled":
            vars(module)["backend"] = "eager"
    return plain


def batches(case: str) -> list[tuple[Tensor, ...]]:
    """Four batches: the first has a value that is not finite, the third lacks a cluster."""
    found = []
    for step in range(4):
        x, ids = mixture_case(SHAPE, 3, seed=step)[0].detach(), torch.arange(9) % (2 if step == 2 else 3)
        if step == 0:
            x[1, 2, 3] = torch.nan
        found.append((x, ids) if takes_ids(case) else (x,))
    return found


def trained(layer: nn.Module, run, case: str) -> list[list[Tensor]]:
    """Return what each of four training steps shows: output, gradients, and the state after it.

    Of the first step, which is not finite, only the state: how far NaN reaches depends on how a layer computes.
    """
    seen = []
    for step, (x, *ids) in enumerate(batches(case)):
        x.requires_grad_()
        y = run(x, *ids)
        weight = torch.linspace(0.5, 2, y.numel(), dtype=y.dtype).view(y.shape)
        parameters = list(layer.parameters()) if step else []
        gradients = torch.autograd.grad((weight * y).sum(), [x, *parameters], materialize_grads=True)
        with torch.no_grad():
            for p, g in zip(parameters, gradients[1:], strict=True):
                p.sub_(g, alpha=0.01)
        shown = [y.detach(), *gradients] if step else []
        seen.append([*shown, *state(layer).values()])
    return seen


@pytest.mark.parametrize("case", [*COMPILED, *in_full(*(name for name in LAYERS if name not in COMPILED))])
def test_a_fresh_layer_trains_compiled_as_it_trains_plain(case):
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return lookup_backend("aot_eager")(graph, inputs)

    layer = fresh(case)
    plain = plain_copy(layer)
    got = trained(layer, torch.compile(layer, fullgraph=True, backend=backend), case)
    torch.testing.assert_close(got, trained(plain, plain, case), equal_nan=True)
    assert len(graphs) == 1  # one graph for a layer before and after its seeding


@pytest.mark.parametrize("case", [*EXPORTED, *in_full(*(name for name in LAYERS if name not in EXPORTED))])
def test_a_fresh_layer_trains_exported_as_it_trains_plain(case):
    layer = fresh(case)
    plain = plain_copy(layer)
    module = torch.export.export(layer, batches(case)[1]).module()
    assert_state(layer, state(plain))  # no batch was seen
    torch.testing.assert_close(trained(module, module, case), trained(plain, plain, case), equal_nan=True)


def graphs_of(run: Any) -> int:
    """Return how many graphs are compiled in a run of a step at five batch sizes."""
    torch._dynamo.reset()
    before = counters["stats"]["unique_graphs"]
    for n in (64, 9, 5, 3, 2):
        run(n)
    return counters["stats"]["unique_graphs"] - before


@pytest.fixture(scope="module")
def graphs_of_batch_norm() -> int:
    layer = torch.compile(nn.BatchNorm2d(16), fullgraph=True, backend="eager")
    return graphs_of(lambda n: layer(torch.randn(n, 16, 32, 32, requires_grad=True)))


@pytest.mark.parametrize("layer", [UCBNorm(16, 3, groups=1), *in_full(MixtureNorm(16, 3), UCBNorm(16, 3))], ids=repr)
def test_training_through_inductor_has_the_gradients_of_the_reference(layer, graphs_of_batch_norm):
    """As `torch.compile` compiles by default, at a size that is computed in several parts outside graphs.

    Every step is held against the equations in float64 under the mixture that the layer had then.
    """
    compiled = torch.compile(layer, fullgraph=True)

    def step(n: int) -> None:
        x, *_, g = mixture_case((n, 16, 32, 32), 1, torch.float32, seed=n)
        mixture = [t.clone() for t in (layer.log_weights(), layer.mean, layer.log_var.exp())]
        x.requires_grad_()
        y = compiled(x)
        (dx,) = torch.autograd.grad(y, x, g)
        if isinstance(layer, MixtureNorm):  # the fit to this batch
            mixture = [layer.fit_logits.log_softmax(0), layer.fit_mean, layer.fit_log_var.exp()]
        exact, plain = (
            mixture_run((x, *mixture, g), dtype, "reference", groups=layer.groups)
            for dtype in (torch.float64, torch.float32)
        )
        assert_within_budget({name: exact[name] for name in ("y", "dx")}, {"y": y, "dx": dx}, plain)

    with inductor.patch(compile_threads=1):  # a pool of processes takes longer to start than to compile
        assert graphs_of(step) == graphs_of_batch_norm


@pytest.mark.parametrize("statistics", ["batch", *in_full("learned", "instance")])
def test_clusters_take_as_many_graphs_as_batch_norm(statistics, graphs_of_batch_norm):
    layer = torch.compile(SCBNorm(16, 3, statistics=statistics), fullgraph=True, backend="eager")

    def step(n: int) -> None:
        layer(torch.randn(n, 16, 8, 8, requires_grad=True), torch.arange(n) % 3)

    assert graphs_of(step) == graphs_of_batch_norm


@pytest.mark.parametrize("kind", ["ucb", "scb"])
def test_a_converted_network_is_one_graph_and_its_features_can_be_extracted(kind):
    network, ids = ResNet(BasicBlock, [1, 1, 1, 1], num_classes=4).double(), torch.arange(6) % 3
    convert_norms(network, kind, where=[0, 1, -1], num_components=3)  # of twelve, since each takes its time
    graphs, seen = [], []

    def backend(graph, _):
        graphs.append(graph)
        return graph

    compiled, plain = torch.compile(network, fullgraph=True, backend=backend), copy.deepcopy(network)
    x = torch.randn(6, 3, 32, 32, generator=torch.Generator().manual_seed(0)).double()
    for given in (1 - x, x):
        with clusters(ids):
            torch.testing.assert_close(compiled(given), plain(given))
    assert len(graphs) == 1
    extractor = create_feature_extractor(plain.eval(), ["layer1.0.bn1", "fc"])
    plain.get_submodule("layer1.0.bn1").register_forward_hook(lambda *args: seen.append(args[2]))
    with clusters(ids):
        want, found = plain(x), extractor(x)
    assert torch.equal(found["fc"], want)
    assert torch.equal(found["layer1.0.bn1"], seen[0])


class Around(nn.Module):
    """A model around a layer in evaluation mode, whose stored statistics are those of data."""

    def __init__(self, case: str) -> None:
        super().__init__()
        kind, options = LAYERS[case]
        layer = any_norm(kind, 4, 3, **options)
        for x, *ids in batches(case)[1:]:
            layer(x[:, :, :50].float(), *ids)
        self.conv, self.norm = nn.Conv1d(2, 4, 1), layer
        self.eval()


class Plain(Around):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * self.norm(self.conv(x))


class Known(Around):
    def forward(self, x: Tensor, ids: Tensor) -> Tensor:
        return 2 * self.norm(self.conv(x), cluster=ids)


def around(case: str) -> tuple[Any, tuple[Tensor, ...], tuple[Tensor, ...]]:
    """Return a model around a layer, arguments to trace it with, and others to run, with unknown clusters if may be."""
    x, fed = torch.randn(3, 2, 5), torch.randn(7, 2, 5)
    if not takes_ids(case):
        return Plain(case), (x,), (fed,)
    unknown = -1 if LAYERS[case][0] != "dsbn" else 2
    return Known(case), (x, torch.tensor([0, 2, 1])), (fed, torch.tensor([2, 1, 0, unknown, 2, 1, 0]))


def test_symbolic_tracing_sees_a_layer_as_one_step():
    for case in LAYERS:
        model, _, fed = around(case)
        traced = torch.fx.symbolic_trace(model)
        assert [node.target for node in traced.graph.nodes if node.op == "call_module"] == ["conv", "norm"], case
        assert torch.equal(traced(*fed), model(*fed)), case
        assert traced.norm is model.norm, case


def onnx_outputs(model: nn.Module, args: tuple[Tensor, ...], fed: tuple[Tensor, ...]) -> Tensor:
    """Export a model by args, with any number of samples, and run what comes of it on fed."""
    onnxruntime = pytest.importorskip("onnxruntime", reason="needs onnx, onnxscript and onnxruntime")
    any_batch = tuple({0: torch.export.Dim.DYNAMIC} for _ in args)
    program = torch.onnx.export(model, args, dynamo=True, verbose=False, dynamic_shapes=any_batch)
    assert program is not None
    proto = program.model_proto
    assert {node.domain for node in proto.graph.node} == {""}  # operators of the standard alone
    assert not proto.functions
    session = onnxruntime.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    names = [value.name for value in session.get_inputs()]
    (y,) = session.run(None, {name: t.numpy() for name, t in zip(names, fed, strict=True)})
    return torch.from_numpy(y)


@pytest.mark.parametrize("case", [*IN_EVALUATION, *in_full("dsbn, no statistics", "scb_base", "ucb learned")])
@torch.no_grad()
def test_traced_and_onnx_models_take_batches_of_other_sizes_and_other_clusters(case):
    model, args, fed = around(case)
    want = plain_copy(model)(*fed)
    traced: Any = torch.jit.trace(model, args)
    torch.testing.assert_close(traced(*fed), want, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(onnx_outputs(model, args, fed), want, rtol=1e-5, atol=1e-5)


def test_a_trace_of_training_keeps_no_draws():
    for case in ("mn", "scb", "ucb compiled"):
        layer: Any = fresh(case)
        with pytest.raises(RuntimeError, match=r"^torch\.jit\.trace: expected evaluation mode, .*"):
            torch.jit.trace(layer, batches(case)[1])
        assert_state(layer, state(fresh(case)))


@torch.no_grad()
def test_onnx_of_unknown_clusters_and_of_channels_last():
    x, fed = torch.randn(3, 5, 4), torch.randn(6, 5, 4)
    for layer in (
        any_norm("scb", 4, 3, unknown_posterior="sample", channel_dim=-1),
        any_norm("ucb", 4, 3, groups=1, channel_dim=-1),
    ):
        for table in (layer.mean, layer.log_var):
            table.copy_(torch.randn(3, 4))
        torch.testing.assert_close(onnx_outputs(layer.eval(), (x,), (fed,)), layer(fed), rtol=1e-5, atol=1e-5)
