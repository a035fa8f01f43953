"""The switches of AdaMatch."""

from dataclasses import dataclass, replace
from typing import Literal

Scaling = Literal["sum", "l2"]
Labels = Literal["hard", "soft"]
SourceLoss = Literal["mean", "sum"]


@dataclass(frozen=True, kw_only=True)
class MethodConfig:
    """AdaMatch; a switch left at null is as in the kind, so that an ablation is one switch."""

    kind: Literal["official", "keras"] = "official"
    """As its authors' code, or as the page of Keras that the paper ran; switches below differ (docs/adaptation.md)."""
    interpolation: bool | None = None
    """Mix at random the logits that labelled images have in the joint pass and in one without unlabelled images; both
    kinds do."""
    source_pass: Literal["training", "inference"] | None = None
    """Mode of the pass without unlabelled images: official training, keras inference."""
    source_loss: SourceLoss | None = None
    """Of the losses of weak and strong source images: official mean, keras sum."""
    alignment: Literal["running", "batch", "none"] | None = None
    """Distributions that pseudo-labels are aligned by: official running estimates, keras none (its ratio is always 1);
    batch takes each batch's own."""
    align_by: Literal["source", "labelled"] = "source"
    """Whose distribution of classes the target's is aligned to: the source's, or the labelled target's."""
    scaling: Scaling | None = None
    """Of pseudo-labels: official sum 1, keras 2-norm 1."""
    labels: Labels | None = None
    """Pseudo-labels: official hard, keras soft."""
    tau: float = 0.9
    """Threshold of confidence, relative to the source's mean."""
    warmup: float = 0.5
    """Share of the run over which mu, the weight of the target's loss, rises from 0 to 1; 0 starts at 1."""
    decay: float = 0.999
    """running: of the average of the source's distribution."""
    history: int = 128
    """running: batches in the mean of the target's distribution."""

    def __post_init__(self) -> None:
        if not 0 < self.tau <= 1:
            raise ValueError(f"method.tau: expected more than 0 and at most 1, got {self.tau}")
        if not 0 <= self.warmup <= 1:
            raise ValueError(f"method.warmup: expected 0 to 1, got {self.warmup}")
        if not 0 <= self.decay < 1:
            raise ValueError(f"method.decay: expected 0 up to, not including, 1, got {self.decay}")
        if self.history < 1:
            raise ValueError(f"method.history: expected at least 1, got {self.history}")

    def resolved(self) -> "MethodConfig":
        """Return the method with what its kind says written out."""
        missing = {name: value for name, value in _KINDS[self.kind].items() if getattr(self, name) is None}
        return replace(self, **missing)


_KINDS: dict[str, dict[str, str | bool]] = {
    "official": {
        "interpolation": True, "source_pass": "training", "source_loss": "mean", "alignment": "running",
        "scaling": "sum", "labels": "hard",
    },
    "keras": {
        "interpolation": True, "source_pass": "inference", "source_loss": "sum", "alignment": "none",
        "scaling": "l2", "labels": "soft",
    },
}  # fmt: skip
