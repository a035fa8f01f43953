"""The host's time, none of which is measured here: what is compared, with what goals, and the driver."""

import contextlib
import ctypes
import shutil

import pytest

from common.errors import UsageError
from common.norms.tools.recording import replaced_kernels
from common.norms.tools.timing import overhead

pytest.importorskip("triton")
needs_compiler = pytest.mark.skipif(shutil.which("cc") is None, reason="there is no C compiler")


@needs_compiler
def test_the_driver_says_that_everything_went_well_and_does_nothing(tmp_path):
    library = ctypes.CDLL(
        str(overhead.build_driver(tmp_path, "cuInit(0); x = cuLaunchKernelEx(a); cuLaunchKernelEx(b)"))
    )
    assert library.cuInit(0) == library.cuLaunchKernelEx(0) == 0
    for function in (library.cuDeviceGetAttribute, library.cuFuncGetAttribute):
        value = ctypes.c_int()
        assert function(ctypes.byref(value), 0, None) == 0
        assert value.value >= 1024  # threads of a block, or bytes that it may share


@pytest.fixture
def timed(monkeypatch):
    """Measure nothing: a layer takes so many microseconds, in each of three rounds."""
    times, entered = {"BatchNorm2d": [100.0, 10.0, 10.0]}, []

    @contextlib.contextmanager
    def nothing_launched():
        entered.append("driver")
        yield

    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(overhead, "microseconds", lambda rounds: times)
    monkeypatch.setattr(overhead, "nothing_launched", nothing_launched)
    monkeypatch.setattr(overhead, "set_threads", entered.append)
    monkeypatch.setattr(overhead.shutil, "which", lambda name: "/usr/bin/cc")
    return times, entered


def run(capsys, *argv: str) -> tuple[int, list[str]]:
    with pytest.raises(SystemExit) as left:
        overhead.main([*argv])
    return int(left.value.code or 0), capsys.readouterr().out.splitlines()


@pytest.mark.parametrize(("time", "stubbed", "launched"), [(30.0, 0, 0), (31.0, 1, 0), (50.0, 1, 0), (51.0, 1, 1)])
def test_a_layer_may_take_three_and_five_times_as_long_as_batch_norm(timed, capsys, time, stubbed, launched):
    timed[0]["UCBNorm"] = [time, time, time]
    code, told = run(capsys)
    assert f"| UCBNorm | kernels stubbed | {time:.0f} | {time / 10:.1f} | 3.0 |" in told
    assert f"| UCBNorm | driver launches nothing | {time:.0f} | {time / 10:.1f} | 5.0 |" in told
    bad = [line.split(": ")[1] for line in told if line.startswith("missed: ")]
    assert bad == ["UCBNorm, kernels stubbed"] * stubbed + ["UCBNorm, driver launches nothing"] * launched
    assert (code, told[-1]) == (bool(bad), f"{len(bad)} goals missed")
    assert timed[1] == [1, "driver"]


def test_the_launcher_may_be_left_out(timed, capsys, monkeypatch):
    monkeypatch.setattr(overhead.shutil, "which", lambda name: None)
    _, told = run(capsys, "--driver", "false")
    assert timed[1] == [1]
    assert not any("driver" in line for line in told)
    with pytest.raises(UsageError, match=r"^driver: True needs a C compiler, cc, and there is none$"):
        overhead.main([])


def test_every_layer_is_run_with_its_backward(monkeypatch):
    monkeypatch.setattr(overhead, "REPEATS", 2)
    launched: list[str] = []
    with replaced_kernels(lambda kernel, *_: launched.append(kernel.__name__)):
        times = overhead.microseconds(2)
    assert list(times) == ["BatchNorm2d", *overhead.LAYERS]
    assert all(len(each) == 2 and min(each) > 0 for each in times.values())
    assert {"scb_fwd_kernel", "scb_bwd_kernel", "mixture_bwd_kernel"} <= set(launched)
    # Each layer is run once to compile, and twice in each of two rounds.
    assert {launched.count(name) % 5 for name in set(launched)} == {0}


def test_rounds_are_checked(monkeypatch):
    with pytest.raises(UsageError, match="rounds: expected at least 1, got 0"):
        overhead.main(["--rounds", "0"])
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(UsageError, match=r"^TRITON_INTERPRET: expected it unset, .* got 1$"):
        overhead.main([])
