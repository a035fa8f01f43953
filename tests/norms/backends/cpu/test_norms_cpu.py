"""The loops in C++: over layouts, threads and sizes, when they are taken, and where they are refused.

``test_norms_agreement`` holds them against the reference under the budget of all backends.
"""

import itertools
import os
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from norm_cases import any_norm, batch, channels_last, in_full, mixture_case, mixture_run, needs_compiler, step
from torch import Tensor

from common.norms import MixtureNorm, UCBNorm, functional, mixture, mixture_norm
from common.norms.backends.backend import Options
from common.norms.backends.cpu import library
from common.norms.backends.reference import MixtureParams, Moments
from common.norms.config import NormConfig
from common.norms.mixture import Components, FitRule, Rule

pytestmark = needs_compiler
CPU = torch.device("cpu")
RESIDENT = {"planes": (2, 2, 400, 211), "rows": (1, 2, 230, 101)}
"""Sizes beyond which a channel's posteriors are found twice in either pass."""
LOOPS = library.Cpu()


def groupings(channels: int) -> set[int]:
    return {1, channels, channels // 2 if channels % 2 == 0 else 1}


def test_channels_too_long_for_a_cache_are_right_too():
    for layout, shape in RESIDENT.items():
        case = list(mixture_case(shape, num=3, dtype=torch.float32))
        if layout == "rows":
            case[0], case[4] = channels_last(case[0]), channels_last(case[4])
        for statistics in ("batch", "learned"):
            exact, ours = (
                mixture_run(case, dtype, by, groups=2, statistics=statistics)
                for dtype, by in ((torch.float64, "reference"), (torch.float32, "compiled"))
            )
            for name, want in exact.items():
                # Random walks of 1e5 roundings in the sums; the reference's own float32 sums err by as much.
                atol = 2e-6 * float(want.abs().max())
                torch.testing.assert_close(ours[name].double(), want, rtol=1e-5, atol=atol)


LAYOUTS = [(9, 4), (5, 18, 7, 3), (3, 40, 5, 5), (6, 36, 16, 16), (6, 32, 16, 16), RESIDENT["rows"]]


@pytest.mark.parametrize(
    ("shape", "num"),
    [
        *((shape, 3) for shape in LAYOUTS[:4]),
        *in_full(*((shape, 3) for shape in LAYOUTS[4:]), *((LAYOUTS[2], num) for num in (1, 2, 5, 8))),
    ],
    ids=str,
)
def test_layouts_and_threads_change_no_bit(shape, num):
    x, log_lambda, mean, var, g = mixture_case(shape, num=num, dtype=torch.float32)
    affine = [t.requires_grad_() for t in mixture_case((2, shape[1]), num=1, dtype=torch.float32)[0].clone()]
    tables, found = [log_lambda, mean, var], []
    before = torch.get_num_threads()
    for groups, statistics in itertools.product(groupings(shape[1]), ("batch", "learned")):
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
        found.append((results, 3 if statistics == "batch" else 0))  # moments
    for results, more in found:
        with_mixture, without = ([each for each in results if len(each) == count + more] for count in (7, 4))
        assert len(with_mixture) == len(without) == 8
        for alike in (with_mixture, without):
            for other in alike[1:]:
                assert all(torch.equal(a, b) for a, b in zip(alike[0], other, strict=True))
        want, dx = with_mixture[0][1 + more], without[0][1 + more]  # rounded elsewhere, where sums are not needed
        torch.testing.assert_close(dx, want, rtol=1e-5, atol=1e-6 * float(want.abs().max()))


def test_loops_read_and_write_no_memory_but_what_they_are_given(tmp_path):
    """Under a sanitizer, with buffers that are made anew, and fresh memory full of zeros or of what is no number."""
    source = library.SOURCE.read_text(encoding="utf-8")
    for kept, fresh in (
        ("if (n > size) {", "{"),
        ("static_cast<float*>(std::aligned_alloc(64, (4 * n + 63) / 64 * 64))", "exactly(n)"),
    ):
        assert source.count(kept) == 1
        source = source.replace(kept, fresh)
    (tmp_path / "library.cpp").write_text(source, encoding="utf-8")
    program, main = str(tmp_path / "program"), str(Path(__file__).with_name("mixture_memory.cpp"))
    given = "-O1", "-fopenmp", "-fsanitize=address", "-DCOMPONENTS=5", f'-DLOOPS="{tmp_path}/library.cpp"'
    options = (*library.OPTIONS, *given)
    command = [library.compiler(), *options, main, "-o", program]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if "libasan" in done.stderr:
        pytest.skip("the compiler has no address sanitizer")
    assert done.returncode == 0, done.stderr
    printed = []
    for byte in (0, 255):
        fill = f"max_malloc_fill_size=1000000000:malloc_fill_byte={byte}"
        environment = {"OMP_NUM_THREADS": "1", "ASAN_OPTIONS": fill}
        ran = subprocess.run([str(program)], capture_output=True, text=True, env=environment, check=False)
        assert ran.returncode == 0, ran.stderr[:3000]
        printed.append(ran.stdout.splitlines())
    assert printed[0] == printed[1]
    assert len(printed[0]) == 15 * 8 * 2
    assert printed[0][::2] == printed[0][1::2]  # planes and rows


def test_other_strides_are_copied():
    x, log_lambda, mean, var, _ = mixture_case((4, 6, 8), num=3, dtype=torch.float32)
    sliced = torch.stack([x, x], dim=3)[..., 0]
    assert not sliced.is_contiguous()
    want, _ = mixture_norm(x, log_lambda, mean, var, backend="compiled")
    assert torch.equal(mixture_norm(sliced, log_lambda, mean, var, backend="compiled")[0], want)


def test_averages_move_as_in_float64():
    x, _, mean, var, _ = mixture_case((5, 6, 9), num=3, dtype=torch.float32)
    rules: list[tuple[Any, bool]] = [("em", False), ("paper", False), ("em", True)]
    for groups, (average, shared) in itertools.product((1, 2, 6), rules):
        params = MixtureParams(torch.tensor([0.3, -1.0, 0.1]), mean.clone(), var.log())
        options = Options(groups, 1e-5, "paper", "batch", stored=True, min_weight=1e-3)
        _, state = LOOPS.normalise(x, params, (None, None), options)
        assert state is not None
        moments = Moments(*(t.double() for t in LOOPS.moments(state, 3, groups)))
        rule = Rule(0.2, average, 1e-3, shared)
        want = mixture.moved(MixtureParams(*(t.double() for t in params)), moments, rule)
        LOOPS.update(params, state, groups, rule)
        for ours, value in zip(params, want, strict=True):
            torch.testing.assert_close(ours.double(), value, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("backend", ["eager", "compiled"])
def test_frozen_parameters_stay(backend):
    """Without gradients the loops read them as they read averages, which they are not."""
    layer = UCBNorm(6, 3, update="weight", backend=backend).requires_grad_(False)
    before = {name: p.clone() for name, p in layer.named_parameters()}
    layer(batch(0, (5, 6, 9)))
    for name, p in layer.named_parameters():
        assert torch.equal(p, before[name]), name


def test_a_fit_is_that_of_em_in_float64():
    points = mixture_case((4096, 6), num=3, dtype=torch.float32)[0]
    mean, var = mixture_case((3, 6), num=3, dtype=torch.float32)[2:4]
    fit = Components(torch.tensor([0.5, 0.3, 0.2]), mean.clone(), var)
    exact = Components(*(t.double() for t in fit))
    for groups in (1, 2, 6):
        want = mixture.expectation_maximisation(points.double(), exact, groups, 1e-5, 4)
        got = LOOPS._em(points, fit, FitRule(groups, 1e-5, 4, 0, 0, 1e-3))
        for ours, value in zip(got, want, strict=True):
            torch.testing.assert_close(ours.double(), value, rtol=1e-4, atol=1e-5)
        assert torch.equal(fit.mean, mean)


@pytest.mark.parametrize("kind", [UCBNorm, MixtureNorm])
def test_layers_train_and_evaluate_as_in_float64(kind):
    """Some batches, so that averages, fits and re-seeding are those of the batches before."""
    for groups in (None, 2, 1):
        layer = kind(6, 3, groups=groups, backend="compiled")
        exact = kind(6, 3, groups=groups, backend="reference").double()
        for seed in range(3):
            x, *_, g = mixture_case((16, 6, 5, 5), num=1, seed=seed)
            results = []
            for each in (layer, exact):
                own, given = x.to(each.mean), g.to(each.mean)
                found = step(each.train(), own, given), each.eval()(own), *each.buffers()
                results.append([t.detach().double() for t in (*found[0], *found[1:])])
            for ours, want in zip(*results, strict=True):
                torch.testing.assert_close(ours, want, rtol=1e-4, atol=1e-4)


def test_they_keep_what_batch_norm_keeps_and_the_posteriors_of_groups():
    x = torch.randn(6, 8, 5, 5, requires_grad=True)
    kept: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    for groups, posteriors in ((1, 3 / 8), (None, 0)):
        kept.clear()
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            UCBNorm(8, 3, groups=groups, backend="compiled")(x)
        parameters = 4 * (10 * 3 * 8 + 2 * 8)  # a few tables (K, C), weight and bias
        assert x.nbytes * (1 + posteriors) <= sum(kept.values()) <= x.nbytes * (1 + posteriors) + parameters


def test_auto_takes_the_loops_from_a_size_on(monkeypatch):
    def chosen(values: int, num: int = 3, dtype: torch.dtype = torch.float32) -> str:
        return functional.choose_backend("auto", torch.empty(values, dtype=dtype), num)

    least = functional.LEAST_VALUES
    assert (chosen(least), chosen(least - 1)) == ("compiled", "eager")
    assert chosen(least, num=library.MOST_COMPONENTS + 1) == "eager"
    assert chosen(least, dtype=torch.float64) == chosen(least, dtype=torch.bfloat16) == "eager"
    assert NormConfig(kind="ucb").backend_on(CPU) == NormConfig(kind="mn").backend_on(CPU) == "compiled"
    assert NormConfig(kind="scb").backend_on(CPU) == NormConfig(kind="ucb").backend_on(CPU, torch.bfloat16) == "eager"
    assert NormConfig(kind="ucb", backend="reference").backend_on(CPU) == "reference"
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert chosen(least) == NormConfig(kind="ucb").backend_on(CPU) == "eager"


def test_auto_does_without_a_compiler_that_fails(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("CXX", shutil.which("false") or "false")
    x = torch.randn(64, 4, 8, 8)
    assert functional.choose_backend("auto", x, 3) == "eager"
    assert (library.refusal(x, 3) or "").endswith("false' fails; install one or set CXX")
    assert not list(tmp_path.rglob("*.so"))


@pytest.fixture
def unoptimised(monkeypatch):
    """Compile in less time, and forget what is loaded."""
    compile_ = library._compile
    monkeypatch.setattr(library, "_compile", lambda command, given, path: compile_(command, [*given, "-O0"], path))
    library._library.cache_clear()
    yield
    library._library.cache_clear()


def test_a_library_is_compiled_once(monkeypatch, tmp_path, unoptimised):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert library.library(1) is not None
    (made,) = tmp_path.rglob("*.so")
    when = made.stat().st_mtime_ns
    library._library.cache_clear()
    assert library.library(1) is not None
    assert made.stat().st_mtime_ns == when


def test_a_home_that_cannot_be_written_is_done_without(monkeypatch, tmp_path, unoptimised):
    (tmp_path / "file").touch()
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    assert library._on_path(library.compiler())  # remembered: a line below would hide it
    for home, writable in (("file/cache", True), ("folder", False)):
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / home))
        monkeypatch.setattr(os, "access", lambda *_, writable=writable: writable)  # which root always may
        library._library.cache_clear()
        assert library.library(1) is not None
        assert not [path for path in tmp_path.rglob("*") if path.suffix == ".so" or "norm-" in path.name]


@pytest.mark.parametrize(("kind", "num"), [("scb", 3), ("scb_base", 3), ("ucb", 17), ("mn", 17)])
def test_layers_without_loops_are_refused_when_they_are_made(kind, num):
    has = "mixtures (ucb, mn) alone" if kind.startswith("scb") else "at most 16 components"
    line = f"backend: 'compiled' has loops for {has}"
    with pytest.raises(ValueError) as caught:  # noqa: PT011 - the whole line is compared below
        any_norm(kind, 4, num, backend="compiled")
    assert str(caught.value) == line
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        NormConfig(kind=kind, num_components=num, backend="compiled")
    assert str(caught.value) == f"norm.{line}"


@pytest.mark.parametrize(("kind", "training"), [("ucb", True), ("mn", False)])
def test_what_the_loops_cannot_read_is_refused(kind, training):
    """A layer that chooses for itself takes another backend."""
    x = torch.randn(64, 4, 8, 8)
    layer, other = (any_norm(kind, 4, 3, backend=by).train(training) for by in ("compiled", "auto"))
    for wrong in (x.double(), x.bfloat16()):
        with pytest.raises(ValueError, match=r"^backend: 'compiled' needs float32 on a CPU, got \w+ on cpu$"):
            layer(wrong)
        assert other(wrong).isfinite().all()
    with pytest.raises(ValueError, match=r"^backend: 'compiled' needs float32 on a CPU, got float64 on cpu$"):
        layer.double()(x)
    assert other.double()(x).isfinite().all()


def test_what_has_to_see_operators_is_refused():
    class Other(Tensor):
        pass

    line = r"^backend: 'compiled' is closed to dispatch modes and subclasses of Tensor$"
    with pytest.raises(ValueError, match=line):
        UCBNorm(4, 3, backend="compiled")(torch.randn(6, 4, 5).as_subclass(Other))


def test_a_missing_compiler_is_named(monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    line = "backend: 'compiled' needs a C\\+\\+ compiler, but 'no-such-compiler' is not on the PATH"
    with pytest.raises(ValueError, match=line):
        UCBNorm(4, 2, backend="compiled")(torch.randn(3, 4, 2))
    with pytest.raises(ValueError, match=f"^norm.{line}"):
        NormConfig(kind="ucb", backend="compiled").backend_on(CPU)


def test_a_configuration_refuses_what_a_run_would_ask_of_the_loops():
    cfg = NormConfig(kind="ucb", backend="compiled")
    assert cfg.backend_on(CPU) == "compiled"
    with pytest.raises(ValueError, match=r"^norm\.backend: 'compiled' needs float32 on a CPU, got bfloat16 on cpu$"):
        cfg.backend_on(CPU, torch.bfloat16)
    with pytest.raises(ValueError, match=r"^norm\.backend: 'compiled' needs float32 on a CPU, got float32 on meta$"):
        cfg.backend_on(torch.device("meta"))
    assert NormConfig(kind="bn", backend="compiled").backend_on(CPU, torch.bfloat16) == "compiled"  # has no backends
