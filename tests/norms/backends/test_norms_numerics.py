"""Offsets, outliers, empty components and clusters, empty and tiny batches, values that are not finite."""

import itertools
import math

import pytest
import torch
from norm_cases import BACKENDS, backend, mixture_case, mixture_run, needs_compiler
from torch import nn

from common.norms import MixtureNorm, SCBNorm, UCBNorm, cluster_norm, make_norm, mixture_norm

MIXTURES = {
    "ucb": lambda: UCBNorm(4, 3),
    "ucb joint": lambda: UCBNorm(4, 3, groups=1),
    "ucb seeded": lambda: UCBNorm(4, 3, init="kmeans++"),
    "ucb shared": lambda: UCBNorm(4, 3, init="kmeans++", variance="shared"),
    "ucb reseed": lambda: UCBNorm(4, 3, reseed=0.3, momentum=1.0),
    "ucb weight": lambda: UCBNorm(4, 3, update="weight", init="kmeans++"),
    "mn": lambda: MixtureNorm(4, 3),
}
COMPILED = [
    lambda: UCBNorm(4, 3, backend="compiled"),
    lambda: UCBNorm(4, 3, groups=1, backend="compiled"),
    lambda: MixtureNorm(4, 3, groups=4, backend="compiled"),
]


def state(layer: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in layer.state_dict().items()}


def assert_same_state(layer: nn.Module, before: dict[str, torch.Tensor]) -> None:
    for name, tensor in layer.state_dict().items():
        assert torch.equal(tensor, before[name]), name


def offset_case(offset: float, positions: int = 32) -> tuple[torch.Tensor, ...]:
    """float32 x and mixture about an offset; deviations about 1."""
    x, log_lambda, mean, var, g = mixture_case((16, 4, positions), num=3, dtype=torch.float32)
    return x + offset, log_lambda, mean + offset, var, g


@pytest.mark.parametrize("by", BACKENDS)
def test_a_large_offset_costs_no_more_than_it_costs_batch_norm(by):
    """Both round a mean near 1e3 to half an ulp, 3e-5.

    Against a float64 run on the same rounded inputs. The mixture's output sums K = 3 terms of weights up to
    tau / sqrt(lambda) and divides by the least deviation of a component: an error of ten such roundings is
    the most allowed. Moments from raw squares err by 1e6 * 6e-8 = 0.06 in the variance and fail.
    """
    case = offset_case(1e3)
    norm = nn.BatchNorm1d(4, affine=False)
    batch_norm = float((norm(case[0]).double() - norm.double()(case[0].double())).abs().max())
    rounding = torch.finfo(torch.float32).eps * 1e3 / 2
    assert batch_norm < rounding
    for groups, statistics in itertools.product((1, 4), ("batch", "learned")):
        exact, _ = mixture_run(case, torch.float64, "reference", groups=groups, statistics=statistics)
        got, _ = mixture_run(case, torch.float32, by, groups=groups, statistics=statistics)
        assert float((got["y"] - exact["y"]).detach().abs().max()) < 10 * rounding
        for name in ("dx", "dlog_lambda", "dmean", "dvar"):
            assert float((got[name] - exact[name]).abs().max() / exact[name].abs().max()) < 10 * rounding, name


@pytest.mark.parametrize("by", BACKENDS)
def test_moments_survive_an_offset_of_a_million(by):
    """Sums of 512 values of 1e6 round to 32, their mean to 0.06; the true variance is about 1.

    The mean cannot be stored closer than half an ulp of 1e6, 0.03. The variance can: two passes leave the square
    of that at most out, which is 1e-3. A pass about a mean off by 0.06 and not corrected errs by 4e-3.
    """
    case = offset_case(1e6, positions=320 if by == "compiled" else 32)  # more than a vector holds
    for groups in (1, 4):
        _, want = mixture_run(case, torch.float64, "reference", groups=groups)
        _, got = mixture_run(case, torch.float32, by, groups=groups)
        assert got is not None
        assert want is not None
        assert float((got.mean - want.mean).abs().max()) <= 0.0313
        torch.testing.assert_close(got.var.double(), want.var, rtol=1e-3, atol=0)


@pytest.mark.parametrize("by", BACKENDS)
def test_variances_are_never_negative(by):
    for seed, groups in itertools.product(range(20), (1, 4)):
        x, log_lambda, mean, var, _ = mixture_case((9, 4, 7), num=3, dtype=torch.float32, seed=seed)
        x[:] = 1000 * x[:1, :, :1]  # constant channels
        with backend(by) as name:
            _, moments = mixture_norm(x, log_lambda, mean, 1e6 * var, groups=groups, backend=name)
        assert moments is not None
        assert moments.var.min() >= 0


