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
from norm_cases import (
    assert_clusters_within_budget,
    assert_within_budget,
    backend,
    channels_last,
    cluster_run,
    mixture_case,
    mixture_run,
    needs_compiler,
)
from torch import Tensor

from common.norms import cluster_norm
from common.norms.backends import passes

ROUNDINGS = 3
POSITIONS: tuple[tuple[int, ...], ...] = ((), (1, 1), (5,), (3, 7), (8, 8))
drawn = functools.partial(settings, derandomize=True, database=None, deadline=None)


@st.composite
def configurations(draw: Any, *dtypes: torch.dtype, components: tuple[int, ...] = (1, 2, 3, 5, 8)) -> dict[str, Any]:
    """Draw a shape, in a layout, and the options of a mixture."""
    # Not one channel: the budget is of the largest entry, and a sum that cancels there has roundings of larger ones.
    groups, width = draw(st.sampled_from([(1, 2), (1, 3), (1, 6), (2, 1), (2, 3), (2, 6), (6, 1), (6, 2), (6, 6)]))
    positions = draw(st.sampled_from(POSITIONS))
    # Not two values a channel: then dx is the rounding of terms that cancel exactly.
    samples = draw(st.integers(3, 17))
    # Nor fewer than two locations a component, whose variance is then a rounding, and divides.
    most = samples * math.prod(positions) // 2
    return {
        "shape": (samples, groups * width, *positions),
        "groups": groups,
        "num": draw(st.sampled_from([k for k in components if k <= most])),
        "statistics": draw(st.sampled_from(["batch", "learned"])),
        "scale": draw(st.sampled_from(["paper", "sqrt_k"])),
        "affine": draw(st.booleans()),
        "last": draw(st.booleans()),
        "dtype": draw(st.sampled_from(dtypes)),
        "seed": draw(st.integers(0, 1000)),
    }


def nearby(case: list[Tensor], seed: int) -> list[Tensor]:
    """Return a case whose numbers are rounded otherwise, by up to an ulp of float32."""
    rng, ulp = torch.Generator().manual_seed(seed), torch.finfo(torch.float32).eps
    return [(t.double() * (1 + ulp * (2 * torch.rand(t.shape, generator=rng) - 1))).float() for t in case]


def check(by: str, *, shape, num, last, dtype, seed, **options: Any) -> None:
    """Hold a backend against the reference in float64; in float64 itself as closely as sums of a thousand terms go."""
    half = dtype if dtype.itemsize == 2 else torch.float32
    case = list(mixture_case(shape, num, torch.float32, seed))
    for i in (0, 4):
        case[i] = case[i].to(half).float()
        case[i] = channels_last(case[i]) if last else case[i]
    exact = mixture_run(case, torch.float64, "reference", **options)
    ours = mixture_run(case, dtype, by, **options)
    if dtype == torch.float64:
        for name, want in exact.items():
            torch.testing.assert_close(ours[name], want, rtol=1e-12, atol=1e-12 * max(1, float(want.abs().max())))
        return
    cases = [case, *(nearby(case, draw) for draw in range(ROUNDINGS))]
    assert_within_budget(exact, ours, *(mixture_run(each, dtype, "reference", **options) for each in cases))


def of_shape(*shape: int, groups: int, statistics: str) -> dict[str, Any]:
    fixed = {"scale": "sqrt_k", "affine": True, "last": False, "num": 3, "dtype": torch.float32, "seed": 0}
    return {"shape": shape, "groups": groups, "statistics": statistics, **fixed}


@pytest.mark.parametrize("by", ["eager", "traced"])
@drawn(max_examples=60)
@given(configurations(torch.float64, torch.float32, torch.bfloat16, torch.float16))
@example(of_shape(3, 1, 1, groups=1, statistics="batch"))  # as many locations as components
def test_passes(by, configuration):
    with mock.patch.object(passes, "CHUNK_ELEMENTS", 30):  # of eager: several parts, the last one ragged
        check(by, **configuration)


@needs_compiler
@drawn(max_examples=60)
@given(configurations(torch.float32, components=(1, 3, 8)))  # each number takes seconds to compile
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
        found = assert_clusters_within_budget(case, torch.arange(samples) % 2, by)  # cluster 2 is absent
        assert not torch.cat([found["dmean"][2], found["dvar"][2]]).any()
    for ids, over, scale in itertools.product(([0, -1, 2, -1], None), ("location", "sample"), ("match", "paper")):
        cluster = None if ids is None else torch.tensor(ids)
        options = {"unknown_posterior": over, "unknown_scale": scale}
        case = mixture_case((4, 3, 7), num=3)
        want, got = (cluster_run(case, cluster, torch.float64, each, **options) for each in ("reference", by))
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)


def equations(x, ids, mean, var, over: str, scale: str):
    """Write Eqs. 10, 12 and 13 out, sample by sample, in float64."""
    rows = []
    for sample, known in zip(x.double(), ids, strict=True):
        u = (sample - mean.double()[:, :, None]) / (var.double()[:, :, None] + 1e-5).sqrt()  # (K, C, L)
        log_p = (-0.5 * u.square() - 0.5 * (var.double()[:, :, None] + 1e-5).log()).sum(1, keepdim=True)
        log_p = log_p.sum(2, keepdim=True) if over == "sample" else log_p
        y = (log_p.softmax(0) * u).sum(0) * (len(mean) ** 0.5 if scale == "paper" else 1)
        rows.append(y if known == -1 else u[known])
    return torch.stack(rows)


@pytest.mark.parametrize("by", ["reference", "eager", "traced"])
def test_known_and_unknown_samples_of_one_batch_are_normalised_by_the_equations(by):
    every_batch = [ids for n in (1, 2, 3) for ids in itertools.product((-1, 0, 1), repeat=n)]
    for ids, over, scale in itertools.product(every_batch, ("location", "sample"), ("match", "paper")):
        x, _, mean, var, _ = mixture_case((len(ids), 3, 4), 2, dtype=torch.float64)
        options: Any = {"unknown_posterior": over, "unknown_scale": scale}
        with backend(by) as name:
            got = cluster_norm(x, torch.tensor(ids), mean, var, backend=name, **options)
        torch.testing.assert_close(got, equations(x, ids, mean, var, over, scale), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("by", ["eager", "traced"])
def test_moments_of_a_component_that_holds_next_to_nothing(by):
    for away, groups in itertools.product((0, 6), (1, 3, 6)):
        case = mixture_case((5, 6, 4), num=3)
        case[2][2] += away
        want, got = (mixture_run(case, torch.float64, each, groups=groups) for each in ("reference", by))
        for name in ("mass", "mean", "var"):
            torch.testing.assert_close(got[name], want[name], rtol=1e-12, atol=1e-12)
