"""The compiled backend: its passes against the reference, what it compiles, and how often."""

import copy
import shutil

import pytest
import torch
from norm_cases import (
    any_norm,
    assert_an_offset_costs_no_moments,
    assert_within_budget,
    cluster_run,
    mixture_case,
    mixture_run,
)
from torch._dynamo.utils import counters

from common.norms import SCBNorm, UCBNorm, cluster_norm, mixture_norm
from common.norms.backends import closed_form, compiled, sync
from common.norms.native import loops

needs_compiler = pytest.mark.skipif(
    compiled.refusal(torch.device("cpu")) is not None, reason="needs a C++ compiler on the PATH"
)


@pytest.fixture
def uncompiled(monkeypatch):
    """Run the passes as they are, without torch.compile: what they compute, cheap enough for many cases."""
    monkeypatch.setattr(loops, "serves", lambda *_: False)
    monkeypatch.setattr(compiled, "run", lambda function, options, *tensors: function(compiled, options, *tensors))


@pytest.mark.usefixtures("uncompiled")
@pytest.mark.parametrize("statistics", ["batch", "learned"])
@pytest.mark.parametrize("num", [1, 3])
@pytest.mark.parametrize("groups", [1, 2, 4])
def test_passes_have_the_gradients_of_finite_differences(groups, num, statistics):
    x, log_lambda, mean, var, _ = mixture_case((3, 4, 2), num=num)
    weight, bias = mixture_case((2, 4), num=1)[0]
    inputs = [t.requires_grad_() for t in (x, log_lambda, mean, var, weight, bias)]

    def run(x, log_lambda, mean, var, weight, bias):
        affine = {"weight": weight, "bias": bias}
        options = {"groups": groups, "statistics": statistics, "scale": "sqrt_k"}
        return mixture_norm(x, log_lambda, mean, var, backend="compiled", **options, **affine)[0]

    assert torch.autograd.gradcheck(run, inputs)


@pytest.mark.usefixtures("uncompiled")
@pytest.mark.parametrize("groups", [1, 2, 4])
def test_a_group_of_one_rank_changes_nothing(monkeypatch, groups):
    """Between its two halves each pass exchanges sums, here with nobody."""
    monkeypatch.setattr(sync, "combine", lambda mass, mean, var, group: (mass, mean, var))
    monkeypatch.setattr(sync, "total", lambda first, second, group: (first, second))
    x, log_lambda, mean, var, g = mixture_case((3, 4, 5), num=3)
    options = {"groups": groups, "eps": 1e-5, "scale": "paper", "statistics": "batch", "backend": "compiled"}
    found = []
    for process_group in (None, "some"):
        inputs = [t.clone().requires_grad_() for t in (x, log_lambda, mean, var)]
        y, _ = closed_form.mixture_norm(*inputs, process_group=process_group, **options)
        found.append((y, *torch.autograd.grad(y, inputs, g)))
    torch.testing.assert_close(*found)


@pytest.mark.usefixtures("uncompiled")
@pytest.mark.parametrize("shape", [(3, 1, 1), (9, 4), (3, 6, 5), (5, 4, 3, 7), (17, 12, 1, 1)], ids=str)
@pytest.mark.parametrize("statistics", ["batch", "learned"])
def test_passes_err_at_most_twice_as_much_as_the_reference(shape, statistics):
    case = mixture_case(shape, num=3, dtype=torch.float32)
    for groups in {1, shape[1]}:
        options = {"groups": groups, "statistics": statistics}
        exact, _ = mixture_run(case, torch.float64, "reference", **options)
        plain, _ = mixture_run(case, torch.float32, "reference", **options)
        ours, _ = mixture_run(case, torch.float32, "compiled", **options)
        assert_within_budget(exact, ours, plain)


@pytest.mark.usefixtures("uncompiled")
@pytest.mark.parametrize("groups", [1, 4])
def test_passes_survive_an_offset_of_a_million(groups):
    assert_an_offset_costs_no_moments(groups, positions=32)
    for seed in range(20):
        x, log_lambda, mean, var, _ = mixture_case((9, 4, 7), num=3, dtype=torch.float32, seed=seed)
        constant = 1000 * x[:1, :, :1].expand(9, 4, 7)
        _, still = mixture_norm(constant, log_lambda, mean, 1e6 * var, groups=groups, backend="compiled")
        assert still is not None
        assert still.var.min() >= 0


