"""Every backend against the reference in float64, at configurations drawn at random, under one error budget.

The budget is `agreement.budget`: twice the error that the reference itself has in the same precision, and 8 ulp of the
largest entry. Another order of summation errs as much as the reference's, by the random walk of as many roundings. On a
single input the reference may be lucky, where roundings cancel, so it counts the worst of a few roundings of the input.
"""

import functools
import itertools
import math
from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from norm_cases import GRADIENTS, assert_within_budget, backend, cluster_run, mixture_case, mixture_run, needs_compiler
from torch import Tensor

from common.norms import mixture_norm
from common.norms.agreement import budget, error
from common.norms.backends import passes

ROUNDINGS = 3
POSITIONS: tuple[tuple[int, ...], ...] = ((), (1, 1), (5,), (3, 7), (8, 8))
drawn = functools.partial(settings, derandomize=True, database=None, deadline=None)


def channels_last(t: Tensor) -> Tensor:
    return t.movedim(1, -1).contiguous().movedim(-1, 1)


@st.composite
def configurations(draw: Any, *dtypes: torch.dtype) -> dict[str, Any]:
    """Draw a shape, in a layout, and the options of a mixture."""
    groups, width = draw(st.sampled_from([1, 2, 6])), draw(st.sampled_from([1, 2, 3, 6]))
    positions = draw(st.sampled_from(POSITIONS))
    # Not two values a channel: then dx is the rounding of terms that cancel exactly.
    samples = draw(st.integers(3, 17))
    # Nor fewer than two locations a component, whose variance is then a rounding, and divides.
    most = samples * math.prod(positions) // 2
    return {
        "shape": (samples, groups * width, *positions),
        "groups": groups,
        "num": draw(st.sampled_from([k for k in (1, 2, 3, 5, 8) if k <= most])),
        "statistics": draw(st.sampled_from(["batch", "learned"])),
        "scale": draw(st.sampled_from(["paper", "sqrt_k"])),
        "affine": draw(st.booleans()),
        "last": draw(st.booleans()),
        "dtype": draw(st.sampled_from(dtypes)),
        "seed": draw(st.integers(0, 1000)),
    }


def results(
    case: list[Tensor], by: str, dtype: torch.dtype, parameters: torch.dtype, **options: Any
) -> dict[str, Tensor]:
    """Return output, gradients and moments, with x and its gradient in dtype, and the rest in another."""
    *given, g = (t.to(dtype if i in (0, 4) else parameters) for i, t in enumerate(case))
    affine = {name: t.to(parameters).requires_grad_() for name, t in options.items() if isinstance(t, Tensor)}
    inputs = [t.detach().requires_grad_() for t in given]
    with backend(by) as name:
        y, moments = mixture_norm(*inputs, **(options | affine), backend=name)  # pyright: ignore[reportCallIssue]
        gradients = torch.autograd.grad(y, [*inputs, *affine.values()], g)
    assert y.dtype == dtype
    assert [t.dtype for t in gradients] == [t.dtype for t in (*inputs, *affine.values())]
    assert moments is None or not any(t.requires_grad for t in moments)
    found = dict(zip((*GRADIENTS, "dweight", "dbias"), (y.detach(), *gradients), strict=False))
    return found | ({} if moments is None else moments._asdict())


def nearby(case: list[Tensor], seed: int) -> list[Tensor]:
    """Return a case whose numbers are rounded otherwise, by up to an ulp of float32."""
    rng, ulp = torch.Generator().manual_seed(seed), torch.finfo(torch.float32).eps
    return [(t.double() * (1 + ulp * (2 * torch.rand(t.shape, generator=rng) - 1))).float() for t in case]


