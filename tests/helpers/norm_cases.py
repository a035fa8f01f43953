"""Inputs and oracles that several tests of the layers share."""

from typing import Any

import pytest
import torch
from torch import Tensor

from common.norms import make_norm
from common.norms.agreement import budget, cluster_results, error, mixture_case, mixture_results
from common.norms.backends.reference import Moments

__all__ = ["GRADIENTS", "any_norm", "assert_within_budget", "cluster_run", "in_full", "mixture_case", "mixture_run"]

GRADIENTS = ("y", "dx", "dlog_lambda", "dmean", "dvar")


def in_full(*cases: Any) -> list[Any]:
    """Return cases that ``make test-full`` runs and ``make test`` does not."""
    return [pytest.param(*(case if isinstance(case, tuple) else (case,)), marks=pytest.mark.full) for case in cases]


def any_norm(kind: str, num_features: int, num_components: int, **options: Any) -> Any:
    """Make a layer, of a type that the checker lets tests look into."""
    return make_norm(kind, num_features, num_components, **options)


def cast(case: tuple[Tensor, ...], dtype: torch.dtype) -> Any:
    return tuple(t.to(dtype) for t in case)


def mixture_run(
    case: tuple[Tensor, ...], dtype: torch.dtype, backend: str, **options: object
) -> tuple[dict[str, Tensor], Moments | None]:
    """Return output, gradients and moments of mixture_norm on a case, computed in dtype."""
    return mixture_results(cast(case, dtype), backend, **options)


def cluster_run(case: tuple[Tensor, ...], cluster: Tensor, dtype: torch.dtype, backend: str) -> dict[str, Tensor]:
    """Return output and gradients of cluster_norm on a case, computed in dtype."""
    return cluster_results(cast(case, dtype), cluster, backend)


def assert_within_budget(exact: dict[str, Tensor], ours: dict[str, Tensor], plain: dict[str, Tensor]) -> None:
    """Assert that ours errs at most twice as much as plain, the reference in the same precision, plus rounding."""
    for name, want in exact.items():
        found, allowed = error(want, ours[name]), budget(want, plain[name])
        assert found <= allowed, f"{name}: {found:.2e} > {allowed:.2e}"


def assert_an_offset_costs_no_moments(groups: int, positions: int) -> None:
    """As eager does with 1e6 added: half an ulp of it for the mean, two passes' accuracy for the variance."""
    x, log_lambda, mean, var, g = mixture_case((16, 4, positions), num=3, dtype=torch.float32)
    case = x + 1e6, log_lambda, mean + 1e6, var, g
    _, want = mixture_run(case, torch.float64, "reference", groups=groups)
    _, got = mixture_run(case, torch.float32, "compiled", groups=groups)
    assert got is not None
    assert want is not None
    assert float((got.mean - want.mean).abs().max()) <= 0.0313
    torch.testing.assert_close(got.var.double(), want.var, rtol=1e-3, atol=0)
