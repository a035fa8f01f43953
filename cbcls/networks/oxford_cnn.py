"""OxfordCNN, which the paper trains on Oxford-IIIT Pet."""

import torch.nn.functional as F
from torch import Tensor, nn

from cbcls.networks.classifier import Classifier
from common.norms import BatchNorm
from common.norms.config import NormConfig
from common.runtime.seeding import derive

_BLOCKS = ((32, 5), (32, 4), (64, 4), (64, 3), (128, 3), (128, 2), (256, 2))
"""Channels and kernel of each block's two convolutions."""


class OxfordCNN(Classifier):
    """Seven blocks of two convolutions and a pool, two sigmoid layers, the layer under test, and a linear map.

    For 37 classes and images of 256 x 256, without a layer under test, there are 1,647,493 parameters.

    Args:
        num_classes: length of the output.
        norm: the layer under test, on the 256 values that go into the last linear map.
        size: side S of the images, 128 at least; the paper's is 256.
        seed: of the mixture's own generator; everything else is drawn from torch's global one.
        num_clusters: as for `Classifier`.

    Source: the page of mayur7garg/PetImageClassification, which the paper names as its baseline. BatchNorm is torch's
    here, with eps 1e-5 and momentum 0.1, where Keras has 1e-3 and, in this orientation, 0.01.
    """

    def __init__(
        self, num_classes: int, norm: NormConfig, *, size: int = 256, seed: int = 0, num_clusters: int = 0
    ) -> None:
        super().__init__(norm, num_clusters)
        blocks, channels = [], 3
        for number, (out, kernel) in enumerate(_BLOCKS, start=1):
            blocks.append(_Block(channels, out, kernel, normalised=number == 3))
            channels = out
        self.blocks = nn.Sequential(*blocks)
        width = channels * (size // 2 ** len(_BLOCKS)) ** 2
        self.dense = nn.Sequential(
            nn.Flatten(),
            BatchNorm(width),
            *(nn.Dropout(0.2), nn.Linear(width, 512), nn.Sigmoid()),
            *(nn.Dropout(0.2), nn.Linear(512, 256), nn.Sigmoid()),
        )
        self.norm = norm.build(256, derive(seed, "norm"))
        self.dropout = nn.Dropout(0.1)
        self.end(256, num_classes)
        for module in self.modules():  # as Keras draws them
            if isinstance(module, nn.Conv2d | nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                assert module.bias is not None
                nn.init.zeros_(module.bias)

    def features(self, x: Tensor, cluster: Tensor | None) -> Tensor:
        """Map images (N, 3, S, S) to what the linear map is given, (N, 256)."""
        return self.dropout(self.normalised(self.norm, self.dense(self.blocks(x)), cluster))


class _Block(nn.Module):
    """Two convolutions that keep the size, the second activated, and a pool that halves it."""

    def __init__(self, channels: int, out: int, kernel: int, *, normalised: bool) -> None:
        super().__init__()
        before = (kernel - 1) // 2  # an even kernel has the larger share at the right and the bottom, as TensorFlow's
        self.padding = (before, kernel - 1 - before) * 2
        self.conv1 = nn.Conv2d(channels, out, kernel)
        self.conv2 = nn.Conv2d(out, out, kernel)
        self.norm = BatchNorm(out) if normalised else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.pad(x, self.padding))
        h = F.leaky_relu(self.conv2(F.pad(h, self.padding)), 0.5)
        return self.norm(F.max_pool2d(h, 2))
