"""Offsets, outliers, empty components and clusters, empty and tiny batches, values that are not finite."""

import itertools
import math
from typing import Any

import pytest
import torch
from norm_cases import (
    BACKENDS,
    any_norm,
    assert_state,
    batch,
    cluster_run,
    in_dtype,
    inputs,
    mixture_case,
    mixture_run,
    needs_compiler,
    state,
)
from torch import nn

from common.norms import SCBNorm, UCBNorm, cluster_norm, make_norm, mixture_norm

MIXTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "ucb": ("ucb", {}),
    "ucb shared": ("ucb", {"init": "kmeans++", "variance": "shared"}),
    "ucb reseed": ("ucb", {"reseed": 0.3, "momentum": 1.0, "groups": 1}),
    "ucb weight": ("ucb", {"update": "weight", "init": "kmeans++"}),
    "mn": ("mn", {}),
}
COMPILED = {
    "ucb compiled": ("ucb", {"backend": "compiled", "groups": 1}),
    "mn compiled": ("mn", {"backend": "compiled", "groups": 4}),
}


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
        exact = mixture_run(case, torch.float64, "reference", groups=groups, statistics=statistics)
        got = mixture_run(case, torch.float32, by, groups=groups, statistics=statistics)
        for name in ("y", "dx", "dlog_lambda", "dmean", "dvar"):
            scale = 1 if name == "y" else exact[name].abs().max()
            assert float((got[name] - exact[name]).abs().max() / scale) < 10 * rounding, name


@pytest.mark.parametrize("by", BACKENDS)
def test_moments_survive_an_offset_of_a_million(by):
    """Sums of 512 values of 1e6 round to 32, their mean to 0.06; the true variance is about 1.

    The mean cannot be stored closer than half an ulp of 1e6, 0.03. The variance can: two passes leave the square
    of that at most out, which is 1e-3. A pass about a mean off by 0.06 and not corrected errs by 4e-3.
    """
    case = offset_case(1e6, positions=320 if by == "compiled" else 32)  # more than a vector holds
    for groups in (1, 4):
        want = mixture_run(case, torch.float64, "reference", groups=groups)
        got = mixture_run(case, torch.float32, by, groups=groups)
        assert float((got["mean"] - want["mean"]).abs().max()) <= 0.0313
        torch.testing.assert_close(got["var"].double(), want["var"], rtol=1e-3, atol=0)


@pytest.mark.parametrize("by", BACKENDS)
def test_variances_are_never_negative(by):
    for seed, groups in itertools.product(range(20), (1, 4)):
        case = list(mixture_case((9, 4, 7), num=3, dtype=torch.float32, seed=seed))
        case[0][:] = 1000 * case[0][:1, :, :1]  # constant channels
        case[3] *= 1e6
        assert mixture_run(case, torch.float32, by, groups=groups)["var"].min() >= 0


@pytest.mark.parametrize("by", BACKENDS)
def test_outliers_and_weights_at_the_floor_stay_finite_and_right(by):
    x, _, mean, var, g = mixture_case((8, 4, 6), num=3, dtype=torch.float32)
    x[2, :, 3] = 1e4
    log_lambda = torch.tensor([1 - 2e-3 / 3, 1e-3 / 3, 1e-3 / 3]).log()
    for groups, statistics in itertools.product((1, 4), ("batch", "learned")):
        options = {"groups": groups, "statistics": statistics}
        exact = mixture_run((x, log_lambda, mean, var, g), torch.float64, "reference", **options)
        got = mixture_run((x, log_lambda, mean, var, g), torch.float32, by, **options)
        for name in ("y", "dx", "dlog_lambda", "dmean", "dvar"):
            assert float((got[name] - exact[name]).abs().max() / exact[name].abs().max()) < 1e-4, name
        assert got["y"][2, :, 3].abs().min() > 1


