"""Replace the BatchNorm layers of a model by layers of this package, and put them back."""

import inspect
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import chain
from typing import Any, NamedTuple, TypeGuard

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm

from . import functional, mixture
from .base import FLAG
from .baselines import DomainBatchNorm
from .cluster_context import ROUTED
from .mixture_norm import MixtureNorm
from .norm_act import NormAct
from .norm_spec import NormSpec, norm_spec
from .registry import MIXTURES, check_options, make_norm
from .scb_norm import SCBNorm, SCBNormBase
from .two_names import refuse_other_layers
from .warm_start import warm_start

_KINDS = ("mn", "ucb", "scb", "scb_base", "dsbn")
SAFE_DEPTH = 6
"""Of SCB layers one after the other, with nothing else that holds the scale: 6 trained at a learning rate of 0.05, 8
and 12 overflowed within 30 steps, resnet18's 20 within 3, at 0.001 too (measured, init="data")."""
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


Item = str | int | type[nn.Module]
Where = Item | Iterable[Item] | Callable[[str, nn.Module], bool]
"""Layers by qualified name, by index among the BatchNorm layers, by type, several of these, or by predicate."""

ORIGINAL = "_converted_from"
"""The attribute in which a converted layer keeps what stood in its place, in a tuple."""


class Place(NamedTuple):
    """Where a model holds a layer: the key and the parent module; the model itself has neither."""

    name: str
    parent: nn.Module | None
    key: str
    module: nn.Module


