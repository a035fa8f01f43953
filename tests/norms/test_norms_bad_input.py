"""What the layers and functions refuse: one line that starts with the argument's name."""

import math
from typing import Any

import pytest
import torch
from norm_cases import any_norm, mixture_case

from common.norms import checks, cluster_norm, mixture_norm

CLUSTERED = {"dsbn": "num_domains", "scb": "num_clusters", "scb_base": "num_clusters"}
MIXTURES = {"mn": "num_components", "ucb": "num_components"}
AVERAGING = ("bn", "in", "dsbn", *MIXTURES)
OWN = ("scb", "scb_base", *MIXTURES)  # share nothing with torch's layers
KINDS = ("bn", "in", "dsbn", *OWN)

X = torch.randn(6, 4, 5, generator=torch.Generator().manual_seed(0))
IDS = torch.tensor([0, 1, 2, 0, 1, 2])

NOT_SIZES = (0, -1, True, 2.0, math.nan, "2", None)
NOT_EPS = (0, -1e-5, math.nan, math.inf, True, "1e-5", None)
NOT_MOMENTUM = (-0.1, 1.1, math.nan, math.inf, True, "0.1")
OPTIONS: list[tuple[str, tuple[str, ...], tuple[Any, ...]]] = [
    ("num_features", KINDS, NOT_SIZES),
    ("eps", KINDS, NOT_EPS),
    ("momentum", AVERAGING, NOT_MOMENTUM),
    ("channel_dim", OWN, (0, True, 1.0)),
    ("backend", OWN, ("cuda", "", None)),
    ("init", OWN, ("first", None)),
    ("groups", tuple(MIXTURES), (0, 3, -2, True, 2.0, math.nan, "2")),
    ("average", tuple(MIXTURES), ("mean",)),
    ("scale", tuple(MIXTURES), ("one",)),
    ("process_group", tuple(MIXTURES), ("all", 3)),
    ("process_group", ("mn",), ("world",)),
    ("update", ("ucb",), ("ema",)),
    ("statistics", ("ucb",), ("running", "learned")),  # by default, averages move
    ("refit_every", ("mn",), NOT_SIZES),
    ("em_steps", ("mn",), NOT_SIZES),
    ("unknown_scale", ("scb", "scb_base"), ("none",)),
    ("unknown_posterior", ("scb", "scb_base"), ("batch",)),
    ("colour", KINDS, (3,)),
]


def assert_names(caught: pytest.ExceptionInfo[Exception], name: str) -> None:
    line = str(caught.value)
    assert line.startswith(f"{name}: ")
    assert "\n" not in line


@pytest.mark.parametrize(
    ("kind", "name", "value"),
    [
        pytest.param(kind, name, value, id=f"{kind} {name}={value!r}")
        for name, kinds, values in OPTIONS
        for kind in kinds
        for value in values
    ],
)
def test_an_option(kind, name, value):
    options = {"num_features": 4, "num_components": 3, name: value}
    with pytest.raises(ValueError) as caught:  # noqa: PT011 - the name is asserted below
        any_norm(kind, **options)
    assert_names(caught, name)


@pytest.mark.parametrize(("kind", "name"), {**CLUSTERED, **MIXTURES}.items())
@pytest.mark.parametrize("value", NOT_SIZES, ids=repr)
def test_the_number_of_components(kind, name, value):
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        any_norm(kind, 4, value)
    assert_names(caught, name)


def test_an_unknown_kind():
    with pytest.raises(ValueError, match=r"^kind: expected one of bn, in,.*, got batchnorm$"):
        any_norm("batchnorm", 4, 3)


