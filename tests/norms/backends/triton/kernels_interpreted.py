"""The kernels under Triton's interpreter; run by test_kernels.py in a process of its own."""

import itertools
import math
import os
from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from norm_cases import GRADIENTS, assert_within_budget, in_full, mixture_case

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

NAMES = ("y", "dx", "dmean", "dvar")
SCB: Any = cluster_kernels
MIXTURE: Any = mixture_kernels
PARAMETERS: Any = parameter_kernels
BACKENDS = ("eager", "reference", "triton")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(autouse=True)
def nan_filled_memory():
    """Fill fresh memory with NaN, so that an element which no kernel writes shows."""
    torch.use_deterministic_algorithms(True)
    assert torch.empty(1).isnan()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True, params=["small tiles"])
def tiles(request, monkeypatch):
    """Cut tiles down, so that small inputs have many, unless a test asks for the real ones."""
    if request.param == "a program a channel":
        monkeypatch.setattr(tile_configs, "CHANNEL", tile_configs.TileConfig(elements=16, num_warps=1))
        monkeypatch.setattr(tile_configs, "FEWEST_CHANNELS", 1)
    if request.param == "small tiles":
        for name in ("SCB_FORWARD", "SCB_BACKWARD", "SUMS"):
            monkeypatch.setattr(tile_configs, name, tile_configs.TileConfig(elements=64, num_warps=1))
        small = tile_configs.TileConfig(elements=64, num_warps=1)
        tiles = tile_configs.MixtureTiles(small, small, small, (8, small), (8, small))
        monkeypatch.setattr(tile_configs, "MIXTURE", dict.fromkeys(tile_configs.MIXTURE, tiles))
        monkeypatch.setattr(tile_configs, "RESIDENT_LOCATIONS", 0)  # channels_interpreted.py has these
        monkeypatch.setattr(tile_configs, "CHANNEL_BLOCK", 16)
        monkeypatch.setattr(tile_configs, "UNKNOWN", 16)
        monkeypatch.setattr(tile_configs, "SUMS_SHARE", 1.0)
        monkeypatch.setattr(tile_configs, "LEAST_PROGRAMS", 1)  # several tiles a program
        monkeypatch.setattr(tile_configs, "ALL_CHANNELS", 4)


def layout(t, memory):
    if memory == "channels_last":
        return t.movedim(1, -1).contiguous().movedim(-1, 1)
    if memory == "strided":  # every second position, of every second channel
        out = t.new_zeros(t.shape[0], 2 * t.shape[1], *t.shape[2:-1], 2 * t.shape[-1])[:, ::2, ..., ::2]
        return out.copy_(t)
    return t


def laid_out(*shapes):
    """Pair the shapes with every layout that differs for them."""
    return [
        (shape, memory)
        for shape in shapes
        for memory in (["contiguous", "channels_last", "strided"] if math.prod(shape[2:]) > 1 else ["contiguous"])
    ]


def case(shape, num, dtype, memory="contiguous", offset=0.0):
    """As mixture_case, x and g rounded to dtype and laid out; parameters in float32."""
    x, log_lambda, mean, var, g = mixture_case(shape, num, dtype=torch.float32)
    x, g = (layout(t.to(dtype), memory) for t in (x + offset, g))
    return x, log_lambda, mean + offset, var, g


def cluster_gradients(values, cluster, dtype, backend, **options):
    """Output and gradients of cluster_norm; dtype None keeps each input's."""
    x, _, mean, var, g = (t if dtype is None else t.to(dtype) for t in values)
    inputs = [t.detach().requires_grad_() for t in (x, mean, var)]
    y = cluster_norm(inputs[0], cluster, *inputs[1:], backend=backend, **options)
    return dict(zip(list[str](NAMES), (y, *torch.autograd.grad(y, inputs, g)), strict=True))


@pytest.mark.parametrize(
    ("shape", "memory", "dtype"),
    [
        ((9, 4), "contiguous", torch.float32),
        ((3, 19, 5), "contiguous", torch.float32),
        ((3, 19, 5), "channels_last", torch.bfloat16),
        ((2, 3, 13, 11), "strided", torch.float16),
        *in_full(*((*each, torch.float32) for each in laid_out((3, 1, 1), (2, 3, 13, 11)))),
        *in_full(((3, 19, 5), "strided", torch.float32), ((3, 19, 5), "channels_last", torch.float32)),
    ],
    ids=str,
)
def test_scb_errs_at_most_twice_as_much_as_eager(shape, memory, dtype):
    """Of 19 channels there are several blocks, of 13 x 11 positions too."""
    values = case(shape, 3, dtype, memory)
    cluster = torch.arange(shape[0]) % 2  # cluster 2 is absent
    exact = cluster_gradients(values, cluster, torch.float64, "reference")
    eager, kernel = (cluster_gradients(values, cluster, None, backend) for backend in ("eager", "triton"))
    assert_within_budget(exact, kernel, eager)
    assert not kernel["dmean"][2].any()
    assert not kernel["dvar"][2].any()
    assert kernel["y"].stride() == values[0].stride() or memory == "strided"
    for name, value in eager.items():
        assert (kernel[name].dtype, kernel[name].shape) == (value.dtype, value.shape)


