"""Parameters, state, shapes and options of the layers."""

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
from norm_cases import any_norm as make_norm
from norm_cases import mixture_case
from torch import nn
from torch.optim.swa_utils import AveragedModel

from common.norms import MixtureNorm, SCBNorm, SCBNormBase, UCBNorm, cluster_norm, functional, mixture_norm

KINDS = ["bn", "in", "dsbn", "mn", "scb", "scb_base", "ucb"]
OWN = ["mn", "scb", "scb_base", "ucb"]
CLUSTERED = ("dsbn", "scb", "scb_base")
OPTIONS = {
    "scb data": ("scb", {"init": "data", "statistics": "batch"}),
    "scb_base data": ("scb_base", {"init": "data", "affine": True}),
    "scb_base instance": ("scb_base", {"statistics": "instance"}),
    "ucb joint paper": ("ucb", {"groups": 1, "average": "paper"}),
    "ucb weight seeded": ("ucb", {"update": "weight", "init": "kmeans++", "groups": 2}),
    "ucb reseed shared": ("ucb", {"reseed": 0.3, "momentum": 1.0, "variance": "shared"}),
    "mn refit": ("mn", {"refit_every": 2, "groups": None}),
    "mn uniform": ("mn", {"init": "uniform"}),
    "dsbn": ("dsbn", {}),
}
"""What differs in its state, or in what it knows of it beside."""


def arguments(kind: str, x: torch.Tensor, num: int = 3) -> tuple[torch.Tensor, ...]:
    return (x, torch.arange(len(x)) % num) if kind in CLUSTERED else (x,)


def batch(step: int, shape: tuple[int, ...] = (6, 4, 5)) -> torch.Tensor:
    return mixture_case(shape, num=1, dtype=torch.float32, seed=step)[0]


def test_parameter_counts_are_the_published_ones():
    for layer, count in (
        (SCBNorm(128, 3), 768),
        (SCBNormBase(128, 3), 1024),
        (UCBNorm(128, 3, update="weight", affine=False), 771),
        (UCBNorm(256, 3, update="weight", affine=False), 1539),
        (UCBNorm(256, 3, affine=False), 0),
        (UCBNorm(256, 3), 512),
        (SCBNorm(128, 3, affine=True), 768 + 256),
        (make_norm("mn", 128, 3), 256),
    ):
        assert sum(p.numel() for p in layer.parameters()) == count, layer


def test_names_and_shapes_of_the_state():
    shapes = {"logits": (3,), "mean": (3, 4), "log_var": (3, 4)}
    weight, average = UCBNorm(4, 3, update="weight"), UCBNorm(4, 3)
    for found in (dict(weight.named_parameters()), dict(average.named_buffers())):
        assert {name: tuple(found[name].shape) for name in shapes} == shapes
    found = dict(SCBNorm(4, 3).named_parameters())
    assert {name: tuple(p.shape) for name, p in found.items()} == {"mean": (3, 4), "log_var": (3, 4)}
    assert {tuple(p.shape) for p in UCBNorm(4, 3).parameters()} == {(4,)}


@pytest.mark.parametrize("case", OPTIONS)
def test_a_saved_layer_continues_bit_for_bit(case):
    """Saved before the first batch and after two; the last batch alone holds cluster 2, which seeds it."""
    kind, options = OPTIONS[case]

    def make():
        return make_norm(kind, 4, 3, **options)

    for saved_at in (0, 2):
        layer, loaded = make(), make()
        for step in range(saved_at):
            layer(*arguments(kind, batch(step), 2))
        for step in (98, 99):  # another life before
            loaded(*arguments(kind, batch(step)))
        file = io.BytesIO()
        torch.save(layer.state_dict(), file)
        file.seek(0)
        loaded.load_state_dict(torch.load(file, weights_only=True))
        twins = loaded, copy.deepcopy(layer)
        for step in range(saved_at, 4):
            args = arguments(kind, batch(step), 2 if step < 3 else 3)
            want = layer(*args)
            for twin in twins:
                assert torch.equal(twin(*args), want)
        for twin in twins:
            for name, tensor in layer.state_dict().items():
                assert torch.equal(twin.state_dict()[name], tensor), name


@pytest.mark.parametrize("case", OPTIONS)
def test_reset_returns_to_a_new_layer(case):
    kind, options = OPTIONS[case]
    layer, fresh = make_norm(kind, 4, 3, **options), make_norm(kind, 4, 3, **options)
    layer(*arguments(kind, batch(0)))
    layer.reset_parameters()
    for step in range(2):
        x = batch(step + 1)
        assert torch.equal(layer(*arguments(kind, x)), fresh(*arguments(kind, x)))
    for name, tensor in fresh.state_dict().items():
        assert torch.equal(layer.state_dict()[name], tensor), name


