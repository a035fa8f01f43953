"""Gradients against finite differences, and second derivatives."""

import copy
import itertools
from typing import Any

import pytest
import torch
from norm_cases import backend, mixture_case, mixture_run
from torch import nn
from torch.autograd import forward_ad

from common.norms import MixtureNorm, SCBNorm, SCBNormBase, UCBNorm, cluster_norm, make_norm, mixture_norm

CLUSTERS = {"known": [0, 2, 1, 0], "unknown": None, "mixed": [0, -1, 2, -1]}
PLAIN = ("reference", "eager", "traced")


@pytest.mark.parametrize("by", PLAIN)
@pytest.mark.parametrize("statistics", ["batch", "learned"])
def test_mixture_norm_has_the_gradients_of_finite_differences(statistics, by):
    for groups, (scale, num) in itertools.product((1, 2, 4), (("paper", 3), ("sqrt_k", 3), ("sqrt_k", 1))):
        x, log_lambda, mean, var, _ = mixture_case((3, 4, 2), num=num)
        weight, bias = mixture_case((2, 4), num=1)[0]
        inputs = [t.requires_grad_() for t in (x, log_lambda, mean, var, weight, bias)]

        def run(*given, groups=groups, scale=scale):
            affine = {"weight": given[4], "bias": given[5]}
            options = {"groups": groups, "statistics": statistics, "scale": scale, "backend": name}
            return mixture_norm(*given[:4], **affine, **options)[0]

        with backend(by) as name:
            assert torch.autograd.gradcheck(run, inputs), (groups, scale, num)


@pytest.mark.parametrize("by", PLAIN)
def test_cluster_norm_has_the_gradients_of_finite_differences(by):
    for ids, over, scale in itertools.product(CLUSTERS.values(), ("location", "sample"), ("match", "paper")):
        x, _, mean, var, _ = mixture_case((4, 3, 2), num=3)
        cluster = None if ids is None else torch.tensor(ids)

        def run(x, mean, var, cluster=cluster, over=over, scale=scale):
            options: Any = {"unknown_scale": scale, "unknown_posterior": over, "backend": name}
            return cluster_norm(x, cluster, mean, var, **options)

        with backend(by) as name:
            assert torch.autograd.gradcheck(run, [t.requires_grad_() for t in (x, mean, var)]), (ids, over, scale)


@pytest.mark.parametrize("statistics", ["batch", "learned"])
def test_a_gradient_is_the_same_whatever_others_are_wanted(statistics):
    x, log_lambda, mean, var, g = mixture_case((3, 4, 2), num=3)
    weight, bias = mixture_case((2, 4), num=1)[0]
    inputs = [x, log_lambda, mean, var, weight, bias]

    def run(wanted: list[int]) -> tuple[torch.Tensor, ...]:
        given = [t.clone().requires_grad_(i in wanted) for i, t in enumerate(inputs)]
        y, _ = mixture_norm(*given[:4], weight=given[4], bias=given[5], statistics=statistics, backend="eager")
        return torch.autograd.grad(y, [given[i] for i in wanted], g)

    for i, want in enumerate(run(list(range(6)))):
        assert torch.equal(run([i])[0], want), i


LAYERS = {
    "scb": lambda: SCBNorm(4, 3),
    "scb affine": lambda: SCBNorm(4, 3, affine=True),
    "scb instance": lambda: SCBNorm(4, 3, statistics="instance"),
    "scb_base": lambda: SCBNormBase(4, 3),
    "ucb": lambda: UCBNorm(4, 3),
    "ucb joint": lambda: UCBNorm(4, 3, groups=1, scale="sqrt_k"),
    "ucb weight": lambda: UCBNorm(4, 3, groups=2, update="weight"),
    "ucb learned": lambda: UCBNorm(4, 3, update="weight", statistics="learned"),
}


@pytest.mark.parametrize("kind", LAYERS)
def test_layers_have_the_gradients_of_finite_differences(kind):
    """Every input and parameter; buffers are put back before each evaluation, which would move them."""
    layer = LAYERS[kind]().double()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    buffers = {name: buffer.clone() for name, buffer in layer.named_buffers()}
    names = [name for name, _ in layer.named_parameters()]
    x = mixture_case((3, 4, 2), num=3)[0].requires_grad_()
    cluster = (torch.tensor([2, 0, 1]),) if isinstance(layer, SCBNorm | SCBNormBase) else ()

    def run(x, *parameters):
        state = {**{k: v.clone() for k, v in buffers.items()}, **dict(zip(names, parameters, strict=True))}
        return torch.func.functional_call(layer, state, (x, *cluster))

    for training in (True, False):
        layer.train(training)
        assert torch.autograd.gradcheck(run, [x, *(p.detach().requires_grad_() for p in layer.parameters())])


def test_mixture_norm_layer_passes_gradients_as_under_its_own_fit():
    """MN is Eqs. 6-9 under fixed parameters, which is what mixture_norm gives from its fit buffers."""
    x, *_, g = mixture_case((6, 4, 9), num=2)
    layer = MixtureNorm(4, 2, affine=False).double()
    layer(2 * mixture_case((6, 4, 9), num=2, seed=1)[0])  # so that averages and fit part
    x.requires_grad_()
    (got,) = torch.autograd.grad(layer(x), x, g)
    fit = (layer.fit_logits.log_softmax(0), layer.fit_mean, layer.fit_log_var.exp())
    (want,) = torch.autograd.grad(mixture_norm(x, *fit, backend="reference")[0], x, g)
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-11)


