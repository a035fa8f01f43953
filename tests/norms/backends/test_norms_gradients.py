"""The closed forms against the reference, and both against finite differences."""

import pytest
import torch
from norm_cases import GRADIENTS, assert_within_budget, cluster_run, mixture_case, mixture_run
from torch import nn

from common.norms import MixtureNorm, SCBNorm, SCBNormBase, UCBNorm, cluster_norm, make_norm, mixture_norm
from common.norms.backends import eager

# Not two values a channel: then dx is the rounding of terms that cancel exactly.
SHAPES = [(3, 1, 1), (9, 4), (3, 6, 5), (5, 4, 3, 7), (17, 12, 1, 1)]
CLUSTERS = {"known": [0, 2, 1, 0], "unknown": None, "mixed": [0, -1, 2, -1]}


@pytest.mark.parametrize("backend", ["reference", "eager"])
@pytest.mark.parametrize("statistics", ["batch", "learned"])
@pytest.mark.parametrize("scale", ["paper", "sqrt_k"])
@pytest.mark.parametrize("groups", [1, 2, 4])
def test_mixture_norm_has_the_gradients_of_finite_differences(backend, statistics, scale, groups):
    x, log_lambda, mean, var, _ = mixture_case((3, 4, 2), num=3)
    inputs = [t.requires_grad_() for t in (x, log_lambda, mean, var)]

    def run(*args):
        return mixture_norm(*args, groups=groups, statistics=statistics, scale=scale, backend=backend)[0]

    assert torch.autograd.gradcheck(run, inputs)


@pytest.mark.parametrize("backend", ["reference", "eager"])
@pytest.mark.parametrize("scale", ["match", "paper"])
@pytest.mark.parametrize("over", ["location", "sample"])
@pytest.mark.parametrize("ids", CLUSTERS)
def test_cluster_norm_has_the_gradients_of_finite_differences(backend, scale, over, ids):
    x, _, mean, var, _ = mixture_case((4, 3, 2), num=3)
    cluster = None if CLUSTERS[ids] is None else torch.tensor(CLUSTERS[ids])

    def run(x, mean, var):
        return cluster_norm(x, cluster, mean, var, unknown_scale=scale, unknown_posterior=over, backend=backend)

    assert torch.autograd.gradcheck(run, [t.requires_grad_() for t in (x, mean, var)])


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
    "scb": lambda **o: SCBNorm(4, 3, **o),
    "scb affine": lambda **o: SCBNorm(4, 3, affine=True, **o),
    "scb_base": lambda **o: SCBNormBase(4, 3, **o),
    "ucb": lambda **o: UCBNorm(4, 3, **o),
    "ucb joint": lambda **o: UCBNorm(4, 3, groups=1, scale="sqrt_k", **o),
    "ucb weight": lambda **o: UCBNorm(4, 3, groups=2, update="weight", **o),
    "ucb learned": lambda **o: UCBNorm(4, 3, update="weight", statistics="learned", **o),
}


@pytest.mark.parametrize("backend", ["reference", "eager"])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("kind", LAYERS)
def test_layers_have_the_gradients_of_finite_differences(kind, training, backend):
    """Every input and parameter; buffers are put back before each evaluation, which would move them."""
    layer = LAYERS[kind](backend=backend).double().train(training)
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