def test_the_options_of_unknown_clusters_reach_them():
    options: list[dict[str, Any]] = [{"unknown_scale": "paper"}, {"unknown_posterior": "sample"}, {"eps": 0.5}]
    for option in options:
        layer, x = make_norm("scb", 4, 3, **option).eval(), batch(0)
        with torch.no_grad():
            layer.mean.copy_(torch.arange(12.0).view(3, 4) / 6)
        want = cluster_norm(x, None, layer.mean, layer.log_var.exp(), backend="reference", **option)
        torch.testing.assert_close(layer(x), want)
        assert not torch.allclose(want, cluster_norm(x, None, layer.mean, layer.log_var.exp()))


def test_layers_leave_the_global_generator_alone():
    torch.manual_seed(0)
    before = torch.get_rng_state()
    for kind in KINDS:
        options = {"init": "data"} if kind.startswith("scb") else {"init": "kmeans++"} if kind in OWN else {}
        layer = make_norm(kind, 4, 3, **options)
        layer(*arguments(kind, batch(0)))
        make_norm(kind, 4, 3, device="cpu", dtype=torch.bfloat16)
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
    x = mixture_case((6, 4, 2, 3, 2), num=1, dtype=torch.float32)[0]
    first = make_norm(kind, 4, 3, affine=True)
    others = {dim: make_norm(kind, 4, 3, channel_dim=dim, affine=True) for dim in (2, -1, -2)}
    for training in (True, False):
        want = first.train(training)(*arguments(kind, x))
        for dim, other in others.items():
            got = other.train(training)(*arguments(kind, x.movedim(1, dim)))
            torch.testing.assert_close(got.movedim(dim, 1), want)
            for name, tensor in first.state_dict().items():
                torch.testing.assert_close(other.state_dict()[name], tensor)


@pytest.mark.parametrize("kind", ["bn", "in", "dsbn", "mn", "scb", "ucb"])
def test_every_kind_takes_every_rank(kind):
    for shape in ((6, 4), (6, 4, 5), (6, 4, 2, 3), (6, 4, 2, 3, 2)):
        if kind == "in" and shape == (6, 4):  # of one position there is no variance
            continue
        layer, flat = make_norm(kind, 4, 3), make_norm(kind, 4, 3)
        x = batch(0, shape)
        y = layer(*arguments(kind, x))
        assert y.shape == shape
        x, y = (t.reshape(6, 4, -1) for t in (x, y))
        torch.testing.assert_close(y, flat(*arguments(kind, x)))


@pytest.mark.parametrize(
    ("kind", "dtype"), [("scb", torch.bfloat16), ("scb_base", torch.float16), ("ucb", torch.float16)]
)
def test_layers_return_the_dtype_they_are_given(kind, dtype):
    layer = make_norm(kind, 4, 3, affine=True)
    x = batch(0).to(dtype).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(*arguments(kind, x))
    assert y.dtype == dtype
    y.float().square().sum().backward()
    assert x.grad is not None
    assert x.grad.dtype == dtype
    assert {p.dtype for p in layer.parameters()} == {torch.float32}
    assert {p.grad.dtype for p in layer.parameters() if p.grad is not None} == {torch.float32}


@pytest.mark.parametrize("kind", ["bn", "in", "dsbn", "mn", "scb", "ucb"])
def test_the_output_may_be_changed_in_place(kind):
    """As nn.ReLU(inplace=True) does in most networks."""
    for training, affine in itertools.product((True, False), repeat=2):
        layer = make_norm(kind, 4, 3, affine=affine).train(training)
        x = batch(0).requires_grad_()
        want = torch.autograd.grad(copy.deepcopy(layer)(*arguments(kind, x)).relu().sum(), x)[0]
        torch.testing.assert_close(torch.autograd.grad(layer(*arguments(kind, x)).relu_().sum(), x)[0], want)


def test_double_computes_in_double():
    layer = UCBNorm(4, 3, update="weight").double()
    x = mixture_case((6, 4, 5), num=1)[0]
    log_lambda = torch.full((3,), -math.log(3), dtype=torch.float64)
    want, _ = mixture_norm(x, log_lambda, layer.mean, layer.log_var.exp(), groups=4, backend="reference")
    torch.testing.assert_close(layer(x), want, rtol=1e-12, atol=1e-12)


def test_affine_scales_and_shifts_the_plain_output():
    for kind in ("scb", "ucb", "mn"):
        plain, layer = make_norm(kind, 4, 3, affine=False), make_norm(kind, 4, 3, affine=True)
        with torch.no_grad():
            layer.weight.copy_(torch.tensor([1.0, 2.0, 3.0, 4.0]))
            layer.bias.copy_(torch.tensor([0.0, -1.0, 0.5, 2.0]))
        x = batch(0)
        want = plain(*arguments(kind, x)) * layer.weight[:, None] + layer.bias[:, None]
        torch.testing.assert_close(layer(*arguments(kind, x)), want)


