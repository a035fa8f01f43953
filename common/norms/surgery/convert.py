"""Put layers of this package where a model has BatchNorm, and put BatchNorm back."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from .. import checks
from ..em_norm import MixtureNorm
from ..estimation import averages
from ..estimation.averages import Stored
from ..factory import BatchNorm, DomainBatchNorm, make_norm
from ..supervised import SCBNorm, SCBNormBase
from ..unsupervised import MixtureLayer
from .routing import ROUTED

Where = str | int | Iterable[str | int] | Callable[[str, nn.Module], bool]
"""Layers by qualified name, by index among the BatchNorm layers, several of these, or by predicate."""

_CONVERTIBLE = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, BatchNorm)
_KINDS = ("mn", "ucb", "scb", "scb_base", "dsbn")
_STATE = {"weight", "bias", "running_mean", "running_var", "num_batches_tracked"}
_ORIGINAL = "_converted_from"
_HOOKS = (
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_backward_pre_hooks",
    "_backward_hooks",
    "_is_full_backward_hook",
    "_state_dict_pre_hooks",
    "_state_dict_hooks",
    "_load_state_dict_pre_hooks",
    "_load_state_dict_post_hooks",
)


class _Place(NamedTuple):
    name: str
    parent: nn.Module
    key: str
    module: nn.Module


def _places(parent: nn.Module, prefix: str = "") -> Iterator[_Place]:
    """Find every place that holds a BatchNorm or a converted layer; a shared one has several."""
    for key, module in parent._modules.items():
        if module is None or (isinstance(module, DomainBatchNorm) and not _is_converted(module)):
            continue
        if isinstance(module, _BatchNorm) or _is_converted(module):
            yield _Place(prefix + key, parent, key, module)
        else:
            yield from _places(module, f"{prefix}{key}.")


def _is_converted(module: nn.Module) -> bool:
    return _ORIGINAL in vars(module)


def _select(model: nn.Module, places: list[_Place], where: Where | None) -> dict[nn.Module, str]:
    """Return the modules that are meant, each with the first of its names."""
    names: dict[nn.Module, str] = {}
    for place in places:
        names.setdefault(place.module, place.name)
    if not names:
        raise ValueError("model: expected at least one BatchNorm layer inside, found none")
    if where is None:
        return names
    if callable(where):
        chosen = [module for module, name in names.items() if where(name, module)]
    else:
        by_name, in_order = {place.name: place.module for place in places}, list(names)
        chosen = []
        for item in [where] if isinstance(where, (str, int)) else where:
            if isinstance(item, str) and item in by_name:
                chosen.append(by_name[item])
            elif isinstance(item, int) and -len(in_order) <= item < len(in_order):
                chosen.append(in_order[item])
            elif isinstance(item, int):
                raise ValueError(f"where: expected an index below the {len(in_order)} BatchNorm layers, got {item}")
            else:
                known = ", ".join(list(by_name)[:5]) + (", ..." if len(by_name) > 5 else "")
                raise ValueError(f"where: expected the name of a BatchNorm layer ({known}), got {item!r}")
    if not chosen:
        raise ValueError(f"where: expected to match at least one of {len(names)} BatchNorm layers, matched none")
    return {module: names[module] for module in chosen}


def _refusal(module: nn.Module) -> str | None:
    """Say why a layer cannot be converted, or None if it can."""
    if _is_converted(module):
        return "is converted already; call revert_norms first"
    if type(module) not in _CONVERTIBLE:
        return "does more than torch's BatchNorm1d, 2d or 3d, which would be lost; leave it out by `where`"
    assert isinstance(module, _BatchNorm)
    if "forward" in vars(module):
        return "has a forward of its own, which would be lost; leave it out by `where`"
    if {*module._parameters, *module._buffers, *module._modules} != _STATE:
        return "has parameters or buffers of its own (pruning?), which would be lost; leave it out by `where`"
    if module.running_mean is None:
        return "keeps no running statistics to start from (track_running_stats=False); leave it out by `where`"
    return None


def convert_norms(
    model: nn.Module, kind: str, where: Where | None = None, num_components: int = 3, **options: Any
) -> list[str]:
    """Replace BatchNorm layers of a model, in place, by layers of this package that start where they stand.

    A mixture of K > 1 starts with means mu + sigma d_k, d evenly spaced in (-1, 1), and with variances such
    that its total mean and variance are BatchNorm's; its output is not BatchNorm's. With K = 1, and for
    "scb", "scb_base" and "dsbn", where all clusters start alike, the evaluation output is BatchNorm's up to
    rounding.

    Taken over from each layer: its running statistics, eps, momentum, weight and bias (copies), dtype, device,
    mode, and hooks: forward, backward and state-dict hooks with their handles. A load_state_dict pre-hook
    that asked for its module keeps being given the BatchNorm. A layer that the model holds in several places
    stays one layer. Convert before building an optimizer, DistributedDataParallel or torch.compile.

    Args:
        model: holds the layers as submodules, at any depth.
        kind: "mn", "ucb", "scb", "scb_base" or "dsbn", as for ``make_norm``. Ids for the last three come from
            ``clusters``.
        where: the layers to replace: a qualified name, an index among the BatchNorm layers in the order of
            ``named_modules`` (converted ones keep theirs), several of these, or a predicate
            ``(name, module) -> bool``; None for all.
        num_components: components, clusters or domains K.
        options: of the new layers; eps, affine and momentum default to the BatchNorm's own. With an explicit
            ``init`` that is taken from data, the first training batch replaces the start described above.

    Returns:
        The qualified names of the replaced layers.

    Raises:
        ValueError: nothing is matched, a name is unknown, a layer is converted already or is one whose
            behaviour would be lost (a subclass such as SyncBatchNorm or timm's BatchNormAct2d), or an option
            is wrong. The model is then unchanged.
    """
    checks.check_choice("kind", kind, _KINDS)
    if isinstance(model, _BatchNorm):
        raise ValueError(f"model: expected a model that holds BatchNorm layers, got a {type(model).__name__} itself")
    if isinstance(model, nn.parallel.DistributedDataParallel):
        raise ValueError("model: expected one not yet wrapped, got DistributedDataParallel; convert, then wrap")
    places = list(_places(model))
    chosen = _select(model, places, where)
    for module, name in chosen.items():
        if reason := _refusal(module):
            raise ValueError(f"where: {name} ({type(module).__name__}) {reason}")
    new: dict[nn.Module, nn.Module] = {}
    for module, name in chosen.items():
        assert isinstance(module, _BatchNorm)
        new[module] = _converted(module, name, kind, num_components, options)
    _swap(places, new)
    return list(chosen.values())


def revert_norms(model: nn.Module) -> list[str]:
    """Put the original BatchNorm modules back, with the state that they had when they were converted.

    They come back on the device, in the dtype and in the mode that the model has now. Hooks registered since
    the conversion stay.

    Returns:
        The qualified names of the layers.

    Raises:
        ValueError: the model has no converted layer.
    """
    places = [place for place in _places(model) if _is_converted(place.module)]
    if not places:
        raise ValueError("model: expected at least one converted layer inside, found none")
    names, new = _select(model, places, None), {}
    for layer in names:
        (original,) = vars(layer)[_ORIGINAL]
        like = next(t for t in (*layer.parameters(), *layer.buffers()) if t.is_floating_point())
        if original.running_mean.device != like.device or original.running_mean.dtype != like.dtype:
            original.to(device=like.device, dtype=like.dtype)
        original.train(layer.training)
        _share_hooks(layer, original)
        new[layer] = original
    _swap(places, new)
    return list(names.values())


def _swap(places: list[_Place], new: Mapping[nn.Module, nn.Module]) -> None:
    for place in places:
        if place.module in new:
            setattr(place.parent, place.key, new[place.module])


def _share_hooks(source: nn.Module, target: nn.Module) -> None:
    """Let target use the very dictionaries of source, so that handles to remove hooks go on working."""
    for name in _HOOKS:
        setattr(target, name, getattr(source, name))


@torch.no_grad()
def _converted(norm: _BatchNorm, name: str, kind: str, num: int, options: dict[str, Any]) -> nn.Module:
    """Make the layer that stands for a BatchNorm."""
    inherited: dict[str, Any] = {"eps": norm.eps, "affine": norm.affine}
    if kind in ("mn", "ucb", "dsbn"):
        inherited["momentum"] = norm.momentum
    if norm.affine and not options.get("affine", True):
        raise ValueError(f"affine: expected True, since {name} has a weight and bias to take over, got False")
    full = inherited | options
    if kind in ("mn", "ucb") and full["momentum"] is None:
        raise ValueError(f"momentum: expected a number, since {name} averages over all batches (None)")
    layer = make_norm(kind, norm.num_features, num, **full)
    if kind in ROUTED:
        layer = ROUTED[kind](norm.num_features, num, **full)
    assert norm.running_mean is not None
    layer.to(device=norm.running_mean.device, dtype=norm.running_mean.dtype)
    _warm_start(layer, norm, keep_unseeded="init" in options)
    layer.train(norm.training)
    _share_hooks(norm, layer)
    vars(layer)[_ORIGINAL] = (norm,)  # a tuple, which nn.Module does not register as a submodule
    return layer


def _warm_start(layer: nn.Module, norm: _BatchNorm, keep_unseeded: bool) -> None:
    if isinstance(layer, DomainBatchNorm):
        for domain in layer.domains:
            domain.load_state_dict(norm.state_dict())
            _take_affine(domain, norm)
        return
    assert norm.running_mean is not None
    assert norm.running_var is not None
    mean, var = (t.detach().to("cpu", torch.float64) for t in (norm.running_mean, norm.running_var))
    if isinstance(layer, MixtureLayer):
        start = _spread(mean, var, layer.num_components)
        layer._write(start)
        if isinstance(layer, MixtureNorm):
            layer._write_fit(start)
    else:
        assert isinstance(layer, SCBNorm | SCBNormBase)
        row = (mean.to(norm.running_mean), averages.log_of(var).to(norm.running_mean))
        layer._write(lambda *old: (row[0].expand_as(old[0]), row[1].expand_as(old[1])))
    if not keep_unseeded:
        layer.set_initialized(True)
    _take_affine(layer, norm)


def _spread(mean: Tensor, var: Tensor, num: int) -> Stored:
    """Return num equal components (1 / num each) whose total mean and variance are mean and var, each (C,)."""
    d = (2 * torch.arange(num, device=mean.device, dtype=mean.dtype)[:, None] + 1 - num) / num
    within = (1 - d.square().mean()) * var
    return Stored(mean.new_zeros(num), mean + var.sqrt() * d, averages.log_of(within).expand(num, -1))


def _take_affine(layer: Any, norm: _BatchNorm) -> None:
    if norm.affine:
        for name in ("weight", "bias"):
            old = getattr(norm, name)
            setattr(layer, name, nn.Parameter(old.detach().clone(), requires_grad=old.requires_grad))
