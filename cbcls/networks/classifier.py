"""What all classifiers have in common: from images and their clusters to logits."""

import torch
from torch import Tensor, nn

from common.norms.config import NormConfig
from common.norms.registry import kinds


class Classifier(nn.Module):
    """A network that maps images and the cluster of each to class logits, by features and a linear map of them.

    A subclass makes its layers, calls `end` last, and says what features are.

    Args:
        norm: the layer under test.
        num_clusters: if not 0, so many clusters are handed to the last linear map, one-hot beside the features:
            the baseline that is given what layers of known clusters are given.

    Shape: (N, 3, S, S) and int64 (N,) to (N, num_classes).

    Attributes:
        pixels: what the network sees of images in [-1, 1]; whoever builds it may set another.
    """

    linear: nn.Linear
    pixels: nn.Module

    def __init__(self, norm: NormConfig, num_clusters: int = 0) -> None:
        super().__init__()
        self.pixels = nn.Identity()
        self.num_clusters = num_clusters
        self._takes_clusters = norm.kind in kinds(takes_clusters=True)

    def end(self, width: int, num_classes: int) -> None:
        """Make the last linear map, for features of a width; the last of the network to draw its weights."""
        self.linear = nn.Linear(width + self.num_clusters, num_classes)

    def features(self, x: Tensor, cluster: Tensor | None) -> Tensor:
        """Map images (N, 3, S, S), as `pixels` shows them, of clusters (N,) to what is mapped last, (N, width)."""
        raise NotImplementedError

    def forward(self, x: Tensor, cluster: Tensor | None = None) -> Tensor:
        """Map images (N, 3, S, S) to logits (N, num_classes).

        Args:
            x: images in [-1, 1].
            cluster: int64 (N,); in evaluation -1, or None for all, is unknown, where the layer knows that. Networks
                that are not given clusters ignore it.

        Raises:
            ValueError: without clusters in training, where they are needed.
        """
        h = self.features(self.pixels(x), cluster)
        return self.linear(self._with_clusters(h, cluster) if self.num_clusters else h)

    def normalised(self, norm: nn.Module, h: Tensor, cluster: Tensor | None) -> Tensor:
        """Apply the layer under test."""
        return norm(h, cluster) if self._takes_clusters else norm(h)

    def _with_clusters(self, h: Tensor, cluster: Tensor | None) -> Tensor:
        """Append clusters to features, one-hot; of an unknown one all are 0."""
        if cluster is None:
            if self.training:
                raise ValueError("cluster: expected the cluster of each image in training, got None")
            cluster = torch.full((len(h),), -1, device=h.device)
        member = cluster[:, None] == torch.arange(self.num_clusters, device=h.device)
        return torch.cat([h, member.to(h.dtype)], 1)
