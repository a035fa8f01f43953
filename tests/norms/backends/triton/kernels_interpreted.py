"""The kernels under Triton's interpreter; run by test_kernels.py in a process of its own."""

import math
import os
from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from launches import replaced_kernels
from norm_cases import assert_clusters_within_budget, channels_last, cluster_run, in_full, mixture_case, mixture_run

from common.norms import cluster_norm, mixture_norm
from common.norms.agreement import budget, error
from common.norms.backends.triton import (
    cluster_kernels,
    cluster_ops,
    launch,
    mixture_kernels,
    parameter_kernels,
    tile_configs,
)

assert os.environ.get("TRITON_INTERPRET") == "1"

pytestmark = [
    pytest.mark.usefixtures("tiles"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),  # NumPy's, of overflows and what is not finite
]
SCB: Any = cluster_kernels
MIXTURE: Any = mixture_kernels
PARAMETERS: Any = parameter_kernels
FLOAT, HALF, BRAIN = torch.float32, torch.float16, torch.bfloat16
WAYS = pytest.mark.parametrize(("tiles", "groups"), [("small", 1), ("channel", 4)], indirect=["tiles"])
"""Many programs for a block of channels, or one for each."""


def case(shape, num=3, dtype=FLOAT, memory="contiguous", offset=0.0):
    """As mixture_case, x and g rounded to dtype and laid out; parameters in float32."""

    def laid_out(t):
        if memory == "strided":  # every second position, of every second channel
            out = t.new_zeros(t.shape[0], 2 * t.shape[1], *t.shape[2:-1], 2 * t.shape[-1])[:, ::2, ..., ::2]
            return out.copy_(t)
        return channels_last(t) if memory == "channels_last" else t

    x, log_lambda, mean, var, g = mixture_case(shape, num, dtype=FLOAT)
    x, g = (laid_out(t.to(dtype)) for t in (x + offset, g))
    return x, log_lambda, mean + offset, var, g


@pytest.mark.parametrize(
    ("shape", "memory", "dtype", "num"),
    [
        ((9, 4), "contiguous", FLOAT, 3),
        ((3, 19, 5), "contiguous", FLOAT, 3),
        ((3, 19, 5), "channels_last", BRAIN, 3),
        ((2, 3, 13, 11), "strided", HALF, 3),
        ((12, 5, 6), "contiguous", FLOAT, 9),
        *in_full(
            ((3, 1, 1), "contiguous", FLOAT, 3), ((12, 5, 6), "contiguous", FLOAT, 1),
            *((shape, memory, FLOAT, 3) for shape in ((3, 19, 5), (2, 3, 13, 11))
              for memory in ("channels_last", "strided")),
        ),
    ],
    ids=str,
)  # fmt: skip
def test_scb_errs_at_most_twice_as_much_as_eager(shape, memory, dtype, num):
    """Of 19 channels there are several blocks, of 13 x 11 positions too; the last of several clusters is absent."""
    values, cluster = case(shape, num, dtype, memory), torch.arange(shape[0]).flip(0) % max(num - 1, 1)
    found = assert_clusters_within_budget(values, cluster, "triton", "eager", eps=0.3)
    assert num == 1 or not torch.cat([found["dmean"][-1], found["dvar"][-1]]).any()
    assert found["y"].stride() == values[0].stride() or memory == "strided"


def test_scb_survives_an_offset():
    values, cluster = case((6, 4, 8), offset=1e3), torch.arange(6) % 3
    exact, kernel = (
        cluster_run(values, cluster, dtype, by) for dtype, by in ((torch.float64, "reference"), (FLOAT, "triton"))
    )
    assert float((kernel["y"] - exact["y"]).abs().max()) < 1e-5  # x - mean is exact near 1e3


def test_scb_sums_over_an_expanded_gradient():
    """The gradient of a sum has strides of zero."""
    x, _, mean, var, _ = case((6, 4, 8))
    mean.requires_grad_()
    cluster_norm(x, torch.arange(6) % 3, mean, var, backend="triton").sum().backward()
    want = -2 * 8 * (var + 1e-5).rsqrt()  # two samples a cluster, eight positions
    torch.testing.assert_close(mean.grad, want)


