"""What the layers and functions refuse: one line with the argument's name, what it should be, and what it is.

Each check once, in the layer or function that makes it: which backend computes, and in which mode, comes after.
"""

import math
import re
from typing import Any

import pytest
import torch
from norm_cases import CLUSTERED, any_norm, assert_state, mixture_case, state

from common.norms import cluster_norm, functional, mixture_norm

X = torch.randn(6, 4, 5, generator=torch.Generator().manual_seed(0))
IDS = torch.tensor([0, 1, 2, 0, 1, 2])
NO_NUMBER = (True, 2.0, math.nan, "2", None)
NOT_EPS = (0, -1e-5, math.nan, math.inf, True, "1e-5", None)
NOT_GROUPS = (0, 3, -2, True, 2.0, math.nan, "2")
NOT_X = (X[:, :3], X[0, :, 0], X.long(), X.bool(), X.to(torch.complex64), X.tolist(), None)


def refusal(error: type[Exception], function: Any, *args: Any, **options: Any) -> str:
    """Return the message, of one line, with which a function refuses arguments."""
    with pytest.raises(error) as caught:
        function(*args, **options)
    line = str(caught.value)
    assert "\n" not in line
    return line


def assert_refused(error: type[Exception], name: str, value: Any, function: Any, *args: Any, **options: Any) -> None:
    """Assert that a function names an argument, and its value: a tensor's device, or dtype and shape, or shape."""
    given = [repr(value), type(value).__name__]
    if isinstance(value, torch.Tensor):
        given = [f"{value.dtype} {tuple(value.shape)}", str(tuple(value.shape)), f"one on {value.device}"]
    line = refusal(error, function, *args, **options)
    assert re.match(rf"{name}: expected .+, got (an? )?({'|'.join(map(re.escape, given))})", line), line


def assert_unchanged(layer: Any, name: str, value: Any, *args: Any, error: type[Exception] = ValueError) -> None:
    """Assert that a layer refuses its input, and is afterwards what it was before."""
    before = state(layer)
    assert_refused(error, name, value, layer, *args)
    assert_state(layer, before)


def test_an_option_of_a_layer():
    for kind, name, values in (
        ("ucb", "num_features", (*NO_NUMBER, 0, -1)),
        ("bn", "num_features", (0,)),
        ("in", "num_features", (0,)),
        ("ucb", "eps", NOT_EPS),
        ("bn", "eps", (0,)),
        ("in", "eps", (0,)),
        ("ucb", "momentum", (-0.1, 1.1, math.nan, math.inf, True, "0.1", None)),
        ("scb", "momentum", (2,)),
        ("bn", "momentum", (2,)),
        ("in", "momentum", (2,)),
        ("ucb", "dtype", (torch.int64, torch.complex64, "float32")),
        ("bn", "dtype", (torch.int64,)),
        ("in", "dtype", (torch.int64,)),
        ("ucb", "seed", NO_NUMBER),
        ("ucb", "channel_dim", (0, True, 1.0)),
        ("ucb", "backend", ("cuda", "", None)),
        ("ucb", "groups", NOT_GROUPS),
        ("ucb", "update", ("ema",)),
        ("ucb", "statistics", ("running",)),
        ("ucb", "average", ("mean",)),
        ("ucb", "scale", ("one",)),
        ("ucb", "init", ("data", None)),
        ("ucb", "variance", ("tied",)),
        ("ucb", "min_weight", (0, 0.4, math.nan)),
        ("ucb", "reseed", (-0.1, 0.5, math.nan)),
        ("ucb", "process_group", ("all", 3)),
        ("mn", "refit_every", (0,)),
        ("mn", "em_steps", (0,)),
        ("mn", "process_group", ("world",)),
        ("scb", "statistics", ("running",)),
        ("scb", "init", ("uniform",)),
        ("scb", "unknown_scale", ("none",)),
        ("scb", "unknown_posterior", ("batch",)),
    ):
        for value in values:
            options = {"num_features": 4, "num_components": 3, name: value}
            assert_refused(ValueError, name, value, any_norm, kind, **options)
    for kind, name in (("ucb", "num_components"), ("scb", "num_clusters"), ("dsbn", "num_domains")):
        assert_refused(ValueError, name, 0, any_norm, kind, 4, 0)


