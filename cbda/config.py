"""The configuration of a domain-adaptation run."""

import re
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import ClassVar, Literal

from cbda.adaptation.config import MethodConfig
from cbda.adaptation.gradients import NOISE_PARTS
from cbda.networks.wide_resnet import Variant
from common.data.augmentation import ViewOptions
from common.data.config import DATA_SETS, DataConfig
from common.networks.pixels import Pixels
from common.norms.config import NormConfig
from common.norms.registry import kinds
from common.runtime.fields import MAY_CHANGE
from common.runtime.paths import texts_to_paths
from common.train.config import RunConfig, ScheduleConfig

_BATCH_NORMS_BECOME = ("mn", "ucb", "scb", "scb_base", "dsbn")


@dataclass(frozen=True, kw_only=True)
class DomainConfig:
    """One of the two domains' images."""

    domain: ClassVar[str]
    name: str = field(default="digits", metadata={"names": DATA_SETS.names})
    """A data set: digits, digits_m, imagefolder (your own images, one sub-folder a class), mnist, mnist_m,
    svhn, cifar10, cifar100, tiny_imagenet, oxford_pet (docs/data.md)."""
    root: Path | None = field(default=None, metadata=MAY_CHANGE)
    """Folder of the data set: the images of imagefolder, or where a published set is or goes to (null: data)."""
    test_root: Path | None = field(default=None, metadata=MAY_CHANGE)
    """imagefolder: labelled images held apart from training, to measure accuracy on."""
    labels: Literal["fine", "coarse"] = "fine"
    """cifar100: 100 classes or 20 superclasses; oxford_pet: 37 breeds, or cat and dog."""
    blend: str = "sklearn"
    """mnist_m: a folder of photographs to blend the digits with, or sklearn for scikit-learn's two."""
    download: bool = field(default=True, metadata=MAY_CHANGE)
    """Download a published data set where it is missing."""
    labels_per_class: int | None = None
    """Labels that may be used, images a class, repeated where they do not fill a batch; null is all of the source's and
    none of the target's."""

    def __post_init__(self) -> None:
        texts_to_paths(self)
        if self.labels_per_class is not None and self.labels_per_class < 1:
            raise ValueError(
                f"{self.domain}.labels_per_class: expected at least 1, or null, got {self.labels_per_class}"
            )
        try:
            self.data(32)
        except ValueError as error:
            raise ValueError(self.own(str(error))) from None

    def data(self, size: int) -> DataConfig:
        """Return the configuration that the images are loaded by, at a size."""
        return DataConfig(
            name=self.name,
            root=self.root,
            test_root=self.test_root,
            size=size,
            labels=self.labels,
            blend=self.blend,
            download=self.download,
        )

    @classmethod
    def own(cls, message: str) -> str:
        """Return a message about settings of ``data`` as one about this domain's."""
        return re.sub(r"\bdata\.(?=[a-z])", f"{cls.domain}.", message)


@dataclass(frozen=True, kw_only=True)
class SourceConfig(DomainConfig):
    """The domain with labels."""

    domain: ClassVar[str] = "source"


@dataclass(frozen=True, kw_only=True)
class TargetConfig(DomainConfig):
    """The domain without labels; those that it has are used to measure, and by labels_per_class N to learn from."""

    domain: ClassVar[str] = "target"
    name: str = field(default="digits_m", metadata={"names": DATA_SETS.names})
    """As source.name; imagefolder also takes a folder of images without sub-folders, which needs no labels anywhere."""


@dataclass(frozen=True, kw_only=True)
class ImagesConfig(ViewOptions):
    """What both domains' images have in common."""

    size: int = 32
    """Side in pixels that images are brought to: a multiple of 4 from 8 to 1024."""
    workers: int = field(default=0, metadata=MAY_CHANGE)
    """Loader processes; 0 makes the next views in a thread of the training process."""
    validation: float | None = None
    """Share of each class of the source's training images held out, to choose epochs by; null is 0.1 where something
    is chosen, else 0."""

    def __post_init__(self) -> None:
        super().__post_init__()
        DataConfig(size=self.size, workers=self.workers, validation=self.validation)  # which refuses what cannot be


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The network, and where the layer under test is in it."""

    name: str = "wrn-10-1"
    """wrn-DEPTH-WIDTH, such as wrn-28-2 of the paper, or timm:NAME, such as timm:resnet18."""
    variant: Variant = "official"
    """wrn: as AdaMatch's authors build it, or as the page of Keras does that the paper follows."""
    momentum: float | None = 0.01
    """wrn: weight of the new batch in BatchNorm's averages; null is the variant's own, for long runs."""
    convert: list[str] = field(default_factory=list)
    """BatchNorms of the network to replace by the layer under test, by name, or all; without, one layer before the
    network normalises the images."""
    weights: Path | None = None
    """timm: a file of weights to start from; the last layer's may be of other classes."""
    pretrained: bool = False
    """timm: download the weights that come with the network."""
    pixels: Pixels = "signed"
    """What images come as: -1 to 1; 0 to 1; 0 to 255, as the paper's own layer got them; or less ImageNet's mean and by
    its deviation, as pretrained networks want them."""

    def __post_init__(self) -> None:
        texts_to_paths(self)
        wrn = re.fullmatch(r"wrn-(\d+)-(\d+)", self.name)
        if wrn is None and not self.name.startswith("timm:"):
            raise ValueError(f"model.name: expected wrn-DEPTH-WIDTH or timm:NAME, got {self.name}")
        if wrn is not None and (int(wrn[1]) < 10 or (int(wrn[1]) - 4) % 6 or not int(wrn[2])):
            raise ValueError(f"model.name: expected a depth of 6 n + 4 and a width from 1 on, got {self.name}")
        if wrn is not None and (self.weights is not None or self.pretrained):
            field_name = "weights" if self.weights is not None else "pretrained"
            raise ValueError(f"model.{field_name}: only timm: networks have weights to start from, not {self.name}")
        if self.momentum is not None and not 0 < self.momentum <= 1:
            raise ValueError(f"model.momentum: expected more than 0 and at most 1, or null, got {self.momentum}")


