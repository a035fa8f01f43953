"""Runs of a backend to hold against the float64 reference, and how far off it may be: for the doctor and the tests."""

from typing import Any

import torch
from torch import Tensor

from .backends.reference import Moments
from .functional import cluster_norm, mixture_norm

Case = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]
"""x (N, C, *), log_lambda (K,), mean (K, C), var (K, C), and an output gradient like x."""


def mixture_case(shape: tuple[int, ...], num: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> Case:
    """Return a case of K = num components whose numbers are none of them special; they follow from the seed."""
    rng = torch.Generator().manual_seed(seed)

    def draw(*size: int) -> Tensor:
        return torch.randn(*size, generator=rng, dtype=torch.float64)

    channels = shape[1]
    x, g = 1.5 * draw(*shape) + 0.3, draw(*shape)
    log_lambda = draw(num).log_softmax(0)
    mean, var = draw(num, channels), (0.5 * draw(num, channels)).exp()
    return x.to(dtype), log_lambda.to(dtype), mean.to(dtype), var.to(dtype), g.to(dtype)


def mixture_results(case: Case, backend: str, **options: Any) -> tuple[dict[str, Tensor], Moments | None]:
    """Return output and gradients of mixture_norm on a case, by name, and the batch's moments."""
    *inputs, g = case
    inputs = [t.detach().requires_grad_() for t in inputs]
    y, moments = mixture_norm(*inputs, backend=backend, **options)
    gradients = torch.autograd.grad(y, inputs, g)
    return dict(zip(("y", "dx", "dlog_lambda", "dmean", "dvar"), (y.detach(), *gradients), strict=True)), moments


def cluster_results(case: Case, cluster: Tensor | None, backend: str, **options: Any) -> dict[str, Tensor]:
    """Return output and gradients of cluster_norm on a case, by name."""
    x, _, mean, var, g = case
    inputs = [t.detach().requires_grad_() for t in (x, mean, var)]
    y = cluster_norm(inputs[0], cluster, *inputs[1:], backend=backend, **options)
    return dict(zip(("y", "dx", "dmean", "dvar"), (y.detach(), *torch.autograd.grad(y, inputs, g)), strict=True))


def error(exact: Tensor, got: Tensor) -> float:
    """Return the largest difference of an entry; NaN if one is NaN."""
    return float((got.detach().cpu().double() - exact.detach()).abs().max())


def budget(exact: Tensor, plain: Tensor) -> float:
    """Return the error allowed: twice that of the reference in the same precision, and rounding.

    An entry is a sum of up to M terms that may cancel, in another order than the reference's: either order's
    error is a random walk of sqrt(M) roundings of the largest partial sum, which 8 ulp of the largest entry
    covers for the sizes of the doctor and the tests, where the reference happens to be lucky.

    Args:
        exact: of the reference in float64.
        plain: of the reference in the precision of the backend under test.
    """
    ulp = torch.finfo(plain.dtype).eps * float(exact.detach().abs().max())
    return 2 * error(exact, plain) + 8 * ulp
