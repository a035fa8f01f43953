"""The loops in C++: against the reference in float64, over layouts, threads and sizes, and when they are taken."""

import itertools
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from norm_cases import assert_an_offset_costs_no_moments, assert_within_budget, mixture_case, mixture_run
from torch import Tensor

from common.norms import MixtureNorm, SCBNorm, UCBNorm, functional, mixture_norm
from common.norms.agreement import error
from common.norms.backends import compiled
from common.norms.backends.reference import Moments
from common.norms.config import NormConfig
from common.norms.estimation import averages, em
from common.norms.estimation.averages import Rule, Stored
from common.norms.estimation.em import Fit
from common.norms.native import loops

pytestmark = pytest.mark.skipif(loops.library(3) is None, reason="needs a C++ compiler on the PATH")
CPU = torch.device("cpu")
SHAPES = [(3, 1, 1), (9, 4), (3, 6, 5), (5, 4, 3, 7), (8, 32, 8, 8), (3, 18, 16, 16), (2, 3, 50, 41)]
RESIDENT = {"planes": (2, 2, 400, 211), "rows": (1, 2, 230, 101)}
"""Sizes beyond which a channel's posteriors are found twice in either pass."""


def channels_last(t: Tensor) -> Tensor:
    return t.movedim(1, -1).contiguous().movedim(-1, 1)