@pytest.mark.parametrize("by", BACKENDS)
def test_outliers_and_weights_at_the_floor_stay_finite_and_right(by):
    x, _, mean, var, g = mixture_case((8, 4, 6), num=3, dtype=torch.float32)
    x[2, :, 3] = 1e4
    log_lambda = torch.tensor([1 - 2e-3 / 3, 1e-3 / 3, 1e-3 / 3]).log()
    for groups, statistics in itertools.product((1, 4), ("batch", "learned")):
        options = {"groups": groups, "statistics": statistics}
        exact, _ = mixture_run((x, log_lambda, mean, var, g), torch.float64, "reference", **options)
        got, _ = mixture_run((x, log_lambda, mean, var, g), torch.float32, by, **options)
        for name, want in exact.items():
            assert got[name].isfinite().all(), name
            assert float((got[name] - want).detach().abs().max() / want.detach().abs().max()) < 1e-4, name
        assert got["y"][2, :, 3].abs().min() > 1


@pytest.mark.parametrize("by", BACKENDS)
def test_an_empty_component_adds_nothing(by):
    """Component 2 is so far away that its posteriors are exactly zero."""
    dtypes = (torch.float32,) if by == "compiled" else (torch.float32, torch.float64)
    for groups, dtype in itertools.product((1, 4), dtypes):
        case = list(mixture_case((8, 4, 6), num=3, dtype=dtype))
        case[2][2] = 1e4
        got, moments = mixture_run(tuple(case), dtype, by, groups=groups)
        assert moments is not None
        assert not moments.mass[2].any()
        assert all(part.isfinite().all() for part in moments)
        two = [case[0], *(t[:2] for t in case[1:4]), case[4]]
        want, _ = mixture_run(tuple(two), dtype, by, groups=groups)
        torch.testing.assert_close(got["y"], want["y"])
        torch.testing.assert_close(got["dx"], want["dx"])
        for name in ("dlog_lambda", "dmean", "dvar"):
            torch.testing.assert_close(got[name][:2], want[name])
            assert not got[name][2].any(), name


def test_an_empty_component_stays_where_it_is_under_em():
    layer = UCBNorm(4, 3, groups=1)
    layer.mean[2] = 1e4
    before = state(layer)
    for step in range(3):
        layer(mixture_case((8, 4, 6), num=3, dtype=torch.float32, seed=step)[0])
    assert torch.equal(layer.mean[2], before["mean"][2])
    assert torch.equal(layer.log_var[2], before["log_var"][2])
    weight = layer.logits.softmax(0)
    assert float(weight[2]) == pytest.approx(0.9**3 / 3, rel=1e-5)


@pytest.mark.parametrize("average", ["em", "paper"])
def test_stored_weights_keep_to_the_floor(average):
    layer = UCBNorm(1, 2, average=average, momentum=1.0)
    layer.mean.copy_(torch.tensor([[0.0], [1e3]]))
    layer(torch.randn(50, 1, generator=torch.Generator().manual_seed(0)))
    # Floored at 1e-3 / K and then divided by the sum, which the floor has raised by as much.
    assert float(layer.logits.softmax(0)[1]) == pytest.approx(5e-4, rel=1e-3)
    assert float(layer.log_weights()[1].exp()) == pytest.approx(5e-4, rel=1e-6)


def test_the_floor_holds_in_normalisation():
    layer = UCBNorm(2, 2, update="weight", affine=False).eval()
    with torch.no_grad():
        layer.logits.copy_(torch.tensor([30.0, 0.0]))
        layer.mean.copy_(torch.tensor([[0.0, 0.0], [100.0, 100.0]]))
    # Component 1 is certain here: u / sqrt(lambda) with the floored lambda of 1e-3 / 2.
    y = layer(torch.tensor([[102.0, 103.0]]))
    torch.testing.assert_close(y, torch.tensor([[2.0, 3.0]]) / math.sqrt(5e-4), rtol=1e-4, atol=0)


@pytest.mark.parametrize("by", BACKENDS)
def test_a_constant_channel_is_finite(by):
    for num in (1, 3):
        case = list(mixture_case((8, 4, 6), num=num, dtype=torch.float32))
        case[0][:, 1] = 5.0
        case[3][:, 1] = 0.0
        got, _ = mixture_run(tuple(case), torch.float32, by)
        for name, value in got.items():
            assert value.isfinite().all(), name
        assert got["y"][:, 1].abs().max() < 1e-3


@pytest.mark.parametrize("kind", MIXTURES)
def test_a_constant_batch_leaves_a_usable_layer(kind):
    layer = MIXTURES[kind]()
    for _ in range(2):
        layer(torch.full((6, 4, 3), 2.5))
    for name, tensor in layer.state_dict().items():
        assert tensor.isfinite().all(), name
    assert layer.eval()(torch.full((6, 4, 3), 2.5)).isfinite().all()


