"""What the layers launch, without a GPU: how much, with which options, on which device, and while Triton compiles."""

import contextlib
import itertools
import os
import re
import warnings
from concurrent.futures import ThreadPoolExecutor
from math import prod
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from launches import LAYERS, LAYOUTS, Launch, Recorder, gpu, record, replaced_kernels

from common.norms import functional
from common.norms.backends.triton import launch, ops, tile_configs

triton = pytest.importorskip("triton")
compiles = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="interpreted kernels do not compile")

SMALL, LARGE = (64, 256, 8, 8), (64, 64, 112, 112)
LIMITS = {
    # forward: launches and passes, backward: launches and passes
    "UCBNorm": (4, 3, 4, 5),  # BatchNorm reads x twice and writes y; reads x and g twice and writes dx
    "UCBNorm, groups=1": (4, 3, 4, 5),
    "UCBNorm, update=weight": (4, 3, 5, 5),
    "UCBNorm, statistics=learned": (4, 2, 5, 3),  # where the statistics are given, everything is read once
    "UCBNorm, evaluation": (2, 2, 3, 3),  # under gradients it copies the mixture, which may move
    "UCBNorm, groups=1, evaluation": (2, 2, 3, 3),
    "SCBNorm": (1, 2, 2, 3),
    "SCBNorm, affine": (1, 2, 2, 3),
    "SCBNorm, evaluation, ids": (2, 2, 3, 3),  # one launch more each way, for samples that may be unknown
    "SCBNorm, evaluation, unknown": (3, 2, 4, 3),  # and one to make a mixture of the clusters
    "SCBNormBase": (3, 2, 4, 3),
    "MixtureNorm": (40, 3, 4, 5),  # ten steps of EM
    "MixtureNorm, evaluation": (2, 2, 3, 3),
}
REAL = {"eps", "kappa", "momentum", "min_weight", "floor", "bessel", "least", "empty"}
"""What kernels are given that is not a whole number."""
MULTIPROCESSORS = 132
"""Of an H100."""


def passes(launches: list[Launch], size: int) -> int:
    return sum(each.passes(size) for each in launches)


@pytest.mark.parametrize("name", LAYERS)
def test_a_step_launches_and_moves_no_more_than_its_limits(name):
    for shape, dtype, layout in itertools.product((SMALL, LARGE), (torch.float32, torch.bfloat16), LAYOUTS):
        if (name, shape) == ("MixtureNorm", SMALL):
            continue  # it is fitted to a small batch as it is, by many passes, and to few locations of a large one
        step, size = record(LAYERS[name], shape, dtype, layout), prod(shape)
        found = len(step.forward), passes(step.forward, size), len(step.backward), passes(step.backward, size)
        assert all(a <= b for a, b in zip(found, LIMITS[name], strict=True)), (found, shape, dtype, layout)
        assert step.kept <= 1.05 * size * dtype.itemsize  # x, and tables
        for each in (*step.forward, *step.backward):
            if each.kernel and each.passes(size):
                assert prod(each.grid) >= 0.9 * MULTIPROCESSORS, (each.name, shape, dtype, layout)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_channels_that_fit_into_a_cache_move_less_than_batch_norm(dtype):
    """A launch and one for the averages forward, one backward: x is read once, and so is the gradient."""
    step = record(LAYERS["UCBNorm"], SMALL, dtype, "NCHW")
    assert [each.name for each in step.forward] == ["mixture_channel_kernel", "mixture_averages_kernel"]
    assert [each.name for each in step.backward] == ["mixture_channel_bwd_kernel"]
    assert (passes(step.forward, prod(SMALL)), passes(step.backward, prod(SMALL))) == (2, 3)


@pytest.mark.parametrize("name", LAYERS)
def test_kernels_are_given_whole_sizes_and_whether_to_fuse(name):
    """A size of 2.0 would be compiled as a float32, which does not count far; Triton 3.10 changes how it fuses."""
    step = record(LAYERS[name], (4, 6, 2, 2), torch.float32, "NCHW")
    kernels = [each for each in (*step.forward, *step.backward) if each.kernel]
    assert kernels
    for each in kernels:
        arguments = {**dict(zip(each.kernel.arg_names, each.args, strict=False)), **each.kwargs}
        assert {argument for argument, value in arguments.items() if isinstance(value, float)} <= REAL, each.name
        assert each.kwargs["enable_fp_fusion"] is True


def test_the_recorder_sees_every_operator_but_views():
    x, few = torch.empty(4, 6, device="meta"), torch.empty(6, device="meta")
    with Recorder() as recorder:
        x.t()[0].unsqueeze(0)
        torch.empty_like(x).detach()
        torch.zeros(3).add(1)  # on the host
        assert not recorder.take()
        x.t().reshape(2, 12)  # a copy
        x.add_(few)
        assert [each.passes(x.numel()) for each in recorder.take()] == [2, 2]


