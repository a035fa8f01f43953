"""Parameters, state, shapes, options, devices and dtypes of the layers."""

import copy
import io
import itertools
import math
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import torch
from norm_cases import any_norm, assert_state, batch, inputs, state
from torch import nn
from torch.optim.swa_utils import AveragedModel

from common.norms import MixtureNorm, SCBNorm, SCBNormBase, UCBNorm, cluster_norm, functional, mixture_norm

KINDS = ["bn", "in", "dsbn", "mn", "scb", "ucb"]
OWN = ["mn", "scb", "scb_base", "ucb"]
OPTIONS = {
    "scb data": ("scb", {"init": "data", "statistics": "batch"}),
    "scb_base data": ("scb_base", {"init": "data", "affine": True}),
    "scb_base instance": ("scb_base", {"statistics": "instance"}),
    "ucb joint paper": ("ucb", {"groups": 1, "average": "paper"}),
    "ucb weight seeded": ("ucb", {"update": "weight", "init": "kmeans++", "groups": 2}),
    "ucb reseed shared": ("ucb", {"reseed": 0.3, "momentum": 1.0, "variance": "shared", "seed": 3}),
    "mn refit": ("mn", {"refit_every": 2, "groups": None}),
    "mn uniform": ("mn", {"init": "uniform"}),
    "dsbn": ("dsbn", {}),
    "in": ("in", {"affine": True}),
}
"""What differs in its state, or in what it knows of it beside."""


def make(case: str, **placed: Any) -> Any:
    kind, options = OPTIONS[case]
    return any_norm(kind, 4, 3, **options, **placed)


def test_parameter_counts_are_the_published_ones():
    for layer, count in (
        (SCBNorm(128, 3), 768),
        (SCBNormBase(128, 3), 1024),
        (UCBNorm(128, 3, update="weight", affine=False), 771),
        (UCBNorm(256, 3, update="weight", affine=False), 1539),
        (UCBNorm(256, 3, affine=False), 0),
        (UCBNorm(256, 3), 512),
        (SCBNorm(128, 3, affine=True), 768 + 256),
        (MixtureNorm(128, 3), 256),
    ):
        assert sum(p.numel() for p in layer.parameters()) == count, layer


def test_names_and_shapes_of_the_state():
    def shapes(tensors: Any) -> dict[str, tuple[int, ...]]:
        return {name: tuple(t.shape) for name, t in tensors if name in ("logits", "mean", "log_var")}

    rows = {"mean": (3, 4), "log_var": (3, 4)}
    assert shapes(UCBNorm(4, 3, update="weight").named_parameters()) == {"logits": (3,)} | rows
    assert shapes(UCBNorm(4, 3).named_buffers()) == {"logits": (3,)} | rows
    assert {name: tuple(p.shape) for name, p in SCBNorm(4, 3).named_parameters()} == rows


@pytest.mark.parametrize("case", OPTIONS)
def test_a_saved_a_copied_and_a_reset_layer_continue_bit_for_bit(case):
    """Before the first batch and after two; the last batch alone holds cluster 2, which seeds it."""
    kind = OPTIONS[case][0]
    for start in (0, 2):
        layer, loaded, reset = make(case), make(case), make(case)
        for other in (loaded, reset):
            for seed in (98, 99):  # another life before
                other(*inputs(kind, batch(seed)))
        reset.reset_parameters()
        for seed in range(start):
            for each in (layer, reset):
                each(*inputs(kind, batch(seed), 2))
        file = io.BytesIO()
        torch.save(layer.state_dict(), file)
        file.seek(0)
        loaded.load_state_dict(torch.load(file, weights_only=True))
        twins = loaded, reset, copy.deepcopy(layer)
        for seed in range(start, 4):
            args = inputs(kind, batch(seed), 2 if seed < 3 else 3)
            want = layer(*args)
            for twin in twins:
                assert torch.equal(twin(*args), want)
        for twin in twins:
            assert_state(twin, state(layer))


def described(layer: nn.Module) -> dict[str, tuple[torch.dtype, str]]:
    return {name: (t.dtype, t.device.type) for name, t in layer.state_dict().items()}


