"""Gradients of the equations against finite differences, second derivatives, and torch.func.

``test_norms_agreement`` holds the gradients of every other backend against those of the reference.
"""

import copy
import itertools
from typing import Any

import pytest
import torch
from norm_cases import any_norm, batch, inputs, mixture_case, mixture_run
from torch.autograd import forward_ad

from common.norms import MixtureNorm, cluster_norm, make_norm, mixture_norm


@pytest.mark.parametrize("statistics", ["batch", "learned"])
def test_mixture_norm_has_the_gradients_of_finite_differences(statistics):
    for groups, scale, num in ((1, "paper", 3), (2, "sqrt_k", 3), (4, "paper", 3), (4, "sqrt_k", 1)):
        x, log_lambda, mean, var, _ = mixture_case((3, 4, 2), num=num)
        given = [t.requires_grad_() for t in (x, log_lambda, mean, var, *mixture_case((2, 4), num=1)[0])]

        def run(*given, groups=groups, scale=scale):
            options = {"groups": groups, "statistics": statistics, "scale": scale, "backend": "reference"}
            return mixture_norm(*given[:4], weight=given[4], bias=given[5], **options)[0]

        assert torch.autograd.gradcheck(run, given), (groups, scale, num)


def test_cluster_norm_has_the_gradients_of_finite_differences():
    for ids, over in itertools.product(([0, 2, 1, 0], None, [0, -1, 2, -1]), ("location", "sample")):
        x, _, mean, var, _ = mixture_case((4, 3, 2), num=3)
        options: Any = {"unknown_scale": "paper", "unknown_posterior": over, "backend": "reference"}
        cluster = None if ids is None else torch.tensor(ids)

        def run(x, mean, var, cluster=cluster, options=options):
            return cluster_norm(x, cluster, mean, var, **options)

        assert torch.autograd.gradcheck(run, [t.requires_grad_() for t in (x, mean, var)]), (ids, over)


@pytest.mark.parametrize("statistics", ["batch", "learned"])
def test_a_gradient_is_the_same_whatever_others_are_wanted(statistics):
    x, log_lambda, mean, var, g = mixture_case((3, 4, 2), num=3)
    every = [x, log_lambda, mean, var, *mixture_case((2, 4), num=1)[0]]

    def run(wanted: list[int]) -> tuple[torch.Tensor, ...]:
        given = [t.clone().requires_grad_(i in wanted) for i, t in enumerate(every)]
        y, _ = mixture_norm(*given[:4], weight=given[4], bias=given[5], statistics=statistics, backend="eager")
        return torch.autograd.grad(y, [given[i] for i in wanted], g)

    for i, want in enumerate(run(list(range(6)))):
        assert torch.equal(run([i])[0], want), i


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("scb", {"affine": True}),
        ("scb", {"statistics": "instance"}),
        ("scb_base", {}),
        ("ucb", {}),
        ("ucb", {"groups": 2, "update": "weight", "scale": "sqrt_k"}),
        ("ucb", {"update": "weight", "statistics": "learned"}),
    ],
    ids=str,
)
def test_layers_have_the_gradients_of_finite_differences(kind, options):
    """Every input and parameter; buffers are put back before each evaluation, which would move them."""
    layer = any_norm(kind, 4, 3, **options).double()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    buffers = {name: buffer.clone() for name, buffer in layer.named_buffers()}
    names = [name for name, _ in layer.named_parameters()]
    x, *ids = inputs(kind, mixture_case((3, 4, 2), num=3)[0])

    def run(x, *parameters):
        state = {**{k: v.clone() for k, v in buffers.items()}, **dict(zip(names, parameters, strict=True))}
        return torch.func.functional_call(layer, state, (x, *ids))

    for training in (True, False):
        layer.train(training)
        given = [x.requires_grad_(), *(p.detach().requires_grad_() for p in layer.parameters())]
        assert torch.autograd.gradcheck(run, given)


