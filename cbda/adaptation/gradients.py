"""How the gradients of each domain's loss vary: the paper's Figure 12, measured on sampled steps."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from cbda.adaptation.algorithm import Terms
from cbda.adaptation.config import MethodConfig
from cbda.adaptation.losses import masked_cross_entropy, source_cross_entropy
from cbda.networks.classifier import own_parameters
from common.metrics.gradient_variance import OverTensors, gradient_noise, gradient_variance
from common.runtime.distributed import mean_over_ranks

NOISE_PARTS = 8
"""Parts of a batch whose gradients `noise_every` compares."""


def gradients_vary(terms: Terms, network: nn.Module) -> dict[str, Tensor]:
    """Return how the gradient of each domain's loss varies within each weight tensor.

    Over the tensors mean, maximum and the mean of those outside the layer under test, which every kind has:
    ``gradient/DOMAIN_variance_mean``, ``_max`` and ``_shared``. The target's loss is taken without mu; where no
    pseudo-label passes it has no values.

    Args:
        terms: of AdaMatch's loss on a part of a batch.
        network: the classifier.
    """
    return _by_domain("variance", terms, gradient_variance, (terms.source, terms.target), network)


def gradients_differ(method: MethodConfig, terms: Terms, labels: Tensor, network: nn.Module) -> dict[str, Tensor]:
    """Return how the gradients of each domain's loss differ between eighths of a batch, ``gradient/DOMAIN_noise_HOW``.

    Args:
        method: resolved.
        terms: of AdaMatch's loss on a part of a batch.
        labels: of its B source images, whose logits are the first of ``terms.from_source``.
        network: the classifier.
    """
    return _by_domain("noise", terms, gradient_noise, _losses_of_parts(method, terms, labels), network)


def logits_vary(logits: Iterable[tuple[str, Tensor]], network: nn.Module) -> dict[str, float]:
    """Return how the gradient of the sum of all logits varies by domain, which is what the paper's authors plot.

    Args:
        logits: domain and logits (B, C) of a batch of each.
        network: the classifier that gave them.
    """
    values: dict[str, float] = {}
    own = own_parameters(network)
    for domain, of_batch in logits:
        found = gradient_variance(of_batch.float().sum(), network.parameters(), own)
        values |= {f"gradient/{domain}_logits_variance_{how}": float(v) for how, v in found._asdict().items()}
    return values


def _by_domain(
    what: str, terms: Terms, measure: Callable[[Any, Any, Any], OverTensors], losses: Sequence[Any], network: nn.Module
) -> dict[str, Tensor]:
    passing = bool(mean_over_ranks(terms.mask.float().mean()) > 0)  # on any rank: all measure the same
    values: dict[str, Tensor] = {}
    own = own_parameters(network)
    for domain, loss in zip(("source", "target"), losses, strict=True):
        if domain == "source" or passing:
            found = measure(loss, network.parameters(), own)
            values |= {f"gradient/{domain}_{what}_{how}": value for how, value in found._asdict().items()}
    return values


def _losses_of_parts(method: MethodConfig, terms: Terms, labels: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """Return each domain's loss on eighths of a batch."""
    weak, strong = terms.from_source.chunk(2)
    source = [
        source_cross_entropy(torch.cat(both), true, method.source_loss or "mean")
        for *both, true in zip(*(whole.tensor_split(NOISE_PARTS) for whole in (weak, strong, labels)), strict=True)
    ]
    wholes = (terms.target_strong, terms.pseudo, terms.mask)
    target = [
        masked_cross_entropy(logits, pseudo, mask, method.labels or "hard")
        for logits, pseudo, mask in zip(*(whole.tensor_split(NOISE_PARTS) for whole in wholes), strict=True)
    ]
    return source, target