def test_an_unknown_option_is_told_the_known_ones():
    with pytest.raises(ValueError, match=r"^colour: 3 is no option of kind 'ucb'; it has groups, update"):
        any_norm("ucb", 4, 3, colour=3)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "x",
    [X[:, :3], X[0, :, 0], X.long(), X.bool(), X.to(torch.complex64), X.to("meta"), X.tolist(), None],
    ids=["3 channels", "1-d", "int64", "bool", "complex", "another device", "list", "None"],
)
def test_x(kind, x, training):
    layer = any_norm(kind, 4, 3, affine=True).train(training)
    before = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        layer(x, *([IDS] if kind in CLUSTERED else []))
    assert_names(caught, "x")
    for name, tensor in layer.state_dict().items():
        assert torch.equal(tensor, before[name]), name


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize(
    ("kind", "affine"), [(kind, affine) for kind in KINDS for affine in (True, False) if affine or kind != "in"]
)
def test_a_layer_on_another_device(kind, training, affine):
    """Any question to the meta device is an error of its own, so none was asked; plain "in" is on no device."""
    layer = any_norm(kind, 4, 3, affine=affine).train(training).to("meta")
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        layer(X, *([IDS] if kind in CLUSTERED else []))
    assert_names(caught, "x")


@pytest.mark.parametrize("dim", [2, -1])
@pytest.mark.parametrize("kind", OWN)
def test_x_with_other_channel_dimensions(kind, dim):
    layer = any_norm(kind, 4, 3, channel_dim=dim)
    for x in (X, X[:, 0], X[0, 0]):
        with pytest.raises(ValueError) as caught:  # noqa: PT011
            layer(x, *([IDS] if kind in CLUSTERED else []))
        assert_names(caught, "x")


@pytest.mark.parametrize("kind", OWN)
def test_the_batch_cannot_be_the_channels(kind):
    with pytest.raises(ValueError, match=r"^x: expected 6 channels in dimension -3, got \(6, 4, 5\)$"):
        any_norm(kind, 6, 3, channel_dim=-3)(X, *([IDS] if kind in CLUSTERED else []))


@pytest.mark.parametrize("kind", ["bn", "in"])
def test_one_value_per_channel_where_no_statistics_are_kept(kind):
    layer = any_norm(kind, 4, 3, track_running_stats=False).eval()
    with pytest.raises(ValueError, match=r"^x: expected more than one .* to take statistics of, got \(1, 4, 1\)$"):
        layer(X[:1, :, :1])
    kept = any_norm(kind, 4, 3, track_running_stats=True).eval()
    assert kept(X[:1, :, :1]).isfinite().all()


def test_one_value_per_channel_is_enough_where_training_takes_no_statistics():
    layer = any_norm("ucb", 4, 3, update="weight", statistics="learned")
    assert torch.equal(layer(X[:1, :, :1]), layer.eval()(X[:1, :, :1]))


@pytest.mark.parametrize("kind", AVERAGING)
def test_one_value_per_channel_in_training(kind):
    layer = any_norm(kind, 4, 3)
    for x in (X[:1, :, 0], X[:1, :, :1]):
        with pytest.raises(ValueError) as caught:  # noqa: PT011
            layer(x, *([IDS[:1]] if kind in CLUSTERED else []))
        assert_names(caught, "x")


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("kind", CLUSTERED)
@pytest.mark.parametrize(
    "ids",
    [IDS[:5], IDS[:, None], IDS.int(), IDS.float(), IDS.bool(), IDS.to("meta"), IDS.tolist(), 0],
    ids=["5", "2-d", "int32", "float", "bool", "another device", "list", "a number"],
)
def test_cluster(kind, ids, training):
    layer = any_norm(kind, 4, 3).train(training)
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        layer(X, ids)
    assert_names(caught, "cluster")


@pytest.mark.parametrize("kind", CLUSTERED)
def test_no_cluster(kind):
    layer = any_norm(kind, 4, 3).train(kind != "dsbn")  # SCB takes it as unknown in evaluation
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        layer(X)
    assert_names(caught, "cluster")


@pytest.mark.parametrize("kind", CLUSTERED)
@pytest.mark.parametrize(("wrong", "training"), [(3, True), (3, False), (-2, True), (-2, False), (-1, True)])
def test_an_id_beyond_range(kind, wrong, training):
    layer = any_norm(kind, 4, 3).train(training)
    lowest = 0 if training or kind == "dsbn" else -1
    with pytest.raises(IndexError, match=f"^cluster: expected ids from {lowest} to 2, got {wrong}$"):
        layer(X, torch.tensor([0, 1, 2, wrong, 0, 1]))


