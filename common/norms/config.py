"""The configuration of a normalization layer, as experiments and command lines state it."""

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from . import functional
from .registry import BUILT_IN, MIXTURES, WITHOUT_COMPONENTS, check_kind, default_options, kinds, make_norm


@dataclass(frozen=True, kw_only=True)
class NormConfig:
    """A normalization layer; a setting left at null takes the layer's own default (see docs of `common.norms`)."""

    kind: str = dataclasses.field(default="ucb", metadata={"names": kinds})
    """bn, in (instance), dsbn (one BatchNorm a domain), mn (EM mixture), scb, scb_base (known clusters), ucb, none (no
    layer at that place), or a kind of your own (register_norm)."""
    num_components: int = 3
    """Mixture components or clusters K; bn, in and none have none and ignore it."""
    groups: int | None = None
    """Groups of channels that share one posterior: 1 is the paper's joint one, null is one channel each."""
    update: Literal["moving_average", "weight"] | None = None
    """ucb: parameters by moving averages, or learned as weights."""
    statistics: Literal["batch", "learned", "instance"] | None = None
    """ucb: normalise by the batch's moments (Eqs. 7-9) or the learned parameters (Eq. 15) in training; scb, scb_base:
    batch standardises each channel over the batch first, instance over the sample's own positions."""
    average: Literal["em", "paper"] | None = None
    """ucb: stepwise EM, or the plain rule of Algorithm 2."""
    scale: Literal["paper", "sqrt_k"] | None = None
    """mn, ucb: keep Eq. 7's variance of up to K, or divide by sqrt(K)."""
    init: Literal["uniform", "kmeans++", "identity", "data"] | None = None
    """ucb: uniform or kmeans++ means; scb, scb_base: identity or the first batch's moments."""
    momentum: float | None = None
    """Weight of the new batch in moving averages, PyTorch's orientation."""
    min_weight: float | None = None
    """mn, ucb: floor of a component's weight, more than 0 and at most 1 / K."""
    variance: Literal["component", "shared"] | None = None
    """ucb: store a variance of each component, or one a channel for all of them."""
    reseed: float | None = None
    """ucb: move a component that holds less than this share to unlikely locations; 0 never does."""
    eps: float | None = None
    """Added to every variance."""
    affine: bool | None = None
    """Learn a scale and shift per channel."""
    backend: Literal["auto", "reference", "eager", "compiled", "triton"] = "auto"
    """How the layer computes; every backend gives the same numbers within rounding."""

    def __post_init__(self) -> None:
        check_kind("norm.kind", self.kind)
        functional.check_size("norm.num_components", self.num_components)
        accepted, given = default_options(self.kind), self._given()
        for name, value in given.items():
            if name not in accepted:
                raise ValueError(f"norm.{name}: {value} means nothing to norm.kind {self.kind}; leave it out")
        if self.groups is not None:
            functional.check_size("norm.groups", self.groups)
            given["groups"] = 1
        if self.kind in BUILT_IN:  # of others nobody knows which sizes they take
            # A small layer refuses what this one would, which may need more memory than there is.
            self._make(2, min(self.num_components, 64), given | {"backend": self.backend})

    def check_features(self, num_features: int) -> None:
        """Raise ValueError, with the field's dotted name, unless the layer can have so many channels."""
        if self.groups is not None:
            try:
                functional.check_groups(self.groups, num_features)
            except ValueError as error:
                raise ValueError(f"norm.{error}") from None
        if self.kind not in BUILT_IN:
            self.build(num_features)

    def build(self, num_features: int, seed: int = 0) -> nn.Module:
        """Make the layer for ``num_features`` channels; ``seed`` is that of a mixture's own generator.

        Raises:
            ValueError: for a combination the layer refuses, with the field's dotted name.
        """
        return self._make(num_features, self.num_components, self.options(seed))

    def options(self, seed: int) -> dict[str, Any]:
        """Return the layer's keyword options that are set here, with the seed of a mixture's own generator."""
        known, given = default_options(self.kind), self._given() | {"backend": self.backend, "seed": seed}
        return {name: value for name, value in given.items() if name in known}

    def _make(self, num_features: int, num_components: int, options: dict[str, Any]) -> nn.Module:
        known = default_options(self.kind)
        options = {name: value for name, value in options.items() if name in known}
        try:
            return make_norm(self.kind, num_features, num_components, **options)
        except ValueError as error:
            own = "" if self.kind in BUILT_IN else f"kind: {self.kind} for {num_features} channels: "
            raise ValueError(f"norm.{own}{error}") from None

    def resolved(self) -> "NormConfig":
        """Return this configuration with the layer's defaults written out, as a run stores it."""
        defaults = default_options(self.kind)
        missing = {name: defaults[name] for name in _FIELDS if name in defaults and getattr(self, name) is None}
        return dataclasses.replace(self, **missing)

    def backend_on(self, device: torch.device, dtype: torch.dtype = torch.float32) -> str:
        """Return what ``backend`` comes to on a device for large activations of a dtype: "auto" is what can run there.

        On a CPU this compiles the loops of a mixture, unless they have been.

        Raises:
            ValueError: the layer has no such backend there, with the field's dotted name.
        """
        if self.backend != "auto" and (self.kind not in BUILT_IN or "backend" not in default_options(self.kind)):
            return self.backend  # of others nobody knows what it means; torch's own layers have none
        try:
            return functional.settled_backend(
                self.backend, device, dtype, self.num_components if self.kind in MIXTURES else 0
            )
        except ValueError as error:
            raise ValueError(f"norm.{error}") from None

    def _given(self) -> dict[str, Any]:
        return {name: value for name in _FIELDS if (value := getattr(self, name)) is not None}


_FIELDS = [
    field.name for field in dataclasses.fields(NormConfig) if field.name not in ("kind", "num_components", "backend")
]


def settings_of(kind: str) -> set[str]:
    """Return the names of the settings that mean something to a kind of layer.

    Raises:
        ValueError: an unknown kind.
    """
    names = {"kind", "backend", *(name for name in _FIELDS if name in default_options(kind))}
    return names if kind in WITHOUT_COMPONENTS else {*names, "num_components"}
