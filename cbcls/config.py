"""The configuration of a classification run."""

from dataclasses import dataclass, field

from common.data.config import DataConfig
from common.norms.config import NormConfig
from common.runs.folder import RunConfig

_KINDS = ("bn", "in", "mn", "ucb")


@dataclass(frozen=True, kw_only=True)
class ClassifierConfig(RunConfig):
    """Train the shallow CNN of the paper's Table IV, whose third normalization is the layer under test.

    Without arguments: UCB-Norm on scikit-learn's handwritten digits, a minute or two on two CPU cores.
    """

    epochs: int = 20
    """Passes over the training images; the paper makes 100."""
    batch_size: int = 256
    """Images a step; the last, smaller batch of an epoch is left out."""
    lr: float = 1e-3
    """AdamW's learning rate, constant; the paper compares 0.001 with 0.005."""
    weight_decay: float = 1e-4
    """AdamW's decay, times lr each step; biases and what normalization layers learn are left out of it."""
    norm: NormConfig = field(default_factory=NormConfig)
    data: DataConfig = field(default_factory=DataConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.epochs < 1:
            raise ValueError(f"epochs: expected at least 1, got {self.epochs}")
        if self.batch_size < 2:
            raise ValueError(f"batch_size: expected at least 2 for batch statistics, got {self.batch_size}")
        if self.lr <= 0:
            raise ValueError(f"lr: expected more than 0, got {self.lr}")
        if self.weight_decay < 0:
            raise ValueError(f"weight_decay: expected 0 or more, got {self.weight_decay}")
        if self.norm.kind not in _KINDS:
            raise ValueError(
                f"norm.kind: {self.norm.kind} needs a cluster id per image, which this command does not have yet; use "
                f"{', '.join(_KINDS)}"
            )
        self.norm.build(128)  # the layer knows best which options it refuses