@pytest.mark.parametrize("case", OPTIONS)
def test_a_layer_is_made_as_it_would_be_moved(case):
    """On a device and in a dtype, and from meta with the same start."""
    moved = make(case).to(device="meta", dtype=torch.float64)
    assert described(make(case, device="meta", dtype=torch.float64)) == described(moved)
    with torch.device("meta"):
        assert described(make(case, dtype=torch.float64)) == described(moved)
    placed, plain = make(case, device="cpu", dtype=torch.float64).state_dict(), make(case).double().state_dict()
    torch.testing.assert_close(placed, plain, rtol=1e-7, atol=0)  # a third is exacter in float64
    layer, plain = make(case, device="meta").to_empty(device="cpu"), make(case)
    layer.reset_parameters()
    assert_state(layer, state(plain))
    for seed in range(2):  # the first seeds what is seeded from data
        args = inputs(OPTIONS[case][0], batch(seed))
        assert torch.equal(layer(*args), plain(*args))
    assert_state(layer, state(plain))


def test_the_options_of_unknown_clusters_reach_them():
    options: list[dict[str, Any]] = [{"unknown_scale": "paper"}, {"unknown_posterior": "sample"}, {"eps": 0.5}]
    for option in options:
        layer, x = any_norm("scb", 4, 3, **option).eval(), batch()
        with torch.no_grad():
            layer.mean.copy_(torch.arange(12.0).view(3, 4) / 6)
        want = cluster_norm(x, None, layer.mean, layer.log_var.exp(), backend="reference", **option)
        torch.testing.assert_close(layer(x), want)
        assert not torch.allclose(want, cluster_norm(x, None, layer.mean, layer.log_var.exp()))


def test_layers_leave_the_global_generator_alone():
    torch.manual_seed(0)
    before = torch.get_rng_state()
    for kind in {*KINDS, *OWN}:
        options = {"init": "data"} if kind.startswith("scb") else {"init": "kmeans++"} if kind in OWN else {}
        any_norm(kind, 4, 3, **options)(*inputs(kind, batch()))
        any_norm(kind, 4, 3, device="cpu", dtype=torch.bfloat16)
        assert torch.equal(torch.get_rng_state(), before), kind


def test_the_seed_option_decides_the_means():
    a, b, c = UCBNorm(4, 3), UCBNorm(4, 3), UCBNorm(4, 3, seed=1)
    assert torch.equal(a.mean, b.mean)
    assert not torch.equal(a.mean, c.mean)
    assert a.mean.abs().max() <= 1
    assert len(a.mean.unique()) == 12
    assert a.mean.min() < 0 < a.mean.max()


@pytest.mark.parametrize("kind", ["mn", "scb", "ucb"])
def test_any_channel_dimension(kind):
    x = batch(0, (6, 4, 2, 3, 2))
    first = any_norm(kind, 4, 3, affine=True)
    others = {dim: any_norm(kind, 4, 3, channel_dim=dim, affine=True) for dim in (2, -1, -2)}
    for training in (True, False):
        want = first.train(training)(*inputs(kind, x))
        for dim, other in others.items():
            got = other.train(training)(*inputs(kind, x.movedim(1, dim)))
            torch.testing.assert_close(got.movedim(dim, 1), want)
            torch.testing.assert_close(other.state_dict(), first.state_dict())


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_takes_every_rank(kind):
    for shape in ((6, 4), (6, 4, 5), (6, 4, 2, 3), (6, 4, 2, 3, 2)):
        if kind == "in" and shape == (6, 4):  # of one position there is no variance
            continue
        layer, flat, x = any_norm(kind, 4, 3), any_norm(kind, 4, 3), batch(0, shape)
        y = layer(*inputs(kind, x))
        assert y.shape == shape
        x, y = (t.reshape(6, 4, -1) for t in (x, y))
        torch.testing.assert_close(y, flat(*inputs(kind, x)))


@pytest.mark.parametrize(
    ("kind", "dtype"), [("scb", torch.bfloat16), ("scb_base", torch.float16), ("ucb", torch.float16)]
)
def test_layers_return_the_dtype_they_are_given(kind, dtype):
    layer, x = any_norm(kind, 4, 3, affine=True), batch().to(dtype).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(*inputs(kind, x))
    y.float().square().sum().backward()
    assert x.grad is not None
    assert y.dtype == x.grad.dtype == dtype
    assert {p.dtype for p in layer.parameters()} == {torch.float32}
    assert {p.grad.dtype for p in layer.parameters() if p.grad is not None} == {torch.float32}


@pytest.mark.parametrize("kind", KINDS)
def test_the_output_may_be_changed_in_place(kind):
    """As nn.ReLU(inplace=True) does in most networks."""
    for training, affine in itertools.product((True, False), repeat=2):
        layer, x = any_norm(kind, 4, 3, affine=affine).train(training), batch().requires_grad_()
        want = torch.autograd.grad(copy.deepcopy(layer)(*inputs(kind, x)).relu().sum(), x)[0]
        torch.testing.assert_close(torch.autograd.grad(layer(*inputs(kind, x)).relu_().sum(), x)[0], want)