def test_options_that_do_not_go_together():
    moves, world = "needs update='moving_average', got update='weight'", {"process_group": "world"}
    for kind, options, message in (
        ("batchnorm", {}, "kind: expected one of bn, in, dsbn, mn, scb, scb_base, ucb, none, got batchnorm"),
        ("bn", {"groups": 1}, "groups: 1 is no option of kind 'bn'; it has eps, momentum, affine, track_running_stats"),
        ("none", {"eps": 0.1}, "eps: 0.1 is no option of kind 'none'; it has none"),
        ("ucb", {"statistics": "learned"}, "statistics: 'learned' needs update='weight', got update='moving_average'"),
        ("ucb", {"variance": "shared", "update": "weight"}, f"variance: 'shared' {moves}"),
        ("ucb", {"reseed": 0.01, "update": "weight"}, f"reseed: 0.01 {moves}"),
        ("ucb", {"reseed": 0.01} | world, "reseed: expected 0 with a process_group, whose ranks draw apart, got 0.01"),
        ("ucb", {"backend": "reference"} | world, "process_group: expected None with backend='reference', got 'world'"),
    ):
        assert refusal(ValueError, any_norm, kind, 4, 3, **options).startswith(message)


@pytest.fixture
def before_dispatch(monkeypatch):
    """Fail where anything asks for a backend."""
    monkeypatch.setattr(functional, "choose_backend", lambda *_: pytest.fail("a backend was chosen first"))


@pytest.mark.parametrize("kind", ["bn", "in", "mn", "ucb", "dsbn", "scb"])
def test_the_input_of_a_layer(kind, before_dispatch):
    """Any question to the meta device is an error of its own, so none is asked of a layer there."""
    layer, ids = any_norm(kind, 4, 3, affine=True), [IDS] if kind in CLUSTERED else []
    for x in (*NOT_X, X.to("meta")):
        assert_unchanged(layer, "x", x, x, *ids)
    if kind != "in":
        layer = any_norm(kind, 4, 3, affine=kind != "bn").to("meta")
        assert refusal(ValueError, layer, X, *ids) == "x: expected a tensor on meta, as the layer, got one on cpu"


def test_channels_in_another_dimension():
    for dim, shape in ((2, X.shape), (-1, (6, 5)), (-1, (5,)), (-3, X.shape), (3, X.shape)):
        message = f"x: expected 6 channels in dimension {dim}, got {tuple(shape)}"
        assert refusal(ValueError, any_norm("ucb", 6, 3, channel_dim=dim), torch.zeros(shape)) == message


def test_one_value_per_channel_in_training():
    for kind, options in (
        ("bn", {}),
        ("in", {}),
        ("scb", {"statistics": "batch"}),
        ("scb", {"statistics": "instance"}),
        ("mn", {}),
        ("ucb", {"init": "kmeans++"}),
    ):
        layer = any_norm(kind, 4, 3, **options)
        for x in (X[:1, :, 0], X[:1, :, :1]):
            assert_unchanged(layer, "x", x, x, *([IDS[:1]] if kind in CLUSTERED else []))
    assert_unchanged(any_norm("dsbn", 4, 3), "x", X[:1, :, 0], X[..., 0], torch.tensor([0, 0, 0, 0, 2, 0]))
    for kind in ("bn", "in"):  # in evaluation, where no statistics are kept
        layer = any_norm(kind, 4, 3, track_running_stats=False).eval()
        assert_unchanged(layer, "x", X[:1, :, :1], X[:1, :, :1])
        assert any_norm(kind, 4, 3, track_running_stats=True).eval()(X[:1, :, :1]).isfinite().all()
    layer = any_norm("ucb", 4, 3, update="weight", statistics="learned")  # takes none in training
    assert torch.equal(layer(X[:1, :, :1]), layer.eval()(X[:1, :, :1]))