@pytest.mark.parametrize("kind", ["scb", "scb_base"])
def test_data_seeds_each_cluster_when_it_is_first_seen(kind):
    layer = make_norm(kind, 4, 3, init="data")
    x = 3 * batch(0, (8, 4, 50)) + 5
    cluster = torch.tensor([0, 0, 0, 1, 1, 1, 1, 1])
    y = layer(x, cluster)
    for k in (0, 1):
        own = y[cluster == k].transpose(0, 1).flatten(1)
        torch.testing.assert_close(own.mean(1), torch.zeros(4), atol=1e-5, rtol=0)
        torch.testing.assert_close(own.var(1, correction=0), torch.ones(4), atol=1e-4, rtol=0)
    assert layer.initialized.tolist() == [True, True, False]
    mean, log_var = (rows.clone() for rows in layer.rows())
    assert not mean[2].any()
    assert not log_var[2].any()
    layer(-x, torch.tensor([0, 0, 0, 1, 1, 1, 2, 2]))
    later, _ = layer.rows()
    assert torch.equal(later[:2], mean[:2])
    torch.testing.assert_close(later[2], -x[6:].mean((0, 2)))
    assert layer.initialized.all()


def test_data_seeds_a_base_layer_whose_biases_have_moved():
    layer = SCBNormBase(4, 2, init="data")
    with torch.no_grad():
        layer.mean.bias.fill_(3.0)
        layer.log_var.bias.fill_(-1.0)
    x = batch(0)
    layer(x, torch.tensor([0, 0, 0, 1, 1, 1]))
    mean, log_var = layer.rows()
    torch.testing.assert_close(mean[1], x[3:].mean((0, 2)))
    torch.testing.assert_close(log_var[1].exp(), x[3:].transpose(0, 1).flatten(1).var(1, correction=0))


@pytest.mark.parametrize("kind", OWN)
def test_averaged_models_average_buffers_too(kind):
    layer = make_norm(kind, 4, 3, init="kmeans++" if kind in ("mn", "ucb") else "data")
    averaged, states = AveragedModel(layer, use_buffers=True), []
    for step in range(3):
        x, cluster = batch(step), torch.tensor([0, 0, 0, 1, 1, 2 if step == 2 else 1])  # the last batch seeds cluster 2
        layer(*((x, cluster) if kind in CLUSTERED else (x,)))
        averaged.update_parameters(layer)
        states.append(copy.deepcopy(layer.state_dict()))
    average: Any = averaged.module
    for name, mean in average.state_dict().items():
        if mean.is_floating_point():  # of counts torch drops the fractions, as of BatchNorm's
            want = torch.stack([state[name].double() for state in states]).mean(0)
            torch.testing.assert_close(mean, want.to(mean), atol=1e-6, rtol=1e-6, msg=lambda m, n=name: f"{n}: {m}")
    assert average.is_initialized()


def test_flags_of_another_type_say_what_is_seeded():
    layer = SCBNorm(4, 3, init="data")
    layer.load_state_dict(layer.state_dict() | {"initialized": torch.tensor([True, True, False])})
    x = batch(0)
    for flags in (layer.initialized, torch.tensor([True, True, False])):
        layer.load_state_dict(layer.state_dict() | {"initialized": flags.clone()}, assign=flags.dtype == torch.bool)
        layer(x, torch.tensor([0, 0, 1, 1, 2, 2]))
        assert not layer.mean[:2].any()
        torch.testing.assert_close(layer.mean[2], x[4:].mean((0, 2)))
        assert layer.initialized.bool().all()


def test_data_seeds_a_constant_channel_with_the_least_variance():
    layer = SCBNorm(4, 2, init="data", eps=0.5)
    x = batch(0)
    x[:, 1] = 5.0
    layer(x, torch.tensor([0, 0, 0, 1, 1, 1]))
    assert layer.log_var[:, 1].tolist() == pytest.approx([math.log(0.5)] * 2)
    torch.testing.assert_close(layer.mean[:, 1], torch.full((2,), 5.0))


def test_data_passes_over_a_non_finite_batch():
    layer = SCBNorm(2, 2, init="data")
    x = torch.randn(4, 2, 5)
    x[0, 0, 0] = math.nan
    layer(x, torch.tensor([0, 0, 1, 1]))
    assert not layer.initialized.any()
    assert not layer.mean.any()


