"""The configuration of a classification run."""

from dataclasses import dataclass, field

from common.cli.fields import MAY_CHANGE
from common.data.config import DataConfig
from common.norms.factory import kinds
from common.training.config import RunConfig


@dataclass(frozen=True, kw_only=True)
class ClassifierConfig(RunConfig):
    """Train the shallow CNN of the paper's Table IV, whose third normalization is the layer under test.

    Without arguments: UCB-Norm on scikit-learn's handwritten digits, a minute or two on two CPU cores. lr and
    weight_decay are AdamW's; the paper compares learning rates 0.001 and 0.005.
    """

    epochs: int = field(default=20, metadata=MAY_CHANGE)
    """Passes over the training images; the paper makes 100."""
    batch_size: int = 256
    """Images a step; the last, smaller batch of a pass is left out."""
    weight_decay: float = 1e-4
    """AdamW's decay, times lr each step; biases and what normalization layers learn are left out of it."""
    data: DataConfig = field(default_factory=DataConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.norm.kind not in (usable := kinds(takes_clusters=False)):
            raise ValueError(
                f"norm.kind: {self.norm.kind} needs a cluster id per image, which this command does not have yet; use "
                f"{', '.join(usable)}"
            )
        self.norm.build(128)  # the layer knows best which options it refuses