def convert_norms(
    model: nn.Module, kind: str, where: Where | None = None, num_components: int = 3, **options: Any
) -> Any:
    """Replace BatchNorm layers of a model, in place, by layers of this package that start where they stand.

    A mixture of K > 1 starts with means mu + sigma d_k, d evenly spaced in (-0.68, 0.68), and with variances such
    that its total mean and variance are BatchNorm's. The gain that such a mixture has (1.6 at K = 3) is taken out of
    the layer's weight, which is frozen where BatchNorm had none, so that a trained model still works: on Gaussian
    activations the output is BatchNorm's but for 1.2 % of its deviation. With K = 1, and for "scb", "scb_base" and
    "dsbn", where all clusters start alike, the evaluation output is BatchNorm's up to rounding. ``recalibrate`` then
    fits the mixtures to data. With statistics="instance" the moments of each sample take the place of BatchNorm's,
    which changes the output: train on.

    Taken over from each layer: its running statistics, eps, momentum, weight and bias (copies), dtype, device,
    mode, and hooks: forward, backward and state-dict hooks with their handles. A load_state_dict pre-hook
    that asked for its module keeps being given the BatchNorm. A layer that the model holds in several places
    stays one layer. Convert before building an optimizer, DistributedDataParallel or torch.compile.

    A BatchNorm with an activation, such as timm's BatchNormAct2d, becomes a ``NormAct`` with the new layer and the
    very same dropout and activation. A SyncBatchNorm becomes a "ucb" of its process group. A LayerNorm is
    replaced where ``where`` asks for it: the channels are the dimension it normalises over, weight and bias are
    taken over, and as it keeps no statistics the mixture starts at mean 0 and variance 1. A warning says what to
    do: estimate the mixtures, and train on, since moments of channels are not those of tokens. An InstanceNorm
    without running statistics becomes, where ``where`` asks for it, an "scb" or "scb_base" with
    statistics="instance" that computes the same.

    Args:
        model: holds the layers as submodules, at any depth, or is one.
        kind: "mn", "ucb", "scb", "scb_base" or "dsbn", as for ``make_norm``. Ids for the last three come from
            ``clusters``.
        where: the layers to replace: a qualified name, an index among the BatchNorm layers in the order of
            ``named_modules`` (converted ones keep theirs), a type such as ``nn.BatchNorm2d`` or ``nn.LayerNorm``
            with its subclasses, several of these, or a predicate ``(name, module) -> bool``, asked about
            LayerNorms and InstanceNorms too; None for all BatchNorm layers.
        num_components: components, clusters or domains K.
        options: of the new layers; eps, affine and momentum default to the BatchNorm's own. With an explicit
            ``init`` that is taken from data, the first training batch replaces the start described above.

    Returns:
        The model; where it is itself the layer to replace, the new layer. ``converted`` names what was replaced.

    Raises:
        ValueError: nothing is matched, a name is unknown, a layer is converted already or is one whose
            behaviour would be lost, a SyncBatchNorm, LayerNorm or InstanceNorm cannot become this, a norm belongs to
            torch's TransformerEncoderLayer, whose fast path goes past it, or an option is wrong. The model is
            then unchanged.
    """
    functional.check_choice("kind", kind, _KINDS)
    if isinstance(model, nn.parallel.DistributedDataParallel):
        raise ValueError("model: expected one not yet wrapped, got DistributedDataParallel; convert, then wrap")
    found = list(places(model))
    chosen = select(found, where)
    tensor = next(chain(model.parameters(), model.buffers()), None)
    specs: dict[nn.Module, NormSpec] = {}
    for module, name in chosen.items():
        called = _called(name, module)
        if is_converted(module):
            raise ValueError(f"where: {called} is converted already; call revert_norms first")
        try:
            specs[module] = norm_spec(module, None if tensor is None else tensor.device)
        except ValueError as error:
            raise ValueError(f"where: {called} {error}; leave it out by `where`") from None
        _check_kind(kind, specs[module], module, called, options)
    _check_parents(place for place in found if place.module in chosen)
    new: dict[nn.Module, nn.Module] = {}
    for module, spec in specs.items():
        new[module] = _converted(module, spec, chosen[module] or "the model", kind, num_components, options)
    unknown = [name for module, name in chosen.items() if isinstance(module, nn.LayerNorm)]
    if unknown and kind in MIXTURES:
        which = (unknown[0] or "the model") + (f" and {len(unknown) - 1} more" if unknown[1:] else "")
        warnings.warn(
            f"{which}: a LayerNorm keeps no statistics for {kind!r} to start from, and takes them of each token: "
            "call recalibrate(model, loader) before the model is evaluated, and train it on",
            stacklevel=2,
        )
    model = _swap(model, found, new)
    if _nothing_holds_the_scale(model, new.values()):
        warnings.warn(
            f"model: with {kind!r} at every layer nothing holds the scale of activations, and training diverges at "
            "BatchNorm's learning rates; convert one layer (where=0), or give statistics='batch' or 'instance' "
            "(commands: --norm.statistics batch)",
            stacklevel=2,
        )
    return model


def _nothing_holds_the_scale(model: nn.Module, new: Iterable[nn.Module]) -> bool:
    """Return whether many layers are new and no layer of the model takes statistics of its input in training."""
    held = (_BatchNorm, DomainBatchNorm, MixtureNorm, nn.LayerNorm, nn.GroupNorm, _InstanceNorm)
    holds = [isinstance(m, held) or getattr(m, "statistics", None) in ("batch", "instance") for m in model.modules()]
    return len({*new}) > SAFE_DEPTH and not any(holds)


def _called(name: str, module: nn.Module) -> str:
    return f"{name or 'the model'} ({type(module).__name__})"


def _check_kind(kind: str, spec: NormSpec, module: nn.Module, called: str, options: Mapping[str, Any]) -> None:
    """Raise ValueError where a layer cannot become one of the kind, though a BatchNorm could."""
    if spec.process_group is not None and kind in ("mn", "dsbn") and "process_group" not in options:
        raise ValueError(
            f"kind: expected 'ucb', 'scb' or 'scb_base' for {called}, which takes statistics over all processes, "
            f"got {kind!r}, which knows its own process alone"
        )
    statistics = options.get("statistics")
    if isinstance(module, _InstanceNorm) and statistics != "instance":
        raise ValueError(
            f"statistics: expected 'instance', with kind 'scb' or 'scb_base', for {called}, which takes statistics of "
            f"each sample, got {statistics!r} with kind {kind!r}"
        )
    if not isinstance(module, nn.LayerNorm):
        return
    if kind == "dsbn":
        raise ValueError(f"kind: expected 'ucb' or 'mn' for {called}, got 'dsbn', whose BatchNorms have no channel_dim")
    if kind in ("scb", "scb_base") and options.get("init") != "data" and statistics != "instance":
        raise ValueError(
            f"init: expected 'data' for kind {kind!r} at {called}, which keeps no statistics to start from, "
            f"got {options.get('init', 'identity')!r}"
        )


