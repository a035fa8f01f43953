import numpy as np
import pytest
import torch
from torch import nn

from common.metrics.gradient_variance import gradient_noise, gradient_variance


def test_mean_and_maximum_counted_by_hand():
    # d/dw sum(w c) is c: variances of (1, 3) and (0, 0, 6) are 1 and 8.
    a, b, one, unused = (nn.Parameter(torch.ones(n)) for n in (2, 3, 1, 4))
    frozen = nn.Parameter(torch.ones(2), requires_grad=False)
    loss = (a * torch.tensor([1.0, 3.0])).sum() + (b * torch.tensor([0.0, 0.0, 6.0])).sum() + 5 * one.sum()
    weights = [a, b, one, unused, frozen]
    for own, shared in (([], 4.5), ([b, unused], 1.0), ([a], 8.0)):
        assert [each.item() for each in gradient_variance(loss, weights, own)] == [4.5, 8.0, shared]
    assert a.grad is None
    loss.backward()  # the graph is still there
    assert a.grad is not None
    assert a.grad.tolist() == [1.0, 3.0]


def test_it_is_what_backward_and_numpy_say():
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(16, 2))
    loss = network(torch.randn(5, 3, 4, 4)).square().mean()
    found = gradient_variance(loss, network.parameters())
    loss.backward()
    variances = [p.grad.numpy().var() for p in network.parameters() if p.grad is not None]
    mean = sum(variances) / len(variances)
    assert [v.item() for v in found] == pytest.approx([mean, max(variances), mean], rel=1e-5)


def test_a_loss_of_other_parameters_is_refused():
    with pytest.raises(ValueError, match="parameters: expected some that the loss depends on"):
        gradient_variance(nn.Parameter(torch.ones(2)).sum(), [nn.Parameter(torch.ones(2))])


def test_noise_counted_by_hand():
    # Of a's entries the gradients are (1, 2, 6) and (0, 0, 3): unbiased variances 7 and 3; of b's 12 in (0, 0, 6).
    a, b, unused = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(1)), nn.Parameter(torch.ones(4))
    slopes = [((1.0, 0.0), 0.0), ((2.0, 0.0), 0.0), ((6.0, 3.0), 6.0)]
    losses = [(a * torch.tensor(of_a)).sum() + of_b * b.sum() for of_a, of_b in slopes]
    assert [each.item() for each in gradient_noise(losses, [a, b, unused])] == pytest.approx([8.5, 12, 8.5])
    assert gradient_noise(losses, [a, b, unused], [b]).shared.item() == pytest.approx(5)
    assert a.grad is None
    sum(losses, torch.zeros(())).backward()  # the graph is still there


def test_noise_is_what_backward_and_numpy_say_of_the_parts_of_a_batch():
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(16, 2))
    outputs = network(torch.randn(16, 3, 4, 4))
    losses = [part.square().mean() for part in outputs.tensor_split(8)]
    found = gradient_noise(losses, network.parameters())
    gradients = []
    for loss in losses:
        network.zero_grad()
        loss.backward(retain_graph=True)
        gradients.append([p.grad.numpy().copy() for p in network.parameters() if p.grad is not None])
    variances = [np.stack(of_one).var(0, ddof=1).mean() for of_one in zip(*gradients, strict=True)]
    mean = np.mean(variances)
    assert [v.item() for v in found] == pytest.approx([mean, max(variances), mean], rel=1e-4)


def test_noise_takes_two_losses():
    with pytest.raises(ValueError, match="losses: expected at least 2, got 1"):
        gradient_noise([torch.zeros(())], [])
    with pytest.raises(ValueError, match="parameters: expected some that the loss depends on"):
        gradient_noise([torch.zeros(())] * 2, [nn.Parameter(torch.ones(2))])
