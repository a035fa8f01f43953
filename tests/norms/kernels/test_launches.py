"""A kernel that was compiled is launched again without asking Triton: with what Triton would launch, or not at all."""

import contextlib
import os
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from launches import LAYERS, gpu, replaced_kernels
from torch import Tensor

from common.norms.kernels import launch, operators

pytest.importorskip("triton")


class Compiled:
    """What Triton might have compiled: it notes what it is launched with."""

    def __init__(self, note: Callable[..., None]) -> None:
        self.note = note

    def __getitem__(self, grid: tuple) -> Callable[..., None]:
        return lambda *arguments: self.note(grid, arguments)


class Kernel:
    """A kernel of one tensor, two more or None, two numbers and a constant, which Triton is asked to launch."""

    arg_names = ("x", "a", "b", "c", "d", "FLAG")

    def __init__(self, launched: Callable[..., Any]) -> None:
        self.launched = launched

    def __getitem__(self, grid: tuple) -> Callable[..., Any]:
        return self.launched


@pytest.fixture(autouse=True)
def nothing_compiled(monkeypatch):
    known: dict = {}
    monkeypatch.setattr(launch, "COMPILED", known)
    return known


def alike(a: object, b: object) -> bool:
    """Say whether two launches' arguments are the same, tensors by what a kernel is compiled for."""
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return (a.shape, a.dtype, a.stride()) == (b.shape, b.dtype, b.stride())
    return type(a) is type(b) and a == b


@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_launches_again_what_triton_made_of_it_in_the_same_order(name):
    """The oracle is how Triton binds arguments: by the kernel's own signature, constants and all."""
    asked, launches = [], []

    def compile_anew(kernel, grid, args, kwargs):
        constants = {name: value for name, value in kwargs.items() if name in kernel.arg_names}
        assert kwargs.keys() - constants.keys() == {"num_warps", "enable_fp_fusion"}
        assert kwargs["enable_fp_fusion"] is True  # Triton's default is another from 3.10 on
        launches.append((grid, kernel.signature.bind(*args, **constants).args))
        asked.append(kernel)
        return Compiled(lambda *launched: launches.append(launched))

    layer = LAYERS[name].build(12, "cpu")
    x = torch.randn(4, 12, 5, 5).requires_grad_()
    inputs = [x, *(p for p in layer.parameters() if p.requires_grad)]
    with replaced_kernels(compile_anew):
        steps = []
        for _ in range(2):
            torch.autograd.grad(layer(*LAYERS[name].arguments(x)), inputs, torch.ones_like(x), allow_unused=True)
            steps.append(launches[:])
            launches.clear()
    assert len(steps[0]) == len(steps[1]) >= len(asked) > 0
    assert len(asked) == len(set(asked)) or name == "MixtureNorm"  # whose first and last steps of EM are others
    for (grid, first), (again, second) in zip(*steps, strict=True):
        assert (*grid, 1, 1)[:3] == again[:3]
        assert len(first) == len(second)
        assert all(alike(a, b) for a, b in zip(first, second, strict=True))


def specialised(arguments: tuple) -> tuple:
    """Return what Triton compiles a kernel for, by Triton."""
    from triton.backends.compiler import GPUTarget  # noqa: PLC0415
    from triton.compiler.compiler import make_backend  # noqa: PLC0415
    from triton.runtime.jit import native_specialize_impl  # noqa: PLC0415

    backend = make_backend(GPUTarget("cuda", 90, 32))
    return tuple(native_specialize_impl(backend, each, False, True, True) for each in arguments)


def tensor(dtype: torch.dtype, first: int) -> Tensor:
    return torch.zeros(80, dtype=torch.uint8)[first : first + 32].view(dtype)


TENSORS = (
    None,
    *(tensor(dtype, first) for dtype in (torch.float32, torch.bfloat16, torch.int64) for first in (0, 8, 16, 24)),
)
NUMBERS = (0, 1, 2, 16, 17, 32, 2**31, -1, 0.0, 1.0, 16.0, 0.5)
BASE = (TENSORS[1], TENSORS[2], 2, 0.5, True)


def one_changed() -> Iterator[tuple]:
    """Yield what a kernel might be launched with: each with one argument that is another than in the base."""
    for place, values in enumerate((TENSORS, TENSORS, NUMBERS, NUMBERS, (True, False))):
        for value in values:
            yield *BASE[:place], value, *BASE[place + 1 :]


