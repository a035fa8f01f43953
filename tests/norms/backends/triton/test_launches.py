"""How kernels are launched, without a GPU: on which device, with which options, and while Triton compiles elsewhere."""

import contextlib
import os
import re
import warnings
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from launches import LAYERS, gpu, record, replaced_kernels

from common.norms import functional
from common.norms.backends.triton import launch, ops, tile_configs

triton = pytest.importorskip("triton")
compiles = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="interpreted kernels do not compile")

LOGITS = (1,), (torch.zeros(3, 4), None, torch.zeros(8, 3, 4), torch.zeros(3)), (4, -5.0)
"""A grid, tensors and numbers of mixture_logits_kernel."""
CONSTANTS = {"K": 3, "STORED": True, "BLOCK_C": tile_configs.ALL_CHANNELS, "num_warps": 4}


@pytest.mark.parametrize("name", LAYERS)
def test_every_launch_says_whether_products_and_sums_are_fused(name):
    """Triton's default changes in 3.10."""
    step = record(LAYERS[name], (4, 12, 5, 5), torch.float32, "NCHW")
    launches = [each for each in (*step.forward, *step.backward) if each.kernel]
    assert launches
    assert all(each.kwargs["enable_fp_fusion"] is True for each in launches)


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