@pytest.mark.usefixtures("uncompiled")
@pytest.mark.parametrize("groups", [1, 4])
def test_an_empty_component_adds_nothing(groups):
    case = mixture_case((8, 4, 6), num=3, dtype=torch.float32)
    case[2][2] = 1e4
    got, moments = mixture_run(case, torch.float32, "compiled", groups=groups)
    assert moments is not None
    assert not moments.mass[2].any()
    assert all(part.isfinite().all() for part in moments)
    want, _ = mixture_run((case[0], *(t[:2] for t in case[1:4]), case[4]), torch.float32, "compiled", groups=groups)
    for name, value in want.items():
        torch.testing.assert_close(got[name] if name in ("y", "dx") else got[name][:2], value)
        assert name in ("y", "dx") or not got[name][2].any()


@pytest.mark.usefixtures("uncompiled")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_passes_compute_half_precision_in_float32(dtype):
    x, log_lambda, mean, var, g = mixture_case((6, 4, 5), num=3, dtype=torch.float32)
    x, g = x.to(dtype), g.to(dtype)
    cluster = torch.arange(6) % 3
    runs = (
        lambda x: mixture_norm(x, log_lambda, mean, var, backend="compiled")[0],
        lambda x: mixture_norm(x, log_lambda, mean, var, statistics="learned", backend="compiled")[0],
        lambda x: cluster_norm(x, cluster, mean, var, backend="compiled"),
    )
    for run in runs:
        found = []
        for each in (x, x.float()):
            y = run(each.requires_grad_())
            assert y.dtype == each.dtype
            found.append((y, *torch.autograd.grad(y, each, g.to(y.dtype))))
        (y, dx), (want, dwant) = found
        assert torch.equal(y, want.to(dtype))
        assert torch.equal(dx, dwant.to(dtype))
    learnt = [parameter.requires_grad_() for parameter in (mean, var, log_lambda)]
    for run, parameters in zip(runs[1:], (learnt, learnt[:2]), strict=True):
        found = []
        for each in (x.detach(), x.detach().float()):
            y = run(each.requires_grad_())
            found.append(torch.autograd.grad(y, parameters, g.to(y.dtype)))
        for ours, want in zip(*found, strict=True):
            assert torch.equal(ours, want)


def test_powers_of_two_are_exact_to_rounding():
    t = -torch.linspace(0, 99, 100_001)
    exact = t.double().exp2()
    error = (compiled._power_of_two(t).double() - exact) / exact
    assert float(error.abs().max()) <= 2 * torch.finfo(torch.float32).eps
    assert compiled._power_of_two(torch.tensor([-0.0, -1.0, -99.0])).tolist() == [1.0, 0.5, 2.0**-99]
    assert compiled._power_of_two(torch.tensor([-101.0, -1e30, -torch.inf])).tolist() == [0.0, 0.0, 0.0]
    assert compiled._power_of_two(torch.tensor([torch.nan])).isnan().all()


@needs_compiler
@pytest.mark.parametrize(("groups", "statistics"), [(1, "batch"), (6, "batch"), (6, "learned")])
def test_compiled_code_errs_at_most_twice_as_much_as_the_reference(groups, statistics):
    case = mixture_case((5, 6, 4, 3), num=3, dtype=torch.float32)
    weight, bias = mixture_case((2, 6), num=1, dtype=torch.float32)[0]  # as in layers, whose graphs are then these
    options = {"groups": groups, "statistics": statistics, "weight": weight, "bias": bias}
    exact, _ = mixture_run(case, torch.float64, "reference", **options)
    plain, _ = mixture_run(case, torch.float32, "reference", **options)
    ours, _ = mixture_run(case, torch.float32, "compiled", **options)
    assert_within_budget(exact, ours, plain)