def test_what_triton_compiles_apart_is_never_launched_for_one_another():
    """Every two of one kind of argument meet, since all are launched again and again in one process."""
    compiled, launched = [], []

    def run(*arguments: Any, FLAG: bool, num_warps: int, **_: Any) -> Compiled:
        found = specialised(arguments), FLAG, num_warps
        compiled.append(found)
        launched.append((found, arguments))
        return Compiled(lambda _, again: launched.append((found, (*again[:-1],))))

    kernel, x = Kernel(run), torch.zeros(1)
    for several in (list(one_changed()), list(one_changed())[::-1]):
        launch.COMPILED.clear()
        for num_warps in (4, 8, 4):
            for a, b, c, d, flag in several:
                launch.start(kernel, (1,), (x, a, b), (c, d), FLAG=flag, num_warps=num_warps)
                ((found, arguments),) = launched
                assert found == (specialised((x, a, b, c, d)), flag, num_warps)
                assert all(given is own for given, own in zip(arguments, (x, a, b, c, d), strict=True))
                launched.clear()
    before = len(compiled)
    launch.start(kernel, (1,), (x, *BASE[:2]), (2, 0.625), FLAG=True, num_warps=4)  # a float of another value
    assert len(compiled) == before
    assert launched[-1][1][-1] == 0.625


def test_kernels_are_told_apart_and_forgotten_when_they_are_too_many(monkeypatch, nothing_compiled):
    monkeypatch.setattr(launch, "MOST_COMPILED", 3)
    asked, x = [], torch.zeros(1)

    def named(name: str) -> Kernel:
        return Kernel(lambda *_, **__: asked.append(name) or Compiled(lambda *_: None))

    kernels = [named(name) for name in "abcd"]
    for kernel in (*kernels[:3], *kernels[:3]):
        launch.start(kernel, (1,), (x, None, None), (1, 2), FLAG=True)
    assert asked == ["a", "b", "c"]
    launch.start(kernels[3], (1,), (x, None, None), (1, 2), FLAG=True)
    assert len(nothing_compiled) == 1
    launch.start(kernels[0], (1,), (x, None, None), (1, 2), FLAG=True)
    assert asked == ["a", "b", "c", "d", "a"]


@pytest.mark.parametrize("made", [None, object()], ids=["the interpreter", "still being compiled"])
def test_where_nothing_is_compiled_yet_triton_is_asked_each_time(made, nothing_compiled):
    asked = []
    kernel = Kernel(lambda *args, **_: asked.append(args) or made)
    for _ in range(2):
        launch.start(kernel, (1,), (torch.zeros(1),), (7,), FLAG=True)
    assert [args[1] for args in asked] == [7, 7]
    assert not nothing_compiled


def test_a_kernel_runs_on_the_device_of_its_tensors_whichever_is_current(monkeypatch):
    current, ran = [0], []

    @contextlib.contextmanager
    def device(index):
        current.append(index)
        yield
        current.pop()

    monkeypatch.setattr(torch.cuda, "current_device", lambda: current[-1])
    monkeypatch.setattr(torch.cuda, "device", device)

    def compile_for(*_: Any, **__: Any) -> Compiled:
        own = current[-1]
        ran.append(("compiled", own))
        return Compiled(lambda *_: ran.append((own, current[-1])))

    kernel = Kernel(compile_for)
    for index in (0, 1, 1, 0):
        x: Any = SimpleNamespace(device=torch.device("cuda", index), dtype=torch.float32, data_ptr=lambda: 16)
        launch.start(kernel, (1,), (x, None, None), (1, 2), FLAG=True)
        assert current == [0]
    assert ran == [("compiled", 0), ("compiled", 1), (1, 1), (0, 0)]


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="interpreted kernels do not compile")
def test_triton_is_asked_once_and_its_launcher_called_as_triton_calls_it(monkeypatch):
    from triton.compiler.compiler import CompiledKernel  # noqa: PLC0415
    from triton.runtime.jit import JITFunction  # noqa: PLC0415

    launched = []
    arguments = (1,), (torch.zeros(3, 4), None, torch.zeros(8, 3, 4), torch.zeros(3)), (4, -5.0)
    constants = {"K": 3, "STORED": True, "BLOCK_C": launch.ALL_CHANNELS, "num_warps": 4}
    kernel = operators._kernels()["mixture_logits_kernel"]
    with gpu(90, lambda *given: launched.append(given)):
        launch.start(kernel, *arguments, **constants)
        ((compiled, rest),) = launch.COMPILED.values()
        assert type(compiled) is CompiledKernel
        assert rest == (3, True, launch.ALL_CHANNELS)
        kernel[(1,)](*arguments[1], *arguments[2], enable_fp_fusion=launch.FP_FUSION, **constants)
        monkeypatch.setattr(JITFunction, "run", None)
        launch.start(kernel, *arguments, **constants)
    first, asked, again = ((*given[:6], *given[7:]) for given in launched)  # all but a profiler's note
    for each in (first, again):
        assert all(a is b or a == b for a, b in zip(asked, each, strict=True))
