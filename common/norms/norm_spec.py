"""The computation of a layer that is to be converted, and the start of the new one."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm

from .baselines import BatchNorm, InstanceNorm

_PLAIN = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm, BatchNorm)
_PLAIN_INSTANCE = (nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d, InstanceNorm)
_STATE = {"weight", "bias", "running_mean", "running_var", "num_batches_tracked"}
_AFTER = ("drop", "act")
_NDIM = {nn.BatchNorm1d: 3, nn.BatchNorm3d: 5}


class NormSpec(NamedTuple):
    """What a layer computes: a norm over channels, and what follows it.

    Args:
        norm: statistics, affine map, eps and momentum; a LayerNorm's or InstanceNorm's, which has no
            statistics, is at mean 0 and variance 1.
        channel_dim: the dimension that holds the channels.
        process_group: of a SyncBatchNorm, otherwise None.
        after: dropout ``drop`` and activation ``act``, as far as there are any.
    """

    norm: _BatchNorm
    channel_dim: int = 1
    process_group: object = None
    after: Mapping[str, nn.Module] = {}


def norm_spec(module: nn.Module, device: torch.device | None = None) -> NormSpec:
    """Return what a BatchNorm, LayerNorm or InstanceNorm computes.

    A subclass with a dropout ``drop`` and an activation ``act``, and one of LayerNorm with the channels in
    another place, is known by what it does: its output in evaluation is compared with that of the spec.

    Args:
        module: the layer.
        device: of a layer without parameters, which has none.

    Raises:
        ValueError: it does something else, which would be lost; the message is the end of a sentence.
    """
    if "forward" in vars(module):
        raise ValueError("has a forward of its own, which would be lost")
    if isinstance(module, nn.LayerNorm):
        return _layer_norm(module, device)
    if isinstance(module, _InstanceNorm):
        return _instance_norm(module, device)
    assert isinstance(module, _BatchNorm)
    spec = NormSpec(module, after=_after(module))
    if type(module) not in _PLAIN and not spec.after:
        raise ValueError(_more(module))
    if {*module._parameters, *module._buffers} != _STATE:
        raise ValueError("has parameters or buffers of its own (pruning?), which would be lost")
    if module.running_mean is None:
        raise ValueError("keeps no running statistics to start from (track_running_stats=False)")
    if spec.after and not _is_batch_norm(module, spec):
        raise ValueError(_more(module))
    if isinstance(module, nn.SyncBatchNorm):
        spec = spec._replace(process_group=module.process_group or "world")
    return spec


def _more(module: nn.Module) -> str:
    bases = {nn.LayerNorm: "LayerNorm", _InstanceNorm: "InstanceNorm", _BatchNorm: "BatchNorm"}
    norm = next(name for base, name in bases.items() if isinstance(module, base))
    return f"does more than torch's {norm}, which would be lost"


def _after(module: nn.Module) -> dict[str, nn.Module]:
    """Return what a module holds as ``drop`` and ``act``, in this order."""
    if unknown := {*module._modules} - {*_AFTER}:
        raise ValueError(f"holds {', '.join(sorted(unknown))}, which would be lost")
    return {name: part for name in _AFTER if (part := module._modules.get(name)) is not None}


def _is_batch_norm(norm: _BatchNorm, spec: NormSpec) -> bool:
    """Return whether a layer is BatchNorm and what follows it."""
    size = [2, norm.num_features] + [2] * (next((n for t, n in _NDIM.items() if isinstance(norm, t)), 4) - 2)

    def batch_norm(x: Tensor) -> Tensor:
        return F.batch_norm(x, norm.running_mean, norm.running_var, norm.weight, norm.bias, eps=norm.eps)

    return _computes(norm, _noise(size, _like(norm)), spec, batch_norm)


def _layer_norm(module: nn.LayerNorm, device: torch.device | None) -> NormSpec:
    if len(module.normalized_shape) != 1:
        raise ValueError(f"normalises over {module.normalized_shape}, of which none alone is the channels")
    if {*module._parameters} != {"weight", "bias"} or module._buffers:
        raise ValueError("has parameters or buffers of its own (pruning?), which would be lost")
    spec = NormSpec(_at_zero(module, module.normalized_shape[0], device), -1, after=_after(module))
    if type(module) is nn.LayerNorm and not spec.after:
        return spec
    channels = module.normalized_shape[0]
    side = 3 if channels == 2 else 2  # of an image, so that no other dimension could be the channels
    for dim, size in ((1, [2, channels, side, side]), (-1, [2, side, channels])):

        def norm(x: Tensor, dim: int = dim) -> Tensor:
            y = F.layer_norm(x.movedim(dim, -1), module.normalized_shape, module.weight, module.bias, module.eps)
            return y.movedim(-1, dim)

        if _computes(module, _noise(size, _like(spec.norm)), spec, norm):
            return spec._replace(channel_dim=dim)
    raise ValueError(_more(module))


def _instance_norm(module: _InstanceNorm, device: torch.device | None) -> NormSpec:
    if type(module) not in _PLAIN_INSTANCE:
        raise ValueError(_more(module))
    if {*module._parameters, *module._buffers} != _STATE:
        raise ValueError("has parameters or buffers of its own (pruning?), which would be lost")
    if module.running_mean is not None:
        raise ValueError("evaluates by running statistics (track_running_stats=True), which would be lost")
    return NormSpec(_at_zero(module, module.num_features, device))


def _at_zero(module: nn.LayerNorm | _InstanceNorm, channels: int, device: torch.device | None) -> BatchNorm:
    """Return a BatchNorm with a layer's affine map and options, mean 0 and variance 1."""
    weight, bias = module._parameters["weight"], module._parameters["bias"]
    like: dict[str, Any] = {"device": device} if weight is None else {"device": weight.device, "dtype": weight.dtype}
    norm = BatchNorm(channels, module.eps, affine=weight is not None, **like)
    if weight is not None:
        norm.weight = weight
        # Without a bias, one that stays 0.
        norm.bias = nn.Parameter(torch.zeros_like(weight), requires_grad=False) if bias is None else bias
    return norm.train(module.training)


