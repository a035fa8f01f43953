"""What the layers and functions refuse: one line with the argument's name, what it should be, and what it is.

Each check once, in the layer or function that makes it: which backend computes, and in which mode, comes after.
"""

import math
from typing import Any

import pytest
import torch
from norm_cases import any_norm, mixture_case

from common.norms import cluster_norm, functional, mixture_norm

CLUSTERED = ("dsbn", "scb")
KINDS = ("bn", "in", "mn", "ucb", *CLUSTERED)
X = torch.randn(6, 4, 5, generator=torch.Generator().manual_seed(0))
IDS = torch.tensor([0, 1, 2, 0, 1, 2])

NO_NUMBER = (True, 2.0, math.nan, "2", None)
NOT_EPS = (0, -1e-5, math.nan, math.inf, True, "1e-5", None)
NOT_GROUPS = (0, 3, -2, True, 2.0, math.nan, "2")
POSITIVE = "a positive, finite number"
BACKENDS = "one of 'auto', 'reference', 'eager', 'compiled', 'triton'"
GROUP = "None, 'world' or a group that this rank belongs to"


def refusal(error: type[Exception], function: Any, *args: Any, **options: Any) -> str:
    """Return the message, of one line, with which a function refuses arguments."""
    with pytest.raises(error) as caught:
        function(*args, **options)
    line = str(caught.value)
    assert "\n" not in line
    return line


def assert_refused_unchanged(layer: Any, error: type[Exception], message: str, *args: Any) -> None:
    """Assert that a layer refuses its input in these words, and is afterwards what it was before."""
    before = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    assert refusal(error, layer, *args) == message
    for name, tensor in layer.state_dict().items():
        assert torch.equal(tensor, before[name]), f"{name} after {message}"


@pytest.mark.parametrize(
    ("kind", "name", "values", "expected"),
    [
        ("ucb", "num_features", NO_NUMBER, "a whole number"),
        ("ucb", "num_features", (0, -1), "at least 1"),
        ("bn", "num_features", (0,), "at least 1"),
        ("in", "num_features", (0,), "at least 1"),
        ("ucb", "eps", NOT_EPS, POSITIVE),
        ("bn", "eps", (0,), POSITIVE),
        ("in", "eps", (0,), POSITIVE),
        ("ucb", "momentum", (-0.1, 1.1, math.nan, math.inf, True, "0.1", None), "0 to 1"),
        ("scb", "momentum", (2,), "0 to 1"),
        ("bn", "momentum", (2,), "0 to 1"),
        ("in", "momentum", (2,), "0 to 1"),
        ("ucb", "dtype", (torch.int64, torch.complex64, "float32"), "a floating-point torch.dtype or None"),
        ("bn", "dtype", (torch.int64,), "a floating-point torch.dtype or None"),
        ("in", "dtype", (torch.int64,), "a floating-point torch.dtype or None"),
        ("ucb", "seed", NO_NUMBER, "a whole number"),
        ("ucb", "channel_dim", (0, True, 1.0), "a dimension other than the batch's"),
        ("ucb", "backend", ("cuda", "", None), BACKENDS),
        ("ucb", "groups", NOT_GROUPS, "a divisor of 4"),
        ("ucb", "update", ("ema",), "one of 'moving_average', 'weight'"),
        ("ucb", "statistics", ("running",), "one of 'batch', 'learned'"),
        ("ucb", "average", ("mean",), "one of 'em', 'paper'"),
        ("ucb", "scale", ("one",), "one of 'paper', 'sqrt_k'"),
        ("ucb", "init", ("data", None), "one of 'uniform', 'kmeans++'"),
        ("ucb", "variance", ("tied",), "one of 'component', 'shared'"),
        ("ucb", "min_weight", (0, 0.4, math.nan), "more than 0 and at most 1 / 3"),
        ("ucb", "reseed", (-0.1, 0.5, math.nan), "at least 0 and less than 1 / 3"),
        ("ucb", "process_group", ("all", 3), GROUP),
        ("mn", "refit_every", (0,), "at least 1"),
        ("mn", "em_steps", (0,), "at least 1"),
        ("scb", "statistics", ("running",), "one of 'learned', 'batch', 'instance'"),
        ("scb", "init", ("uniform",), "one of 'identity', 'data'"),
        ("scb", "unknown_scale", ("none",), "one of 'match', 'paper'"),
        ("scb", "unknown_posterior", ("batch",), "one of 'location', 'sample'"),
    ],
)
def test_an_option_of_a_layer(kind, name, values, expected):
    for value in values:
        options = {"num_features": 4, "num_components": 3, name: value}
        assert refusal(ValueError, any_norm, kind, **options) == f"{name}: expected {expected}, got {value!r}"