def scb(x, g, cluster, mean, var, *, eps=1e-5, lowest=-1, unknown=False, weight=None, kappa=1.0):
    """Output and gradients of the operators, past the check of ids, as on a GPU."""
    tables, options = (cluster, mean, var, None, None, weight), (eps, kappa, lowest, False, unknown)
    y = cluster_ops.scb_forward(x, *tables, weight, *options)
    return y, *cluster_ops.scb_backward(x, g, *tables, *options)


@pytest.mark.parametrize(("lowest", "length"), [(-1, 5), (0, 1)])  # sums by sample, and by cluster
def test_scb_takes_the_row_of_an_id_the_first_for_an_unknown_one_and_nan_for_any_other(lowest, length):
    """A wrong id spoils its own sample alone, and -1 is one of them where nothing may be unknown."""
    x, _, mean, var, g = case((7, 19, length))
    weight = torch.linspace(0.5, 1.5, 19)
    cluster, right = torch.tensor([0, 3, 2, -2, -1, 1 << 40, 1]), [0, 2, 4, 6] if lowest else [0, 2, 6]
    y, dx, *rows = scb(x, g, cluster, mean, var, lowest=lowest, weight=weight)
    wrong = sorted(set(range(7)) - set(right))
    known = cluster[right].clamp(min=0)
    scale = (weight / (var + 1e-5).sqrt())[known, :, None]
    torch.testing.assert_close(y[right], (x[right] - mean[known, :, None]) * scale + weight[:, None])
    torch.testing.assert_close(dx[right], g[right] * scale)
    for each in (y, dx):
        assert each[wrong].isnan().all()
    kept = [0, 2, 6]  # what is unknown belongs to no row
    want = scb(x[kept], g[kept], cluster[kept], mean, var, weight=weight)[2:]
    torch.testing.assert_close(rows, list(want))


def check_mixture(values, affine=True, **options):
    """Assert that the kernels err at most four times as much as eager does: their posteriors are off by 3e-7."""
    dtype = values[0].dtype
    exact = mixture_run(values, torch.float64, "reference", affine, **options)
    # Eager may be lucky in one sum; the reference in the same precision is as fair a measure.
    eager, plain, kernel = (
        mixture_run(values, dtype, by, affine, **options) for by in ("eager", "reference", "triton")
    )
    for name, want in exact.items():
        allowed = 2 * max(budget(want, run[name]) for run in (eager, plain))
        assert error(want, kernel[name]) <= allowed, f"{name}: {error(want, kernel[name]):.2e} > {allowed:.2e}"
        assert (kernel[name].dtype, kernel[name].shape) == (eager[name].dtype, eager[name].shape), name


