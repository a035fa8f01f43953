"""Inputs and oracles that several tests of the layers share."""

from typing import Any

import torch
from torch import Tensor

from common.norms import cluster_norm, make_norm, mixture_norm
from common.norms.reference import Moments

GRADIENTS = ("y", "dx", "dlog_lambda", "dmean", "dvar")


def any_norm(kind: str, num_features: int, num_components: int, **options: Any) -> Any:
    """Make a layer, of a type that the checker lets tests look into."""
    return make_norm(kind, num_features, num_components, **options)


def mixture_case(
    shape: tuple[int, ...], num: int, dtype: torch.dtype = torch.float64, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return x, log_lambda, mean, var and an output gradient, none of them special."""
    rng = torch.Generator().manual_seed(seed)

    def draw(*size: int) -> Tensor:
        return torch.randn(*size, generator=rng, dtype=torch.float64)

    channels = shape[1]
    x, g = 1.5 * draw(*shape) + 0.3, draw(*shape)
    log_lambda = draw(num).log_softmax(0)
    mean, var = draw(num, channels), (0.5 * draw(num, channels)).exp()
    # Rounded first, so that every dtype computes on the same numbers.
    return tuple(t.to(dtype) for t in (x, log_lambda, mean, var, g))  # pyright: ignore[reportReturnType]


def mixture_run(
    case: tuple[Tensor, ...], dtype: torch.dtype, backend: str, **options: object
) -> tuple[dict[str, Tensor], Moments | None]:
    """Return output, gradients and moments of mixture_norm on a case, computed in dtype."""
    *inputs, g = (t.to(dtype) for t in case)
    inputs = [t.detach().requires_grad_() for t in inputs]
    y, moments = mixture_norm(*inputs, backend=backend, **options)  # pyright: ignore[reportArgumentType]
    return dict(zip(GRADIENTS, (y, *torch.autograd.grad(y, inputs, g)), strict=True)), moments


def cluster_run(case: tuple[Tensor, ...], cluster: Tensor, dtype: torch.dtype, backend: str) -> dict[str, Tensor]:
    """Return output and gradients of cluster_norm on a case, computed in dtype."""
    x, _, mean, var, g = (t.to(dtype) for t in case)
    inputs = [t.detach().requires_grad_() for t in (x, mean, var)]
    y = cluster_norm(inputs[0], cluster, *inputs[1:], backend=backend)
    return dict(zip(("y", "dx", "dmean", "dvar"), (y, *torch.autograd.grad(y, inputs, g)), strict=True))


def assert_within_budget(exact: dict[str, Tensor], ours: dict[str, Tensor], plain: dict[str, Tensor]) -> None:
    """Assert that ours errs at most twice as much as plain, the reference in the same precision.

    An entry is a sum of up to M terms that may cancel, in another order than the reference's: either order's
    error is a random walk of sqrt(M) roundings of the largest partial sum, which 8 ulp of the largest entry
    covers for the sizes here, where the reference happens to be lucky.
    """
    for name in exact:
        want, got, base = (run[name].detach().double() for run in (exact, ours, plain))
        ulp = torch.finfo(ours[name].dtype).eps * float(want.abs().max())
        error = float((got - want).abs().max())
        budget = 2 * float((base - want).abs().max()) + 8 * ulp
        assert error <= budget, f"{name}: {error:.2e} > {budget:.2e}"
