"""Layers whose kernels are interpreted, against the same layers in float64; run by test_kernels.py."""

import math

import pytest
import torch
from launches import as_accurate_as_a_gpu, replaced_kernels
from norm_cases import CLUSTERED, any_norm, assert_state, batch, channels_last, in_full, mixture_case, state, step
from torch.utils.checkpoint import checkpoint

from common.norms import mixture
from common.norms.backends import reference
from common.norms.backends.reference import MixtureParams
from common.norms.backends.triton import launch, ops
from common.norms.backends.triton.backend import Triton

SHAPE = (4, 6, 5)
OPTIONS = {
    "default": ("ucb", {}),
    "joint, paper's averages, one variance, of weights that a floor leaves with a sum above 1": (
        "ucb",
        {"groups": 1, "average": "paper", "variance": "shared", "min_weight": 0.3},
    ),
    "learned by gradients, with a floor": ("ucb", {"groups": 2, "update": "weight", "min_weight": 0.3}),
    "learned statistics": ("ucb", {"update": "weight", "statistics": "learned", "scale": "sqrt_k"}),
    "re-seeded": ("ucb", {"reseed": 0.2, "affine": False}),
    "mixture normalization": ("mn", {"em_steps": 2, "eps": 1.0}),
}
BY_CHANNEL = {
    "paper's averages, one variance": ("ucb", {"average": "paper", "variance": "shared", "scale": "sqrt_k"}),
    "learned by gradients, with a floor": ("ucb", {"update": "weight", "min_weight": 0.3}),
    "re-seeded, without an affine map": ("ucb", {"reseed": 0.2, "affine": False}),
    "mixture normalization": ("mn", {"groups": None, "em_steps": 2, "eps": 1.0}),
}


@pytest.fixture(autouse=True)
def as_on_a_gpu(tiles):
    """Cut tiles down, and err as a GPU may."""
    with as_accurate_as_a_gpu():
        yield


def case(shape=SHAPE, seed=0, dtype=torch.float32):
    x, *_, g = mixture_case(shape, 3, dtype=dtype, seed=seed)
    return x, g


def pair(kind, options, dtype=torch.float32, num=3):
    """Make a layer of kernels and one of equations in float64, with the same numbers, none of them special."""
    kernel = any_norm(kind, SHAPE[1], num, backend="triton", **options)
    exact = any_norm(kind, SHAPE[1], num, backend="reference", **options).double()
    rng = torch.Generator().manual_seed(7)
    stored = [getattr(kernel, name, None) for name in ("logits", "log_var", "weight", "bias")]
    with torch.no_grad():
        for tensor in kernel.parameters() if kind in CLUSTERED else stored:
            if tensor is not None:
                tensor.add_(torch.randn(tensor.shape, generator=rng) / 2)
    kernel = kernel.to(dtype)
    exact.load_state_dict(kernel.state_dict())
    return kernel, exact


def assert_steps(kernel, exact, x, g, *ids, rtol):
    """Assert that a step of both gives the same, and leaves the same."""
    assert_near(step(kernel, x, g, *ids), step(exact, x.double(), g.double(), *ids), rtol)
    assert_near(kernel.state_dict().values(), exact.state_dict().values(), rtol)


def assert_near(got, want, rtol):
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(
            a.double(), b.double(), rtol=0, atol=rtol * max(1.0, float(b.detach().double().abs().max()))
        )


@pytest.mark.parametrize(
    ("tiles", "name"),
    [
        *(("small", n) for n in OPTIONS if n.startswith(("joint", "learned by", "re-seeded"))),
        ("channel", "learned by gradients, with a floor"),
        *in_full(*(("small", n) for n in ("default", "learned statistics", "mixture normalization"))),
        *in_full(*(("channel", n) for n in BY_CHANNEL if not n.startswith("learned"))),
    ],
    indirect=["tiles"],
)
def test_a_layer_steps_and_moves_its_averages_as_in_float64(name, request):
    """The second step sees what the first has stored; evaluation what both have.

    A GPU's posteriors may be off by 5e-7, 2 ulp of a power and 2^-21.9 of one over their sum: magnified 100 times by
    slopes and sums. EM leaves a component one location alone, with the least variance that it allows, 6e-3: the slope
    of posteriors is 1 / variance, 160; and the spread of that location, 0, is magnified by 1 / sqrt(eps): hence eps.
    """
    by_channel = request.node.callspec.params["tiles"] == "channel"
    made = (BY_CHANNEL if by_channel else OPTIONS)[name]
    rtol, (x, g) = 2e-4 if made[0] == "mn" else 5e-5, case()
    if by_channel:
        names = []
        with replaced_kernels(lambda kernel, *_: names.append(kernel.__name__)):
            step(pair(*made)[0], x, g)
        assert {"mixture_channel_kernel", "mixture_channel_bwd_kernel"} <= set(names)
    kernel, exact = pair(*made)
    for shift in (1, -1):
        x = 2 * x + shift
        assert_steps(kernel, exact, x, g, rtol=rtol)
    assert_steps(kernel.eval(), exact.eval(), x, g, rtol=rtol)