@pytest.mark.parametrize(
    ("tiles", "shape", "memory", "dtype", "groups", "statistics"),
    [
        ("small", (3, 6, 5), "contiguous", FLOAT, (1, 2, 6), "batch"),
        ("small", (3, 6, 5), "channels_last", FLOAT, (1, 2, 6), "learned"),
        ("small", (3, 6, 2, 5), "channels_last", BRAIN, (2,), "batch"),
        ("small", (3, 6, 2, 5), "contiguous", HALF, (6,), "learned"),
        # Of one sample, of forty locations: among nine a component holds next to none, and magnifies errors.
        ("small", (1, 6, 40), "channels_last", FLOAT, (1,), "batch"),
        ("small", (8, 4, 9), "offset", FLOAT, (4,), "learned"),
        ("channel", (8, 4, 9), "offset", FLOAT, (4,), "batch"),
        ("channel", (3, 4, 5), "strided", FLOAT, (4,), "batch"),  # tiles of several samples
        ("channel", (2, 3, 37), "contiguous", FLOAT, (3,), "batch"),  # tiles of a part of a sample
        ("channel", (3, 4, 2, 5), "contiguous", BRAIN, (4,), "batch"),
        ("channel", (3, 4, 2, 5), "contiguous", HALF, (4,), "batch"),
        *in_full(
            *(("small", shape, memory, FLOAT, groups, statistics) for statistics in ("batch", "learned")
              for shape, memory, groups in (
                  ((3, 1, 1), "contiguous", (1,)), ((9, 4), "contiguous", (1, 2, 4)),
                  ((2, 4, 3, 7), "contiguous", (1, 2, 4)), ((2, 4, 3, 7), "channels_last", (1, 2, 4)),
                  ((2, 4, 3, 7), "strided", (1, 2, 4)))),
            ("small", (3, 6, 2, 5), "contiguous", HALF, (2, 6), "batch"),
            ("small", (3, 6, 2, 5), "channels_last", BRAIN, (2, 6), "learned"),
            ("small", (8, 4, 9), "offset", FLOAT, (1,), "batch"),
            ("channel", (9, 2, 3), "contiguous", FLOAT, (2,), "batch"),
            ("channel", (5, 2, 4, 4), "strided", FLOAT, (2,), "batch"),
            *(("real", (2, 70, 5, 7), memory, FLOAT, (groups,), statistics)
              for memory in ("contiguous", "channels_last") for groups, statistics in ((2, "batch"), (70, "learned"))),
        ),
    ],
    ids=str,
    indirect=["tiles"],
)  # fmt: skip
def test_mixture_errs_at_most_twice_as_much_as_eager(tiles, shape, memory, dtype, groups, statistics):
    values = case(shape, 3, dtype, memory, 1e3 if memory == "offset" else 0.0)
    for count in groups:
        check_mixture(values, groups=count, statistics=statistics)


@pytest.mark.parametrize(
    ("tiles", "num", "scale"),
    [("small", 2, "paper"), ("channel", 4, "sqrt_k"),
     *in_full(("small", 1, "sqrt_k"), ("small", 8, "sqrt_k"), ("channel", 1, "sqrt_k"), ("channel", 2, "paper"))],
    indirect=["tiles"],
)  # fmt: skip
def test_mixture_takes_any_number_of_components_and_eps(tiles, num, scale):
    for groups, statistics in ((1, "batch"), (2, "learned"), (4, "batch")):
        check_mixture(case((3, 4, 5), num), False, groups=groups, statistics=statistics, scale=scale, eps=0.3)


@pytest.mark.parametrize(("dtype", "statistics"), [(BRAIN, "batch"), (FLOAT, "learned")], ids=str)
def test_a_mixture_of_runs_of_positions(dtype, statistics):
    """Where channels share a posterior a tile has eight positions at least, however many channels."""
    layout = tile_configs.layout_of((torch.empty(2, 20, 16),), merge=True)
    assert tile_configs.mixture_tiling("mixture_apply_kernel", layout, 1, 3).block_l == 8
    check_mixture(case((2, 20, 16), 3, dtype), groups=1, statistics=statistics)


@pytest.mark.parametrize("tiles", ["channel"], indirect=True)
def test_a_backward_of_many_programs_takes_the_state_that_one_program_left(monkeypatch, tiles):
    """As at 16,384 locations in float32: x fits into the cache, and x and its gradient do not."""
    monkeypatch.setattr(tile_configs, "RESIDENT_BYTES", 3 * 5 * 4)
    values, names = case((3, 4, 5)), []
    with replaced_kernels(lambda kernel, *_: names.append(kernel.__name__)):
        mixture_run(values, FLOAT, "triton", groups=4)
    assert "mixture_channel_kernel" in names
    assert "mixture_channel_bwd_kernel" not in names
    check_mixture(values, groups=4, statistics="batch")


@WAYS
def test_moments_survive_offsets_and_outliers(groups, tiles):
    """As for eager: half an ulp of 1e6 for the mean, two passes' accuracy for the variance.

    An outlier of 1e4 in the first place is where squares about the first element fail, by 1e8 * 6e-8 = 6; means
    relative to it round to 5e-4, and distances of tiles, about 1, enter squared.
    """

    def runs(values):
        exact = mixture_run(values, torch.float64, "reference", groups=groups)
        return exact, mixture_run(values, FLOAT, "triton", groups=groups)

    want, got = runs(case((4, 4, 32), offset=1e6))
    assert float((got["mean"] - want["mean"]).abs().max()) <= 0.0313
    torch.testing.assert_close(got["var"].double(), want["var"], rtol=1e-3, atol=0)
    x, log_lambda, mean, var, g = case((4, 4, 32))
    x[0, :, 0] = 1e4
    mean = mean + torch.tensor([[1e4], [0], [0]])  # one component takes the outlier
    want, got = runs((x, log_lambda, mean, var, g))
    torch.testing.assert_close(got["var"][1:].double(), want["var"][1:], rtol=1e-3, atol=0)


