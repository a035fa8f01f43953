import pytest
import torch
from torch import nn
from torch.distributions import Normal, kl_divergence

from cbda.networks.classifier import SOURCE, TARGET, Classifier
from cbda.networks.divergence import IMAGES, collect_activation, divergence, divergences
from cbda.networks.wide_resnet import WideResNet
from common.norms.config import NormConfig


def test_it_is_the_symmetric_divergence_of_normal_distributions():
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(50, 6, generator=generator, dtype=torch.float64) * torch.arange(1, 7) + torch.arange(6)
    b = torch.randn(30, 6, generator=generator, dtype=torch.float64) * 2 + 1
    p, q = (Normal(x.mean(0), (x.var(0, correction=0) + 1e-5).sqrt()) for x in (a, b))
    want = (kl_divergence(p, q) + kl_divergence(q, p)).mean()
    assert divergence(a, b) == pytest.approx(float(want), rel=1e-9)
    assert divergence(b, a) == pytest.approx(float(want), rel=1e-9)


def test_a_channel_that_never_changes_is_no_infinity():
    dead = torch.zeros(4, 1)
    assert divergence(dead, dead) == 0
    assert divergence(dead, dead + 1) == pytest.approx(1e5)


class Views(nn.Module):
    """A network with channels second, then last."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(3, 4, 3)
        self.norm = nn.LayerNorm(4)
        self.linear = nn.Linear(4, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(self.norm(self.convolution(x).movedim(1, -1))).mean((1, 2))


def test_activation_is_the_mean_of_each_channel_over_an_images_positions():
    network, x = Views(), torch.randn(5, 3, 6, 6)
    with collect_activation(network) as found:
        network(x)
        network(x[:2])
    network(x)  # no longer watched
    assert list(found) == [IMAGES, "convolution", "norm", "linear"]
    inner = network.convolution(x)
    normed = network.norm(inner.movedim(1, -1))
    for name, want in ((IMAGES, x.mean((2, 3))), ("convolution", inner.mean((2, 3))), ("norm", normed.mean((1, 2))),
                       ("linear", network.linear(normed).mean((1, 2)))):  # fmt: skip
        assert len(found[name]) == 2
        torch.testing.assert_close(found[name][0].float(), want.detach(), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(found[name][1], found[name][0][:2])


def test_a_norm_by_domain_that_knows_both_brings_them_together():
    torch.manual_seed(0)
    network = Classifier(WideResNet(10, 1, 3), NormConfig(kind="dsbn", num_components=2))
    dark, bright = torch.randn(64, 3, 8, 8) - 2, torch.randn(64, 3, 8, 8) * 2 + 2
    both, ids = torch.cat([dark, bright]), torch.tensor([SOURCE] * 64 + [TARGET] * 64)
    for _ in range(100):
        network.norm(both, ids)
    network.eval()
    found = []
    for images, cluster in ((dark, SOURCE), (bright, TARGET)):
        with collect_activation(network) as activation, torch.no_grad():
            network(images, torch.full((64,), cluster))
        found.append(activation)
    apart = divergences(*found)
    assert list(apart)[:3] == [IMAGES, "norm", "network.stem"]
    assert apart[IMAGES] > 10
    assert apart["norm"] < 1
    assert not any("domains" in name for name in apart)  # the layer counts, not its parts