@pytest.mark.parametrize("memory", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("statistics", ["batch", "learned"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_closed_form_errs_at_most_twice_as_much_as_the_reference(monkeypatch, shape, statistics, dtype, memory):
    monkeypatch.setattr(eager, "PART_ELEMENTS", 30)  # several parts, the last one ragged
    case = list(mixture_case(shape, num=3, dtype=torch.float32))
    case[0], case[4] = case[0].to(dtype).float(), case[4].to(dtype).float()
    if memory == "channels_last" and len(shape) == 4:
        case[0], case[4] = (t.contiguous(memory_format=torch.channels_last) for t in (case[0], case[4]))
    for groups in {1, shape[1]}:
        options = {"groups": groups, "statistics": statistics}
        exact, _ = mixture_run(tuple(case), torch.float64, "reference", **options)
        plain = mixture_run_mixed(case, dtype, "reference", options)
        ours = mixture_run_mixed(case, dtype, "eager", options)
        assert_within_budget(exact, ours, plain)


def mixture_run_mixed(case, dtype, backend, options):
    """As mixture_run with x and its gradient in dtype and the parameters in float32."""
    x, log_lambda, mean, var, g = case
    inputs = [t.detach().requires_grad_() for t in (x.to(dtype), log_lambda, mean, var)]
    y, _ = mixture_norm(*inputs, backend=backend, **options)
    assert y.dtype == dtype
    grads = torch.autograd.grad(y, inputs, g.to(dtype))
    assert [grad.dtype for grad in grads] == [t.dtype for t in inputs]
    return dict(zip(list[str](GRADIENTS), (y, *grads), strict=True))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_cluster_closed_form_errs_at_most_twice_as_much_as_the_reference(monkeypatch, shape):
    monkeypatch.setattr(eager, "PART_ELEMENTS", 30)
    case = mixture_case(shape, num=3, dtype=torch.float32)
    cluster = torch.arange(shape[0]) % 2  # cluster 2 is absent
    exact = cluster_run(case, cluster, torch.float64, "reference")
    plain, ours = (cluster_run(case, cluster, torch.float32, backend) for backend in ("reference", "eager"))
    assert_within_budget(exact, ours, plain)
    assert not ours["dmean"][2].any()
    assert not ours["dvar"][2].any()


@pytest.mark.parametrize("away", [0, 6])
@pytest.mark.parametrize("groups", [1, 3, 6])
def test_backends_agree_on_the_moments(groups, away):
    """Also on those of a component that holds next to nothing."""
    case = mixture_case((5, 6, 4), num=3)
    case[2][2] += away
    (_, want), (_, got) = (
        mixture_run(case, torch.float64, backend, groups=groups) for backend in ("reference", "eager")
    )
    assert got is not None
    assert want is not None
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
        assert not a.requires_grad


def gradient_penalty(layer: nn.Module, *cluster: torch.Tensor) -> torch.Tensor:
    x = mixture_case((4, 4, 3), num=3)[0].requires_grad_()
    (grad,) = torch.autograd.grad(layer(x, *cluster).square().sum(), x, create_graph=True)
    return grad.square().sum()


@pytest.mark.parametrize("kind", ["scb", "ucb"])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_a_second_derivative_names_the_backend_that_has_one(kind, training):
    cluster = (torch.tensor([0, 1, 2, 0]),) if kind == "scb" else ()
    penalty = gradient_penalty(make_norm(kind, 4, 3).double().train(training), *cluster)
    with pytest.raises(RuntimeError, match='backend="reference"'):
        penalty.backward()
    layer = make_norm(kind, 4, 3, backend="reference").double().train(training)
    gradient_penalty(layer, *cluster).backward()


def test_the_reference_has_the_second_derivatives_of_finite_differences():
    x, log_lambda, mean, var, _ = mixture_case((2, 2, 2), num=2)
    inputs = [t.requires_grad_() for t in (x, log_lambda, mean, var)]
    assert torch.autograd.gradgradcheck(lambda *a: mixture_norm(*a, backend="reference")[0], inputs)


def test_eager_ignores_autocast():
    x, log_lambda, mean, var, g = mixture_case((6, 4, 8), num=3, dtype=torch.float32)
    want, _ = mixture_run((x, log_lambda, mean, var, g), torch.float32, "eager")
    with torch.autocast("cpu", torch.bfloat16):
        got, _ = mixture_run((x, log_lambda, mean, var, g), torch.float32, "eager")
    for name, value in want.items():
        assert torch.equal(got[name], value), name
