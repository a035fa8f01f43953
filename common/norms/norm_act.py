"""A normalization layer with its activation, for constructors that ask for one module that does both."""

import inspect
from collections import OrderedDict
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from torch import Tensor, nn


class NormAct(nn.Sequential):
    """A normalization layer, then dropout, then an activation: timm's BatchNormAct2d with another norm.

    Its parts are ``norm``, ``drop`` and ``act``, also in state dicts.
    """

    norm: nn.Module
    drop: nn.Module
    act: nn.Module

    def __init__(self, norm: nn.Module, drop: nn.Module | None = None, act: nn.Module | None = None) -> None:
        after = {"drop": drop, "act": act}
        parts = {name: nn.Identity() if part is None else part for name, part in after.items()}
        super().__init__(OrderedDict(norm=norm, **parts))

    @property
    def weight(self) -> Tensor | None:
        """The norm's, where constructors that start a residual branch at zero look for it."""
        return getattr(self.norm, "weight", None)

    @property
    def bias(self) -> Tensor | None:
        """The norm's."""
        return getattr(self.norm, "bias", None)


def norm_act(
    norm_layer: Callable[..., nn.Module], act_layer: Callable[..., nn.Module] | None, **options: Any
) -> Callable[..., NormAct]:
    """Return a ``norm_layer`` for constructors whose norms hold the activation, such as timm's EfficientNet.

    Such a constructor says where an activation follows, but not which: it knows only its own norms'.
    The result takes the number of channels and what timm passes: ``apply_act``, ``act_kwargs``,
    ``inplace``, ``drop_layer``, and options of the norm. It can be pickled if its parts can.

    Args:
        norm_layer: makes the norm of a number of channels: ``UCBNorm``, ``SCBNorm``, ...
        act_layer: makes the activation, such as ``nn.SiLU``; None for none.
        options: of the norm.

    Raises:
        ValueError: one of the two cannot be called.

    Example:
        >>> timm.create_model("efficientnet_b0", norm_layer=norm_act(UCBNorm, nn.SiLU, num_components=3))
    """
    if not callable(norm_layer):
        raise ValueError(f"norm_layer: expected a class such as UCBNorm, got {norm_layer!r}")
    if act_layer is not None and not callable(act_layer):
        raise ValueError(f"act_layer: expected a class such as nn.SiLU, or None, got {act_layer!r}")
    # A partial of a function is what timm takes for "makes a norm with its activation"; a class it looks up by name.
    return partial(_build, norm_layer=norm_layer, act_layer=act_layer, **options)


def _build(
    num_features: int,
    *,
    norm_layer: Callable[..., nn.Module],
    act_layer: Callable[..., nn.Module] | None,
    apply_act: bool = True,
    act_kwargs: Mapping[str, Any] | None = None,
    inplace: bool = False,
    drop_layer: Callable[[], nn.Module] | None = None,
    **options: Any,
) -> NormAct:
    drop = None if drop_layer is None else drop_layer()
    act = None
    if apply_act and act_layer is not None:
        has_inplace = "inplace" in inspect.signature(act_layer).parameters
        act = act_layer(**({"inplace": inplace} if has_inplace else {}) | dict(act_kwargs or {}))
    return NormAct(norm_layer(num_features, **options), drop, act)