@pytest.mark.parametrize("name", ["default", *in_full("mixture normalization")])
def test_a_checkpointed_layer_steps_as_without(name):
    """After an evaluation, whose gradient the step leaves as it is."""
    found = []
    for checkpointed in (False, True):
        kernel, _ = pair(*OPTIONS[name])
        x, g = case()
        first, x = x.detach().requires_grad_(), x.detach().requires_grad_()
        evaluated = kernel.eval()(first)
        gradients = torch.autograd.grad(evaluated, first, g, retain_graph=True)
        kernel.train()
        y = checkpoint(kernel, x, use_reentrant=False) if checkpointed else kernel(x)
        again = torch.autograd.grad([y, evaluated], [x, first], [g, g])
        assert torch.equal(again[1], gradients[0])
        found.append([y, again[0], *kernel.state_dict().values()])
    for want, got in zip(*found, strict=True):
        assert torch.equal(got, want)


FITTED = {
    "joint": {"groups": 1},
    "in groups, plain averages, a floor": {"groups": 2, "average": "paper", "min_weight": 0.3},
    "each channel, every other batch": {"groups": None, "refit_every": 2, "init": "uniform"},
    "a single step": {"em_steps": 1, "eps": 1.0},
}


@pytest.mark.parametrize(
    ("name", "memory"),
    [
        ("in groups, plain averages, a floor", "channels_last"),
        ("joint", "contiguous"),
        *in_full(("a single step", "contiguous"), ("each channel, every other batch", "channels_last")),
    ],
)
def test_a_mixture_is_fitted_to_drawn_locations_as_in_float64(monkeypatch, name, memory):
    """Sixteen of forty-two; each batch draws others."""
    monkeypatch.setattr(mixture, "MAX_POINTS", 16)
    kernel, exact = pair("mn", {"em_steps": 2, "eps": 0.1, **FITTED[name]})
    for step_number in range(3):
        x, g = case((6, SHAPE[1], 7), step_number)
        if memory == "channels_last":
            x, g = channels_last(x), channels_last(g)
        assert_steps(kernel, exact, x, g, rtol=1e-4)
    assert not torch.equal(kernel.fit_mean, kernel.mean)


def test_a_component_that_holds_no_location_stays_where_its_fit_was():
    kernel, exact = pair("mn", {"em_steps": 2})
    for layer in (kernel, exact):
        layer.set_initialized(True)
        layer.fit_mean[2], layer.fit_log_var[2] = 1e4, -2.0
    assert_steps(kernel, exact, *case(), rtol=1e-4)
    assert torch.equal(kernel.fit_mean[2], torch.full((SHAPE[1],), 1e4))
    torch.testing.assert_close(kernel.fit_log_var[2], torch.full((SHAPE[1],), -2.0))


def test_a_fit_may_be_stored_in_bfloat16_and_lie_in_memory_in_any_way():
    kernel, exact = pair("mn", {"em_steps": 2, "eps": 0.1}, torch.bfloat16)
    x, g = case((6, SHAPE[1], 7))
    kernel(x)
    exact.load_state_dict(kernel.state_dict())
    for table in (kernel.fit_mean, kernel.mean):
        table.data = table.data.t().contiguous().t()
    x = 1 - x
    assert_near(step(kernel, x, g)[:2], step(exact, x.double(), g.double())[:2], rtol=1e-3)
    for name, want in exact.named_buffers():
        if want.is_floating_point():
            torch.testing.assert_close(
                kernel.get_buffer(name).double(), want.double(), rtol=2**-7, atol=2**-9, msg=name
            )