def gradient_penalty(layer: nn.Module, *cluster: torch.Tensor) -> torch.Tensor:
    x = mixture_case((4, 4, 3), num=3)[0].requires_grad_()
    (grad,) = torch.autograd.grad(layer(x, *cluster).square().sum(), x, create_graph=True)
    return grad.square().sum()


@pytest.mark.parametrize("kind", ["scb", "ucb"])
def test_a_second_derivative_names_the_backend_that_has_one(kind):
    cluster = (torch.tensor([0, 1, 2, 0]),) if kind == "scb" else ()
    for training in (True, False):
        layer = make_norm(kind, 4, 3).double().train(training)
        penalty = gradient_penalty(layer, *cluster)
        with pytest.raises(RuntimeError, match='backend="reference"'):
            torch.autograd.grad(penalty, list(layer.parameters()), retain_graph=True, allow_unused=True)
        with pytest.raises(RuntimeError, match='backend="reference"'):
            penalty.backward()
        x = mixture_case((4, 4, 3), num=3)[0]
        with pytest.raises(RuntimeError, match='backend="reference"'):  # by differentiating a gradient, too
            torch.autograd.functional.jvp(lambda x, layer=layer: layer(x, *cluster), x, x)
        layer = make_norm(kind, 4, 3, backend="reference").double().train(training)
        gradient_penalty(layer, *cluster).backward()


@pytest.mark.parametrize("kind", ["dsbn", "mn", "scb", "scb_base", "ucb"])
def test_torch_func_transforms_a_layer(kind):
    layer, ids = make_norm(kind, 4, 3).double(), torch.tensor([0, 1, 2, 0])
    x, *_, v = mixture_case((4, 4, 3), num=3)

    def call(x: torch.Tensor, ids: torch.Tensor = ids) -> torch.Tensor:
        return layer(x, ids) if kind in ("dsbn", "scb", "scb_base") else layer(x)

    call(x)  # moves what is stored
    layer.eval()
    leaf = x.clone().requires_grad_()
    y = call(leaf)
    (want,) = torch.autograd.grad(y, leaf, v)
    torch.testing.assert_close(torch.func.grad(lambda x: (v * call(x)).sum())(x), want)
    tangent = torch.func.jvp(call, (x,), (v,))[1]
    torch.testing.assert_close(tangent, (call(x + 1e-6 * v) - call(x - 1e-6 * v)).detach() / 2e-6, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close((tangent * v).sum(), (want * v).sum())  # <J v, v> = <v, J^T v>
    with forward_ad.dual_level():
        torch.testing.assert_close(forward_ad.unpack_dual(call(forward_ad.make_dual(x, v))).tangent, tangent)
    both = torch.func.vmap(call)(torch.stack([x, v]), torch.stack([ids, ids.flip(0)]))
    torch.testing.assert_close(both, torch.stack([call(x), call(v, ids.flip(0))]))


@pytest.mark.parametrize("kind", ["ucb", "mn"])
@pytest.mark.parametrize("backend", ["eager", "compiled"])
def test_torch_func_trains_by_buffers_that_it_is_given(backend, kind):
    layer, (x, *_, v) = make_norm(kind, 4, 3, backend=backend), mixture_case((4, 4, 3), 3, torch.float32)
    state = {name: t.detach().clone() for name, t in layer.state_dict().items()}

    def loss(weights: dict[str, torch.Tensor], others: dict[str, torch.Tensor]) -> torch.Tensor:
        return (v * torch.func.functional_call(layer, (weights, others), (x,))).sum()

    weights = {name: state.pop(name) for name in ("weight", "bias")}
    found = torch.func.grad(loss)(weights, state)
    layer = copy.deepcopy(layer)  # which a tensor of the transform's in the layer would prevent
    (v * layer(x)).sum().backward()
    close: Any = {"rtol": 1e-4, "atol": 1e-5} if kind == "mn" else {"rtol": 1e-5, "atol": 1e-5}  # EM takes steps
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, layer.get_parameter(name).grad, **close)
    torch.testing.assert_close(state, dict(layer.named_buffers()), **close)


def test_the_reference_has_the_second_derivatives_of_finite_differences():
    x, log_lambda, mean, var, _ = mixture_case((2, 2, 2), num=2)
    inputs = [t.requires_grad_() for t in (x, log_lambda, mean, var)]
    assert torch.autograd.gradgradcheck(lambda *a: mixture_norm(*a, backend="reference")[0], inputs)


def test_eager_ignores_autocast():
    case = mixture_case((6, 4, 8), num=3, dtype=torch.float32)
    want, _ = mixture_run(case, torch.float32, "eager")
    with torch.autocast("cpu", torch.bfloat16):
        got, _ = mixture_run(case, torch.float32, "eager")
    for name, value in want.items():
        assert torch.equal(got[name], value), name
