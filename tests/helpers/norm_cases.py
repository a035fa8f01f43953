"""Inputs and oracles that several tests of the layers share."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from common.norms import make_norm
from common.norms.agreement import budget, cluster_results, error, mixture_case, mixture_results
from common.norms.backends import eager, traced_passes
from common.norms.backends.cpu import library
from common.norms.backends.reference import Moments

__all__ = [
    "BACKENDS",
    "GRADIENTS",
    "any_norm",
    "assert_within_budget",
    "backend",
    "cluster_run",
    "in_full",
    "mixture_case",
    "mixture_run",
    "needs_compiler",
]

needs_compiler = pytest.mark.skipif(shutil.which(library.compiler()) is None, reason="needs a C++ compiler on the PATH")
BACKENDS = ("reference", "eager", "traced", pytest.param("compiled", marks=needs_compiler))
"""Of mixtures; those of clusters are all but the last."""
GRADIENTS = ("y", "dx", "dlog_lambda", "dmean", "dvar")


def in_full(*cases: Any) -> list[Any]:
    """Return cases that ``make test-full`` runs and ``make test`` does not."""
    return [pytest.param(*(case if isinstance(case, tuple) else (case,)), marks=pytest.mark.full) for case in cases]


@contextmanager
def backend(name: str) -> Iterator[str]:
    """Give the name that layers know a backend by; "traced" is eager with the passes of graphs, run as they are."""
    if name != "traced":
        yield name
        return
    with mock.patch.object(eager, "_passes", return_value=traced_passes):
        yield "eager"


def any_norm(kind: str, num_features: int, num_components: int, **options: Any) -> Any:
    """Make a layer, of a type that the checker lets tests look into."""
    return make_norm(kind, num_features, num_components, **options)


def cast(case: tuple[Tensor, ...], dtype: torch.dtype) -> Any:
    return tuple(t.to(dtype) for t in case)


def mixture_run(
    case: tuple[Tensor, ...], dtype: torch.dtype, by: str, **options: object
) -> tuple[dict[str, Tensor], Moments | None]:
    """Return output, gradients and moments of mixture_norm on a case, computed in dtype."""
    with backend(by) as name:
        return mixture_results(cast(case, dtype), name, **options)


def cluster_run(case: tuple[Tensor, ...], cluster: Tensor, dtype: torch.dtype, by: str) -> dict[str, Tensor]:
    """Return output and gradients of cluster_norm on a case, computed in dtype."""
    with backend(by) as name:
        return cluster_results(cast(case, dtype), cluster, name)


def assert_within_budget(exact: dict[str, Tensor], ours: dict[str, Tensor], plain: dict[str, Tensor]) -> None:
    """Assert that ours errs at most twice as much as plain, the reference in the same precision, plus rounding."""
    for name, want in exact.items():
        found, allowed = error(want, ours[name]), budget(want, plain[name])
        assert found <= allowed, f"{name}: {found:.2e} > {allowed:.2e}"
