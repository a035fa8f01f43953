"""The configuration of a classification run."""

from dataclasses import dataclass, field
from typing import Literal

from common.cli.fields import MAY_CHANGE
from common.data.clusters import ClustersConfig
from common.data.config import DataConfig
from common.norms.factory import kinds
from common.training.config import RunConfig

_NAMES = "shallow_cnn"
_CHANNELS = (64, 128, 128, 256)
"""Of the shallow CNN's normalizations."""


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The network, and where the layer under test is in it."""

    name: str = "shallow_cnn"
    """shallow_cnn, of the paper's Table IV."""
    position: int | None = None
    """shallow_cnn: after which of its four convolutions the layer under test is; null is the third, the paper's."""
    cluster_input: bool = False
    """Hand the cluster of each image to the last linear map, one-hot beside the features: the baseline that is told
    what scb and scb_base are told, without such a layer."""

    def __post_init__(self) -> None:
        if self.name != "shallow_cnn":
            raise ValueError(f"model.name: expected {_NAMES}, got {self.name}")
        if self.position is not None and not 1 <= self.position <= 4:
            raise ValueError(f"model.position: expected 1 to 4, or null, got {self.position}")

    @property
    def channels(self) -> int:
        """How many channels the layer under test has."""
        return _CHANNELS[(self.position or 3) - 1]


@dataclass(frozen=True, kw_only=True)
class ImagesConfig(DataConfig):
    """Which images a run uses, and how the network sees them."""

    normalise: Literal["signed", "unit", "raw", "imagenet", "dataset"] = "signed"
    """What the network sees of pixels: -1 to 1; 0 to 1; 0 to 255; or less each channel's mean and by its deviation,
    those of ImageNet or of the training images."""


@dataclass(frozen=True, kw_only=True)
class ClassifierConfig(RunConfig):
    """Train one of the paper's classifiers, in which one normalization is the layer under test.

    Without arguments: the shallow CNN of Table IV with UCB-Norm on scikit-learn's handwritten digits, a minute or two
    on two CPU cores. lr and weight_decay are AdamW's; the paper compares learning rates 0.001 and 0.005.
    """

    epochs: int = field(default=20, metadata=MAY_CHANGE)
    """Passes over the training images; the paper makes 100."""
    batch_size: int = 256
    """Images a step; the last, smaller batch of a pass is left out."""
    weight_decay: float = 1e-4
    """AdamW's decay, times lr each step; biases and what normalization layers learn are left out of it."""
    model: ModelConfig = field(default_factory=ModelConfig)
    clusters: ClustersConfig = field(default_factory=ClustersConfig)
    data: ImagesConfig = field(default_factory=ImagesConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.clusters.by == "none" and (self.takes_clusters or self.model.cluster_input):
            asks = f"norm.kind: {self.norm.kind}" if self.takes_clusters else "model.cluster_input: true"
            raise ValueError(f"{asks} needs a cluster for each image; say which by clusters.by {_CLUSTERS}")
        if self.takes_clusters and self.model.cluster_input:
            without = ", ".join(kinds(takes_clusters=False))
            raise ValueError(
                f"model.cluster_input: {self.norm.kind} is told the clusters already; expected norm.kind {without}"
            )
        self.norm.build(self.model.channels)  # the layer knows best which options it refuses

    @property
    def takes_clusters(self) -> bool:
        """Whether the layer under test is told the cluster of each image."""
        return self.norm.kind in kinds(takes_clusters=True)

    @property
    def told_clusters(self) -> bool:
        """Whether the network is, by its layer or beside its features."""
        return self.takes_clusters or self.model.cluster_input


_CLUSTERS = "superclasses, classes or file"