def _like(norm: _BatchNorm) -> Tensor:
    assert norm.running_mean is not None
    return norm.running_mean


def _noise(size: Sequence[int], like: Tensor) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(0)).to(like)


@torch.no_grad()
def _computes(module: nn.Module, x: Tensor, spec: NormSpec, norm: Callable[[Tensor], Tensor]) -> bool:
    """Return whether a module computes, in evaluation and without its hooks, a norm and what the spec has after it."""
    with _evaluated(module):
        try:
            y = norm(x)
            for part in spec.after.values():
                y = part(y)
            tolerance = torch.finfo(y.dtype).eps ** 0.5
            return torch.allclose(module.forward(x.clone()), y, rtol=tolerance, atol=tolerance)
        except Exception:  # whatever a module cannot do with such an input, it is not of this spec
            return False


@contextmanager
def _evaluated(module: nn.Module) -> Iterator[None]:
    """Put a module into evaluation mode, with parameters and statistics of its own that are not special.

    At mean 0 and variance 1 an activation before the norm looks like one after it.
    """
    modes = {part: part.training for part in module.modules()}
    owned: list[dict[str, Any]] = [module._parameters, module._buffers]
    before = [dict(tensors) for tensors in owned]
    module.eval()
    for tensors, state in zip(owned, before, strict=True):
        for name, tensor in state.items():
            if tensor is not None and tensor.is_floating_point():
                tensors[name] = 0.5 + _noise(tensor.shape, tensor).abs()
    try:
        yield
    finally:
        for tensors, state in zip(owned, before, strict=True):
            tensors.update(state)
        for part, mode in modes.items():
            part.training = mode