@WAYS
def test_an_empty_component_adds_nothing(groups, tiles):
    x, log_lambda, mean, var, g = case((8, 4, 6))
    mean[2] = 1e4
    got = mixture_run((x, log_lambda, mean, var, g), FLOAT, "triton", groups=groups)
    two = mixture_run((x, log_lambda[:2], mean[:2], var[:2], g), FLOAT, "triton", groups=groups)
    for name, want in two.items():
        rows = slice(None) if name in ("y", "dx") else slice(2)
        torch.testing.assert_close(got[name][rows], want, msg=name)
        assert name in ("y", "dx") or not got[name][2].any(), name


@WAYS
def test_a_value_that_is_not_finite_shows_in_the_moments(groups, tiles):
    """Moving averages are kept from such a batch by what they see in its moments."""
    for value in (math.nan, math.inf, 1e30):
        x, log_lambda, mean, var, _ = case((8, 4, 6))
        x[3, 2, 1] = value
        _, moments = mixture_norm(x, log_lambda, mean, var, groups=groups, backend="triton")
        assert moments is not None
        assert not all(part.isfinite().all() for part in moments), value


@pytest.mark.parametrize(
    ("tiles", "groups", "statistics"),
    [("small", 1, "learned"), ("channel", 4, "batch"), *in_full(("small", 1, "batch"))],
    indirect=["tiles"],
)
def test_a_gradient_is_the_same_whatever_others_are_wanted(groups, statistics, tiles):
    *given, g = case((8, 4, 6))
    options: Any = {"groups": groups, "statistics": statistics}
    want = mixture_run((*given, g), FLOAT, "triton", **options)
    for i, name in ((0, "dx"), (2, "dmean")):
        own = [t.detach().requires_grad_(k == i) for k, t in enumerate(given)]
        (got,) = torch.autograd.grad(mixture_norm(*own, **options, backend="triton")[0], own[i], g)
        torch.testing.assert_close(got, want[name], msg=name)  # tiles, and with them the order of sums, may differ


@pytest.mark.parametrize(
    ("ids", "over", "scale"),
    [
        ([0, -1, 2, -1], "location", "paper"),
        (None, "location", "match"),
        *in_full(([0, -1, 2, -1], "sample", "match"), (None, "sample", "paper")),
    ],
    ids=str,
)
def test_unknown_clusters_err_at_most_twice_as_much_as_eager(monkeypatch, ids, over, scale):
    """Where some are unknown, each of two programs has one of them."""
    monkeypatch.setattr(tile_configs, "LEAST_PROGRAMS", 2)
    cluster = None if ids is None else torch.tensor(ids)
    options = {"unknown_scale": scale, "unknown_posterior": over}
    assert_clusters_within_budget(case((4, 6, 5)), cluster, "triton", "eager", **options)


@pytest.mark.parametrize(
    ("shape", "memory", "dtype", "num"),
    [
        ((9, 4), "contiguous", FLOAT, 1),
        ((3, 9, 5), "channels_last", FLOAT, 9),
        ((4, 6, 5), "contiguous", BRAIN, 3),
        ((4, 6, 5), "contiguous", HALF, 3),
        *in_full(((9, 4), "contiguous", FLOAT, 9), ((3, 9, 5), "contiguous", FLOAT, 9)),
        *in_full(((3, 9, 5), "strided", FLOAT, 1)),
    ],
    ids=str,
)
def test_unknown_samples_stand_beside_others(shape, memory, dtype, num):
    """In every layout, in blocks of samples, with more clusters than other kernels take."""
    cluster = torch.tensor([-1 if i in (1, 2, 8) else i % num for i in range(shape[0])])
    assert_clusters_within_budget(case(shape, num, dtype, memory), cluster, "triton", "eager")