def check(by: str, *, shape, num, last, dtype, affine, seed, **options: Any) -> None:
    """Hold a backend against the reference in float64; in float64 itself as closely as sums of a thousand terms go."""
    half = dtype if dtype.itemsize == 2 else torch.float32
    case = list(mixture_case(shape, num, torch.float32, seed))
    for i in (0, 4):
        case[i] = case[i].to(half).float()
        case[i] = channels_last(case[i]) if last else case[i]
    if affine:
        options["weight"], options["bias"] = mixture_case((2, shape[1]), 1, torch.float32, seed)[0]
    exact = results(case, "reference", torch.float64, torch.float64, **options)
    ours = results(case, by, dtype, torch.promote_types(dtype, torch.float32), **options)
    if dtype == torch.float64:
        for name, want in exact.items():
            torch.testing.assert_close(ours[name], want, rtol=1e-12, atol=1e-12 * max(1, float(want.abs().max())))
        return
    cases = [case, *(nearby(case, draw) for draw in range(ROUNDINGS))]
    plain = [results(each, "reference", dtype, torch.float32, **options) for each in cases]
    for name, want in exact.items():
        found, allowed = error(want, ours[name]), max(budget(want, each[name]) for each in plain)
        assert found <= allowed, f"{name}: {found:.2e} > {allowed:.2e}"


def of_shape(*shape: int, groups: int, statistics: str) -> dict[str, Any]:
    fixed = {"scale": "sqrt_k", "affine": True, "last": False, "num": 3, "dtype": torch.float32, "seed": 0}
    return {"shape": shape, "groups": groups, "statistics": statistics, **fixed}


@drawn(max_examples=100)
@given(configurations(torch.float64, torch.float32, torch.bfloat16, torch.float16))
@example(of_shape(3, 1, 1, groups=1, statistics="batch"))  # as many locations as components
def test_eager(configuration):
    with mock.patch.object(passes, "CHUNK_ELEMENTS", 30):  # several parts, the last one ragged
        check("eager", **configuration)


@drawn(max_examples=60)
@given(configurations(torch.float64, torch.float32, torch.bfloat16, torch.float16))
@example(of_shape(3, 1, 1, groups=1, statistics="batch"))
def test_the_passes_of_graphs(configuration):
    check("traced", **configuration)


@needs_compiler
@drawn(max_examples=100)
@given(configurations(torch.float32))
@example(of_shape(3, 1, 1, groups=1, statistics="batch"))
@example(of_shape(8, 32, 8, 8, groups=1, statistics="batch"))  # whole vectors, a joint chunk that is full
@example(of_shape(8, 32, 8, 8, groups=32, statistics="learned"))
@example(of_shape(3, 18, 16, 16, groups=9, statistics="batch"))  # groups that no vector divides
@example(of_shape(2, 3, 50, 41, groups=3, statistics="batch"))  # long rows that end in part of a vector
@example(of_shape(2, 3, 50, 41, groups=1, statistics="learned"))
def test_loops(configuration):
    check("compiled", **configuration)


@pytest.mark.parametrize("by", ["eager", "traced"])
def test_clusters(monkeypatch, by):
    monkeypatch.setattr(passes, "CHUNK_ELEMENTS", 30)
    for positions, samples, channels in itertools.product(POSITIONS, (3, 9), (1, 6)):
        case = mixture_case((samples, channels, *positions), num=3, dtype=torch.float32)
        cluster = torch.arange(samples) % 2  # cluster 2 is absent
        exact = cluster_run(case, cluster, torch.float64, "reference")
        plain, ours = (cluster_run(case, cluster, torch.float32, each) for each in ("reference", by))
        assert_within_budget(exact, ours, plain)
        assert not ours["dmean"][2].any()
        assert not ours["dvar"][2].any()


@pytest.mark.parametrize("by", ["eager", "traced"])
@pytest.mark.parametrize("away", [0, 6])
def test_moments_of_a_component_that_holds_next_to_nothing(away, by):
    case = mixture_case((5, 6, 4), num=3)
    case[2][2] += away
    for groups in (1, 3, 6):
        (_, want), (_, got) = (mixture_run(case, torch.float64, each, groups=groups) for each in ("reference", by))
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