def _check_parents(found: Iterable[Place]) -> None:
    """Raise ValueError for a norm that its parent does not call in evaluation, but computes by itself."""
    for place in found:
        if isinstance(place.parent, nn.TransformerEncoderLayer) and torch.backends.mha.get_fastpath_enabled():
            raise ValueError(
                f"where: {_called(place.name, place.module)} belongs to torch's TransformerEncoderLayer, whose fast "
                "path in evaluation computes LayerNorm whatever stands there; call "
                "torch.backends.mha.set_fastpath_enabled(False) first, here and wherever the model is evaluated"
            )


def converted(model: nn.Module) -> list[str]:
    """Return the qualified names of a model's converted layers, in the order of ``named_modules``.

    A layer in several places goes by the first; a model that is a converted layer by "".
    """
    return list(names_of(place for place in places(model) if is_converted(place.module)).values())


def revert_norms(model: nn.Module) -> Any:
    """Put the original modules back, with the state that they had when they were converted.

    They come back on the device, in the dtype and in the mode that the model has now. Hooks registered since
    the conversion stay.

    Returns:
        The model; where it is itself a converted layer, the original.

    Raises:
        ValueError: the model has no converted layer.
    """
    found = [place for place in places(model) if is_converted(place.module)]
    if not found:
        raise ValueError("model: expected at least one converted layer inside, found none")
    new: dict[nn.Module, nn.Module] = {}
    for layer in names_of(found):
        (original,) = vars(layer)[ORIGINAL]
        like = _floating(layer)[0]
        if any(t.device != like.device or t.dtype != like.dtype for t in _floating(original)):
            original.to(device=like.device, dtype=like.dtype)
        original.train(layer.training)
        _share_hooks(layer, original)
        new[layer] = original
    return _swap(model, found, new)


def _floating(module: nn.Module) -> list[Tensor]:
    return [t for t in chain(module.parameters(), module.buffers()) if t.is_floating_point()]


def _swap(model: nn.Module, found: list[Place], new: Mapping[nn.Module, nn.Module]) -> nn.Module:
    """Put the new modules in their places; return the model, or what stands for it."""
    for place in found:
        if place.module in new and place.parent is not None:
            setattr(place.parent, place.key, new[place.module])
    return new.get(model, model)


def _share_hooks(source: nn.Module, target: nn.Module) -> None:
    """Let target use the very dictionaries of source, so that handles to remove hooks still work."""
    for name in _HOOKS:
        setattr(target, name, getattr(source, name))