def test_an_unknown_sample_has_the_cluster_that_alone_explains_it():
    """Densities that underflow stay apart, however far."""
    _, _, mean, var, g = case((2, 6, 5))
    mean[0], mean[1] = 1e12, 1e4
    x = mean[None, 1, :, None].expand(2, 6, 5) + g
    want, got = (scb(x, g, torch.full((2,), k), mean, var, unknown=True) for k in (1, -1))
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b)


def test_unknown_samples_are_eagers_where_the_kernels_do_not_take_them(monkeypatch):
    """One posterior a sample, of nine clusters; and more channels than a tile holds."""
    values = case((4, 6, 5), 9)
    x, _, mean, var, _ = values
    for over in ("location", "sample"):
        want, got = (cluster_norm(x, None, mean, var, unknown_posterior=over, backend=b) for b in ("eager", "triton"))
        assert torch.equal(got, want)
    monkeypatch.setattr(tile_configs, "MAX_UNKNOWN_CHANNELS", 5)
    monkeypatch.setattr(tile_configs, "UNKNOWN", 0)  # not asked for
    assert_clusters_within_budget(values, torch.tensor([0, -1, 2, -1]), "triton", "eager")


@triton.jit
def _offsets_kernel(out_ptr, stride_n, stride_c, stride_l, BLOCK_L: tl.constexpr, BLOCK_C: tl.constexpr):
    i, c = tl.arange(0, BLOCK_L), tl.arange(0, BLOCK_C)
    at = cluster_kernels.offsets(tl.program_id(0), c, i, stride_n, stride_c, stride_l)
    place = (tl.program_id(0) * BLOCK_L + i)[:, None] * BLOCK_C + c[None, :]
    tl.store(out_ptr + place, at)


