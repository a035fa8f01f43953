"""Inputs, oracles and steps that the tests of the layers share."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn

from common.norms import make_norm, mixture_norm
from common.norms.agreement import budget, cluster_results, error, mixture_case
from common.norms.backends import eager, traced_passes
from common.norms.backends.cpu import library

needs_compiler = pytest.mark.skipif(shutil.which(library.compiler()) is None, reason="needs a C++ compiler on the PATH")
BACKENDS = ("reference", "eager", "traced", pytest.param("compiled", marks=needs_compiler))
"""Of mixtures; those of clusters are all but the last."""
CLUSTERED = ("dsbn", "scb", "scb_base")
"""Kinds that take cluster ids."""
GRADIENTS = ("dx", "dlog_lambda", "dmean", "dvar", "dweight", "dbias")


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


def batch(seed: int = 0, shape: tuple[int, ...] = (6, 4, 5), dtype: torch.dtype = torch.float32) -> Tensor:
    """Return an activation."""
    return mixture_case(shape, 1, dtype, seed)[0]


def inputs(kind: str, x: Tensor, num: int = 3) -> tuple[Tensor, ...]:
    """Return what a layer of a kind is called with: x, and the samples' clusters where it takes any."""
    return (x, torch.arange(len(x)) % num) if kind in CLUSTERED else (x,)


def channels_last(t: Tensor) -> Tensor:
    return t.movedim(1, -1).contiguous().movedim(-1, 1)


def state(module: nn.Module) -> dict[str, Tensor]:
    return {name: t.clone() for name, t in module.state_dict().items()}


def assert_state(module: nn.Module, want: dict[str, Tensor], *but: str) -> None:
    """Assert that a module's state is this to the bit, but for some names."""
    found = module.state_dict()
    assert found.keys() == want.keys()
    for name, t in want.items():
        assert name in but or torch.equal(found[name], t), name


def step(layer: Any, x: Tensor, g: Tensor, *ids: Tensor | None) -> list[Tensor]:
    """Return the output of a layer, and the gradients of x and of its parameters."""
    x = x.detach().requires_grad_()
    y = layer(x, *ids)
    return [y, *torch.autograd.grad(y, [x, *layer.parameters()], g)]


def in_dtype(case: Any, dtype: torch.dtype) -> Any:
    """Return a case with x and its gradient in dtype, and the mixture in float32 at least."""
    full = torch.promote_types(dtype, torch.float32)
    return [t.to(dtype if i in (0, 4) else full) for i, t in enumerate(case)]


def mixture_run(case: Any, dtype: torch.dtype, by: str, affine: bool = False, **options: Any) -> dict[str, Tensor]:
    """Return output, gradients and moments of mixture_norm on a case in dtype, by name."""
    *given, g = in_dtype(case, dtype)
    if affine:
        given += [torch.linspace(*ends, given[0].shape[1], dtype=given[1].dtype) for ends in ((0.5, 1.5), (-1, 1))]
    given = [t.detach().requires_grad_() for t in given]
    maps = dict(zip(("weight", "bias"), given[4:], strict=False))
    with backend(by) as name:
        y, moments = mixture_norm(*given[:4], **maps, backend=name, **options)
        gradients = torch.autograd.grad(y, given, g)
    assert (y.dtype, y.shape) == (dtype, g.shape)
    assert [t.dtype for t in gradients] == [t.dtype for t in given]
    found = {"y": y.detach(), **dict(zip(GRADIENTS, gradients, strict=False))}
    assert moments is None or not any(t.requires_grad for t in moments)
    return found if moments is None else found | moments._asdict()


def cluster_run(case: Any, cluster: Tensor | None, dtype: torch.dtype, by: str, **options: Any) -> dict[str, Tensor]:
    """Return output and gradients of cluster_norm on a case in dtype, by name."""
    with backend(by) as name:
        found = cluster_results(in_dtype(case, dtype), cluster, name, **options)
    assert (found["y"].dtype, found["dx"].dtype) == (dtype, dtype)
    return found


def assert_within_budget(exact: dict[str, Tensor], ours: dict[str, Tensor], *plain: dict[str, Tensor]) -> None:
    """Assert that ours errs at most twice as much as the worst of plain runs in the same precision, plus rounding."""
    for name, want in exact.items():
        found, allowed = error(want, ours[name]), max(budget(want, each[name]) for each in plain)
        assert found <= allowed, f"{name}: {found:.2e} > {allowed:.2e}"


def assert_clusters_within_budget(
    case: Any, cluster: Tensor | None, by: str, plain: str = "reference", **options: Any
) -> dict[str, Tensor]:
    """Hold a backend's cluster_norm against the reference in float64; return what it found."""
    dtype = case[0].dtype
    exact = cluster_run(case, cluster, torch.float64, "reference", **options)
    ours, theirs = (cluster_run(case, cluster, dtype, each, **options) for each in (by, plain))
    assert_within_budget(exact, ours, theirs)
    return ours