@pytest.mark.parametrize("num", [9, *in_full(1)])
def test_scb_takes_any_number_of_clusters(num):
    values = case((12, 5, 6), num, torch.float32)
    cluster = torch.arange(12).flip(0) % num
    exact = cluster_gradients(values, cluster, torch.float64, "reference")
    eager, kernel = (cluster_gradients(values, cluster, None, backend) for backend in ("eager", "triton"))
    assert_within_budget(exact, kernel, eager)


def test_scb_survives_an_offset():
    values = case((6, 4, 8), 3, torch.float32, offset=1e3)
    cluster = torch.arange(6) % 3
    exact = cluster_gradients(values, cluster, torch.float64, "reference")
    kernel = cluster_gradients(values, cluster, None, "triton")
    assert float((kernel["y"] - exact["y"]).detach().abs().max()) < 1e-5  # x - mean is exact near 1e3


def test_scb_uses_eps():
    values = case((6, 4, 8), 3, torch.float32)
    cluster = torch.arange(6) % 3
    exact, eager, kernel = (
        cluster_gradients(values, cluster, dtype, backend, eps=0.5)
        for dtype, backend in ((torch.float64, "reference"), (None, "eager"), (None, "triton"))
    )
    assert_within_budget(exact, kernel, eager)


def test_scb_sums_over_an_expanded_gradient():
    """The gradient of a sum has strides of zero."""
    x, _, mean, var, _ = case((6, 4, 8), 3, torch.float32)
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
    x, _, mean, var, g = case((7, 19, length), 3, torch.float32)
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


def mixture_gradients(values, dtype, backend, affine=True, **options):
    """Output, gradients and moments of mixture_norm; dtype None keeps each input's."""
    *inputs, g = (t if dtype is None else t.to(dtype) for t in values)
    channels, names = inputs[0].shape[1], list[str](GRADIENTS)
    if affine:
        inputs += [torch.linspace(*ends, channels, dtype=inputs[1].dtype) for ends in ((0.5, 1.5), (-1, 1))]
        names += ["dweight", "dbias"]
    inputs = [t.detach().requires_grad_() for t in inputs]
    given = dict(zip(("weight", "bias"), inputs[4:], strict=True)) if affine else {}
    y, moments = mixture_norm(*inputs[:4], **given, backend=backend, **options)
    results = dict(zip(names, (y, *torch.autograd.grad(y, inputs, g)), strict=True))
    return results | ({} if moments is None else moments._asdict())


def assert_mixture_within_budget(values, **options):
    """Assert that the kernels err at most four times as much as eager does: their posteriors are off by 3e-7."""
    exact = mixture_gradients(values, torch.float64, "reference", **options)
    # Eager may be lucky in one sum; the reference in the same precision is as fair a measure.
    eager, plain, kernel = (mixture_gradients(values, None, backend, **options) for backend in BACKENDS)
    for name, want in exact.items():
        allowed = 2 * max(budget(want, run[name].detach()) for run in (eager, plain))
        assert error(want, kernel[name]) <= allowed, f"{name}: {error(want, kernel[name]):.2e} > {allowed:.2e}"
        assert (kernel[name].dtype, kernel[name].shape) == (eager[name].dtype, eager[name].shape), name
    return kernel


@pytest.mark.parametrize(
    ("shape", "memory", "statistics"),
    [
        ((3, 6, 5), "contiguous", "batch"),
        ((3, 6, 5), "channels_last", "learned"),
        *in_full(
            *(
                (*each, statistics)
                for each, statistics in itertools.product(
                    laid_out((3, 1, 1), (9, 4), (2, 4, 3, 7)), ("batch", "learned")
                )
            )
        ),
    ],
    ids=str,
)
def test_mixture_errs_at_most_twice_as_much_as_eager(shape, memory, statistics):
    for groups in sorted({1, 2 - shape[1] % 2, shape[1]}):
        assert_mixture_within_budget(case(shape, 3, torch.float32, memory), groups=groups, statistics=statistics)


