"""The configuration of a classification run."""

import re
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal, NamedTuple

from cbcls.networks.shallow_cnn import CHANNELS
from common.data.clusters import ClustersConfig
from common.data.config import DataConfig
from common.norms.registry import kinds
from common.runtime.fields import MAY_CHANGE
from common.runtime.paths import texts_to_paths
from common.train.config import RunConfig

_FAMILIES = "shallow_cnn, densenet-DEPTH-GROWTH, densenet-bc-DEPTH-GROWTH, vit, oxford_cnn or timm:NAME"
_BATCH_NORMS_BECOME = ("bn", "mn", "ucb", "scb", "scb_base", "dsbn")
_OXFORD_LEAST = 128


class Dense(NamedTuple):
    """A densely connected network, as its name says."""

    depth: int
    growth: int
    bottleneck: bool


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The network, and where the layer under test is in it."""

    name: str = "shallow_cnn"
    """shallow_cnn (the paper's Table IV), densenet-DEPTH-GROWTH or densenet-bc-DEPTH-GROWTH, such as densenet-40-12,
    vit, oxford_cnn, or timm:NAME, such as timm:resnet18 (docs/classification.md)."""
    position: int | None = None
    """shallow_cnn: after which of its four convolutions the layer under test is; null is the third, the paper's."""
    onehot_cluster: bool = False
    """Hand the cluster of each image to the last linear map, one-hot beside the features: the baseline that is given
    what scb and scb_base are given, without such a layer."""
    dropout: float = 0.0
    """densenet: after each convolution but the first; 0.2 in the original where images are not augmented."""
    convert: list[str] = field(default_factory=list)
    """timm: BatchNorms of the network to replace by the layer under test, by name, or all (bn leaves them); without,
    one layer before the network normalises the images."""
    weights: Path | None = None
    """timm: a file of weights to start from; the last layer's may be of other classes."""
    pretrained: bool = False
    """timm: download the weights that come with the network."""

    def __post_init__(self) -> None:
        texts_to_paths(self)
        dense = self.dense
        if dense is None and not re.fullmatch(r"shallow_cnn|vit|oxford_cnn|timm:.+", self.name):
            raise ValueError(f"model.name: expected {_FAMILIES}, got {self.name}")
        if dense is not None:
            step = 6 if dense.bottleneck else 3
            if dense.depth < step + 4 or (dense.depth - 4) % step or not dense.growth:
                raise ValueError(
                    f"model.name: expected a depth of {step} n + 4 and a growth from 1 on, got {self.name}"
                )
        if not 0 <= self.dropout < 1:
            raise ValueError(f"model.dropout: expected 0 up to, not including, 1, got {self.dropout}")
        if self.position is not None and not 1 <= self.position <= len(CHANNELS):
            raise ValueError(f"model.position: expected 1 to {len(CHANNELS)}, or null, got {self.position}")
        own = {"position": self.name == "shallow_cnn", "dropout": dense is not None}
        own |= dict.fromkeys(("convert", "weights", "pretrained"), self.name.startswith("timm:"))
        for name, takes in own.items():
            if (value := getattr(self, name)) and not takes:
                raise ValueError(f"model.{name}: {value} means nothing to {self.name}; leave it out")

    @property
    def dense(self) -> Dense | None:
        """The densely connected network of this name, if it is one."""
        match = re.fullmatch(r"densenet-(bc-)?(\d+)-(\d+)", self.name)
        return None if match is None else Dense(int(match[2]), int(match[3]), match[1] is not None)


@dataclass(frozen=True, kw_only=True)
class ImagesConfig(DataConfig):
    """Which images a run uses, and how the network sees them."""

    normalise: Literal["signed", "unit", "raw", "imagenet", "dataset"] = "signed"
    """What the network sees of pixels: -1 to 1; 0 to 1; 0 to 255; or less each channel's mean and by its deviation,
    those of ImageNet or of the training images."""
    augment: Literal["none", "weak", "strong", "zoom", "affine"] = "none"
    """What training changes in each image anew each time: weak shifts by up to an eighth of the side; zoom scales by a
    fifth and rotates a little; affine rotates by up to 30 degrees and shifts; strong as AdaMatch (docs/data.md). flip
    goes with each."""


@dataclass(frozen=True, kw_only=True)
class ClassifierConfig(RunConfig):
    """Train one of the paper's classifiers, in which one normalization is the layer under test.

    Without arguments: the shallow CNN of Table IV with UCB-Norm on scikit-learn's handwritten digits, a minute or two
    on two CPU cores; the paper compares learning rates 0.001 and 0.005.
    """

    epochs: int = field(default=20, metadata=MAY_CHANGE)
    """Passes over the training images; the paper makes 100."""
    batch_size: int = 256
    """Images a step; the last, smaller batch of a pass is left out."""
    optimizer: Literal["adamw", "adam", "sgd"] = "adamw"
    """AdamW; Adam; or SGD with Nesterov's momentum of 0.9."""
    weight_decay: float = 1e-4
    """adamw: times lr each step; adam, sgd: added to the loss. Biases and what normalization layers learn are left out
    of it."""
    decay: Literal["of_lr", "absolute"] = "of_lr"
    """adamw: each step subtracts weight_decay times the learning rate from a weight of 1, as torch does, or
    weight_decay itself times the schedule's factor, as TensorFlow Addons did for the paper's authors."""
    model: ModelConfig = field(default_factory=ModelConfig)
    clusters: ClustersConfig = field(default_factory=ClustersConfig)
    data: ImagesConfig = field(default_factory=ImagesConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.clusters.by == "none" and (self.takes_clusters or self.model.onehot_cluster):
            asks = f"norm.kind: {self.norm.kind}" if self.takes_clusters else "model.onehot_cluster: true"
            raise ValueError(
                f"{asks} needs a cluster for each image; say which by clusters.by superclasses, classes or file"
            )
        if self.takes_clusters and self.model.onehot_cluster:
            without = ", ".join(kinds(takes_clusters=False))
            raise ValueError(
                f"model.onehot_cluster: {self.norm.kind} is given the clusters already; expected norm.kind {without}"
            )
        if self.decay == "absolute" and self.optimizer != "adamw":
            raise ValueError(f"decay: expected of_lr, since absolute means adamw's, got absolute for {self.optimizer}")
        self._check_model()

    def _check_model(self) -> None:
        model, size = self.model, self.data.size
        if model.name == "oxford_cnn" and size < _OXFORD_LEAST:
            raise ValueError(
                f"data.size: oxford_cnn takes images from {_OXFORD_LEAST} pixels on (the paper's 256), got {size}"
            )
        if model.name == "oxford_cnn" and self.norm.kind in ("in", "dsbn"):
            raise ValueError(
                f"norm.kind: oxford_cnn has one value a channel where the layer is, too few for {self.norm.kind}"
            )
        if not model.convert:
            channels = {"shallow_cnn": CHANNELS[(model.position or 3) - 1], "oxford_cnn": 256}.get(model.name, 3)
            self.norm.build(channels)  # the layer knows best which options it refuses
        elif self.norm.kind not in _BATCH_NORMS_BECOME:
            raise ValueError(
                f"model.convert: BatchNorms become {', '.join(_BATCH_NORMS_BECOME)}, not {self.norm.kind}; leave it out"
            )

    @property
    def fast_in_nhwc(self) -> bool:
        """Whether training steps on a CPU were no slower in NHWC: not those of timm's networks."""
        return not self.model.name.startswith("timm:")

    def resolved(self) -> "ClassifierConfig":
        """Return the configuration as a run stores it; what is null of layers that BatchNorms become is BatchNorm's."""
        resolved = super().resolved()
        own = {name: getattr(self.norm, name) for name in ("eps", "affine", "momentum")}
        return replace(resolved, norm=replace(resolved.norm, **own)) if self.model.convert else resolved

    @property
    def takes_clusters(self) -> bool:
        """Whether the layer under test is given the cluster of each image."""
        return self.norm.kind in kinds(takes_clusters=True)

    @property
    def knows_unknown(self) -> bool:
        """Whether the network can classify an image whose cluster is unknown."""
        return self.norm.kind in ("scb", "scb_base") or self.model.onehot_cluster

    @property
    def uses_clusters(self) -> bool:
        """Whether the network is given the cluster of each image, by its layer or beside its features."""
        return self.takes_clusters or self.model.onehot_cluster
