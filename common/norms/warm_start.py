"""Where a converted layer starts: at the statistics and the affine map of the BatchNorm that it replaces."""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from . import mixture
from .backends.reference import MixtureParams
from .base import MixtureLayer
from .baselines import DomainBatchNorm
from .mixture_norm import MixtureNorm
from .scb_norm import SCBNorm, SCBNormBase

SPREAD = 0.68
"""Of a converted mixture's means, in standard deviations. For K from 2 to 5 its posteriors tell 0.061 to 0.080 nats on
Gaussian activations, and its output departs from a straight line by 1.2 % of its deviation (at 0.5 0.04 nats and 0.3 %,
at 1 0.19 nats and 6 %)."""
JOINT_SPREAD = 1.8
"""Times as much where many channels share a posterior. In a trained ResNet-18 the layer that learns least from its
posteriors then has 0.046 to 0.051 nats for K from 2 to 5, and logits are off by 8 to 10 % (measured)."""
REFERENCE_WIDTH = 1.35
"""Standard deviation, in those of the channel, of the Gaussian over which a mixture's gain is taken: large activations
are what passes a rectifier. On trained ResNet-18s the logits were off by 20 % at 1, by 6 to 9 % at 1.35 (measured)."""


@torch.no_grad()
def warm_start(layer: nn.Module, norm: _BatchNorm, options: Mapping[str, Any]) -> None:
    """Let a layer start where a BatchNorm stands.

    Args:
        layer: fresh, on the BatchNorm's device.
        norm: with running statistics.
        options: that the caller asked for: an ``init`` taken from data is left to seed the layer, and an ``affine``
            stays to be trained.
    """
    if isinstance(layer, DomainBatchNorm):
        for domain in layer.domains:
            domain.load_state_dict(norm.state_dict())
            _take_affine(domain, norm)
        return
    assert norm.running_mean is not None
    assert norm.running_var is not None
    mean, var = (t.detach().to("cpu", torch.float64) for t in (norm.running_mean, norm.running_var))
    if isinstance(layer, MixtureLayer):
        start = _spread(mean, var, layer.num_components, layer.num_features // layer.groups)
        mixture.write(layer.params(), start)
        if isinstance(layer, MixtureNorm):
            mixture.write(layer.last_fit(), start)
    else:
        assert isinstance(layer, SCBNorm | SCBNormBase)
        row = (mean.to(norm.running_mean), mixture.log_of(var).to(norm.running_mean))
        if layer.statistics == "batch":
            layer.running_mean.copy_(norm.running_mean)
            layer.running_var.copy_(norm.running_var)
        if layer.statistics != "learned":
            row = (torch.zeros_like(row[0]), torch.full_like(row[1], math.log1p(-layer.eps)))  # variance 1 with eps
        layer._write(lambda *old: (row[0].expand_as(old[0]), row[1].expand_as(old[1])))
    if "init" not in options:
        layer.set_initialized(True)
    _take_affine(layer, norm)
    if isinstance(layer, MixtureLayer) and layer.weight is not None and layer.bias is not None:
        layer.weight.div_(_gain(var, layer).to(layer.weight))
        if not norm.affine and "affine" not in options:
            layer.weight.requires_grad_(False)
            layer.bias.requires_grad_(False)


def _spread(mean: Tensor, var: Tensor, num: int, width: int) -> MixtureParams:
    """Return num equal components (1 / num each) whose total mean and variance are mean and var, each (C,).

    Their means are spaced evenly in (-SPREAD, SPREAD) standard deviations, and closer where a group of channels shares
    a posterior: as many independent channels would tell the components apart as well as one if the means were divided
    by the square root of their number. Real channels tell less, for which JOINT_SPREAD makes up.
    """
    d = _distances(num, width).to(mean)[:, None]
    within = (1 - d.square().mean()) * var
    return MixtureParams(mean.new_zeros(num), mean + var.sqrt() * d, mixture.log_of(within).expand(num, -1))


def _distances(num: int, width: int) -> Tensor:
    spread = SPREAD * min(JOINT_SPREAD, 1 + (width - 1) / 64) / math.sqrt(width)
    return spread * (2 * torch.arange(num, dtype=torch.float64) + 1 - num) / num


def _gain(var: Tensor, layer: MixtureLayer) -> Tensor:
    r"""Return the slope of a mixture that ``_spread`` made against BatchNorm, on Gaussian activations, (C,) in float64.

    Both are functions of z = (x - mean) / sigma, and the slope is E[y z] / E[b z], with b BatchNorm's output and z of
    variance q, REFERENCE_WIDTH squared. With r = var / (component variance + eps) the posteriors are the softmax over
    k of r (z d_k - d_k^2 / 2), and the slope is

    .. math:: \sqrt{K} \sqrt{(var + \epsilon) / (v + \epsilon)} \, (1 - E[z \sum_k \tau_k(z) d_k] / q)

    In a group of several channels the sum of their z over the square root of the width takes the place of
    z in the posteriors, and q becomes q times the width.

    Overlapping components have a gain over 1 (up to sqrt(K), 1.60 for three), which twenty layers raise to the
    twentieth power.
    """
    num, width = layer.num_components, layer.num_features // layer.groups
    if num == 1:
        return torch.ones_like(var)
    d = _distances(num, width)
    component = (1 - d.square().mean()) * var + layer.eps
    grid = torch.linspace(-8, 8, 161, dtype=torch.float64)
    nodes, weights = REFERENCE_WIDTH * grid, torch.exp(-0.5 * grid.square())
    d = d * math.sqrt(width)
    ratio = (var / component).unflatten(0, (-1, width)).mean(1)  # (G,)
    tau = (ratio * (nodes[:, None] * d - d.square() / 2)[..., None]).softmax(1)  # (Q, K, G)
    pulled = torch.einsum("q,q,qkg,k->g", weights / weights.sum(), nodes, tau, d) / (REFERENCE_WIDTH**2 * width)
    kappa = 1 / math.sqrt(num) if layer.scale == "sqrt_k" else 1.0
    slope = kappa * math.sqrt(num) * ((var + layer.eps) / component).sqrt()
    return slope * (1 - pulled.repeat_interleave(width))


def _take_affine(layer: Any, norm: _BatchNorm) -> None:
    if norm.affine:
        for name in ("weight", "bias"):
            old = getattr(norm, name)
            setattr(layer, name, nn.Parameter(old.detach().clone(), requires_grad=old.requires_grad))