def test_printing_shows_every_option_that_is_not_the_default():
    assert repr(UCBNorm(8, 3)) == "UCBNorm(8, 3)"
    shared: dict[str, Any] = {"average": "paper", "scale": "sqrt_k", "momentum": 0.2, "min_weight": 0.01, "eps": 1e-3}
    shared |= {"affine": False, "channel_dim": -1, "seed": 5, "backend": "eager"}
    learned: dict[str, Any] = {"groups": 1, "update": "weight", "statistics": "learned", "init": "kmeans++"}
    for layer, options in ((UCBNorm, learned), (MixtureNorm, {"groups": 2, "init": "uniform", "em_steps": 5})):
        text = repr(layer(8, 3, **options, **shared))
        shown = sorted(f"{name}={value!r}" for name, value in (options | shared).items())
        assert sorted(text.removeprefix(f"{layer.__name__}(8, 3, ").removesuffix(")").split(", ")) == shown
    alive = "UCBNorm(8, 3, variance='shared', reseed=0.02, min_weight=0.01)"
    assert repr(UCBNorm(8, 3, min_weight=0.01, variance="shared", reseed=0.02)) == alive
    supervised = {"affine": True, "init": "data", "unknown_scale": "paper", "unknown_posterior": "sample"}
    shown = "8, 3, affine=True, init='data', unknown_scale='paper', unknown_posterior='sample'"
    for kind in ("scb", "scb_base"):
        assert make_norm(kind, 8, 3).extra_repr() == "8, 3"
        assert make_norm(kind, 8, 3, **supervised).extra_repr() == shown
    assert repr(MixtureNorm(8, 3)) == "MixtureNorm(8, 3)"
    fitted = MixtureNorm(8, 3, groups=2, init="uniform", refit_every=2, em_steps=5)
    assert repr(fitted) == "MixtureNorm(8, 3, groups=2, init='uniform', refit_every=2, em_steps=5)"


@pytest.mark.parametrize("kind", ["bn", "in"])
def test_bn_and_in_are_torchs_own(kind):
    theirs = {"bn": nn.BatchNorm2d, "in": nn.InstanceNorm2d}[kind](4, affine=True)
    ours = make_norm(kind, 4, 3, affine=True)
    x = batch(0, (6, 4, 3, 2))
    assert torch.equal(ours(x), theirs(x))
    ours.load_state_dict(theirs.state_dict())
    assert torch.equal(ours.eval()(x), theirs.eval()(x))


def test_domain_batch_norm_is_one_batch_norm_a_domain():
    layer = make_norm("dsbn", 4, 3)
    norms = [nn.BatchNorm2d(4) for _ in range(3)]
    cluster = torch.tensor([2, 0, 2, 0, 2, 0])  # domain 1 is absent
    x = batch(0, (6, 4, 3, 2))
    want = torch.empty_like(x)
    for k in (0, 2):
        want[cluster == k] = norms[k](x[cluster == k]).detach()
    torch.testing.assert_close(layer(x, cluster), want)
    for k, norm in enumerate(norms):
        own = layer.domains[k].state_dict()
        for name, tensor in norm.state_dict().items():
            torch.testing.assert_close(own[name], tensor)
    layer.eval()
    want[cluster == 2] = norms[2].eval()(x[cluster == 2]).detach()
    torch.testing.assert_close(layer(x, cluster)[cluster == 2], want[cluster == 2])


@pytest.mark.parametrize("kind", OWN)
def test_a_forward_pass_asks_for_a_backend_once(monkeypatch, kind):
    asked, choose = [], functional.choose_backend
    monkeypatch.setattr(functional, "choose_backend", lambda *given: asked.append(given) or choose(*given))
    layer = make_norm(kind, 4, 3)
    for training in (True, False):
        layer.train(training)(*arguments(kind, batch(0)))
    assert len(asked) == 2


def test_importing_the_layers_imports_no_triton():
    code = "import sys; import common.norms; sys.exit('triton' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize("kind", [*OWN, "bn", "in", "dsbn"])
def test_numpy_numbers_become_pythons(kind):
    options: dict[str, Any] = {"eps": np.float32(2**-10), "momentum": np.float32(0.25)}
    if kind in ("mn", "ucb"):
        options |= {"groups": np.int64(2), "seed": np.int64(7), "min_weight": np.float32(2**-12)}
    if kind == "ucb":
        options["reseed"] = np.float32(0.125)
    if kind == "mn":
        options |= {"refit_every": np.int32(2), "em_steps": np.int64(3)}
    sizes: Any = np.int64(4), np.int32(3)
    layer = make_norm(kind, *sizes, **options)
    plain = make_norm(kind, 4, 3, **{name: value.item() for name, value in options.items()})
    torch.testing.assert_close(layer.state_dict(), plain.state_dict(), rtol=0, atol=0)
    for found, wanted in zip(layer.modules(), plain.modules(), strict=True):
        kept = {k: v for k, v in vars(found).items() if isinstance(v, int | float | np.generic)}
        assert repr(kept) == repr({k: vars(wanted)[k] for k in kept})