@pytest.mark.parametrize(
    ("shape", "limit", "memory"),
    [((3, 5, 7), 16, "channels_last"), ((21, 70), 20, "contiguous"), ((2, 3, 500), 999, "strided")],
    ids=str,
)
def test_the_kernel_draws_the_locations_that_estimation_does(monkeypatch, shape, limit, memory):
    monkeypatch.setattr(mixture, "MAX_POINTS", limit)
    x = reference.flatten(mixture_case(shape, 2, dtype=torch.float32)[0])
    if memory == "channels_last":
        x = channels_last(x)
    if memory == "strided":
        x = torch.stack([x, x + 1], dim=3).flatten(2)[:, :, ::2]
    for seed, count in ((0, 1), (5, 2**33 + 7)):
        step_tensor = torch.tensor(count)
        key = mixture.points_key(seed, "fit")
        drawn = ops.drawn_locations(x, step_tensor, limit, *key)
        assert torch.equal(drawn[:, :, 0], mixture.sample_points(x, key, step_tensor))


def test_bfloat16_is_rounded_once():
    kernel, exact = pair("ucb", {})
    x, g = case(dtype=torch.bfloat16)
    got, want = step(kernel, x, g), step(exact, x.double(), g.double())
    assert [t.dtype for t in got] == [torch.bfloat16, torch.bfloat16, torch.float32, torch.float32]
    for a, b in zip(got[:2], want[:2], strict=True):
        torch.testing.assert_close(a.double(), b, rtol=2**-7, atol=1e-5)
    assert_near(got[2:], want[2:], rtol=2e-5)


def test_a_layer_may_be_stored_in_bfloat16():
    kernel, exact = pair("ucb", {}, torch.bfloat16)
    x, g = case()
    got, want = step(kernel, x, g), step(exact, x.double(), g.double())
    assert [t.dtype for t in got] == [torch.float32, torch.float32, torch.bfloat16, torch.bfloat16]
    assert_near(got[:2], want[:2], rtol=2e-5)
    for name in ("logits", "mean", "log_var"):
        assert_near([getattr(kernel, name)], [getattr(exact, name)], rtol=2**-7)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy's, of numbers that are not finite
@pytest.mark.parametrize(("value", "kind"), [(math.inf, "mn"), (1e30, "ucb"), *in_full((math.nan, "ucb"))])
def test_a_batch_that_is_not_finite_moves_nothing(value, kind):
    kernel, _ = pair(kind, {"init": "uniform"})
    before, (x, _) = state(kernel), case()
    x[3, 5, 1] = value
    kernel(x)
    assert_state(kernel, before, "step")


@pytest.mark.parametrize("table", ["mean", "log_var"])
def test_a_fit_that_is_not_finite_is_not_stored(table):
    """Its last channel alone, under a state that is."""
    kernel, _ = pair("mn", {"init": "uniform"})
    last = {name: getattr(kernel, f"fit_{name}").clone() for name in ("logits", "mean", "log_var")}
    mean = kernel.mean.clone()
    state = torch.full((launch.STATE_PLANES, *mean.shape), 0.5)
    new = {name: t + 1 for name, t in last.items()}
    for finite in (False, True):
        new[table][2, -1] = 1.0 if finite else math.inf
        kernel._update(Triton(), state, (MixtureParams(**new), kernel.last_fit()))
        for name, old in last.items():
            assert torch.equal(getattr(kernel, f"fit_{name}"), new[name] if finite else old)
        assert torch.equal(kernel.mean, mean) is not finite


def test_a_component_that_holds_nothing_stays_to_the_bit_and_keeps_a_least_weight():
    kernel, _ = pair("ucb", {"min_weight": 0.05})
    kernel.mean[2], kernel.logits[2] = 1e4, -20.0
    mean, log_var = kernel.mean[2].clone(), kernel.log_var[2].clone()
    for seed in range(3):
        kernel(batch(seed, SHAPE))
    assert torch.equal(kernel.mean[2], mean)
    assert torch.equal(kernel.log_var[2], log_var)
    assert kernel.logits[2].item() == pytest.approx(math.log(0.05))


