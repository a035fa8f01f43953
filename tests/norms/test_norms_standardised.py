"""SCB layers with statistics="batch" or "instance": the clusters' rows are those of standardised activations."""

import pytest
import torch
from norm_cases import any_norm, assert_state, batch, in_full, state, step
from torch import nn
from torch.nn import functional as F
from torchvision.models import resnet18

from common.norms import SCBNorm, cluster_norm, clusters, convert_norms

IDS = torch.arange(6) % 3


def layer_of(kind, **options):
    torch.manual_seed(0)
    layer = any_norm(kind, 4, 3, dtype=torch.float64, **options)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return layer


def equations(layer, standardise, x, ids=IDS):
    """Eq. 10 of standardised x (N, C, L), and the layer's affine map."""
    mean, log_var = layer.rows()
    y = (standardise(x) - mean[ids][:, :, None]) / (log_var[ids][:, :, None].exp() + layer.eps).sqrt()
    return y if layer.weight is None else y * layer.weight[:, None] + layer.bias[:, None]


def by_instance(x):
    return F.instance_norm(x, eps=1e-3)


def samples(shape=(6, 4, 7)):
    """Samples (N, C, *) of many scales."""
    return 5 + batch(1, shape, torch.float64) * torch.arange(1, len(IDS) + 1).view(-1, *[1] * (len(shape) - 1))


@pytest.mark.parametrize(("kind", "affine"), [("scb", False), ("scb_base", True)])
def test_it_is_eq_10_of_batch_norms_output(kind, affine):
    layer = layer_of(kind, statistics="batch", momentum=0.3, affine=affine)
    twin = nn.BatchNorm1d(4, momentum=0.3, affine=False).double()
    for training in (True, True, False):
        x, g = samples(), torch.randn(6, 4, 7, dtype=torch.float64)
        other = x.clone().requires_grad_()
        want = equations(layer, twin.train(training), other)
        gradients = torch.autograd.grad(want, [other, *layer.parameters()], g)
        torch.testing.assert_close(step(layer.train(training), x, g, IDS), [want, *gradients])
        torch.testing.assert_close(layer.running_mean, twin.running_mean)
        torch.testing.assert_close(layer.running_var, twin.running_var)


def test_half_precision_keeps_float32_statistics():
    layer, x = SCBNorm(4, 2, statistics="batch"), batch(0, (6, 4, 50))
    y = layer(x.bfloat16(), torch.zeros(6, dtype=torch.long))
    assert y.dtype is torch.bfloat16
    assert layer.running_var.dtype is torch.float32
    torch.testing.assert_close(layer.running_var, 0.9 + 0.1 * x.bfloat16().float().var((0, 2)), rtol=1e-3, atol=1e-3)


def test_a_batch_that_is_not_finite_or_empty_moves_no_statistics_and_a_reset_returns_to_none():
    layer = layer_of("scb", statistics="batch")
    before, x = state(layer), batch(0, (3, 4, 5), torch.float64)
    layer(torch.where(x == x[1, 2, 3], torch.inf, x), torch.arange(3))
    layer(x[:0], torch.arange(0))
    assert_state(layer, before)
    layer(x, torch.arange(3))
    layer.reset_parameters()
    assert torch.equal(layer.running_mean, torch.zeros(4, dtype=torch.float64))
    assert torch.equal(layer.running_var, torch.ones(4, dtype=torch.float64))
    assert {"running_mean", "running_var"}.isdisjoint(SCBNorm(4, 2).state_dict())


def test_rows_are_seeded_by_standardised_activations():
    layer = SCBNorm(4, 2, statistics="batch", init="data", dtype=torch.float64)
    x, ids = 9 + 3 * batch(0, (8, 4, 20), torch.float64), torch.arange(8) % 2
    x[ids == 1] += 5
    layer(x, ids)
    standard = (x - x.mean((0, 2), keepdim=True)) / (x.var((0, 2), correction=0, keepdim=True) + layer.eps).sqrt()
    for k in range(2):
        torch.testing.assert_close(layer.mean[k], standard[ids == k].mean((0, 2)))
        torch.testing.assert_close(layer.log_var[k].exp(), standard[ids == k].var((0, 2), correction=0))


@pytest.mark.parametrize(("kind", "affine", "backend"), [("scb", False, "eager"), ("scb_base", True, "reference")])
def test_it_is_eq_10_of_instance_norms_output(kind, affine, backend):
    layer = layer_of(kind, statistics="instance", affine=affine, eps=1e-3, backend=backend)
    x, g = samples(), torch.randn(6, 4, 7, dtype=torch.float64)
    for training in (True, False):
        other = x.clone().requires_grad_()
        want = equations(layer, by_instance, other)
        gradients = torch.autograd.grad(want, [other, *layer.parameters()], g)
        torch.testing.assert_close(step(layer.train(training), x, g, IDS), [want, *gradients])
        torch.testing.assert_close(layer(x[2:3], IDS[2:3]), want[2:3])  # a sample by itself


