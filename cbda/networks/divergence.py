"""How far apart two domains are in a network, layer by layer."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from common.norms.base import NormLayer
from common.norms.baselines import DomainBatchNorm

IMAGES = "images"
"""What the channels of the network's input are called, beside those of its layers."""
_CHANNELS_LAST = (nn.Linear, nn.LayerNorm)
_LAYERS = (nn.Conv2d, *_CHANNELS_LAST, nn.GroupNorm, _NormBase, NormLayer, DomainBatchNorm)
_EPS = 1e-5


@contextmanager
def collect_activation(network: nn.Module) -> Iterator[dict[str, list[Tensor]]]:
    """Collect how active the channels of convolutions, linear maps and normalization layers are, inside the block.

    A dictionary from `IMAGES` and the layers' names, in the order in which they run, to a tensor (B, C) a run: the mean
    of each channel over the positions of each image, float64 on the CPU.
    """
    found: dict[str, list[Tensor]] = {}

    def noting(name: str, channel: int) -> Callable[[Any, Any, Tensor], None]:
        def note(_layer: nn.Module, _given: Any, output: Tensor) -> None:
            channels = output.detach().double().movedim(channel, 1)
            found.setdefault(name, []).append((channels.flatten(2).mean(2) if channels.ndim > 2 else channels).cpu())

        return note

    def images(_network: nn.Module, given: tuple[Tensor, ...]) -> None:
        noting(IMAGES, 1)(None, None, given[0])

    handles = [network.register_forward_pre_hook(images)]
    inner = {child for module in network.modules() if isinstance(module, DomainBatchNorm) for child in module.domains}
    for name, module in network.named_modules():
        if isinstance(module, _LAYERS) and module not in inner:
            channel = -1 if isinstance(module, _CHANNELS_LAST) else getattr(module, "channel_dim", 1)
            handles.append(module.register_forward_hook(noting(name, channel)))
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def divergence(source: Tensor, target: Tensor) -> float:
    r"""Return the mean over channels of the symmetric Kullback-Leibler divergence of two domains, in nats.

    A channel's activation is taken for normally distributed over a domain's images, and

    .. math:: KL(s \| t) + KL(t \| s) = (v_s + d^2) / 2 v_t + (v_t + d^2) / 2 v_s - 1

    with means d apart and variances v, to each of which 1e-5 is added, so that a channel without any counts too. It
    stays the same where a channel of both domains is scaled or moved, so that layers can be compared.

    Args:
        source: activation (N, C) of N images.
        target: (M, C).

    Source: Pan et al., "Two at Once: Enhancing Learning and Generalization Capacities via IBN-Net", ECCV 2018, after Li
    et al., "Revisiting Batch Normalization for Practical Domain Adaptation", 2016.
    """
    apart = (source.mean(0) - target.mean(0)).square()
    ours, theirs = (domain.var(0, correction=0) + _EPS for domain in (source, target))
    return float(((ours + apart) / (2 * theirs) + (theirs + apart) / (2 * ours) - 1).mean())


def divergences(source: Mapping[str, list[Tensor]], target: Mapping[str, list[Tensor]]) -> dict[str, float]:
    """Return the divergence of two domains in each layer, from what `collect_activation` found of each."""
    return {name: divergence(torch.cat(source[name]), torch.cat(target[name])) for name in source}
