"""Densely connected networks, plain and with bottlenecks and compression."""

import math

import torch
from torch import Tensor, nn

from cbcls.networks.classifier import Classifier
from common.norms import BatchNorm
from common.norms.config import NormConfig
from common.runtime.seeding import derive


class DenseNet(Classifier):
    """Three blocks whose every layer sees all that came before it in the block, after the layer under test.

    Plain: blocks of (depth - 4) / 3 layers BatchNorm, ReLU, convolution of 3 x 3, and 16 channels to begin with. With
    bottlenecks (BC): half as many, each after BatchNorm, ReLU and a convolution of 1 x 1 to 4 times the growth,
    transitions that halve the channels, and 24 to begin with. Without a layer under test, growth 12 and 10 classes,
    40 plain layers have 1,019,722 parameters and 100 have 6,979,642; 100 with bottlenecks have 769,162.

    Args:
        depth: weight layers, 3 n + 4, with bottlenecks 6 n + 4.
        growth: channels that a layer adds.
        num_classes: length of the output.
        norm: the layer under test, on the 3 channels of the images.
        bottleneck: BC.
        dropout: after each convolution but the first.
        seed: of the mixture's own generator; everything else is drawn from torch's global one.
        num_clusters: as for `Classifier`.

    Source: Huang et al., "Densely Connected Convolutional Networks", CVPR 2017.
    """

    def __init__(
        self,
        depth: int,
        growth: int,
        num_classes: int,
        norm: NormConfig,
        *,
        bottleneck: bool = False,
        dropout: float = 0.0,
        seed: int = 0,
        num_clusters: int = 0,
    ) -> None:
        super().__init__(norm, num_clusters)
        layers = (depth - 4) // (6 if bottleneck else 3)
        channels = 24 if bottleneck else 16
        self.norm = norm.build(3, derive(seed, "norm"))
        self.stem = nn.Conv2d(3, channels, 3, padding=1, bias=False)
        body: list[nn.Module] = []
        for block in range(3):
            if block:
                out = channels // 2 if bottleneck else channels
                body += [*_activated(channels, out, 1), *_dropped(dropout), nn.AvgPool2d(2)]
                channels = out
            for _ in range(layers):
                body.append(_Layer(channels, growth, bottleneck, dropout))
                channels += growth
        self.body = nn.Sequential(*body, BatchNorm(channels), nn.ReLU())
        self.end(channels, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):  # N(0, 2 / (k k out))
                nn.init.normal_(module.weight, std=math.sqrt(2 / (module.kernel_size[0] ** 2 * module.out_channels)))
        nn.init.zeros_(self.linear.bias)

    def features(self, x: Tensor, cluster: Tensor | None) -> Tensor:
        """Map images (N, 3, S, S) to the means of the last channels over positions."""
        return self.body(self.stem(self.normalised(self.norm, x, cluster))).mean((2, 3))


def _activated(channels: int, out: int, kernel: int) -> list[nn.Module]:
    return [BatchNorm(channels), nn.ReLU(), nn.Conv2d(channels, out, kernel, padding=kernel // 2, bias=False)]


def _dropped(dropout: float) -> list[nn.Module]:
    return [nn.Dropout(dropout)] if dropout else []


class _Layer(nn.Module):
    """Channels beside those that it is given."""

    def __init__(self, channels: int, growth: int, bottleneck: bool, dropout: float) -> None:
        super().__init__()
        steps: list[nn.Module] = []
        if bottleneck:
            steps += [*_activated(channels, 4 * growth, 1), *_dropped(dropout)]
            channels = 4 * growth
        self.steps = nn.Sequential(*steps, *_activated(channels, growth, 3), *_dropped(dropout))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x, self.steps(x)], 1)