@pytest.mark.parametrize(("kind", "options"), [("dsbn", {}), ("scb", {"init": "data", "statistics": "batch"})])
def test_the_clusters_of_a_layer(kind, options, before_dispatch):
    layer = any_norm(kind, 4, 3, **options)
    for ids in (IDS[:5], IDS[:, None], IDS.int(), IDS.float(), IDS.bool(), IDS.tolist(), 0, IDS.to("meta"), None):
        assert_unchanged(layer, "cluster", ids, X, ids)
    assert "; call the layer with its samples' cluster ids: layer(x, ids)" in refusal(ValueError, layer, X)
    for training in (True, False):
        lowest = -1 if kind == "scb" and not training else 0
        for value in (3, lowest - 1):
            ids = torch.tensor([0, 1, 2, value, 0, 1])
            assert_unchanged(layer.train(training), "cluster", value, X, ids, error=IndexError)
    functional.check_cluster(IDS.to("meta"), X.to("meta"), num_clusters=3, lowest=0)  # not asked for on other devices


def test_an_id_that_nobody_may_ask_about_gives_a_row_of_nan(monkeypatch):
    """As on a GPU, and in a graph that is compiled: in training -1 is such an id, in evaluation it is unknown."""
    layer = any_norm("scb", 4, 3)
    with torch.no_grad():
        layer.mean.copy_(torch.arange(12.0).view(3, 4))
    want, unknown = layer(X, IDS), layer.eval()(X)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    for training in (True, False):
        y = layer.train(training)(X, torch.tensor([0, 3, 2, -2, 9, -1]))
        torch.testing.assert_close(y[[0, 2]], want[[0, 2]])
        assert y[[1, 3, 4]].isnan().all()
        assert y[5].isnan().all() if training else torch.allclose(y[5], unknown[5])


CASE: dict[str, Any] = dict(zip(("x", "log_lambda", "mean", "var"), mixture_case((6, 4, 5), num=3), strict=False))
MEAN, VAR, LOG_LAMBDA = CASE["mean"], CASE["var"], CASE["log_lambda"]
BOTH = {
    "x": NOT_X,
    "mean": (MEAN[0], MEAN[:0], MEAN.long(), None, MEAN.to("meta")),
    "var": (VAR[:2], VAR.T, VAR.long(), 1.0, VAR.to("meta")),
    "eps": NOT_EPS,
}
ARGUMENTS = {
    "cluster": BOTH
    | {"unknown_scale": ("none",), "unknown_posterior": ("batch",), "cluster": (IDS[:5], IDS.to("meta"))},
    "mixture": BOTH
    | {
        "log_lambda": (LOG_LAMBDA[:2], LOG_LAMBDA[:, None], None, LOG_LAMBDA.to("meta")),
        "weight": (torch.ones(3),),
        "bias": (torch.ones(3),),
        "groups": (*NOT_GROUPS, None),
        "scale": ("one", None),
        "statistics": ("running",),
    },
}


def cluster(log_lambda, x, mean, var, cluster=IDS, **options: Any) -> torch.Tensor:
    return cluster_norm(x, cluster, mean, var, **options)


@pytest.mark.parametrize("function", [cluster, mixture_norm], ids=["cluster", "mixture"])
def test_the_arguments_of_a_function(function, before_dispatch, request):
    for name, values in ARGUMENTS[request.node.callspec.id].items():
        for value in values:
            assert_refused(ValueError, name, value, function, **(CASE | {name: value}))


def test_an_unknown_backend():
    for function in (cluster, mixture_norm):
        assert_refused(ValueError, "backend", "cuda", function, **CASE, backend="cuda")


def test_arguments_that_do_not_go_together(before_dispatch):
    for name in ("weight", "bias"):
        message = f"weight: expected together with bias, got only {name}"
        assert refusal(ValueError, mixture_norm, **CASE, **{name: torch.ones(4)}) == message
    wrong = torch.tensor([0, 1, 2, 3, -1, 0])
    assert_refused(IndexError, "cluster", 3, cluster, **CASE, cluster=wrong)
    assert_refused(IndexError, "cluster", -1, cluster, **CASE, cluster=wrong, allow_unknown=False)
    assert_refused(ValueError, "cluster", None, cluster, **CASE, cluster=None, allow_unknown=False)
