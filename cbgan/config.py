"""The configuration of a GAN run."""

from dataclasses import dataclass, field
from typing import ClassVar

from cbgan.networks.augmentation import KINDS
from cbgan.networks.losses import Loss
from common.data.config import DataConfig
from common.metrics.fid import FidConfig
from common.norms.registry import kinds
from common.runtime.fields import MAY_CHANGE
from common.train.config import BestConfig, RunConfig, ScheduleConfig

_NHWC_WIDTH = 128


@dataclass(frozen=True, kw_only=True)
class GanConfig(RunConfig):
    """Train a DCGAN whose generator normalises with the layer under test, and measure its FID.

    Without arguments: UCB-Norm on scikit-learn's handwritten digits, a few minutes on two CPU cores. lr, weight_decay
    and the other settings of the optimizer are Adam's, for both networks. A norm.kind that takes clusters (scb,
    scb_base, dsbn) takes the images' classes, and makes the GAN a conditional one.
    """

    least_evaluate_every: ClassVar[int] = 0
    epochs: int = field(default=80, metadata=MAY_CHANGE)
    """Passes over the training images."""
    evaluate_every: int = 10
    """Epochs between two measurements; the first and the last epoch are measured too. 0 measures nothing, and draws
    samples with each checkpoint."""
    lr: float = 1e-3
    """Learning rate of both networks."""
    schedule: ScheduleConfig = field(default_factory=lambda: ScheduleConfig(kind="cosine"))
    width: int = 64
    """Widest layer's channels in generator and discriminator, a multiple of 8; the paper's network has 512."""
    latent_dim: int = 128
    """Length of the generator's input, drawn from N(0, 1)."""
    base_size: int = 0
    """Side of the generator's first feature map: data.size / 8, or / 16 for one more deconvolution; 0 is / 8."""
    beta1: float = 0.0
    """Adam's first decay rate."""
    beta2: float = 0.9
    """Adam's second decay rate."""
    loss: Loss = "hinge"
    """hinge, or the non-saturating logistic loss."""
    spectral: bool = True
    """Spectral normalization of the discriminator's weights, in place of its BatchNorm."""
    r1: float = 0.0
    """Factor gamma of the penalty gamma / 2 |gradient of the logit by the real image|^2; 0 leaves it out."""
    augment: list[str] = field(default_factory=lambda: ["translation"])
    """Changes to what the discriminator sees of both kinds of images: some of color, translation, cutout; or none."""
    best: BestConfig = field(default_factory=lambda: BestConfig(keep=True))
    data: DataConfig = field(default_factory=DataConfig)
    fid: FidConfig = field(default_factory=FidConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.data.in_memory:
            raise ValueError("data.in_memory: expected true, since the FID reads real images as a whole, got false")
        for name, least, wanted in (("latent_dim", 1, "at least 1"), ("r1", 0, "0 or more")):
            if getattr(self, name) < least:
                raise ValueError(f"{name}: expected {wanted}, got {getattr(self, name)}")
        if self.width < 8 or self.width % 8:
            raise ValueError(f"width: expected a multiple of 8, got {self.width}")
        for name in ("beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name}: expected 0 up to, not including, 1, got {getattr(self, name)}")
        if self.r1 and (self.precision == "fp16" or self.compile):
            why = "compile, which differentiates once" if self.compile else "precision fp16, too narrow for it"
            raise ValueError(f"r1: expected 0 with {why}, got {self.r1}")
        if self.augment != ["none"] and (unknown := [name for name in self.augment if name not in KINDS]):
            raise ValueError(f"augment: expected some of {', '.join(KINDS)}, or none, got {', '.join(unknown)}")
        for channels in (self.width // 2, self.width // 4):
            self.norm.check_features(channels)
        if self.data.validation:
            raise ValueError(
                f"data.validation: expected 0 or null, a GAN holds nothing out, got {self.data.validation}; the best "
                "epoch is chosen by the FID against fid.reference and reported against the other images"
            )
        if self.data.size % 8:
            raise ValueError(f"data.size: expected a multiple of 8 for the GAN's networks, got {self.data.size}")
        allowed = [self.data.size // 8] + ([self.data.size // 16] if self.data.size % 16 == 0 else [])
        if self.base_size and self.base_size not in allowed:
            raise ValueError(
                f"base_size: expected 0 or {' or '.join(map(str, allowed))} for images of {self.data.size}, "
                f"got {self.base_size}"
            )

    @property
    def fast_in_nhwc(self) -> bool:
        """Whether training steps on a CPU were no slower in NHWC: those of narrow networks."""
        return self.width <= _NHWC_WIDTH

    @property
    def conditional(self) -> bool:
        """Whether images are made of a class that is asked for: the layer under test takes clusters."""
        return self.norm.kind in kinds(takes_clusters=True)
