"""What every normalization layer of this package shares: checks, channel order, affine, printing."""

import functools
from collections.abc import Callable
from typing import Any, ParamSpec, Self, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from . import functional
from .backends import checkpointing, graphs

P = ParamSpec("P")
R = TypeVar("R")
DeviceLike = torch.device | str | int | None
FLAG = torch.float32
"""Type of ``initialized``, where 0 is not seeded: ``AveragedModel`` cannot average bool, and rounds whole numbers down.

A scalar of float64 torch.compile takes for a number, and compiles twice."""


def leaf(forward: Callable[P, R]) -> Callable[P, R]:
    """Let torch.fx see a layer, by its forward, as one step, which is what it makes of torch's own layers."""

    @functools.wraps(forward)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> R:
        layer: Any = args[0]
        for value in (*args[1:], *kwargs.values()):
            if isinstance(value, torch.fx.Proxy):
                tracer: Any = value.tracer
                return tracer.create_proxy("call_module", tracer.path_of_module(layer), args[1:], kwargs)
        return forward(*args, **kwargs)

    return wrapped


class NormLayer(nn.Module):
    r"""A layer over x (N, C, \*) with an optional affine map and a buffer that says whether it is seeded."""

    initialized: Tensor

    def __init__(
        self,
        num_features: int,
        *,
        eps: float,
        affine: bool,
        channel_dim: int,
        backend: str,
        device: DeviceLike = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.num_features = functional.check_size("num_features", num_features)
        self.eps = functional.check_eps(eps)
        if not functional.is_integer(channel_dim) or channel_dim == 0:
            raise ValueError(f"channel_dim: expected a dimension other than the batch's, got {channel_dim!r}")
        functional.check_dtype(dtype)
        self.affine, self.channel_dim, self.backend = affine, int(channel_dim), backend
        shape, placed = (num_features,), {"device": device, "dtype": dtype}
        self.weight = nn.Parameter(torch.empty(shape, **placed)) if affine else None
        self.bias = nn.Parameter(torch.empty(shape, **placed)) if affine else None
        self.forget_initialized()

    def reset_parameters(self) -> None:
        """Set the affine map to the identity."""
        if self.weight is not None and self.bias is not None:
            nn.init.ones_(self.weight)
            nn.init.zeros_(self.bias)

    def set_initialized(self, value: bool) -> None:
        """Write ``initialized``, all of it, and know what was written."""
        self.initialized.fill_(value)
        self._seen_initialized = value
        self._ready = torch.tensor(value, device="cpu")

    def forget_initialized(self) -> None:
        """Look at ``initialized`` again when next asked: it was written from outside."""
        self._seen_initialized = False  # on the host, so that a seeded layer never asks the device
        # The same for graphs, which were compiled before the layer was seeded.
        self._ready: Tensor = torch.tensor(False, device="cpu")

    def is_initialized(self) -> bool:
        """Say whether nothing is left to seed from data."""
        if not self._seen_initialized:
            graphs.refuse(self.initialized, graphs.WARM_UP)
            self._seen_initialized = bool(self.initialized.all())
        return self._seen_initialized

    @checkpointing.computed_once
    def _may_seed(self) -> bool:
        """Say whether something may be left to seed; a graph cannot ask the device."""
        return not self._seen_initialized and (torch.compiler.is_compiling() or not self.is_initialized())

    def _seed_refusal(self, option: str) -> str | None:
        """Say why no batch can seed parameters, if what is written to one now is lost."""
        sharded = getattr(self, "_is_fsdp_managed_module", False)  # FSDP, of either version, says so to torch.compile
        if not sharded and not any(parametrize.is_parametrized(module) for module in self.modules()):
            return None
        return (
            f"{option}: the first training batches seed parameters, and FSDP and torch.nn.utils.parametrize lose that; "
            "seed before wrapping: train on these batches, load a state dict or call set_initialized(True)"
        )

    def _known_ready(self) -> Tensor | None:
        """Return what a graph is to know of the seeding; an exported one has only what the state dict holds."""
        return None if torch.compiler.is_exporting() else self._ready

    def _learn_ready(self, ready: Tensor) -> None:
        if not torch.compiler.is_exporting():
            self._ready = ready

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        super()._apply(fn, recurse)
        self.initialized = self.initialized.to(FLAG)
        return self

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self.forget_initialized()
        super()._load_from_state_dict(*args, **kwargs)

    def _channels_first(self, x: Tensor) -> Tensor:
        r"""Check x and return it as (N, C, \*)."""
        functional.check_input(x, self.num_features, self.channel_dim)
        return x if self.channel_dim == 1 else x.movedim(self.channel_dim, 1)

    def _channels_back(self, y: Tensor) -> Tensor:
        """Put the channels back where they were."""
        return y if self.channel_dim == 1 else y.movedim(1, self.channel_dim)

    def _finish(self, y: Tensor) -> Tensor:
        """Apply the affine map and put the channels back."""
        if self.weight is not None and self.bias is not None:
            y = functional.affine(y, self.weight, self.bias)
        return self._channels_back(y)

    def _options(self) -> dict[str, Any]:
        """Return option: (value, default)."""
        raise NotImplementedError

    def _size(self) -> int:
        raise NotImplementedError

    def extra_repr(self) -> str:
        """Show the sizes, and every option that is not at its default."""
        options = {
            "eps": (self.eps, 1e-5),
            **self._options(),
            "channel_dim": (self.channel_dim, 1),
            "backend": (self.backend, "auto"),
        }
        shown = [f"{name}={value!r}" for name, (value, default) in options.items() if value != default]
        return ", ".join([str(self.num_features), str(self._size()), *shown])
