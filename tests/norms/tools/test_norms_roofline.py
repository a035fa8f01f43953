"""Least times, against hand-made arithmetic; no compiler runs here."""

import pytest
import torch

from common.errors import UsageError
from common.norms.tools import counts
from common.norms.tools.machine_code import specialise
from common.norms.tools.recording import Launch
from common.norms.tools.timing import roofline
from common.norms.tools.timing.roofline import Bound, Device, Row, Work

pytest.importorskip("triton")

DEVICE = Device(arch=90, multiprocessors=10, clock=1e9, bandwidth=1e12)


def launched(programs: int = 100, name: str = "a_kernel") -> Launch:
    return Launch(name, reads=6e6, writes=2e6, grid=(programs,))


def test_a_launch_takes_as_long_as_what_bounds_it():
    """10 multiprocessors at 1 GHz: 1.28e12 instructions and 1.6e11 special ones a second."""
    size = 1_000_000
    found = roofline.bound(launched(), Work(64, 4), size, DEVICE)
    assert found == pytest.approx((50e-6, 25e-6, 8e-6, 2e-6))
    assert (found.time, found.by) == (pytest.approx(50e-6), "issue")
    assert roofline.bound(launched(), Work(1, 4), size, DEVICE).by == "MUFU"
    assert roofline.bound(launched(), Work(1, 0.1), size, DEVICE).by == "memory"
    assert roofline.bound(launched(), None, size, DEVICE) == pytest.approx((0, 0, 8e-6, 2e-6))
    assert roofline.bound(launched(), None, size, DEVICE._replace(bandwidth=8e12)).by == "launch"


def test_half_a_device_takes_twice_as_long():
    whole, half = (roofline.bound(launched(n), Work(64, 4), 1_000_000, DEVICE) for n in (10, 5))
    assert half[:2] == pytest.approx((2 * whole.issue, 2 * whole.special))
    assert half.memory == whole.memory


def test_batch_norm_is_two_kernels_each_way_and_bound_by_memory():
    """8 activations of 205,520,896 bytes at 3.35e12 bytes a second, and a counter."""
    base = batch_norm((64, 64, 112, 112))
    assert base.time == pytest.approx(8 * 205_520_896 / 3.35e12 + 2e-6, rel=1e-3)
    assert {each.by for name, each in base.launches if name != "add_"} == {"memory"}
    small = batch_norm((2, 4, 2, 2))
    assert small.time == pytest.approx(5 * 2e-6)


def batch_norm(shape: tuple[int, ...]) -> Row:
    step = counts.record(counts.SUBJECTS[0], shape, torch.float32)
    bounds = [
        (each.name, roofline.bound(each, None, 0, roofline.DEVICES["H100"]))
        for each in (*step.forward.launches, *step.backward.launches)
    ]
    return Row("BatchNorm2d", shape, "float32", "H100", bounds)


@pytest.fixture
def compiled(monkeypatch):
    """Compile nothing: every kernel takes as many instructions an element as a test says."""
    done, work = [], {"count": 50.0}

    class Fake:
        def __init__(self, launch, text, size):
            self.launch = launch

        def per_element(self, *names):
            return 4.0 if names == ("MUFU",) else work["count"]

    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(
        roofline, "compile_launch", lambda launch, arch: done.append((specialise(launch, arch).key, arch)) or b""
    )
    monkeypatch.setattr(roofline, "disassembled", lambda cubin: "")
    monkeypatch.setattr(roofline, "Code", Fake)
    monkeypatch.setattr(roofline, "LAYERS", ("UCBNorm",))
    return done, work


def lines(capsys, *argv: str) -> tuple[int, list[str]]:
    with pytest.raises(SystemExit) as left:
        roofline.main([*argv])
    return int(left.value.code or 0), capsys.readouterr().out.splitlines()


def test_the_command_prints_every_step_beside_batch_norms(compiled, capsys):
    _, told = lines(capsys, "--devices", "H100")
    steps = [line for line in told if line.startswith(("| BatchNorm2d |", "| UCBNorm |"))]
    assert len(steps) == 2 * len(counts.SHAPES) * len(counts.DTYPES)
    assert (
        "| BatchNorm2d | 64x64x112x112 | float32 | H100 | 3 | 493 | 1.00 | native_batch_norm_backward: memory |" in told
    )
    kernels = [line for line in told if "_kernel | UCBNorm | 64x64x112x112 | float32 | H100 | " in line]
    assert kernels
    # 50 instructions of 51,380,224 elements at 132 * 128 * 1.98e9 a second, and 4 at 132 * 16 * 1.98e9.
    assert all(line.split(" | ")[5:7] == ["77", "49"] for line in kernels)
    assert len(set(compiled[0])) == len(compiled[0])  # none is compiled twice
    assert {arch for _, arch in compiled[0]} == {90}


def test_a_step_that_takes_too_long_fails(compiled, capsys):
    compiled[1]["count"] = 5000.0
    code, told = lines(capsys, "--devices", "H100", "--kernels", "false")
    assert code == 1
    bad = [line for line in told if line.startswith("missed: UCBNorm, ")]
    assert [line.split(" on ")[0] for line in bad] == ["missed: UCBNorm, float32", "missed: UCBNorm, bfloat16"]
    assert told[-1] == "2 aims missed"
    assert not [line for line in told if line.startswith("| mixture")]


@pytest.mark.parametrize(
    ("dtype", "ratio", "fails"),
    [("float32", 1.1, False), ("float32", 1.11, True), ("bfloat16", 1.6, False), ("bfloat16", 1.61, True)],
)
def test_aims_are_those_that_were_set(dtype, ratio, fails):
    base, row = (
        Row("UCBNorm", (64, 64, 112, 112), dtype, "H100", [("k", Bound(0.0, 0.0, time, 0.0))]) for time in (1, ratio)
    )
    said = f"UCBNorm, {dtype} on H100: {2 * ratio:.2f} of BatchNorm2d's, aim {roofline.AIMS['UCBNorm', dtype]}"
    assert roofline.missed(row, base._replace(launches=[("k", Bound(0.0, 0.0, 0.5, 0.0))])) == said
    assert bool(roofline.missed(row, base)) == fails
    assert not roofline.missed(row._replace(layer="SCBNorm", launches=[("k", Bound(0, 0, 9, 0))]), base)
    assert not roofline.missed(row._replace(device="A100", launches=[("k", Bound(0, 0, 9, 0))]), base)


def test_a_device_that_is_none_is_refused():
    with pytest.raises(UsageError, match="devices: expected some of A100, H100, B200, got V100"):
        roofline.main(["--devices", "V100"])


def test_interpreted_kernels_are_refused(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(UsageError, match=r"^TRITON_INTERPRET: expected it unset, .* got 1$"):
        roofline.main([])
