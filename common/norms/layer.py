"""What every normalization layer of this package shares: checks, channel order, affine, printing."""

from typing import Any

import torch
from torch import Tensor, nn

from . import checks, functional

DeviceLike = torch.device | str | int | None


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
        checks.check_choice("backend", backend, functional.BACKENDS)
        checks.check_size("num_features", num_features)
        checks.check_eps(eps)
        if not checks.is_integer(channel_dim) or channel_dim == 0:
            raise ValueError(f"channel_dim: expected a dimension other than the batch's, got {channel_dim!r}")
        checks.check_dtype(dtype)
        self.num_features, self.eps, self.affine = num_features, eps, affine
        self.channel_dim, self.backend = channel_dim, backend
        shape, placed = (num_features,), {"device": device, "dtype": dtype}
        self.weight = nn.Parameter(torch.empty(shape, **placed)) if affine else None
        self.bias = nn.Parameter(torch.empty(shape, **placed)) if affine else None
        self._seen_initialized = False  # on the host, so that a seeded layer never asks the device

    def reset_parameters(self) -> None:
        """Set the affine map to the identity."""
        if self.weight is not None and self.bias is not None:
            nn.init.ones_(self.weight)
            nn.init.zeros_(self.bias)
        self.forget_initialized()

    def forget_initialized(self) -> None:
        """Look at ``initialized`` again when next asked: it was written from outside."""
        self._seen_initialized = False

    def is_initialized(self) -> bool:
        """Say whether nothing is left to seed from data."""
        if not self._seen_initialized:
            self._seen_initialized = bool(self.initialized.all())
        return self._seen_initialized

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self.forget_initialized()
        super()._load_from_state_dict(*args, **kwargs)

    def _channels_first(self, x: Tensor) -> Tensor:
        r"""Check x and return it as (N, C, \*)."""
        checks.check_input(x, self.num_features, self.channel_dim)
        return x.movedim(self.channel_dim, 1)

    def _finish(self, y: Tensor) -> Tensor:
        """Apply the affine map and put the channels back."""
        if self.weight is not None and self.bias is not None:
            y = functional.affine(y, self.weight, self.bias)
        return y.movedim(1, self.channel_dim)

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