@triton.jit
def _places_kernel(out_ptr, stride_n, stride_c, stride_l, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    place = (at[:, None, None] * BLOCK + at[None, :, None]) * BLOCK + at[None, None, :]
    tl.store(out_ptr + place, cluster_kernels._places(at, at, at, stride_n, stride_c, stride_l))


@pytest.mark.parametrize("strides", [(2**30, 3, 1), (1, 2**30, 5), (7, 1, 2**30)], ids=str)
def test_offsets_reach_beyond_two_to_the_31(strides):
    by_program: Any = _offsets_kernel
    at_once: Any = _places_kernel
    first, second = (torch.empty(4, 4, 4, dtype=torch.int64) for _ in range(2))
    by_program[(4,)](first, *strides, BLOCK_L=4, BLOCK_C=4)
    at_once[(1,)](second, *strides, BLOCK=4)
    n, i, c = torch.meshgrid(*(torch.arange(4),) * 3, indexing="ij")
    want = n * strides[0] + c * strides[1] + i * strides[2]
    assert torch.equal(first, want)
    assert torch.equal(second, want)
    assert int(want.max()) > 2**31


@pytest.mark.parametrize(("programs", "by_sample"), [(1, True), (2, False), (3, True)])
def test_a_program_of_scb_walks_over_all_its_tiles(programs, by_sample):
    """Thirteen positions are four tiles of one program, and two programs' two each."""
    x, _, mean, var, g = case((3, 3, 13), 2)
    cluster, eps = torch.tensor([1, 0, 1]), 0.1
    rstd = (var.double() + eps).rsqrt()[cluster, :, None]
    y, dx = torch.full_like(x, math.nan), torch.full_like(x, math.nan)
    grid, sizes = (2, 1, programs), {"BLOCK_S": 2, "BLOCK_L": 4, "BLOCK_C": 4, "UNKNOWN": False}
    shape, last = (3, 2, 3, 13, 3, 1), (eps, 0)
    SCB.scb_fwd_kernel[grid](
        x, cluster, mean, var, None, None, None, None, y, *shape, *x.stride(), *y.stride(), *last,
        STORED=False, **sizes,
    )  # fmt: skip
    centred = x.double() - mean.double()[cluster, :, None]
    torch.testing.assert_close(y.double(), centred * rstd, rtol=1e-5, atol=1e-6)
    rows = 3 if by_sample else 4  # of samples, or of two clusters in two blocks of samples
    sums = torch.full((2, programs, rows, 3), math.nan)
    SCB.scb_bwd_kernel[grid](
        x, g, cluster, mean, var, None, None, None, dx, sums,
        *shape, *x.stride(), *g.stride(), *dx.stride(), *last, STORED=False, BY_SAMPLE=by_sample, **sizes,
    )  # fmt: skip
    torch.testing.assert_close(dx.double(), g.double() * rstd, rtol=1e-5, atol=1e-6)
    want = torch.stack([g.double().sum(2), (g.double() * centred).sum(2)])
    if not by_sample:
        want = torch.stack([want[:, 1], want[:, 0], torch.zeros(2, 3), want[:, 2]], dim=1)
    torch.testing.assert_close(sums.double().sum(1), want, rtol=1e-5, atol=1e-5)


def test_an_infinite_mean_has_the_gradients_of_its_limit():
    """What lies outside of a tile adds nothing to them: 0 times infinity would be NaN."""
    x, g = torch.zeros(1, 1, 3), torch.ones(1, 1, 3)
    mean, var = torch.tensor([[math.inf]]), torch.ones(1, 1)
    _, dx, dmean, dvar, *_ = scb(x, g, torch.tensor([0]), mean, var, eps=0.0)
    torch.testing.assert_close((dx, dmean), (g, torch.tensor([[-3.0]])))
    assert dvar.item() == math.inf  # -1/2 of the sum of g (x - mean)


@pytest.mark.parametrize("programs", [1, 4, 9])
def test_moments_of_any_number_of_programs_are_merged(programs):
    """A NaN stays one, and no mass is a mean and a variance of 0."""
    rng = torch.Generator().manual_seed(programs)
    mass, mean, square = (torch.rand(programs, 2, 3, generator=rng) for _ in range(3))
    for each in (mass, mean, square):
        each[:, 1, 2] = 0.0
    square[-1, 0, 1] = math.nan
    x = torch.tensor([[1.0, 2.0, 3.0]])  # the first location, which means are relative to
    state = torch.full((launch.STATE_PLANES, 2, 3), -2.0)
    PARAMETERS.mixture_merge_kernel[2, 1](
        torch.stack([mass, mean, square]), x, state, programs, 3, 1, 0.5, -1.0, 3.0, K=2, BLOCK_P=4, BLOCK_C=4
    )
    mass, mean, square = (t.double() for t in (mass, mean, square))
    total = mass.sum(0)
    centre = (mass * mean).sum(0) / total
    spread = (square + mass * (mean - centre).square()).sum(0) / total
    want = [total, x.double() + centre, spread]
    for tensor in want:
        tensor[1, 2] = 0.0
    assert want[2].isnan().nonzero().tolist() == [[0, 1]]
    want.append(3 * math.exp(0.5) / (spread + 0.5).sqrt())  # of a log weight at its floor of -1
    want[3][1, 2] = 3 * math.exp(0.5) / math.sqrt(0.5)
    torch.testing.assert_close(state[4:].double(), torch.stack(want), rtol=1e-5, atol=1e-6, equal_nan=True)
    assert (state[:4] == -2).all()


def test_what_lies_outside_of_a_tile_adds_nothing_though_its_posterior_is_none():
    """Read as 0, it would be so far from the mean that no component explains it: 0 / 0."""
    x, g = torch.full((1, 1, 3), 1e20), torch.tensor([[[1.0, 2.0, 4.0]]])
    state, sums = torch.zeros(launch.STATE_PLANES, 1, 1), torch.full((2, 1, 1, 1), math.nan)
    state[0], state[1], state[5] = 1e20, -0.5, 1e20
    MIXTURE.mixture_sums_kernel[1, 1](
        x, g, state, sums, 1, 1, 1, 3, *x.stride(), *g.stride(),
        K=1, JOINT=False, FLAT=False, BLOCK_L=4, BLOCK_C=1,
    )  # fmt: skip
    assert sums.flatten().tolist() == [7.0, 0.0]
