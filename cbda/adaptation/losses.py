"""The parts of AdaMatch (Berthelot et al., ICLR 2022) as functions of tensors, and what it remembers between steps.

B images, C classes. Statistics are over all ranks where there are several, so that they do what one would.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cbda.adaptation.collapse import Watch
from cbda.adaptation.config import Labels, Scaling, SourceLoss
from common.runtime.distributed import mean_over_ranks

_EPSILON = 1e-6  # of google-research/adamatch, in both terms of the ratio


def interpolated(together: Tensor, alone: Tensor, share: Tensor) -> Tensor:
    """Mix logits (B, C) of the joint and the source-only pass, each entry by its own share in [0, 1) of the latter."""
    return together + (alone - together) * share


def batch_mean(probabilities: Tensor) -> Tensor:
    """Return the mean distribution (C,) of probabilities (B, C) over the batches of all ranks, without gradient."""
    return mean_over_ranks(probabilities.detach().mean(0))


def relative_threshold(probabilities: Tensor, tau: float) -> Tensor:
    """Return tau times the mean confidence of weakly augmented source images, probabilities (B, C); no gradient."""
    return tau * mean_over_ranks(probabilities.detach().amax(1).mean())


def aligned(probabilities: Tensor, wanted: Tensor, found: Tensor, scaling: Scaling = "sum") -> Tensor:
    """Return the target's pseudo-labels (B, C): probabilities times (wanted + 1e-6) / (found + 1e-6), scaled.

    Args:
        probabilities: (B, C) of weakly augmented target images.
        wanted: distribution (C,) of classes in the source, or in the labelled target.
        found: distribution (C,) of the target's probabilities.
        scaling: "sum" makes rows sum to 1; "l2" gives them 2-norm 1, as the page of Keras does, so that their largest
            entry exceeds the probability that it stands for.
    """
    scaled = probabilities.detach() * ((wanted + _EPSILON) / (found + _EPSILON))
    return F.normalize(scaled, p=1 if scaling == "sum" else 2, dim=1)


def masked_cross_entropy(logits: Tensor, labels: Tensor, mask: Tensor, kind: Labels = "hard") -> Tensor:
    """Return the mean over all B images of the cross-entropy of those that the mask lets pass; no NaN if none does.

    Args:
        logits: (B, C) of strongly augmented target images.
        labels: pseudo-labels (B, C).
        mask: bool (B,).
        kind: "hard" takes each label's largest entry for the class. "soft" takes the distribution; where it does not
            sum to 1, value and gradient are TensorFlow's: -sum(label log softmax), and softmax - label.
    """
    if kind == "hard":
        losses = F.cross_entropy(logits, labels.argmax(1), reduction="none")
    else:
        normaliser = logits.logsumexp(1)
        losses = normaliser + (labels.sum(1) - 1) * normaliser.detach() - (labels * logits).sum(1)
    return (losses * mask).mean()


def source_cross_entropy(logits: Tensor, labels: Tensor, kind: SourceLoss = "mean") -> Tensor:
    """Return the cross-entropy of weak images and that of strong ones, their "mean" or their "sum".

    Args:
        logits: (2 B, C), the weak views' first.
        labels: (B,).
        kind: which of both.
    """
    weak, strong = logits.chunk(2)
    total = F.cross_entropy(weak, labels) + F.cross_entropy(strong, labels)
    return total / 2 if kind == "mean" else total


def ramp(progress: float, share: float) -> float:
    """Return mu, the weight of the target's loss: half a cosine from 0 to 1 over a share of the run, then 1.

    ``(1 - cos(pi min(1, progress / share))) / 2``; a share of 0 is 1 all through.
    """
    return (1 - math.cos(math.pi * min(1.0, progress / share))) / 2 if share else 1.0


class Alignment(nn.Module):
    """Running estimates of the distribution of classes in both domains, from which pseudo-labels are aligned.

    google-research/adamatch: the source's is an exponential moving average of batch means, the target's the plain mean
    of the last ``history`` batch means; both start at 1/C and include the current batch.

    Args:
        num_classes: classes C.
        decay: of the source's average.
        history: batches in the target's mean.
    """

    wanted: Tensor
    means: Tensor
    batches: Tensor
    threshold: Tensor
    """What pseudo-labels last had to exceed: for whoever uses the classifier."""

    def __init__(self, num_classes: int, decay: float = 0.999, history: int = 128) -> None:
        super().__init__()
        self.decay = decay
        self.register_buffer("wanted", torch.full((num_classes,), 1 / num_classes))
        self.register_buffer("means", torch.full((history, num_classes), 1 / num_classes))
        self.register_buffer("batches", torch.zeros((), dtype=torch.int64))
        self.register_buffer("threshold", torch.zeros(()))
        self.watch = Watch(num_classes)

    @torch.no_grad()
    def forward(self, wanted: Tensor, found: Tensor) -> tuple[Tensor, Tensor]:
        """Take in the means (C,) of a batch of each domain and return both estimates (C,)."""
        self.wanted.lerp_(wanted, 1 - self.decay)
        self.means.index_copy_(0, (self.batches % len(self.means))[None], found[None])
        self.batches += 1
        return self.wanted.clone(), self.means.mean(0)