@torch.no_grad()
def _converted(module: nn.Module, spec: NormSpec, name: str, kind: str, num: int, options: dict[str, Any]) -> nn.Module:
    """Make the layer that stands for a module of this spec."""
    norm = spec.norm
    inherited: dict[str, Any] = {"eps": norm.eps, "affine": norm.affine}
    if kind in ("mn", "ucb", "dsbn") or options.get("statistics") == "batch":
        inherited["momentum"] = norm.momentum
    if spec.channel_dim != 1:
        inherited["channel_dim"] = spec.channel_dim
    if kind == "ucb" and spec.process_group is not None:
        inherited["process_group"] = spec.process_group
    if norm.affine and not options.get("affine", True):
        raise ValueError(f"affine: expected True, since {name} has a weight and bias to take over, got False")
    if kind in MIXTURES and num > 1:
        inherited["affine"] = True  # frozen where BatchNorm has none: for the gain, which nothing would hold otherwise
    full = inherited | options
    if kind != "dsbn" and full.get("momentum", 0) is None:
        raise ValueError(f"momentum: expected a number, since {name} averages over all batches (None)")
    check_options(kind, full)
    args = norm.num_features, num
    layer = ROUTED[kind](*args, **full) if kind in ROUTED else make_norm(kind, *args, **full)
    if isinstance(layer, SCBNorm | SCBNormBase) and layer.statistics != "learned" and layer.eps >= 1:
        raise ValueError(
            f"eps: expected less than 1 for {name} with statistics={layer.statistics!r}, since clusters start at "
            f"variance 1 - eps, got {layer.eps}"
        )
    assert norm.running_mean is not None
    layer.to(device=norm.running_mean.device, dtype=norm.running_mean.dtype)
    warm_start(layer, norm, options)
    if spec.after:
        layer = NormAct(layer, **spec.after)
    layer.train(module.training)
    _share_hooks(module, layer)
    vars(layer)[ORIGINAL] = (module,)  # a tuple, which nn.Module does not register as a submodule
    return layer


def is_converted(module: nn.Module) -> bool:
    """Return whether the layer stands where another one stood."""
    return ORIGINAL in vars(module)


def places(module: nn.Module, name: str = "", parent: nn.Module | None = None, key: str = "") -> Iterator[Place]:
    """Find every place that holds a BatchNorm, LayerNorm, InstanceNorm or converted layer; a shared one has several."""
    if parent is None:
        refuse_other_layers(module)
    if is_converted(module) or isinstance(module, (_BatchNorm, nn.LayerNorm, _InstanceNorm)):
        yield Place(name, parent, key, module)
    elif not isinstance(module, DomainBatchNorm):
        for child_key, child in module._modules.items():
            if child is not None:
                yield from places(child, f"{name}.{child_key}" if name else child_key, module, child_key)


def names_of(found: Iterable[Place]) -> dict[nn.Module, str]:
    """Return the modules, each with the first of its names."""
    names: dict[nn.Module, str] = {}
    for place in found:
        names.setdefault(place.module, place.name)
    return names


def select(found: list[Place], where: Where | None) -> dict[nn.Module, str]:
    """Return the modules that are meant, each with the first of its names.

    Raises:
        ValueError: nothing is meant; a name, an index or a value of another type is wrong.
    """
    names = names_of(found)
    norms = [module for module in names if isinstance(_original(module), _BatchNorm)]
    layer_norms = sum(isinstance(_original(module), nn.LayerNorm) for module in names)
    counts = {"LayerNorm": layer_norms, "InstanceNorm": len(names) - len(norms) - layer_norms}
    others = " and ".join(f"{count} {name}s" for name, count in counts.items() if count)
    if not names:
        raise ValueError("model: expected at least one BatchNorm layer inside, found none")
    if where is None:
        if not norms:
            raise ValueError(
                f"model: expected at least one BatchNorm layer inside, found {others}, which are converted "
                "where asked for, as by where=nn.LayerNorm"
            )
        return {module: names[module] for module in norms}
    if _is_predicate(where):
        chosen = [module for module, name in names.items() if where(name, module)]
    else:
        by_name = {place.name: place.module for place in found}
        chosen = [module for item in _items(where) for module in _matches(item, by_name, norms)]
    if not chosen:
        what = f"{len(norms)} BatchNorm layers" + (f" or {others}" if others else "")
        raise ValueError(f"where: expected to match at least one of {what}, matched none")
    return {module: names[module] for module in chosen}


def _original(module: nn.Module) -> nn.Module:
    return vars(module)[ORIGINAL][0] if is_converted(module) else module