def test_a_gradient_is_of_the_mixture_before_the_averages_moved():
    """Another step between forward and backward changes no gradient."""
    kernel, _ = pair("ucb", {})
    x, g = case()
    other = any_norm("ucb", SHAPE[1], 3, backend="triton")
    other.load_state_dict(kernel.state_dict())
    want = step(other, x, g)
    x.requires_grad_()
    y = kernel(x)
    kernel(5 - 2 * x.detach())
    assert torch.equal(torch.autograd.grad(y, x, g)[0], want[1])


BY_CLUSTER = {
    "default": ("scb", {}),
    "affine": ("scb", {"affine": True, "unknown_scale": "paper", "eps": 0.1}),
    "one posterior a sample": ("scb", {"affine": True, "unknown_posterior": "sample"}),
    "standardised": ("scb", {"statistics": "batch"}),
    "standardised by sample": ("scb_base", {"statistics": "instance", "affine": True}),
    "seeded": ("scb", {"init": "data"}),
    "linear layers": ("scb_base", {}),
    "linear layers, affine, seeded": ("scb_base", {"affine": True, "init": "data", "unknown_scale": "paper"}),
}


@pytest.mark.parametrize(
    ("name", "length"),
    [
        ("affine", 5),
        ("standardised", 1),
        ("linear layers, affine, seeded", 5),
        *in_full(("standardised by sample", 5), ("one posterior a sample", 1)),
        *in_full(*((name, 1) for name in ("default", "affine", "seeded", "linear layers"))),
    ],
)  # sums by cluster, and by sample
def test_a_layer_of_clusters_steps_as_in_float64(name, length):
    kernel, exact = pair(*BY_CLUSTER[name])
    (x, g), ids = case((6, SHAPE[1], length)), torch.arange(6) % 2  # one cluster is absent
    assert_steps(kernel, exact, x, g, ids, rtol=2e-5)
    kernel.eval()
    exact.eval()
    for ids[[0, 4, 5]] in (2, -1):
        assert_steps(kernel, exact, x, g, ids, rtol=2e-5)
    assert_steps(kernel, exact, x, g, None, rtol=2e-5)


@pytest.mark.parametrize(("kind", "num"), [("scb", 1), ("scb_base", 40)])
def test_a_layer_takes_one_cluster_and_more_than_samples(kind, num):
    kernel, exact = pair(kind, {"affine": True}, num=num)
    (x, g), ids = case((3, SHAPE[1], 2)), torch.tensor([num - 1, 0, num // 2])
    assert_steps(kernel, exact, x, g, ids, rtol=2e-5)
    ids[1] = -1
    assert_steps(kernel.eval(), exact.eval(), x, g, ids, rtol=2e-5)


@pytest.mark.parametrize("kind", ["scb_base", *in_full("scb")])
def test_a_layer_of_clusters_may_be_stored_in_bfloat16(kind):
    kernel, exact = pair(kind, {"affine": True}, dtype=torch.bfloat16)
    x, g = case(dtype=torch.bfloat16)
    ids = torch.tensor([0, 2, 1, 0])
    got, want = step(kernel, x, g, ids), step(exact, x.double(), g.double(), ids)
    for a, b in zip(got, want, strict=True):
        assert a.dtype == torch.bfloat16
        torch.testing.assert_close(a.double(), b, rtol=2**-7, atol=1e-5)


def test_tables_may_lie_in_memory_in_any_way():
    """One of them transposed, or neither contiguous: what a state dict of views leaves."""
    kernel, exact = pair("scb", {})
    x, g = case()
    ids = torch.tensor([0, 2, 1, 0])
    want = step(exact, x.double(), g.double(), ids)
    kernel.mean.data = kernel.mean.data.t().contiguous().t()
    assert_near(step(kernel, x, g, ids), want, rtol=2e-5)
    for table in (kernel.mean, kernel.log_var):
        table.data = table.data.repeat_interleave(2, dim=1)[:, ::2]
    assert_near(step(kernel, x, g, ids), want, rtol=2e-5)


def test_an_empty_batch_of_clusters_has_gradients_of_zero():
    kernel, _ = pair("scb_base", {"affine": True})
    x = torch.empty(0, SHAPE[1], 5)
    y, *gradients = step(kernel, x, x, torch.empty(0, dtype=torch.int64))
    assert y.shape == x.shape
    assert not any(each.any() for each in gradients)