@pytest.mark.parametrize(
    ("kind", "name"), [("ucb", "num_components"), ("scb", "num_clusters"), ("dsbn", "num_domains")]
)
def test_the_number_of_components(kind, name):
    assert refusal(ValueError, any_norm, kind, 4, 0) == f"{name}: expected at least 1, got 0"


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        ("batchnorm", {}, "kind: expected one of bn, in, dsbn, mn, scb, scb_base, ucb, none, got batchnorm"),
        ("bn", {"groups": 1}, "groups: 1 is no option of kind 'bn'; it has eps, momentum, affine, track_running_stats"),
        ("mn", {"reseed": 0.1}, "reseed: 0.1 is no option of kind 'mn'; it has groups, init, refit_every, em_steps"),
        ("none", {"eps": 0.1}, "eps: 0.1 is no option of kind 'none'; it has none"),
        ("ucb", {"statistics": "learned"}, "statistics: 'learned' needs update='weight', got update='moving_average'"),
        (
            "ucb",
            {"variance": "shared", "update": "weight"},
            "variance: 'shared' needs update='moving_average', got update='weight'",
        ),
        (
            "ucb",
            {"reseed": 0.01, "update": "weight"},
            "reseed: 0.01 needs update='moving_average', got update='weight'",
        ),
        (
            "ucb",
            {"reseed": 0.01, "process_group": "world"},
            "reseed: expected 0 with a process_group, whose ranks draw apart, got 0.01",
        ),
        (
            "ucb",
            {"process_group": "world", "backend": "reference"},
            "process_group: expected None with backend='reference', got 'world'",
        ),
        (
            "mn",
            {"process_group": "world"},
            "process_group: expected None, since MixtureNorm fits each rank's batch by an EM of its own and has no "
            "synchronised one (UCBNorm has), got 'world'",
        ),
    ],
)
def test_options_that_do_not_go_together(kind, options, message):
    assert refusal(ValueError, any_norm, kind, 4, 3, **options).startswith(message)


WRONG_X = (
    (X[:, :3], "x: expected 4 channels in dimension 1, got (6, 3, 5)"),
    (X[0, :, 0], "x: expected 4 channels in dimension 1, got (4,)"),
    (X.long(), "x: expected a floating-point tensor, got torch.int64 (6, 4, 5)"),
    (X.bool(), "x: expected a floating-point tensor, got torch.bool (6, 4, 5)"),
    (X.to(torch.complex64), "x: expected a floating-point tensor, got torch.complex64 (6, 4, 5)"),
    (X.tolist(), "x: expected a floating-point tensor, got list"),
    (None, "x: expected a floating-point tensor, got NoneType"),
)
ELSEWHERE = (X.to("meta"), "x: expected a tensor on cpu, as the layer, got one on meta")


@pytest.fixture
def before_dispatch(monkeypatch):
    """Fail where anything asks for a backend."""
    monkeypatch.setattr(functional, "choose_backend", lambda *_: pytest.fail("a backend was chosen first"))


@pytest.mark.parametrize("kind", KINDS)
def test_the_input_of_a_layer(kind, before_dispatch):
    layer = any_norm(kind, 4, 3, affine=True)
    for x, message in (*WRONG_X, ELSEWHERE):
        assert_refused_unchanged(layer, ValueError, message, x, *([IDS] if kind in CLUSTERED else []))


@pytest.mark.parametrize(
    ("kind", "options"), [("bn", {"affine": True}), ("bn", {"affine": False}), ("dsbn", {}), ("scb", {}), ("ucb", {})]
)
def test_a_layer_on_another_device(kind, options):
    """Any question to the meta device is an error of its own, so none was asked."""
    layer = any_norm(kind, 4, 3, **options).to("meta")
    message = "x: expected a tensor on meta, as the layer, got one on cpu"
    assert refusal(ValueError, layer, X, *([IDS] if kind in CLUSTERED else [])) == message


def test_channels_in_another_dimension():
    for dim, shape in ((2, X.shape), (-1, (6, 5)), (-1, (5,)), (-3, X.shape), (3, X.shape)):
        message = f"x: expected 6 channels in dimension {dim}, got {tuple(shape)}"
        assert refusal(ValueError, any_norm("ucb", 6, 3, channel_dim=dim), torch.zeros(shape)) == message


@pytest.mark.parametrize(
    ("kind", "options", "expected"),
    [
        ("bn", {}, "more than one value per channel to take statistics of"),
        ("in", {}, "more than one position to take statistics of"),
        ("scb", {"statistics": "batch"}, "more than one value per channel in training"),
        ("scb", {"statistics": "instance"}, "more than one position to take statistics of"),
        ("mn", {}, "more than one value per channel in training"),
        ("ucb", {}, "more than one value per channel in training"),
        ("ucb", {"init": "kmeans++"}, "more than one value per channel in training"),
    ],
)
def test_one_value_per_channel_in_training(kind, options, expected):
    layer = any_norm(kind, 4, 3, **options)
    for x in (X[:1, :, 0], X[:1, :, :1]):
        message = f"x: expected {expected}, got {tuple(x.shape)}"
        assert_refused_unchanged(layer, ValueError, message, x, *([IDS[:1]] if kind in CLUSTERED else []))