@pytest.mark.parametrize("kind", ["scb", "scb_base"])
def test_no_cluster_is_seeded_beside_an_id_beyond_range(kind):
    layer = any_norm(kind, 4, 3, init="data")
    with pytest.raises(IndexError, match=r"^cluster: expected ids"):
        layer(X, torch.tensor([0, 1, 2, 3, 0, 1]))
    assert not layer.initialized.any()


def test_ids_on_other_devices_are_not_asked_for():
    checks.check_cluster(IDS.to("meta"), X.to("meta"), num_clusters=3, lowest=0)


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
FUNCTIONS = {
    "cluster": lambda log_lambda, x, mean, var, cluster=IDS, **options: cluster_norm(x, cluster, mean, var, **options),
    "mixture": mixture_norm,
}
BOTH, MIXTURE = ("cluster", "mixture"), ("mixture",)


@pytest.mark.parametrize("backend", ["reference", "eager", "auto"])
@pytest.mark.parametrize(
    ("function", "name", "value"),
    [
        pytest.param(function, name, value, id=f"{function} {name} {i}")
        for name, functions, values in (
            ("x", BOTH, [X[:, :3], X[0, :, 0], X.long(), X.to(torch.complex64), None]),
            ("mean", BOTH, [CASE["mean"][0], CASE["mean"][:0], CASE["mean"].long(), CASE["mean"].to("meta"), None]),
            ("var", BOTH, [CASE["var"][:2], CASE["var"].T, CASE["var"].long(), CASE["var"].to("meta"), 1.0]),
            (
                "log_lambda",
                MIXTURE,
                [torch.zeros(2), torch.zeros(3, 1), torch.arange(3), CASE["mean"].to("meta")[:, 0], None],
            ),
            ("cluster", ("cluster",), [IDS[:5], IDS.int(), IDS.to("meta"), IDS.tolist()]),
            ("eps", BOTH, NOT_EPS),
            ("groups", MIXTURE, (0, 3, -2, True, 2.0, math.nan, "2", None)),
            ("scale", MIXTURE, ("one", None)),
            ("statistics", MIXTURE, ("running",)),
            ("unknown_scale", ("cluster",), ("none",)),
            ("unknown_posterior", ("cluster",), ("batch",)),
        )
        for function in functions
        for i, value in enumerate(values)
    ],
)
def test_an_argument_of_a_function(function, name, value, backend):
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        FUNCTIONS[function](**(CASE | {name: value}), backend=backend)
    assert_names(caught, name)


@pytest.mark.parametrize("function", BOTH)
def test_an_unknown_backend(function):
    with pytest.raises(ValueError, match=r"^backend: expected one of 'auto', 'reference', .*, got 'cuda'$"):
        FUNCTIONS[function](**CASE, backend="cuda")


@pytest.mark.parametrize(("given", "missing"), [("weight", "bias"), ("bias", "weight")])
def test_half_of_an_affine_map(given, missing):
    arguments = dict[str, Any](CASE, **{given: torch.ones(4)})
    with pytest.raises(ValueError, match=f"^weight: expected together with bias, got only {given}$"):
        mixture_norm(**arguments)
    with pytest.raises(ValueError, match=rf"^{missing}: expected a floating-point \(4,\), got torch.float32 \(3,\)$"):
        mixture_norm(**dict[str, Any](arguments, **{missing: torch.ones(3)}))


def test_ids_of_a_function():
    with pytest.raises(IndexError, match=r"^cluster: expected ids from -1 to 2, got 3$"):
        FUNCTIONS["cluster"](**CASE, cluster=torch.tensor([0, 1, 2, 3, -1, 0]))
    with pytest.raises(ValueError, match=r"^cluster: expected an int64 tensor \(6,\) in training, got None$"):
        FUNCTIONS["cluster"](**CASE, cluster=None, allow_unknown=False)