def test_double_computes_in_double():
    layer, x = UCBNorm(4, 3, update="weight").double(), batch(dtype=torch.float64)
    log_lambda = torch.full((3,), -math.log(3), dtype=torch.float64)
    want, _ = mixture_norm(x, log_lambda, layer.mean, layer.log_var.exp(), groups=4, backend="reference")
    torch.testing.assert_close(layer(x), want, rtol=1e-12, atol=1e-12)


def test_affine_scales_and_shifts_the_plain_output():
    for kind in ("scb", "ucb", "mn"):
        plain, layer, x = any_norm(kind, 4, 3, affine=False), any_norm(kind, 4, 3, affine=True), batch()
        with torch.no_grad():
            layer.weight.copy_(torch.tensor([1.0, 2.0, 3.0, 4.0]))
            layer.bias.copy_(torch.tensor([0.0, -1.0, 0.5, 2.0]))
        want = plain(*inputs(kind, x)) * layer.weight[:, None] + layer.bias[:, None]
        torch.testing.assert_close(layer(*inputs(kind, x)), want)


@pytest.mark.parametrize("kind", ["scb", "scb_base"])
def test_data_seeds_each_cluster_when_it_is_first_seen(kind):
    layer = any_norm(kind, 4, 3, init="data")
    if kind == "scb_base":  # biases that have moved
        nn.init.constant_(layer.mean.bias, 3.0)
        nn.init.constant_(layer.log_var.bias, -1.0)
    unseen = [rows[2].clone() for rows in layer.rows()]
    x = 3 * batch(0, (8, 4, 50)) + 5
    cluster = torch.tensor([0, 0, 0, 1, 1, 1, 1, 1])
    y = layer(x, cluster)
    for k in (0, 1):
        own = y[cluster == k].transpose(0, 1).flatten(1)
        torch.testing.assert_close(own.mean(1), torch.zeros(4), atol=1e-5, rtol=0)
        torch.testing.assert_close(own.var(1, correction=0), torch.ones(4), atol=1e-4, rtol=0)
    assert layer.initialized.tolist() == [True, True, False]
    mean, log_var = (rows.clone() for rows in layer.rows())
    torch.testing.assert_close([mean[2], log_var[2]], unseen)
    layer(-x, torch.tensor([0, 0, 0, 1, 1, 1, 2, 2]))
    later, _ = layer.rows()
    torch.testing.assert_close(later[:2], mean[:2], rtol=0, atol=0 if kind == "scb" else 1e-6)  # less a bias, and more
    torch.testing.assert_close(later[2], -x[6:].mean((0, 2)))
    assert layer.initialized.all()


def test_data_seeds_a_constant_channel_with_the_least_variance_and_passes_over_a_batch_that_is_not_finite():
    layer, x = SCBNorm(4, 2, init="data", eps=0.5), batch()
    bad = torch.where(torch.arange(5) == 2, math.nan, x)
    layer(bad, torch.tensor([0, 0, 0, 1, 1, 1]))
    assert not layer.initialized.any()
    assert not layer.mean.any()
    x[:, 1] = 5.0
    layer(x, torch.tensor([0, 0, 0, 1, 1, 1]))
    assert layer.log_var[:, 1].tolist() == pytest.approx([math.log(0.5)] * 2)
    torch.testing.assert_close(layer.mean[:, 1], torch.full((2,), 5.0))


@pytest.mark.parametrize("kind", OWN)
def test_averaged_models_average_buffers_too(kind):
    layer = any_norm(kind, 4, 3, init="kmeans++" if kind in ("mn", "ucb") else "data")
    averaged, states = AveragedModel(layer, use_buffers=True), []
    for seed in range(3):
        layer(*inputs(kind, batch(seed), 3 if seed == 2 else 2))  # the last batch seeds cluster 2
        averaged.update_parameters(layer)
        states.append(state(layer))
    average: Any = averaged.module
    for name, mean in average.state_dict().items():
        if mean.is_floating_point():  # of counts torch drops the fractions, as of BatchNorm's
            want = torch.stack([each[name].double() for each in states]).mean(0)
            torch.testing.assert_close(mean, want.to(mean), atol=1e-6, rtol=1e-6, msg=lambda m, n=name: f"{n}: {m}")
    assert average.is_initialized()