def test_a_domain_with_one_value_per_channel_in_training():
    message = "x: expected more than one value per channel to take statistics of, got (1, 4)"
    assert_refused_unchanged(any_norm("dsbn", 4, 3), ValueError, message, X[..., 0], torch.tensor([0, 0, 0, 0, 2, 0]))


@pytest.mark.parametrize("kind", ["bn", "in"])
def test_one_value_per_channel_where_no_statistics_are_kept(kind):
    layer = any_norm(kind, 4, 3, track_running_stats=False).eval()
    assert "to take statistics of, got (1, 4, 1)" in refusal(ValueError, layer, X[:1, :, :1])
    kept = any_norm(kind, 4, 3, track_running_stats=True).eval()
    assert kept(X[:1, :, :1]).isfinite().all()


def test_one_value_per_channel_is_enough_where_training_takes_no_statistics():
    layer = any_norm("ucb", 4, 3, update="weight", statistics="learned")
    assert torch.equal(layer(X[:1, :, :1]), layer.eval()(X[:1, :, :1]))


@pytest.mark.parametrize(("kind", "options"), [("dsbn", {}), ("scb", {}), ("scb", {"statistics": "batch"})])
def test_the_clusters_of_a_layer(kind, options, before_dispatch):
    layer = any_norm(kind, 4, 3, **options)
    for ids, found in (
        (IDS[:5], "torch.int64 (5,)"),
        (IDS[:, None], "torch.int64 (6, 1)"),
        (IDS.int(), "torch.int32 (6,)"),
        (IDS.float(), "torch.float32 (6,)"),
        (IDS.bool(), "torch.bool (6,)"),
        (IDS.tolist(), "list"),
        (0, "int"),
    ):
        assert_refused_unchanged(layer, ValueError, f"cluster: expected an int64 tensor (6,), got {found}", X, ids)
    message = "cluster: expected a tensor on cpu, as x, got one on meta"
    assert_refused_unchanged(layer, ValueError, message, X, IDS.to("meta"))
    missing = "got NoneType" if kind == "dsbn" else "in training, got None"
    missing = f"cluster: expected an int64 tensor (6,){' ' if kind == 'scb' else ', '}{missing}"
    missing += "; call the layer with its samples' cluster ids: layer(x, ids)"
    assert_refused_unchanged(layer.train(kind != "dsbn"), ValueError, missing, X)  # SCB in evaluation: unknown


@pytest.mark.parametrize(
    ("kind", "options", "training", "wrong"),
    [
        ("dsbn", {}, True, (3, -1)),
        ("dsbn", {}, False, (3, -1)),
        ("scb", {}, True, (3, -1, -2)),
        ("scb", {}, False, (3, -2)),
        ("scb", {"init": "data"}, True, (3,)),
        ("scb", {"statistics": "batch"}, True, (3,)),
    ],
)
def test_an_id_beyond_range(kind, options, training, wrong, before_dispatch):
    layer = any_norm(kind, 4, 3, **options).train(training)
    lowest = 0 if training or kind == "dsbn" else -1
    for value in wrong:
        message = f"cluster: expected ids from {lowest} to 2, got {value}"
        assert_refused_unchanged(layer, IndexError, message, X, torch.tensor([0, 1, 2, value, 0, 1]))


def test_ids_on_other_devices_are_not_asked_for():
    functional.check_cluster(IDS.to("meta"), X.to("meta"), num_clusters=3, lowest=0)


def test_an_id_that_nobody_may_ask_about_gives_a_row_of_nan(monkeypatch):
    """As on a GPU, and in a graph that is compiled: in training -1 is such an id, in evaluation it is unknown."""
    layer = any_norm("scb", 4, 3)
    with torch.no_grad():
        layer.mean.copy_(torch.arange(12.0).view(3, 4))
    want, unknown = layer(X, IDS), layer.eval()(X)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    for ids, training in (([0, 3, 2, -2, 9, -1], True), ([0, 3, 2, -2, 9, -1], False)):
        y = layer.train(training)(X, torch.tensor(ids))
        torch.testing.assert_close(y[[0, 2]], want[[0, 2]])
        assert y[[1, 3, 4]].isnan().all()
        assert y[5].isnan().all() if training else torch.allclose(y[5], unknown[5])