LOGITS = (1,), (torch.zeros(3, 4), None, torch.zeros(8, 3, 4), torch.zeros(3)), (4, -5.0)
"""A grid, tensors and numbers of mixture_logits_kernel."""
CONSTANTS = {"K": 3, "STORED": True, "BLOCK_C": tile_configs.ALL_CHANNELS, "num_warps": 4}


def test_a_kernel_runs_on_the_device_of_its_tensors_whichever_is_current(monkeypatch):
    current, ran = [0], []

    @contextlib.contextmanager
    def device_of(x):
        current.append(int(x.sum()))
        yield
        current.pop()

    monkeypatch.setattr(torch.cuda, "device_of", device_of)
    kernel = ops._kernels()["mixture_logits_kernel"]
    with replaced_kernels(lambda *_: ran.append(current[-1])):
        for index in (0, 1, 0):
            launch.start(kernel, (1,), (torch.tensor(index), *LOGITS[1][1:]), LOGITS[2], **CONSTANTS)
            assert current == [0]
    assert ran == [0, 1, 0]


@compiles
@pytest.mark.skipif(not hasattr(triton, "AsyncCompileMode"), reason="Triton before 3.7")
def test_kernels_are_launched_while_triton_compiles_in_other_threads():
    launched = []
    kernel = ops._kernels()["mixture_logits_kernel"]
    with gpu(90, lambda *given: launched.append(given)):
        with ThreadPoolExecutor(1) as pool, triton.AsyncCompileMode(pool):
            for _ in range(2):
                launch.start(kernel, *LOGITS, **CONSTANTS)
        launch.start(kernel, *LOGITS, **CONSTANTS)
    assert len(launched) == 3


def on_gpu(index: int) -> Any:
    """Return what the choice of a backend asks of a tensor."""
    return SimpleNamespace(is_cuda=True, device=torch.device("cuda", index), dtype=torch.float32, ndim=0)


def test_each_device_is_tried_once_whichever_is_current(monkeypatch):
    from common.norms.backends.triton import cluster_kernels  # noqa: PLC0415 - an optional dependency

    current, tried = [0], []

    @contextlib.contextmanager
    def device(given):
        current.append(given.index)
        yield
        current.pop()

    def run(**_):
        tried.append(current[-1])
        if current[-1] == 1:
            raise RuntimeError("out of memory")

    monkeypatch.setattr(torch.cuda, "device", device)
    monkeypatch.setattr(cluster_kernels, "nothing", {(1,): run})
    launch.failure.cache_clear()
    with pytest.warns(UserWarning, match=r"cannot start on cuda:1 \(out of memory\)"):
        chosen = [functional.choose_backend("auto", on_gpu(index), 3) for index in (1, 0, 1, 0)]
    launch.failure.cache_clear()
    assert chosen == ["eager", "triton"] * 2
    assert tried == [1, 0]


@compiles
@pytest.mark.parametrize(
    ("compiler", "reason"),
    [
        ("gcc", None),
        (None, "Failed to find C compiler"),
        ("false", "false compiles nothing: are there Python's headers[?]"),
    ],
)
def test_the_automatic_choice_is_eager_with_a_warning_where_triton_cannot_start(monkeypatch, compiler, reason):
    """Triton compiles in C what launches a kernel, as slim containers cannot."""
    from triton.runtime.build import compile_module_from_src  # noqa: PLC0415

    if compiler:
        monkeypatch.setenv("CC", compiler)
    else:
        monkeypatch.delenv("CC", raising=False)
        monkeypatch.setenv("PATH", "")

    def launcher(source, metadata):
        if compiler != "gcc":
            compile_module_from_src("", "launcher")
        return lambda *_: None

    monkeypatch.setattr(torch.cuda, "device", lambda _: contextlib.nullcontext())
    x: Any = on_gpu(0)
    launch.failure.cache_clear()
    with gpu(90) as driver, warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        driver.launcher_cls = launcher
        chosen = [functional.choose_backend("auto", x, 3) for _ in range(2)]
        assert chosen == ["eager" if reason else "triton"] * 2
        if reason:
            with pytest.raises(ValueError, match=f"^backend: 'triton' cannot start: {reason}"):
                functional.choose_backend("triton", x, 3)
    launch.failure.cache_clear()
    said = [str(each.message) for each in caught]
    assert len(said) == bool(reason)
    assert all(
        re.match(rf"backend: Triton cannot start on cuda:0 \({reason}.*\); 'auto' takes eager$", text) for text in said
    )
