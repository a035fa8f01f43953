"""What the closed forms are made of: a mixture in the shapes that passes use, and the passes themselves.

A pass is one loop over the activation that serves as many sums as it can. ``eager`` and ``traced``
implement the passes; ``closed_form`` puts them together to layers and their gradients.

Shapes: x and g (N, G, D, L), G groups of D channels at L positions of N samples; parameters (K, G, D, 1);
posteriors (K, N, G, L), in the compute dtype like all sums.
"""

from typing import NamedTuple, Protocol

import torch
from torch import Tensor


class Mixture(NamedTuple):
    """A mixture as the passes use it."""

    mean: Tensor
    """(K, G, D, 1)."""
    precision: Tensor
    """1 / (variance + eps), (K, G, D, 1)."""
    constant: Tensor
    """Log weight less half the log determinant, (K, G, 1); the term in 2 pi is common to all and cancels."""

    @classmethod
    def of(cls, log_lambda: Tensor, mean: Tensor, s: Tensor, split: tuple[int, int]) -> "Mixture":
        """Shape log weights (K,), means and variances plus eps, (K, C) each; split is of C into (G, D)."""
        shape = (len(mean), *split, 1)
        constant = log_lambda[:, None, None] - 0.5 * s.log().view(shape).sum(2)
        return cls(mean.reshape(shape), s.reciprocal().view(shape), constant)


class DensitySums(NamedTuple):
    """Sums over locations of z, the gradient of a component's log density, for the mixture's own gradients."""

    z: Tensor
    """(K, G)."""
    zu: Tensor
    """Of z (x - mean) / s, (K, G, D, 1)."""
    zuu: Tensor
    """Of z (x - mean)^2 / s^2, (K, G, D, 1)."""


def least_posterior(dtype: torch.dtype) -> float:
    """Return the posterior below which one counts as zero, 2^-100 in float32.

    It changes nothing that a sum could show, and keeps products with it out of the denormal numbers, which cost
    a CPU a hundred times as much as others.
    """
    return torch.finfo(dtype).tiny * 2.0**26


class Passes(Protocol):
    """The loops over an activation; tau None stands for the posteriors under mix, found again in the pass."""

    KEEP_SINGLE: bool
    """Whether to keep the posteriors of single channels for the backward pass: they are K times x."""

    def posterior(self, x: Tensor, mix: Mixture) -> Tensor | None:
        """Return tau (Eq. 6) for several passes to share, if that is worth it."""
        ...

    def moments(self, x: Tensor, mix: Mixture) -> tuple[Tensor | None, Tensor, Tensor, Tensor]:
        """Return tau (Eq. 6), as ``posterior``, mass (K, G), mean and variance (K, G, D, 1) of Eqs. 8 and 9."""
        ...

    def transform(
        self, x: Tensor, tau: Tensor | None, mean: Tensor, rstd: Tensor, bias: Tensor | None, mix: Mixture
    ) -> Tensor:
        """Return y = sum_k tau_k rstd_k (x - mean_k) + bias, Eqs. 7 and 15.

        rstd (K, G, D, 1) holds lambda^(-1/2) and the channel's scale too; bias is (G, D, 1).
        """
        ...

    def gradient_sums(
        self, x: Tensor, g: Tensor, tau: Tensor | None, mean: Tensor, mix: Mixture
    ) -> tuple[Tensor, Tensor]:
        """Return the sums of tau g and tau g (x - mean) over the locations, (K, G, D, 1)."""
        ...

    def batch_gradients(
        self,
        x: Tensor,
        g: Tensor,
        tau: Tensor | None,
        mean: Tensor,
        rstd: Tensor,
        dm: Tensor,
        dv: Tensor,
        constant: Tensor,
        mix: Mixture,
        wanted: bool,
    ) -> tuple[Tensor, DensitySums | None]:
        """Return dx of Eqs. 6-9, and the sums if they are wanted; dm and dv are the moments' gradients over mass."""
        ...

    def learned_gradients(
        self, x: Tensor, g: Tensor, rstd: Tensor, mix: Mixture, wanted: bool
    ) -> tuple[Tensor, tuple[DensitySums, Tensor, Tensor] | None]:
        """Return dx of Eq. 15, and if wanted the sums, and those of tau g and tau g (x - mean), (K, G, D, 1)."""
        ...

    def cluster_transform(self, x: Tensor, centre: Tensor, rho: Tensor) -> Tensor:
        """Return (x - centre) rho, Eq. 10, for x (N, C, L) and rows (N, C, 1)."""
        ...

    def cluster_gradients(
        self, x: Tensor, g: Tensor, centre: Tensor, rho: Tensor, need_dx: bool
    ) -> tuple[Tensor | None, Tensor]:
        """Return dx if it is needed, and the sums of g and g (x - centre) over positions, (2, N, C)."""
        ...
