"""Health of mixture layers: usage of the components, and how much the posteriors depend on location and sample."""

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .backends import reference
from .base import MixtureLayer
from .two_names import refuse_other_layers

LEAST_USAGE = 0.01
LEAST_INFORMATION = 0.05
LEAST_SAMPLE_INFORMATION = 0.02
MOST_DEAD_CHANNELS = 0.1


@dataclass(frozen=True)
class Health:
    """The state of one mixture layer on one batch."""

    usage: tuple[float, ...]
    """Mean posterior of each component over locations and groups; sums to 1."""
    effective: float
    """exp of the entropy of usage: 1 (one component holds all) to K (all hold alike)."""
    information: float
    """Entropy of a group's mean posterior less its mean entropy, in nats, averaged over groups: 0 to log K.

    At 0 the posteriors do not depend on x and the layer is BatchNorm up to a factor, which usage cannot show.
    """
    distance: float
    """Least distance between two components, in standard deviations (rms over channels); infinite for K =
    1."""
    drift: float
    """Distance from stored to batch component in the same unit, averaged by usage."""
    sample_information: float | None = None
    """Mutual information of the posteriors and the sample at one position, in nats, averaged over positions and groups;
    None for a single sample.

    The rest of information is about the position, for which zero padding suffices. At 0 each position belongs to one
    component whatever the sample, and the layer is a BatchNorm for each region of the map.
    """
    dead_channels: float = 0.0
    """Share of the groups, with the default one channel each, whose least used component has a usage below 0.01."""

    def warnings(self) -> list[str]:
        """Return one line for each problem; none for K = 1, which cannot have them.

        Left out is what follows from another line: sample information is at most information, and a component that is
        empty on average is empty in many groups.
        """
        if len(self.usage) == 1:
            return []
        found = [
            f"component {k} holds {100 * share:.2g} % of the locations, less than {100 * LEAST_USAGE:g} %"
            for k, share in enumerate(self.usage)
            if not share >= LEAST_USAGE
        ]
        if not self.information >= LEAST_INFORMATION:
            found.append(
                f"information is {self.information:.2g} nats, less than {LEAST_INFORMATION:g}: "
                "the layer acts as BatchNorm"
            )
        elif self.sample_information is not None and not self.sample_information >= LEAST_SAMPLE_INFORMATION:
            found.append(
                f"sample information is {self.sample_information:.2g} nats, less than {LEAST_SAMPLE_INFORMATION:g}: "
                "the posteriors tell where a location is, not what is there"
            )
        if not found and self.dead_channels > MOST_DEAD_CHANNELS:
            found.append(
                f"{100 * self.dead_channels:.2g} % of the channel groups have a component that holds less than "
                f"{100 * LEAST_USAGE:g} % of their locations, more than {100 * MOST_DEAD_CHANNELS:g} %"
            )
        return found


def _distance(mean_a: Tensor, s_a: Tensor, mean_b: Tensor, s_b: Tensor) -> Tensor:
    """Root mean square over channels (the last dimension) of |mean_a - mean_b| / sqrt((s_a + s_b) / 2)."""
    return ((mean_a - mean_b).square() / ((s_a + s_b) / 2)).mean(-1).sqrt()


@torch.no_grad()
def health(layer: MixtureLayer, x: Tensor) -> Health:
    """Measure a layer's stored mixture on its input x; changes nothing.

    Raises:
        ValueError: x has not the layer's channels, or holds nothing.
    """
    refuse_other_layers(layer)
    if x.numel() == 0:
        raise ValueError(f"x: expected at least one location, got {tuple(x.shape)}")
    tau = layer.posterior(x)
    flat = reference.flatten(x.detach().movedim(layer.channel_dim, 1)).to(tau.dtype)
    mean, s = layer.mean.to(tau.dtype), layer.log_var.to(tau.dtype).exp() + layer.eps
    share = tau.mean((1, 3))  # (K, G)
    usage = share.mean(1)
    entropy = torch.special.entr(tau).sum(0)  # (N, G, L)
    information = (torch.special.entr(share).sum(0) - entropy.mean((0, 2))).mean()
    sample_information = (torch.special.entr(tau.mean(1)).sum(0) - entropy.mean(0)).mean()
    dead = 1 - (share.amin(0) >= LEAST_USAGE).to(tau.dtype).mean() if len(share) > 1 else torch.tensor(0.0)
    distance = torch.tensor(math.inf)
    if len(mean) > 1:
        j, k = torch.triu_indices(len(mean), len(mean), offset=1)
        distance = _distance(mean[j], s[j], mean[k], s[k]).min()
    moments = reference.batch_moments(flat, tau)
    drift = (usage * _distance(mean, s, moments.mean, moments.var + layer.eps)).sum()
    effective = torch.special.entr(usage).sum().exp()
    return Health(
        usage=tuple(usage.tolist()),
        effective=float(effective),
        information=float(information),
        distance=float(distance),
        drift=float(drift),
        sample_information=float(sample_information) if len(x) > 1 else None,
        dead_channels=float(dead),
    )


def mixture_layers(model: nn.Module) -> dict[str, MixtureLayer]:
    """Return a model's mixture layers by qualified name; a model that is one goes by its class's name."""
    refuse_other_layers(model)
    return {
        name or type(module).__name__: module
        for name, module in model.named_modules()
        if isinstance(module, MixtureLayer)
    }


@contextmanager
def collect_health(model: nn.Module) -> Iterator[dict[str, Health]]:
    """Measure every mixture layer on what it is fed inside the block.

    The dictionary fills as the model runs; a layer that runs twice keeps the last measurement. Each measures
    the stored mixture as it was before the batch, in training and in evaluation mode alike. In training mode
    the run itself would move running statistics and seed layers: on leaving the block every buffer of the
    model, and every parameter of a mixture layer, is put back as it was. Use it between training steps, not
    around one.

    Example:
        >>> with collect_health(model) as found, torch.no_grad():
        ...     model(x)
        >>> log.scalars(step, log_scalars(found))
    """
    found: dict[str, Health] = {}
    layers = mixture_layers(model)
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    parameters = [(p, p.detach().clone()) for layer in layers.values() for p in layer.parameters()]

    def measure(name: str) -> Any:
        def hook(layer: MixtureLayer, args: tuple[Tensor, ...], kwargs: dict[str, Any]) -> None:
            x = args[0] if args else kwargs["x"]
            if layer.training:
                layer.seed_from(x.movedim(layer.channel_dim, 1))
            if x.numel():
                found[name] = health(layer, x)

        return hook

    handles = [layer.register_forward_pre_hook(measure(name), with_kwargs=True) for name, layer in layers.items()]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()
        with torch.no_grad():
            for tensor, saved in (*buffers, *parameters):
                if not torch.equal(tensor, saved):
                    tensor.copy_(saved)
        for layer in layers.values():
            layer.forget_initialized()


def log_scalars(found: Mapping[str, Health]) -> dict[str, float]:
    """Flatten to {"health/<layer>/<quantity>": value}; no distance for K = 1, no sample_information for one sample."""
    scalars = {}
    for layer, state in found.items():
        values = {
            "usage_min": min(state.usage),
            "effective": state.effective,
            "information": state.information,
            "sample_information": state.sample_information,
            "dead_channels": state.dead_channels,
            "distance": state.distance if len(state.usage) > 1 else None,
            "drift": state.drift,
        }
        scalars |= {f"health/{layer}/{name}": v for name, v in values.items() if v is not None}
    return scalars