@dataclass(frozen=True, kw_only=True)
class AdaMatchConfig(RunConfig):
    """Adapt a classifier from a labelled source to an unlabelled target by AdaMatch, the domains as clusters.

    Without arguments: from scikit-learn's handwritten digits to others blended with photographs, SCB-Norm first, beside
    a network that sees the source alone; minutes on two CPU cores.
    """

    epochs: int = field(default=10, metadata=MAY_CHANGE)
    """Passes of steps_per_epoch steps."""
    steps_per_epoch: int | None = 100
    """Steps that make an epoch; null is one pass over the source's training images."""
    of_any_length: ClassVar[str] = "--schedule.kind constant --method.warmup 0"
    evaluate_every: int = 2
    """Epochs between two measurements; the last is always measured."""
    batch_size: int = 32
    """Source images a step, and labelled target images if there are any; each is seen weakly and strongly augmented."""
    target_ratio: int = 1
    """Target images a step for each source image; AdaMatch's authors take 3."""
    optimizer: Literal["adam", "sgd"] = "adam"
    """Adam with the eps 1e-7 of Keras, or SGD with momentum 0.9."""
    lr: float = 0.03
    """Learning rate."""
    ema_decay: float = 0.99
    """Decay of an exponential moving average of weights and buffers, which then is what is evaluated; 0 keeps none."""
    schedule: ScheduleConfig = field(default_factory=lambda: ScheduleConfig(kind="partial_cosine", floor=0.25))
    norm: NormConfig = field(default_factory=lambda: NormConfig(kind="scb", num_components=2))
    variance_every: int = 50
    """Steps between two measurements of how each domain's gradient varies within each weight tensor, which cost three
    quarters of a step each; logged as means over an epoch; 0: never."""
    noise_every: int = 0
    """Steps between two measurements of how each domain's gradient varies between eighths of a batch, which cost about
    eight steps each; 0: never."""
    logits_variance: bool = False
    """Measure after each epoch also what the paper's authors plot: how the gradient of the sum of all logits of a fresh
    weakly augmented batch varies within each weight tensor, in training mode."""
    source_only: bool = True
    """Train a second network by as many steps on the same source images alone, to compare with."""
    model: ModelConfig = field(default_factory=ModelConfig)
    method: MethodConfig = field(default_factory=MethodConfig)
    data: ImagesConfig = field(default_factory=ImagesConfig)
    source: SourceConfig = field(default_factory=SourceConfig)
    target: TargetConfig = field(default_factory=TargetConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.target_ratio < 1:
            raise ValueError(f"target_ratio: expected at least 1, got {self.target_ratio}")
        for name in ("variance_every", "noise_every"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}: expected 0 or more, got {getattr(self, name)}")
        if self.noise_every and self.batch_size < NOISE_PARTS:
            raise ValueError(
                f"noise_every: expected 0, or a batch_size of at least {NOISE_PARTS} to take parts of, got "
                f"{self.noise_every} for {self.batch_size}"
            )
        if self.norm.kind in kinds(takes_clusters=True) and self.norm.num_components != 2:
            raise ValueError(
                f"norm.num_components: expected 2, since the clusters of {self.norm.kind} are the two domains, got "
                f"{self.norm.num_components}"
            )
        if self.model.convert and self.norm.kind not in _BATCH_NORMS_BECOME:
            raise ValueError(
                f"model.convert: BatchNorms become {', '.join(_BATCH_NORMS_BECOME)}, not {self.norm.kind}; leave it out"
            )
        if self.method.align_by == "labelled" and self.target.labels_per_class is None:
            raise ValueError(
                "method.align_by: labelled needs target.labels_per_class, the labels a class that may be used"
            )
        if not self.model.convert:
            self.norm.check_features(3)

    @property
    def follows_length(self) -> bool:
        """Whether learning rate or mu depend on how many epochs there will be."""
        return super().follows_length or self.method.warmup > 0

    @property
    def fast_in_nhwc(self) -> bool:
        """Whether training steps on a CPU were no slower in NHWC: not those of timm's networks."""
        return not self.model.name.startswith("timm:")

    def resolved(self) -> "AdaMatchConfig":
        """Return the configuration as a run stores it; what is null of layers that BatchNorms become is BatchNorm's."""
        resolved = replace(super().resolved(), method=self.method.resolved())
        if not self.model.convert:
            return resolved
        own = {name: getattr(self.norm, name) for name in ("eps", "affine", "momentum")}
        return replace(resolved, norm=replace(resolved.norm, **own))