@needs_compiler
def test_compiled_cluster_norm_errs_at_most_twice_as_much_as_the_reference():
    case = mixture_case((5, 6, 4), num=3, dtype=torch.float32)
    cluster = torch.tensor([0, 1, 1, 0, 1])  # cluster 2 is absent
    exact = cluster_run(case, cluster, torch.float64, "reference")
    plain, ours = (cluster_run(case, cluster, torch.float32, backend) for backend in ("reference", "compiled"))
    assert_within_budget(exact, ours, plain)
    assert not ours["dmean"][2].any()


@needs_compiler
@pytest.mark.parametrize("kind", ["ucb", "scb"])
def test_one_compilation_serves_all_batch_sizes_and_widths(kind):
    """Sizes of 1 and layouts apart; the first batch has as many samples as channels and positions."""

    def step(n: int, channels: int, length: int) -> None:
        x, g = (t.float() for t in mixture_case((n, channels, length), num=1, seed=n)[::4])
        cluster = (torch.arange(n) % 3,) if kind == "scb" else ()
        gradients, state = [], []
        for backend in ("compiled", "eager"):
            layer = any_norm(kind, channels, 3, backend=backend)
            own = x.clone().requires_grad_()
            layer(own, *cluster).backward(g)
            gradients.append(own.grad)
            state.append(layer.state_dict())
        torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(*state)

    step(4, 4, 4)
    before = counters["stats"]["unique_graphs"]
    for size in ((7, 4, 4), (4, 4, 9), (32, 6, 5), (2, 3, 30)):
        step(*size)
    assert counters["stats"]["unique_graphs"] == before


@needs_compiler
def test_it_keeps_what_batch_norm_keeps_and_the_posteriors_of_groups():
    x = torch.randn(6, 8, 5, 5, requires_grad=True)
    kept: dict[int, int] = {}

    def pack(t: torch.Tensor) -> torch.Tensor:
        kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    for groups, posteriors in ((1, 3 / 8), (None, 0)):
        kept.clear()
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            UCBNorm(8, 3, groups=groups, backend="compiled")(x)
        parameters = 4 * (10 * 3 * 8 + 2 * 8)  # a few tables (K, C), weight and bias
        assert x.nbytes * (1 + posteriors) <= sum(kept.values()) <= x.nbytes * (1 + posteriors) + parameters


def test_a_missing_compiler_is_named(monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert shutil.which("no-such-compiler") is None
    with pytest.raises(ValueError, match="backend: 'compiled' needs a C\\+\\+ compiler, but 'no-such-compiler'"):
        UCBNorm(4, 2, backend="compiled")(torch.randn(3, 4, 2))


LAYERS = [UCBNorm(4, 2), UCBNorm(4, 2, groups=1), SCBNorm(4, 2)]


@pytest.mark.parametrize("layer", LAYERS, ids=repr)
def test_layers_can_be_exported(layer):
    """Within somebody else's graph the functional passes run whatever the backend."""
    cluster = (torch.tensor([0, 1, 0]),) if isinstance(layer, SCBNorm) else ()
    x = torch.randn(3, 4, 2)
    layer.eval()
    exported = torch.export.export(layer, (x, *cluster))
    torch.testing.assert_close(exported.module()(x, *cluster), layer(x, *cluster))


# torch's tracer looks at .grad of intermediate results, which warns; a warning is an error here.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
@pytest.mark.parametrize("layer", LAYERS, ids=repr)
def test_layers_can_be_traced_with_gradients(layer):
    cluster = (torch.tensor([0, 1, 0]),) if isinstance(layer, SCBNorm) else ()
    layer = copy.deepcopy(layer).double().train()
    assert layer.is_initialized()  # which asks the device, and no graph may; once is enough
    twin, x = copy.deepcopy(layer), mixture_case((3, 4, 2), num=1)[0].requires_grad_()
    found = []
    for each, run in ((twin, twin), (layer, torch.compile(layer, fullgraph=True, backend="aot_eager"))):
        y = run(x, *cluster)
        found.append((y, *torch.autograd.grad(y.pow(3).sum(), [x, *each.parameters()]), *each.buffers()))
    torch.testing.assert_close(found[1], found[0])