@pytest.mark.parametrize(("dtype", "statistics"), [(torch.bfloat16, "batch"), (torch.float32, "learned")], ids=str)
def test_a_mixture_of_runs_of_positions(dtype, statistics):
    """Where channels share a posterior a tile has eight positions at least, however many channels."""
    layout = tile_configs.layout_of((torch.empty(2, 20, 16),), merge=True)
    assert tile_configs.mixture_tiling("mixture_apply_kernel", layout, 1, 3).block_l == 8
    assert_mixture_within_budget(case((2, 20, 16), 3, dtype), groups=1, statistics=statistics)


def test_a_mixture_of_a_single_sample():
    """Of forty locations: among nine a component holds next to none, and magnifies what posteriors are off by."""
    assert_mixture_within_budget(case((1, 6, 40), 3, torch.float32, "channels_last"), groups=1)


@pytest.mark.parametrize(
    ("dtype", "statistics"),
    [
        (torch.bfloat16, "batch"),
        (torch.float16, "learned"),
        *in_full((torch.float16, "batch"), (torch.bfloat16, "learned")),
    ],
    ids=str,
)
def test_mixture_takes_half_precision(dtype, statistics):
    for groups, memory in ((2, "channels_last"), (6, "contiguous")):
        assert_mixture_within_budget(case((3, 6, 2, 5), 3, dtype, memory), groups=groups, statistics=statistics)


@pytest.mark.parametrize(("num", "scale"), [(2, "paper"), *in_full((1, "sqrt_k"), (8, "sqrt_k"))])
def test_mixture_takes_any_number_of_components_and_eps(num, scale):
    for groups, statistics in ((1, "batch"), (2, "learned"), (4, "batch")):
        values = case((3, 4, 5), num, torch.float32)
        assert_mixture_within_budget(values, affine=False, groups=groups, statistics=statistics, scale=scale, eps=0.3)


@pytest.mark.full
@pytest.mark.parametrize("tiles", ["real tiles"], indirect=True)
@pytest.mark.parametrize("memory", ["contiguous", "channels_last"])
def test_mixture_at_the_sizes_of_a_launch(memory, tiles):
    values = case((2, 70, 5, 7), 3, torch.float32, memory)
    assert_mixture_within_budget(values, groups=2)
    assert_mixture_within_budget(values, groups=70, statistics="learned")


WAYS = pytest.mark.parametrize(
    ("tiles", "groups"),
    [("small tiles", 1), ("a program a channel", 4), *in_full(("small tiles", 4))],
    indirect=["tiles"],
)
"""Many programs for a block of channels, or one for each."""


@WAYS
def test_moments_survive_offsets_and_outliers(groups, tiles):
    """As for eager: half an ulp of 1e6 for the mean, two passes' accuracy for the variance.

    An outlier of 1e4 in the first place is where squares about the first element fail, by 1e8 * 6e-8 = 6; means
    relative to it round to 5e-4, and distances of tiles, about 1, enter squared.
    """
    x, log_lambda, mean, var, g = case((4, 4, 32), 3, torch.float32, offset=1e6)
    want = mixture_gradients((x, log_lambda, mean, var, g), torch.float64, "reference", groups=groups)
    got = mixture_gradients((x, log_lambda, mean, var, g), None, "triton", groups=groups)
    assert float((got["mean"] - want["mean"]).abs().max()) <= 0.0313
    torch.testing.assert_close(got["var"].double(), want["var"], rtol=1e-3, atol=0)
    x, log_lambda, mean, var, g = case((4, 4, 32), 3, torch.float32)
    x[0, :, 0] = 1e4
    mean, var = mean + torch.tensor([[1e4], [0], [0]]), var.clone()  # one component takes the outlier
    want = mixture_gradients((x, log_lambda, mean, var, g), torch.float64, "reference", groups=groups)
    got = mixture_gradients((x, log_lambda, mean, var, g), None, "triton", groups=groups)
    torch.testing.assert_close(got["var"][1:].double(), want["var"][1:], rtol=1e-3, atol=0)


@pytest.mark.parametrize(
    ("tiles", "groups", "statistics"),
    [("small tiles", 4, "learned"), ("a program a channel", 4, "batch"), *in_full(("small tiles", 1, "batch"))],
    indirect=["tiles"],
)
def test_an_offset_costs_what_it_costs_eager(groups, statistics, tiles):
    assert_mixture_within_budget(case((8, 4, 9), 3, torch.float32, offset=1e3), groups=groups, statistics=statistics)


