"""SCB layers with statistics="batch": the clusters' rows are those of standardised activations."""

import pytest
import torch
from norm_cases import any_norm
from torch import nn
from torchvision.models import resnet18

from common.norms import SCBNorm, clusters, convert_norms


def layer_and_twin(kind, affine=False):
    torch.manual_seed(0)
    layer = any_norm(kind, 4, 3, statistics="batch", momentum=0.3, affine=affine, dtype=torch.float64)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return layer, nn.BatchNorm1d(4, momentum=0.3, affine=False).double()


def equations(layer, twin, x, ids):
    """Eq. 10 of BatchNorm's output, and the layer's affine map."""
    mean, log_var = layer.rows()
    y = (twin(x) - mean[ids][:, :, None]) / (log_var[ids][:, :, None].exp() + layer.eps).sqrt()
    return y if layer.weight is None else y * layer.weight[:, None] + layer.bias[:, None]


@pytest.mark.parametrize(("kind", "affine"), [("scb", False), ("scb_base", True)])
def test_it_is_eq_10_of_batch_norms_output(kind, affine):
    layer, twin = layer_and_twin(kind, affine)
    x, ids = torch.empty(0), torch.tensor([0, 1, 2, 0, 1, 2])
    for step in range(3):
        x = 5 + (step + 1) * torch.randn(6, 4, 7, dtype=torch.float64, requires_grad=True)
        other = x.detach().requires_grad_()
        found, want = layer(x, ids), equations(layer, twin, other, ids)
        torch.testing.assert_close(found, want)
        weights, pairs = torch.randn_like(found), ((found, x), (want, other))
        torch.testing.assert_close(*(torch.autograd.grad((y * weights).sum(), i)[0] for y, i in pairs))
    torch.testing.assert_close(layer.running_mean, twin.running_mean)
    torch.testing.assert_close(layer.running_var, twin.running_var)
    layer.eval()
    twin.eval()
    torch.testing.assert_close(layer(x, ids), equations(layer, twin, x, ids))


def test_half_precision_keeps_float32_statistics():
    torch.manual_seed(0)
    layer, x = SCBNorm(4, 2, statistics="batch"), torch.randn(6, 4, 50)
    y = layer(x.bfloat16(), torch.zeros(6, dtype=torch.long))
    assert y.dtype is torch.bfloat16
    assert layer.running_var.dtype is torch.float32
    torch.testing.assert_close(layer.running_var, 0.9 + 0.1 * x.bfloat16().float().var((0, 2)), rtol=1e-3, atol=1e-3)


def test_a_batch_that_is_not_finite_or_empty_moves_no_statistics():
    layer, _ = layer_and_twin("scb")
    before = {name: t.clone() for name, t in layer.state_dict().items()}
    x = torch.randn(3, 4, 5, dtype=torch.float64)
    x[1, 2, 3] = torch.inf
    layer(x, torch.arange(3))
    layer(x[:0], torch.arange(0))
    assert all(torch.equal(t, before[name]) for name, t in layer.state_dict().items())


def test_rows_are_seeded_by_standardised_activations():
    torch.manual_seed(0)
    layer = SCBNorm(4, 2, statistics="batch", init="data", dtype=torch.float64)
    x, ids = 9 + 3 * torch.randn(8, 4, 20, dtype=torch.float64), torch.arange(8) % 2
    x[ids == 1] += 5
    layer(x, ids)
    standard = (x - x.mean((0, 2), keepdim=True)) / (x.var((0, 2), correction=0, keepdim=True) + layer.eps).sqrt()
    for k in range(2):
        torch.testing.assert_close(layer.mean[k], standard[ids == k].mean((0, 2)))
        torch.testing.assert_close(layer.log_var[k].exp(), standard[ids == k].var((0, 2), correction=0))


def test_one_value_a_channel_is_enough_in_evaluation():
    assert SCBNorm(4, 2, statistics="batch").eval()(torch.ones(1, 4), torch.tensor([0])).isfinite().all()


def test_the_options_are_shown_and_reset():
    layer, _ = layer_and_twin("scb")
    assert "statistics='batch', momentum=0.3" in repr(layer)
    layer(torch.randn(3, 4, 5, dtype=torch.float64), torch.arange(3))
    layer.reset_parameters()
    assert torch.equal(layer.running_mean, torch.zeros(4, dtype=torch.float64))
    assert torch.equal(layer.running_var, torch.ones(4, dtype=torch.float64))
    assert {"running_mean", "running_var"}.isdisjoint(SCBNorm(4, 2).state_dict())


def noise():
    rng = torch.Generator().manual_seed(1)
    return torch.randn(12, 3, 32, 32, generator=rng), torch.arange(12) % 10, torch.arange(12) % 3


def losses(model, steps=8, lr=0.05):
    x, labels, ids = noise()
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
    [
        ("scb", {"statistics": "batch"}),
        ("scb", {"where": 0, "init": "data"}),
        ("ucb", {}),
    ],
    ids=str,
)
def test_a_fresh_resnet_trains_at_batch_norms_learning_rate(kind, options, recwarn):
    torch.manual_seed(0)
    model = convert_norms(resnet18(num_classes=10), kind, **options)
    found = losses(model)
    assert found[-1] < 0.1
    assert max(found) < 5


def test_conversion_warns_where_nothing_is_left_to_hold_the_scale():
    torch.manual_seed(0)
    with pytest.warns(UserWarning, match=r"^model: with '.*' at every layer nothing holds .*where=0.*'batch'"):
        model = convert_norms(resnet18(num_classes=10), "scb", init="data")
    assert not losses(model, steps=4)[-1] < 10  # as the warning says: it overflows
    convert_norms(resnet18(), "scb", where=0)  # warns of nothing, nor does this
    convert_norms(resnet18(), "scb", where=list(range(1, 20)))
    convert_norms(resnet18(), "scb", statistics="batch")
