"""Make any normalization layer by its kind: those of the family, those they are compared with, and those users add."""

import difflib
import inspect
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from torch import nn

from .baselines import BatchNorm, DomainBatchNorm, InstanceNorm, NoNorm
from .mixture_norm import MixtureNorm
from .scb_norm import SCBNorm, SCBNormBase
from .two_names import ADVICE, OTHER, other_module, refuse_other_layers
from .ucb_norm import UCBNorm


class _Kind(NamedTuple):
    build: Callable[..., nn.Module]
    takes_clusters: bool
    options: dict[str, Any]


def _options_of(build: Callable[..., object]) -> dict[str, Any]:
    """Return what has a default in the signature of a layer or a function, with the default."""
    return {p.name: p.default for p in inspect.signature(build).parameters.values() if p.default is not p.empty}


_KINDS = {
    "bn": _Kind(lambda channels, _, **options: BatchNorm(channels, **options), False, _options_of(BatchNorm)),
    "in": _Kind(lambda channels, _, **options: InstanceNorm(channels, **options), False, _options_of(InstanceNorm)),
    "dsbn": _Kind(DomainBatchNorm, True, _options_of(BatchNorm)),
    "mn": _Kind(MixtureNorm, False, _options_of(MixtureNorm)),
    "scb": _Kind(SCBNorm, True, _options_of(SCBNorm)),
    "scb_base": _Kind(SCBNormBase, True, _options_of(SCBNormBase)),
    "ucb": _Kind(UCBNorm, False, _options_of(UCBNorm)),
    "none": _Kind(lambda *_: NoNorm(), False, {}),
}
BUILT_IN, WITHOUT_COMPONENTS, MIXTURES = tuple(_KINDS), ("bn", "in", "none"), ("mn", "ucb")


def register_norm(name: str, build: Callable[..., nn.Module], *, takes_clusters: bool = False) -> None:
    r"""Add a kind of layer, which ``make_norm`` and ``NormConfig.kind`` then know by its name.

    Args:
        name: what it is called: lower-case letters, digits and underscores, a letter first.
        build: called as ``build(num_features, num_components, **options)``, returns the layer for
            x (N, C, \*). What has a default in its signature is an option; those with the name of a setting of
            ``NormConfig`` (eps, momentum, affine, ...) are set by it, ``seed`` and ``backend`` are passed where taken.
            Options it refuses raise ValueError, "eps: expected ...".
        takes_clusters: the layer is called as ``layer(x, cluster)``, with cluster (N,) int64.

    Raises:
        ValueError: the name is taken or none, or build cannot be called with two sizes alone.
    """
    if not isinstance(name, str) or not re.fullmatch(r"[a-z][a-z0-9_]*", name):
        raise ValueError(f"name: expected lower-case letters, digits and underscores, a letter first, got {name!r}")
    if name in _KINDS:
        raise ValueError(f"name: {name} is taken; the kinds are {', '.join(_KINDS)}")
    try:
        signature = inspect.signature(build)
        signature.bind("num_features", "num_components")
    except (TypeError, ValueError) as error:  # not callable, or without a signature
        raise ValueError(
            f"build: expected a function of num_features, num_components and options with defaults ({error})"
        ) from None
    options = {p.name: p.default for p in [*signature.parameters.values()][2:] if p.default is not p.empty}
    _KINDS[name] = _Kind(build, takes_clusters, options)


def kinds(*, takes_clusters: bool | None = None) -> tuple[str, ...]:
    """Return the names of all kinds, or of those that take the samples' clusters, or take none."""
    return tuple(name for name, kind in _KINDS.items() if takes_clusters in (None, kind.takes_clusters))


def check_kind(field: str, kind: object) -> None:
    """Raise ValueError, naming the field, the kinds and the nearest one, unless kind is one of them."""
    if kind not in tuple(_KINDS):
        near = difflib.get_close_matches(str(kind), _KINDS, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        if kind in getattr(other_module("registry"), "_KINDS", ()):
            hint = f", which is registered with {OTHER}; {ADVICE}"
        raise ValueError(f"{field}: expected one of {', '.join(_KINDS)}, got {kind}{hint}")


def default_options(kind: str) -> dict[str, Any]:
    """Return the keyword options of a kind's layer and their defaults.

    Raises:
        ValueError: an unknown kind.
    """
    check_kind("kind", kind)
    return dict(_KINDS[kind].options)


def check_options(kind: str, options: Mapping[str, Any]) -> None:
    """Raise ValueError for an unknown kind, or an option that its layer does not have."""
    known = default_options(kind)
    for name, value in options.items():
        if name not in known:
            raise ValueError(f"{name}: {value!r} is no option of kind {kind!r}; it has {', '.join(known) or 'none'}")


def make_norm(kind: str, num_features: int, num_components: int, **options: Any) -> nn.Module:
    """Make the normalization layer of a kind.

    Args:
        kind: "bn" (batch), "in" (instance), "dsbn" (one BatchNorm a domain), "mn" (``MixtureNorm``),
            "scb" (``SCBNorm``), "scb_base" (``SCBNormBase``), "ucb" (``UCBNorm``), "none" (no layer at that place),
            or one added by ``register_norm``. dsbn, scb and scb_base take ``(x, cluster)``, the others x alone.
        num_features: channels C.
        num_components: components, clusters or domains K; "bn", "in" and "none" have none and ignore it.
        options: keyword options of the layer.

    Raises:
        ValueError: an unknown kind, an option that the layer does not have, or a kind whose layer is none.
    """
    check_options(kind, options)
    layer = _KINDS[kind].build(num_features, num_components, **options)
    if not isinstance(layer, nn.Module):
        raise ValueError(f"kind: expected {kind} to make a torch.nn.Module, got {type(layer).__name__}")
    refuse_other_layers(layer)
    return layer