def test_mixture_norm_layer_passes_gradients_as_under_its_own_fit():
    """MN is Eqs. 6-9 under fixed parameters, which is what mixture_norm gives from its fit buffers."""
    x, *_, g = mixture_case((6, 4, 9), num=2)
    layer = MixtureNorm(4, 2, affine=False).double()
    layer(2 * batch(1, (6, 4, 9), torch.float64))  # so that averages and fit part
    x.requires_grad_()
    (got,) = torch.autograd.grad(layer(x), x, g)
    fit = (layer.fit_logits.log_softmax(0), layer.fit_mean, layer.fit_log_var.exp())
    (want,) = torch.autograd.grad(mixture_norm(x, *fit, backend="reference")[0], x, g)
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("kind", ["scb", "ucb"])
def test_a_second_derivative_names_the_backend_that_has_one(kind):
    x, *ids = inputs(kind, mixture_case((4, 4, 3), num=3)[0])

    def penalty(layer: Any) -> torch.Tensor:
        own = x.clone().requires_grad_()
        (grad,) = torch.autograd.grad(layer(own, *ids).square().sum(), own, create_graph=True)
        return grad.square().sum()

    for training in (True, False):
        layer = make_norm(kind, 4, 3).double().train(training)
        found = penalty(layer)
        with pytest.raises(RuntimeError, match='backend="reference"'):
            torch.autograd.grad(found, list(layer.parameters()), retain_graph=True, allow_unused=True)
        with pytest.raises(RuntimeError, match='backend="reference"'):
            found.backward()
        with pytest.raises(RuntimeError, match='backend="reference"'):  # by differentiating a gradient, too
            torch.autograd.functional.jvp(lambda x, layer=layer: layer(x, *ids), x, x)
        penalty(make_norm(kind, 4, 3, backend="reference").double().train(training)).backward()


@pytest.mark.parametrize("kind", ["dsbn", "mn", "scb", "ucb"])
def test_torch_func_transforms_a_layer(kind):
    layer, ids = make_norm(kind, 4, 3).double(), torch.tensor([0, 1, 2, 0])
    x, *_, v = mixture_case((4, 4, 3), num=3)

    def call(x: torch.Tensor, ids: torch.Tensor = ids) -> torch.Tensor:
        return layer(x, ids) if kind in ("dsbn", "scb") else layer(x)

    call(x)  # moves what is stored
    layer.eval()
    leaf = x.clone().requires_grad_()
    (want,) = torch.autograd.grad(call(leaf), leaf, v)
    torch.testing.assert_close(torch.func.grad(lambda x: (v * call(x)).sum())(x), want)
    tangent = torch.func.jvp(call, (x,), (v,))[1]
    torch.testing.assert_close(tangent, (call(x + 1e-6 * v) - call(x - 1e-6 * v)).detach() / 2e-6, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close((tangent * v).sum(), (want * v).sum())  # <J v, v> = <v, J^T v>
    with forward_ad.dual_level():
        torch.testing.assert_close(forward_ad.unpack_dual(call(forward_ad.make_dual(x, v))).tangent, tangent)
    both = torch.func.vmap(call)(torch.stack([x, v]), torch.stack([ids, ids.flip(0)]))
    torch.testing.assert_close(both, torch.stack([call(x), call(v, ids.flip(0))]))


@pytest.mark.parametrize(("backend", "kind"), [("eager", "mn"), ("compiled", "ucb")])
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
    given = [t.requires_grad_() for t in (x, log_lambda, mean, var)]
    assert torch.autograd.gradgradcheck(lambda *a: mixture_norm(*a, backend="reference")[0], given)


def test_eager_ignores_autocast():
    case = mixture_case((6, 4, 8), num=3, dtype=torch.float32)
    want = mixture_run(case, torch.float32, "eager")
    with torch.autocast("cpu", torch.bfloat16):
        got = mixture_run(case, torch.float32, "eager")
    torch.testing.assert_close(got, want, rtol=0, atol=0)