@pytest.mark.parametrize("kind", [*MIXTURES, pytest.param("compiled", marks=needs_compiler)])
def test_a_non_finite_batch_leaves_the_state_as_it_was(kind):
    """1e30 is finite, but its square is not."""
    x = mixture_case((6, 4, 5), num=3, dtype=torch.float32)[0]
    makes = COMPILED if kind == "compiled" else [MIXTURES[kind]]
    for make, value, seen in itertools.product(makes, (math.nan, math.inf, -math.inf, 1e30), (False, True)):
        layer = make()
        if seen:
            layer(x)
        before = state(layer)
        bad = x.clone()
        bad[3, 2, 1] = value
        y = layer(bad)
        assert value == 1e30 or not y.isfinite().all()
        if "step" in before:
            before["step"] += 1
        assert_same_state(layer, before)
        layer(x)
        assert all(t.isfinite().all() for t in layer.state_dict().values())


@pytest.mark.parametrize("kind", ["scb", "scb_base", "ucb", "mn"])
def test_an_empty_batch_passes_and_changes_nothing(kind):
    options = {"init": "data"} if kind.startswith("scb") else {"init": "kmeans++"}
    shapes = (0, 4), (0, 4, 3, 3), (2, 4, 0)
    for by, shape, training in itertools.product(("reference", "eager"), shapes, (True, False)):
        layer = make_norm(kind, 4, 3, backend=by, **options).train(training)
        before = state(layer)
        x = torch.empty(shape, requires_grad=True)
        cluster = (torch.zeros(shape[0], dtype=torch.int64),) if kind.startswith("scb") else ()
        y = layer(x, *cluster)
        assert y.shape == shape
        assert y.dtype == x.dtype
        y.sum().backward()
        assert_same_state(layer, before)
        assert all(p.grad is not None and not p.grad.any() for p in layer.parameters())


def test_the_moments_of_an_empty_batch_are_zero():
    x, log_lambda, mean, var, _ = mixture_case((6, 4), num=3)
    y, moments = mixture_norm(x[:0], log_lambda, mean, var, groups=2)
    assert y.shape == (0, 4)
    assert moments is not None
    assert [tuple(part.shape) for part in moments] == [(3, 2), (3, 4), (3, 4)]
    assert not any(part.any() for part in moments)
    assert mixture_norm(x[:0], log_lambda, mean, var, statistics="learned")[1] is None


def test_supervised_layers_take_single_values():
    x = torch.randn(1, 4)
    for kind in ("scb", "scb_base"):
        torch.testing.assert_close(make_norm(kind, 4, 3)(x, torch.tensor([2])), x / math.sqrt(1 + 1e-5))


@pytest.mark.parametrize("by", ["reference", "eager", "traced"])
def test_half_precision_is_computed_in_float32(by):
    """Outputs, gradients and moments are those of the same numbers in float32, rounded once."""
    inputs = mixture_case((8, 4, 6), num=3, dtype=torch.float32)
    cluster = torch.arange(8) % 3

    def run(case, statistics):
        *given, g = [t.detach().requires_grad_() for t in case]
        with backend(by) as name:
            if statistics == "clusters":
                y, moments = cluster_norm(given[0], cluster, *given[2:], backend=name), ()
            else:
                y, moments = mixture_norm(*given, statistics=statistics, backend=name)
            return y, torch.autograd.grad(y, given, g, materialize_grads=True), moments or ()

    for dtype, statistics in itertools.product((torch.bfloat16, torch.float16), ("batch", "learned", "clusters")):
        case = [t.to(dtype) if i in (0, 4) else t for i, t in enumerate(inputs)]
        y, (dx, *gradients), moments = run(case, statistics)
        want, (wanted, *others), theirs = run([t.float() for t in case], statistics)
        assert torch.equal(y, want.to(dtype))
        assert torch.equal(dx, wanted.to(dtype))
        for a, b in zip((*gradients, *moments), (*others, *theirs), strict=True):
            assert torch.equal(a, b)


def test_scb_survives_an_offset():
    x, _, mean, var, _ = offset_case(1e3)
    cluster = torch.arange(len(x)) % 3
    want = cluster_norm(x.double(), cluster, mean.double(), var.double(), backend="reference")
    got = cluster_norm(x, cluster, mean, var)
    assert float((got - want).abs().max()) < 1e-5  # x - mean is exact near 1e3
    layer = SCBNorm(4, 3, init="data")
    assert float(layer(x, cluster).detach().mean((0, 2)).abs().max()) < 1e-4