@pytest.mark.parametrize("by", BACKENDS)
def test_an_empty_component_adds_nothing(by):
    """Component 2 is so far away that its posteriors are exactly zero; sums of 48 float32 numbers are rounded."""
    for groups in (1, 4):
        case = list(mixture_case((8, 4, 6), num=3, dtype=torch.float32))
        case[2][2] = 1e4
        got = mixture_run(case, torch.float32, by, groups=groups)
        two = [case[0], *(t[:2] for t in case[1:4]), case[4]]
        for name, want in mixture_run(two, torch.float64, "reference", groups=groups).items():
            rows = slice(None) if name in ("y", "dx") else slice(2)
            assert float((got[name][rows] - want).abs().max()) < 1e-5 * max(1, float(want.abs().max())), name
            assert name in ("y", "dx") or not got[name][2].any(), name


def test_an_empty_component_stays_where_it_is_under_em():
    layer = UCBNorm(4, 3, groups=1)
    layer.mean[2] = 1e4
    before = state(layer)
    for seed in range(3):
        layer(batch(seed))
    assert torch.equal(layer.mean[2], before["mean"][2])
    assert torch.equal(layer.log_var[2], before["log_var"][2])
    assert float(layer.logits.softmax(0)[2]) == pytest.approx(0.9**3 / 3, rel=1e-5)


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
    for num in (3,) if by == "compiled" else (1, 3):  # another number would be compiled anew
        case = mixture_case((8, 4, 6), num=num, dtype=torch.float32)
        case[0][:, 1] = 5.0
        case[3][:, 1] = 0.0
        got = mixture_run(case, torch.float32, by)
        assert all(value.isfinite().all() for value in got.values())
        assert got["y"][:, 1].abs().max() < 1e-3


@pytest.mark.parametrize("name", [*MIXTURES, *(pytest.param(name, marks=needs_compiler) for name in COMPILED)])
def test_a_batch_that_is_not_finite_changes_nothing_and_a_constant_one_leaves_a_usable_layer(name):
    """1e30 is finite, but its square is not."""
    kind, options = (MIXTURES | COMPILED)[name]
    for value, seen in itertools.product((math.nan, math.inf, -math.inf, 1e30), (False, True)):
        layer, x = any_norm(kind, 4, 3, **options), batch()
        if seen:
            layer(x)
        before = state(layer)
        bad = x.clone()
        bad[3, 2, 1] = value
        y = layer(bad)
        assert value == 1e30 or not y.isfinite().all()
        if "step" in before:
            before["step"] += 1
        assert_state(layer, before)
        for next_batch in (x, *[torch.full((6, 4, 5), 2.5)] * 2):
            layer.train()(next_batch)
            assert all(t.isfinite().all() for t in layer.state_dict().values())
        assert layer.eval()(torch.full((6, 4, 3), 2.5)).isfinite().all()


@pytest.mark.parametrize("kind", ["scb", "scb_base", "ucb", "mn"])
def test_an_empty_batch_passes_and_changes_nothing(kind):
    options = {"init": "data"} if kind.startswith("scb") else {"init": "kmeans++"}
    for shape, training in itertools.product(((0, 4), (0, 4, 3, 3), (2, 4, 0)), (True, False)):
        layer = make_norm(kind, 4, 3, **options).train(training)
        before = state(layer)
        x, *ids = inputs(kind, torch.empty(shape, requires_grad=True))
        y = layer(x, *ids)
        assert (y.shape, y.dtype) == (shape, x.dtype)
        y.sum().backward()
        assert_state(layer, before)
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
    for dtype, statistics in itertools.product((torch.bfloat16, torch.float16), ("batch", "learned", "clusters")):
        case = in_dtype(mixture_case((8, 4, 6), num=3, dtype=torch.float32), dtype)
        want, got = (
            cluster_run(case, torch.arange(8) % 3, each, by)
            if statistics == "clusters"
            else mixture_run(case, each, by, statistics=statistics)
            for each in (torch.float32, dtype)
        )
        for name, value in got.items():
            assert torch.equal(value, want[name].to(dtype if name in ("y", "dx") else torch.float32)), name


def test_scb_survives_an_offset():
    x, _, mean, var, _ = offset_case(1e3)
    cluster = torch.arange(len(x)) % 3
    want = cluster_norm(x.double(), cluster, mean.double(), var.double(), backend="reference")
    got = cluster_norm(x, cluster, mean, var)
    assert float((got - want).abs().max()) < 1e-5  # x - mean is exact near 1e3
    layer = SCBNorm(4, 3, init="data")
    assert float(layer(x, cluster).detach().mean((0, 2)).abs().max()) < 1e-4