CASE: dict[str, Any] = dict(zip(("x", "log_lambda", "mean", "var"), mixture_case((6, 4, 5), num=3), strict=False))
MEAN, VAR, LOG_LAMBDA = CASE["mean"], CASE["var"], CASE["log_lambda"]
FUNCTIONS = {
    "cluster": lambda log_lambda, x, mean, var, cluster=IDS, **options: cluster_norm(x, cluster, mean, var, **options),
    "mixture": mixture_norm,
}
WRONG_MEAN = (
    (MEAN[0], "mean: expected a floating-point (K, C) with K of at least 1, got torch.float64 (4,)"),
    (MEAN[:0], "mean: expected a floating-point (K, C) with K of at least 1, got torch.float64 (0, 4)"),
    (MEAN.long(), "mean: expected a floating-point (K, C) with K of at least 1, got torch.int64 (3, 4)"),
    (None, "mean: expected a floating-point (K, C) with K of at least 1, got NoneType"),
    (MEAN.to("meta"), "mean: expected a tensor on cpu, as x, got one on meta"),
)
WRONG_VAR = (
    (VAR[:2], "var: expected a floating-point (3, 4), got torch.float64 (2, 4)"),
    (VAR.T, "var: expected a floating-point (3, 4), got torch.float64 (4, 3)"),
    (VAR.long(), "var: expected a floating-point (3, 4), got torch.int64 (3, 4)"),
    (1.0, "var: expected a floating-point (3, 4), got float"),
    (VAR.to("meta"), "var: expected a tensor on cpu, as x, got one on meta"),
)
ARGUMENTS = {
    "cluster": {
        "x": WRONG_X,
        "mean": WRONG_MEAN,
        "var": WRONG_VAR,
        "eps": [(value, f"eps: expected {POSITIVE}, got {value!r}") for value in NOT_EPS],
        "unknown_scale": [("none", "unknown_scale: expected one of 'match', 'paper', got 'none'")],
        "unknown_posterior": [("batch", "unknown_posterior: expected one of 'location', 'sample', got 'batch'")],
        "cluster": [
            (IDS[:5], "cluster: expected an int64 tensor (6,), got torch.int64 (5,)"),
            (IDS.to("meta"), "cluster: expected a tensor on cpu, as x, got one on meta"),
        ],
    },
    "mixture": {
        "x": WRONG_X,
        "mean": WRONG_MEAN,
        "var": WRONG_VAR,
        "log_lambda": [
            (LOG_LAMBDA[:2], "log_lambda: expected a floating-point (3,), got torch.float64 (2,)"),
            (LOG_LAMBDA[:, None], "log_lambda: expected a floating-point (3,), got torch.float64 (3, 1)"),
            (None, "log_lambda: expected a floating-point (3,), got NoneType"),
            (LOG_LAMBDA.to("meta"), "log_lambda: expected a tensor on cpu, as x, got one on meta"),
        ],
        "weight": [
            (torch.ones(3), "weight: expected a floating-point (4,), got torch.float32 (3,)"),
            (torch.ones(4), "weight: expected together with bias, got only weight"),
        ],
        "bias": [
            (torch.ones(3), "bias: expected a floating-point (4,), got torch.float32 (3,)"),
            (torch.ones(4), "weight: expected together with bias, got only bias"),
        ],
        "eps": [(value, f"eps: expected {POSITIVE}, got {value!r}") for value in NOT_EPS],
        "groups": [(value, f"groups: expected a divisor of 4, got {value!r}") for value in (*NOT_GROUPS, None)],
        "scale": [(value, f"scale: expected one of 'paper', 'sqrt_k', got {value!r}") for value in ("one", None)],
        "statistics": [("running", "statistics: expected one of 'batch', 'learned', got 'running'")],
    },
}


@pytest.mark.parametrize(("function", "name"), [(f, name) for f, names in ARGUMENTS.items() for name in names])
def test_an_argument_of_a_function(function, name, before_dispatch):
    for value, message in ARGUMENTS[function][name]:
        assert refusal(ValueError, FUNCTIONS[function], **(CASE | {name: value})) == message


@pytest.mark.parametrize("function", FUNCTIONS)
def test_an_unknown_backend_of_a_function(function):
    message = f"backend: expected {BACKENDS}, got 'cuda'"
    assert refusal(ValueError, FUNCTIONS[function], **CASE, backend="cuda") == message


def test_ids_of_a_function(before_dispatch):
    cluster, wrong = FUNCTIONS["cluster"], torch.tensor([0, 1, 2, 3, -1, 0])
    message = "cluster: expected ids from -1 to 2, got 3"
    assert refusal(IndexError, cluster, **CASE, cluster=wrong) == message
    message = "cluster: expected ids from 0 to 2, got -1"
    assert refusal(IndexError, cluster, **CASE, cluster=wrong, allow_unknown=False) == message
    message = "cluster: expected an int64 tensor (6,) in training, got None"
    assert refusal(ValueError, cluster, **CASE, cluster=None, allow_unknown=False) == message
