"""Which layers of a model are meant: where they are, and what ``where`` says of them."""

import inspect
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple, TypeGuard

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm

from .. import checks
from ..factory import DomainBatchNorm

Item = str | int | type[nn.Module]
Where = Item | Iterable[Item] | Callable[[str, nn.Module], bool]
"""Layers by qualified name, by index among the BatchNorm layers, by type, several of these, or by predicate."""

ORIGINAL = "_converted_from"
"""The attribute in which a converted layer keeps what stood in its place, in a tuple."""


class Place(NamedTuple):
    """Where a model holds a layer: under which key of which module; the model itself has neither."""

    name: str
    parent: nn.Module | None
    key: str
    module: nn.Module


def is_converted(module: nn.Module) -> bool:
    """Say whether the layer stands where another one stood."""
    return ORIGINAL in vars(module)


def places(module: nn.Module, name: str = "", parent: nn.Module | None = None, key: str = "") -> Iterator[Place]:
    """Find every place that holds a BatchNorm, LayerNorm, InstanceNorm or converted layer; a shared one has several."""
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
    if checks.is_integer(item):
        if -len(norms) <= item < len(norms):
            return [norms[item]]
        raise ValueError(f"where: expected an index below the {len(norms)} BatchNorm layers, got {item}")
    given = f"a {type(item).__name__}" if isinstance(item, nn.Module | Tensor) else repr(item)
    raise ValueError(f"where: expected a name, an index, a type, several of these or a predicate, got {given}")