@WAYS
def test_an_empty_component_adds_nothing(groups, tiles):
    x, log_lambda, mean, var, g = case((8, 4, 6), 3, torch.float32)
    mean[2] = 1e4
    got = mixture_gradients((x, log_lambda, mean, var, g), None, "triton", affine=False, groups=groups)
    assert all(value.isfinite().all() for value in got.values())
    two = mixture_gradients((x, log_lambda[:2], mean[:2], var[:2], g), None, "triton", affine=False, groups=groups)
    for name in ("y", "dx"):
        torch.testing.assert_close(got[name], two[name])
    for name in set(got) - {"y", "dx"}:
        torch.testing.assert_close(got[name][:2], two[name])
        assert not got[name][2].any(), name


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy's, of an overflow
@pytest.mark.parametrize(
    ("tiles", "groups", "value"),
    [(way, 4 if way == "a program a channel" else 1, value) for way in ("small tiles", "a program a channel")
     for value in (math.nan, math.inf, 1e30)],
    indirect=["tiles"],
)  # fmt: skip
def test_a_value_that_is_not_finite_shows_in_the_moments(groups, value, tiles):
    """Moving averages are kept from such a batch by what they see in its moments."""
    x, log_lambda, mean, var, _ = case((8, 4, 6), 3, torch.float32)
    x[3, 2, 1] = value
    _, moments = mixture_norm(x, log_lambda, mean, var, groups=groups, backend="triton")
    assert moments is not None
    assert not all(part.isfinite().all() for part in moments)


@pytest.mark.parametrize(
    ("tiles", "groups", "statistics"),
    [("small tiles", 1, "learned"), ("a program a channel", 4, "batch"), *in_full(("small tiles", 1, "batch"))],
    indirect=["tiles"],
)
def test_a_gradient_is_the_same_whatever_others_are_wanted(groups, statistics, tiles):
    *inputs, g = case((8, 4, 6), 3, torch.float32)
    options: Any = {"groups": groups, "statistics": statistics, "backend": "triton"}
    want = mixture_gradients((*inputs, g), None, affine=False, **options)
    for i, name in ((0, "dx"), (2, "dmean")):
        given = [t.detach().requires_grad_(k == i) for k, t in enumerate(inputs)]
        (got,) = torch.autograd.grad(mixture_norm(*given, **options)[0], given[i], g)
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
    values = case((4, 6, 5), 3, torch.float32)
    assert_unknown_within_budget(values, ids, unknown_scale=scale, unknown_posterior=over)


def assert_unknown_within_budget(values, ids, **options):
    cluster = None if ids is None else torch.tensor(ids)
    exact = cluster_gradients(values, cluster, torch.float64, "reference", **options)
    eager, kernel = (cluster_gradients(values, cluster, None, backend, **options) for backend in ("eager", "triton"))
    assert_within_budget(exact, kernel, eager)


@pytest.mark.parametrize(
    ("shape", "memory", "num"),
    [
        ((9, 4), "contiguous", 1),
        ((3, 9, 5), "channels_last", 9),
        *in_full(((9, 4), "contiguous", 9), ((3, 9, 5), "contiguous", 9), ((3, 9, 5), "strided", 1)),
    ],
    ids=str,
)
def test_unknown_samples_stand_beside_others(shape, memory, num):
    """In every layout, in blocks of samples, with more clusters than other kernels take."""
    ids = [-1 if i in (1, 2, 8) else i % num for i in range(shape[0])]
    assert_unknown_within_budget(case(shape, num, torch.float32, memory), ids)


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_unknown_samples_take_half_precision(dtype):
    assert_unknown_within_budget(case((4, 6, 5), 3, dtype), [0, -1, 2, -1])


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy's, of an overflow
def test_an_unknown_sample_has_the_cluster_that_alone_explains_it():
    """Densities that underflow stay apart, however far."""
    _, _, mean, var, g = case((2, 6, 5), 3, torch.float32)
    mean[0], mean[1] = 1e12, 1e4
    x = mean[None, 1, :, None].expand(2, 6, 5) + g
    want, got = (scb(x, g, torch.full((2,), k), mean, var, unknown=True) for k in (1, -1))
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("over", ["location", "sample"])
def test_unknown_clusters_are_eagers_where_the_kernels_take_no_such_mixture(over):
    x, _, mean, var, _ = case((4, 6, 5), 9, torch.float32)
    want, got = (cluster_norm(x, None, mean, var, unknown_posterior=over, backend=b) for b in ("eager", "triton"))
    assert torch.equal(got, want)


def test_unknown_samples_of_more_channels_than_a_tile_holds_are_eagers(monkeypatch):
    monkeypatch.setattr(tile_configs, "MAX_UNKNOWN_CHANNELS", 5)
    monkeypatch.setattr(tile_configs, "UNKNOWN", 0)  # not asked for
    assert_unknown_within_budget(case((4, 6, 5), 9, torch.float32), [0, -1, 2, -1])


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
    x, _, mean, var, g = case((3, 3, 13), 2, torch.float32)
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


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy's, of infinities
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


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy's, of an overflow
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