def test_flags_of_another_type_say_what_is_seeded():
    layer, x = SCBNorm(4, 3, init="data"), batch()
    layer.load_state_dict(layer.state_dict() | {"initialized": torch.tensor([True, True, False])})
    for flags in (layer.initialized, torch.tensor([True, True, False])):
        layer.load_state_dict(layer.state_dict() | {"initialized": flags.clone()}, assign=flags.dtype == torch.bool)
        layer(x, torch.tensor([0, 0, 1, 1, 2, 2]))
        assert not layer.mean[:2].any()
        torch.testing.assert_close(layer.mean[2], x[4:].mean((0, 2)))
        assert layer.initialized.bool().all()


def test_printing_shows_every_option_that_is_not_the_default():
    shared: dict[str, Any] = {"average": "paper", "scale": "sqrt_k", "momentum": 0.2, "min_weight": 0.01, "eps": 1e-3}
    shared |= {"affine": False, "channel_dim": -1, "seed": 5, "backend": "eager"}
    unknown = {"init": "data", "unknown_scale": "paper", "unknown_posterior": "sample"}
    for kind, options in (
        ("ucb", {}),
        ("ucb", shared | {"groups": 1, "update": "weight", "statistics": "learned", "init": "kmeans++"}),
        ("ucb", {"variance": "shared", "reseed": 0.02, "min_weight": 0.01}),
        ("mn", {}),
        ("mn", shared | {"groups": 2, "init": "uniform", "refit_every": 2, "em_steps": 5}),
        ("scb", {}),
        ("scb_base", {"affine": True, "statistics": "batch", "momentum": 0.3} | unknown),
    ):
        text = any_norm(kind, 8, 3, **options).extra_repr()
        shown = sorted(f"{name}={value!r}" for name, value in options.items())
        assert text.split(", ")[:2] == ["8", "3"]
        assert sorted(text.split(", ")[2:]) == shown
    assert repr(UCBNorm(8, 3)) == "UCBNorm(8, 3)"


@pytest.mark.parametrize("kind", ["bn", "in"])
def test_bn_and_in_are_torchs_own(kind):
    theirs = {"bn": nn.BatchNorm2d, "in": nn.InstanceNorm2d}[kind](4, affine=True)
    ours = any_norm(kind, 4, 3, affine=True)
    x = batch(0, (6, 4, 3, 2))
    assert torch.equal(ours(x), theirs(x))
    ours.load_state_dict(theirs.state_dict())
    assert torch.equal(ours.eval()(x), theirs.eval()(x))


def test_domain_batch_norm_is_one_batch_norm_a_domain():
    layer, norms = any_norm("dsbn", 4, 3), [nn.BatchNorm2d(4) for _ in range(3)]
    cluster = torch.tensor([2, 0, 2, 0, 2, 0])  # domain 1 is absent
    x = batch(0, (6, 4, 3, 2))
    for training in (True, False):
        want = torch.empty_like(x)
        for k in (0, 2):
            want[cluster == k] = norms[k].train(training)(x[cluster == k]).detach()
        torch.testing.assert_close(layer.train(training)(x, cluster), want)
        for domain, norm in zip(layer.domains, norms, strict=True):
            torch.testing.assert_close(domain.state_dict(), norm.state_dict())


@pytest.mark.parametrize("kind", OWN)
def test_a_forward_pass_asks_for_a_backend_once(monkeypatch, kind):
    asked, choose = [], functional.choose_backend
    monkeypatch.setattr(functional, "choose_backend", lambda *given: asked.append(given) or choose(*given))
    layer = any_norm(kind, 4, 3)
    for training in (True, False):
        layer.train(training)(*inputs(kind, batch()))
    assert len(asked) == 2


def test_importing_the_layers_imports_no_triton():
    code = "import sys; import common.norms; sys.exit('triton' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize("kind", KINDS)
def test_numpy_numbers_become_pythons(kind):
    options: dict[str, Any] = {"eps": np.float32(2**-10), "momentum": np.float32(0.25)}
    if kind in ("mn", "ucb"):
        options |= {"groups": np.int64(2), "seed": np.int64(7), "min_weight": np.float32(2**-12)}
    if kind == "ucb":
        options["reseed"] = np.float32(0.125)
    if kind == "mn":
        options |= {"refit_every": np.int32(2), "em_steps": np.int64(3)}
    sizes: Any = np.int64(4), np.int32(3)
    layer = any_norm(kind, *sizes, **options)
    plain = any_norm(kind, 4, 3, **{name: value.item() for name, value in options.items()})
    assert_state(layer, state(plain))
    for found, wanted in zip(layer.modules(), plain.modules(), strict=True):
        kept = {k: v for k, v in vars(found).items() if isinstance(v, int | float | np.generic)}
        assert repr(kept) == repr({k: vars(wanted)[k] for k in kept})