@pytest.mark.parametrize("posterior", ["location", "sample"])
def test_unknown_clusters_are_weighed_by_the_posteriors_of_the_standardised_sample(posterior):
    layer = layer_of("scb", statistics="instance", eps=1e-3, unknown_posterior=posterior).eval()
    x = samples()
    for given in (torch.where(torch.arange(6) < 2, IDS, -1), None):
        options = {"eps": 1e-3, "unknown_posterior": posterior, "backend": "reference"}
        want = cluster_norm(by_instance(x), given, layer.mean, layer.log_var.exp(), **options)
        torch.testing.assert_close(layer(x, given), want)


def test_instance_statistics_keep_layouts():
    layer, last = (layer_of("scb", statistics="instance", eps=1e-3, channel_dim=dim) for dim in (1, -1))
    x = samples((6, 4, 3, 5))
    want = equations(layer, by_instance, x.flatten(2)).view_as(x)
    y = layer(x.contiguous(memory_format=torch.channels_last), IDS)
    assert y.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(y, want)
    torch.testing.assert_close(last(x.movedim(1, -1), IDS), want.movedim(1, -1))


@pytest.mark.parametrize(
    ("dtype", "offset", "tolerance"),
    [(torch.bfloat16, 3, 2**-5), (torch.float16, 3, 2**-8), (torch.float32, 1e3, 2e-3)],
)
def test_instance_statistics_are_exact_to_rounding(dtype, offset, tolerance):
    """Deviations are 0.25 and more; moments rounded to half precision, or taken of squares, miss by more."""
    layer = layer_of("scb", statistics="instance", eps=1e-3)
    x = (offset + (samples((6, 4, 16, 16)) - 5) / 4).to(dtype)
    want = equations(layer, by_instance, x.double().flatten(2)).view(x.shape)
    y = layer.float()(x, IDS)
    assert y.dtype is dtype
    torch.testing.assert_close(y.double(), want, rtol=0, atol=tolerance)


def test_instance_statistics_of_nothing_pass():
    for kind, training in (("scb", True), ("scb_base", False)):
        layer = layer_of(kind, statistics="instance").train(training)
        for shape in ((0, 4, 1), (0, 4, 5), (6, 4, 0)):
            x = torch.zeros(shape, dtype=torch.float64)
            y = layer(x, torch.arange(len(x)) % 3)
            assert y.shape == shape
            assert not any(g.any() for g in torch.autograd.grad(y.sum(), list(layer.parameters())))


def test_instance_statistics_store_nothing_and_seed_the_identity():
    layer = SCBNorm(4, 3, statistics="instance", init="data", dtype=torch.float64)
    assert layer.state_dict().keys() == SCBNorm(4, 3).state_dict().keys()
    x = samples()
    constant = x.clone()
    constant[:, 1] = 2.0  # a channel that tells nothing of the variance
    layer(constant, IDS)
    torch.testing.assert_close(layer(x, IDS), F.instance_norm(x), rtol=0, atol=1e-4)
    torch.testing.assert_close(layer.mean.detach(), torch.zeros(3, 4, dtype=torch.float64), rtol=0, atol=1e-12)


def losses(model, steps=8, lr=0.05, size=32):
    x = torch.randn(12, 3, size, size, generator=torch.Generator().manual_seed(1))
    labels, ids = torch.arange(12) % 10, torch.arange(12) % 3
    optimizer, found = torch.optim.SGD(model.parameters(), lr), []
    for _ in range(steps):
        with clusters(ids):
            loss = nn.functional.cross_entropy(model(x), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        found.append(loss.item())
    return found


@pytest.mark.parametrize(
    ("kind", "options"),
    [("scb", {"statistics": "batch"}), ("ucb", {}), *in_full(("scb", {"where": 0, "init": "data"}))],
    ids=str,
)
def test_a_fresh_resnet_trains_at_batch_norms_learning_rate(kind, options, recwarn):
    torch.manual_seed(0)
    found = losses(convert_norms(resnet18(num_classes=10), kind, **options))
    assert found[-1] < 0.1
    assert max(found) < 5


def test_instance_statistics_hold_the_scale_of_a_fresh_resnet():
    torch.manual_seed(0)
    found = losses(convert_norms(resnet18(num_classes=10), "scb", statistics="instance"), size=64)
    assert found[-1] < found[0]
    assert max(found) < 5


def test_conversion_warns_where_nothing_is_left_to_hold_the_scale():
    torch.manual_seed(0)
    with pytest.warns(UserWarning, match=r"^model: with '.*' at every layer nothing holds .*where=0.*'batch'"):
        model = convert_norms(resnet18(num_classes=10), "scb", init="data")
    assert not losses(model, steps=4)[-1] < 10  # as the warning says: it overflows
    convert_norms(resnet18(), "scb", where=0)  # warns of nothing, nor does this
    convert_norms(resnet18(), "scb", where=list(range(1, 20)))
    for statistics in ("batch", "instance"):
        convert_norms(resnet18(), "scb", statistics=statistics)