def _is_predicate(where: Any) -> TypeGuard[Callable[[str, nn.Module], bool]]:
    if isinstance(where, type | nn.Module) or not callable(where):
        return False
    try:
        inspect.signature(where).bind("", nn.Identity())
    except TypeError:
        given = inspect.signature(where)
        raise ValueError(f"where: expected a predicate of (name, module), got one of {given}") from None
    except ValueError:  # a builtin without a signature
        pass
    return True


def _items(where: Any) -> list[Any]:
    """Return what where holds; a single value as a list of one."""
    if isinstance(where, Iterable) and not isinstance(where, str | bytes | type | nn.Module | Tensor):
        return list(where)
    return [where]


def _matches(item: Any, by_name: dict[str, nn.Module], norms: list[nn.Module]) -> list[nn.Module]:
    """Return the modules that an item of where means."""
    if isinstance(item, type) and issubclass(item, nn.Module):
        return [module for module in dict.fromkeys(by_name.values()) if isinstance(module, item)]
    if isinstance(item, str):
        if item in by_name:
            return [by_name[item]]
        known = ", ".join(list(by_name)[:5]) + (", ..." if len(by_name) > 5 else "")
        raise ValueError(f"where: expected the name of a BatchNorm, LayerNorm or InstanceNorm ({known}), got {item!r}")
    if functional.is_integer(item):
        if -len(norms) <= item < len(norms):
            return [norms[item]]
        raise ValueError(f"where: expected an index below the {len(norms)} BatchNorm layers, got {item}")
    given = f"a {type(item).__name__}" if isinstance(item, nn.Module | Tensor) else repr(item)
    raise ValueError(f"where: expected a name, an index, a type, several of these or a predicate, got {given}")


def scb_state_from_base(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Turn a state dict with SCBNormBase layers into that of the same model with SCBNorm layers.

    Exact: the rows are what the linear layers give, mu_k = W[:, k] + b. Other entries are passed on.

    Args:
        state: of one layer or of a whole model.

    Raises:
        ValueError: no SCBNormBase is in it.
    """
    new = dict(state)
    found = _prefixes(state, "mean.weight", "mean.bias", "log_var.weight", "log_var.bias", "initialized")
    for prefix in _at_least_one(found, "SCBNormBase"):
        for name in ("mean", "log_var"):
            weight, bias = new.pop(f"{prefix}{name}.weight"), new.pop(f"{prefix}{name}.bias")
            new[prefix + name] = (weight + bias[:, None]).T.contiguous()
    return new


def ucb_state_from_batch_norm(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Turn a state dict with BatchNorm layers into that of the same model with UCBNorm(C, 1) layers.

    Exact up to rounding, in evaluation and in further training with moving averages. Other entries are passed
    on, and every BatchNorm with running statistics is turned; for some of them only, use ``convert_norms``.

    Args:
        state: of one layer or of a whole model.

    Raises:
        ValueError: no BatchNorm with running statistics is in it.
    """
    new = dict(state)
    for prefix in _at_least_one(_prefixes(state, "running_mean", "running_var"), "BatchNorm"):
        mean, var = new.pop(f"{prefix}running_mean"), new.pop(f"{prefix}running_var")
        new.pop(f"{prefix}num_batches_tracked", None)
        new[f"{prefix}logits"] = torch.zeros_like(mean[:1])
        new[f"{prefix}mean"] = mean[None].clone()
        new[f"{prefix}log_var"] = mixture.log_of(var.double())[None].to(var.dtype)
        new[f"{prefix}initialized"] = torch.ones((), dtype=FLAG, device=mean.device)
    return new


def _prefixes(state: Mapping[str, Tensor], *names: str) -> list[str]:
    """Return the prefixes under which the state holds all the names."""
    first = names[0]
    starts = [key.removesuffix(first) for key in state if key == first or key.endswith(f".{first}")]
    return [start for start in starts if all(start + name in state for name in names)]


def _at_least_one(prefixes: list[str], layer: str) -> list[str]:
    if not prefixes:
        raise ValueError(f"state: expected the state of at least one {layer}, found none")
    return prefixes