def groupings(channels: int) -> set[int]:
    return {1, channels, channels // 2 if channels % 2 == 0 else 1}


@pytest.mark.parametrize("statistics", ["batch", "learned"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_loops_err_at_most_twice_as_much_as_plain_torch(shape, statistics):
    """As the reference or as eager in float32, whichever errs more: one alone may be lucky, where roundings cancel."""
    case = mixture_case(shape, num=3, dtype=torch.float32)
    weight, bias = mixture_case((2, shape[1]), num=1, dtype=torch.float32)[0]
    for groups in groupings(shape[1]):
        options: Any = {"groups": groups, "statistics": statistics, "scale": "sqrt_k"}
        exact, _ = mixture_run(case, torch.float64, "reference", weight=weight, bias=bias, **options)
        plain, eager, ours = (
            mixture_run(case, torch.float32, backend, weight=weight, bias=bias, **options)[0]
            for backend in ("reference", "eager", "compiled")
        )
        worse = {name: max(plain[name], eager[name], key=lambda t, name=name: error(exact[name], t)) for name in exact}
        assert_within_budget(exact, ours, worse)


@pytest.mark.parametrize("num", [1, 2, 5])
def test_loops_serve_any_number_of_components(num):
    case = mixture_case((7, 6, 5, 5), num=num, dtype=torch.float32)
    for groups in (1, 6):
        exact, want = mixture_run(case, torch.float64, "reference", groups=groups)
        plain, _ = mixture_run(case, torch.float32, "reference", groups=groups)
        ours, got = mixture_run(case, torch.float32, "compiled", groups=groups)
        assert_within_budget(exact, ours, plain)
        assert want is not None
        assert got is not None
        for ours_of, exact_of in zip(got, want, strict=True):
            torch.testing.assert_close(ours_of.double(), exact_of, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("layout", RESIDENT)
@pytest.mark.parametrize("statistics", ["batch", "learned"])
def test_channels_too_long_for_a_cache_are_right_too(layout, statistics):
    case = mixture_case(RESIDENT[layout], num=3, dtype=torch.float32)
    if layout == "rows":
        case = channels_last(case[0]), *case[1:4], channels_last(case[4])
    options: Any = {"groups": 2, "statistics": statistics}
    exact, _ = mixture_run(case, torch.float64, "reference", **options)
    ours, _ = mixture_run(case, torch.float32, "compiled", **options)
    for name, want in exact.items():
        # Random walks of 1e5 roundings in the sums; the reference's own float32 sums err by as much.
        torch.testing.assert_close(ours[name].double(), want, rtol=1e-5, atol=2e-6 * float(want.abs().max()))


LAYOUTS = [(9, 4), (5, 18, 7, 3), (3, 40, 5, 5), (6, 36, 16, 16), (6, 32, 16, 16), RESIDENT["rows"]]


@pytest.mark.parametrize("statistics", ["batch", "learned"])
@pytest.mark.parametrize(
    ("shape", "num"), [*((shape, 3) for shape in LAYOUTS), *((LAYOUTS[2], num) for num in (1, 2, 5, 8))], ids=str
)
def test_layouts_and_threads_change_no_bit(shape, num, statistics):
    x, log_lambda, mean, var, g = mixture_case(shape, num=num, dtype=torch.float32)
    affine = [t.requires_grad_() for t in mixture_case((2, shape[1]), num=1, dtype=torch.float32)[0].clone()]
    tables, found = [log_lambda, mean, var], []
    before = torch.get_num_threads()
    for groups in groupings(shape[1]):
        options: Any = {"groups": groups, "statistics": statistics, "weight": affine[0], "bias": affine[1]}
        results = []
        try:
            for threads, of, of_gradient, learnt in itertools.product(
                (1, 3), (lambda t: t, channels_last), (lambda t: t, channels_last), (True, False)
            ):
                torch.set_num_threads(threads)
                own, given = of(x).requires_grad_(), [t.detach().requires_grad_(learnt) for t in tables]
                y, moments = mixture_norm(own, *given, backend="compiled", **options)
                assert y.movedim(1, -1).is_contiguous() == own.movedim(1, -1).is_contiguous()
                gradients = torch.autograd.grad(y, [own, *affine, *(given if learnt else [])], of_gradient(g))
                results.append((y.detach(), *(moments or ()), *gradients))
        finally:
            torch.set_num_threads(before)
        found.append(results)
    more = 3 if statistics == "batch" else 0  # moments
    for results in found:
        with_mixture, without = ([each for each in results if len(each) == count + more] for count in (7, 4))
        assert len(with_mixture) == len(without) == 8
        for alike in (with_mixture, without):
            for other in alike[1:]:
                assert all(torch.equal(a, b) for a, b in zip(alike[0], other, strict=True))
        want, dx = with_mixture[0][1 + more], without[0][1 + more]  # rounded elsewhere, where sums are not needed
        torch.testing.assert_close(dx, want, rtol=1e-5, atol=1e-6 * float(want.abs().max()))


def test_loops_read_and_write_no_memory_but_what_they_are_given(tmp_path):
    """Under a sanitizer, with buffers that are made anew, and fresh memory full of zeros or of what is no number."""
    source = loops.SOURCE.read_text(encoding="utf-8")
    for kept, fresh in (
        ("if (n > size) {", "{"),
        ("static_cast<float*>(std::aligned_alloc(64, (4 * n + 63) / 64 * 64))", "exactly(n)"),
    ):
        assert source.count(kept) == 1
        source = source.replace(kept, fresh)
    (tmp_path / "loops.cpp").write_text(source, encoding="utf-8")
    program, main = str(tmp_path / "program"), str(Path(__file__).with_name("loops_memory.cpp"))
    options = (
        *loops.OPTIONS,
        "-O1",
        "-fopenmp",
        "-fsanitize=address",
        "-DCOMPONENTS=5",
        f'-DLOOPS="{tmp_path}/loops.cpp"',
    )
    done = subprocess.run(
        [compiled.compiler(), *options, main, "-o", program],
        capture_output=True,
        text=True,
        check=False,
    )
    if "libasan" in done.stderr:
        pytest.skip("the compiler has no address sanitizer")
    assert done.returncode == 0, done.stderr
    told = []
    for byte in (0, 255):
        environment = {
            "OMP_NUM_THREADS": "1",
            "ASAN_OPTIONS": f"max_malloc_fill_size=1000000000:malloc_fill_byte={byte}",
        }
        ran = subprocess.run([str(program)], capture_output=True, text=True, env=environment, check=False)
        assert ran.returncode == 0, ran.stderr[:3000]
        told.append(ran.stdout.splitlines())
    assert told[0] == told[1]
    assert len(told[0]) == 15 * 8 * 2
    assert told[0][::2] == told[0][1::2]  # planes and rows


def test_other_strides_are_copied():
    x, log_lambda, mean, var, _ = mixture_case((4, 6, 8), num=3, dtype=torch.float32)
    sliced = torch.stack([x, x], dim=3)[..., 0]
    assert not sliced.is_contiguous()
    want, _ = mixture_norm(x, log_lambda, mean, var, backend="compiled")
    assert torch.equal(mixture_norm(sliced, log_lambda, mean, var, backend="compiled")[0], want)


@pytest.mark.parametrize("groups", [1, 4])
def test_moments_survive_an_offset_of_a_million(groups):
    assert_an_offset_costs_no_moments(groups, positions=320)


@pytest.mark.parametrize("groups", [1, 4])
def test_an_empty_component_adds_nothing(groups):
    case = mixture_case((8, 4, 6), num=3, dtype=torch.float32)
    case[2][2] = 1e4
    got, moments = mixture_run(case, torch.float32, "compiled", groups=groups)
    assert moments is not None
    assert not moments.mass[2].any()
    assert not moments.mean[2].any()
    want, _ = mixture_run((case[0], *(t[:2] for t in case[1:4]), case[4]), torch.float64, "reference", groups=groups)
    for name, value in want.items():
        kept = got[name] if name in ("y", "dx") else got[name][:2]
        torch.testing.assert_close(kept.double(), value, rtol=1e-4, atol=1e-5)
        assert name in ("y", "dx") or not got[name][2].any()


@pytest.mark.parametrize("wrong", [torch.nan, torch.inf])
@pytest.mark.parametrize("layer", [UCBNorm(4, 3), UCBNorm(4, 3, groups=1), MixtureNorm(4, 3, groups=4)], ids=repr)
def test_a_value_that_is_not_finite_is_seen_and_moves_nothing(layer, wrong):
    layer = type(layer)(4, 3, groups=layer.groups, backend="compiled")
    layer(torch.randn(16, 4, 5))
    before = {name: t.clone() for name, t in layer.state_dict().items() if name != "step"}
    x = torch.randn(16, 4, 5)
    x[3, 1, 2] = wrong
    assert not layer(x).isfinite().all()
    assert all(torch.equal(t, layer.state_dict()[name]) for name, t in before.items())


@pytest.mark.parametrize("groups", [1, 2, 6])
@pytest.mark.parametrize(("average", "shared"), [("em", False), ("paper", False), ("em", True)])
def test_averages_move_as_in_float64(average, shared, groups):
    x, _, mean, var, _ = mixture_case((5, 6, 9), num=3, dtype=torch.float32)
    stored = Stored(torch.tensor([0.3, -1.0, 0.1]), mean, var.log())
    rule = Rule(0.2, average, 1e-3, shared)
    options: Any = {"groups": groups, "eps": 1e-5, "scale": "paper", "statistics": "batch"}
    _, state = loops.mixture_norm(x, stored, None, None, stored=True, min_weight=1e-3, **options)
    moments = Moments(*(t.double() for t in loops.moments_of(state, 3, groups)))
    want = averages.moved(Stored(*(t.double() for t in stored)), moments, rule)
    numbers: Any = {"groups": groups, "momentum": 0.2, "paper": average == "paper", "min_weight": 1e-3}
    loops.move_averages(stored, state, shared=shared, **numbers)
    for name, value in zip(Stored._fields, want, strict=True):
        torch.testing.assert_close(getattr(stored, name).double(), value, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("groups", [1, 2, 6])
@pytest.mark.parametrize("count", [100, 4096])
def test_a_fit_is_that_of_em_in_float64(count, groups):
    points = mixture_case((count, 6), num=3, dtype=torch.float32)[0]
    mean, var = mixture_case((3, 6), num=3, dtype=torch.float32)[2:4]
    fit = Fit(torch.tensor([0.5, 0.3, 0.2]), mean, var)
    exact = Fit(*(t.double() for t in fit))
    want = em.expectation_maximisation(points.double(), exact, groups, 1e-5, 4)
    floor = em.variance_floor(points)
    got = loops.fit_mixture(points, fit, floor, groups=groups, eps=1e-5, empty=em.EMPTY, steps=4)
    for ours, value in zip(got, want, strict=True):
        torch.testing.assert_close(ours.double(), value, rtol=1e-4, atol=1e-5)
    assert torch.equal(fit.mean, mean)


@pytest.mark.parametrize("kind", [UCBNorm, MixtureNorm])
@pytest.mark.parametrize("groups", [None, 2, 1])
def test_layers_train_and_evaluate_as_in_float64(kind, groups):
    """Some batches, so that averages, fits and re-seeding are those of the batches before."""
    layer, exact = (
        kind(6, 3, groups=groups, backend="compiled"),
        kind(6, 3, groups=groups, backend="reference").double(),
    )
    for seed in range(3):
        x, *_, g = mixture_case((16, 6, 5, 5), num=1, seed=seed)
        results = []
        for each in (layer, exact):
            own = x.to(each.mean.dtype).requires_grad_()
            each.train()
            y = each(own)
            gradients = torch.autograd.grad(y, [own, *each.parameters()], g.to(y.dtype))
            each.eval()
            results.append([t.detach().double() for t in (y, *gradients, each(own), *each.buffers())])
        for ours, want in zip(*results, strict=True):
            torch.testing.assert_close(ours, want, rtol=1e-4, atol=1e-4)


def test_there_is_no_second_derivative():
    x = torch.randn(4, 3, 5, requires_grad=True)
    (dx,) = torch.autograd.grad(UCBNorm(3, 2, backend="compiled")(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match='backend="reference"'):
        dx.sum().backward()


def test_auto_takes_the_loops_from_a_size_on(monkeypatch):
    def chosen(values: int, num: int = 3, dtype: torch.dtype = torch.float32) -> str:
        return functional.choose_backend("auto", torch.empty(values, dtype=dtype), num)

    least = functional.LEAST_VALUES["single"]
    assert (chosen(least), chosen(least - 1)) == ("compiled", "eager")
    assert chosen(least, num=loops.MOST_COMPONENTS + 1) == "eager"
    assert chosen(least, dtype=torch.float64) == chosen(least, dtype=torch.bfloat16) == "eager"
    assert NormConfig(kind="ucb").backend_on(CPU) == NormConfig(kind="mn").backend_on(CPU) == "compiled"
    assert NormConfig(kind="scb").backend_on(CPU) == NormConfig(kind="ucb").backend_on(CPU, torch.bfloat16) == "eager"
    assert NormConfig(kind="ucb", backend="reference").backend_on(CPU) == "reference"
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert chosen(least) == NormConfig(kind="ucb").backend_on(CPU) == "eager"


def test_a_compiler_that_fails_leaves_what_needs_none(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("CXX", shutil.which("false") or "false")
    x = torch.randn(64, 4, 8, 8)
    assert functional.choose_backend("auto", x, 3) == "eager"
    assert not loops.serves(x, 3)
    assert compiled.refusal(CPU) is None  # torch.compile may have another way, and says what fails
    assert not list(tmp_path.rglob("*.so"))


def test_a_library_is_compiled_once(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    loops._library.cache_clear()
    try:
        assert loops.library(1) is not None
        (made,) = tmp_path.rglob("*.so")
        when = made.stat().st_mtime_ns
        loops._library.cache_clear()
        assert loops.library(1) is not None
        assert made.stat().st_mtime_ns == when
    finally:
        loops._library.cache_clear()


def test_clusters_stay_eager():
    """Which is as fast as BatchNorm without a compiler."""
    layer, x = SCBNorm(4, 3), torch.randn(64, 4, 8, 8)
    assert functional.choose_backend(layer.backend, x) == "eager"
