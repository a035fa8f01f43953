"""What a step of each layer launches, moves and keeps, against the goals; no kernel runs here."""

import dataclasses
from typing import Any

import pytest
import torch
from torch import nn

from common.norms import bench
from common.norms.tools import counts
from common.norms.tools.recording import Launch, bytes_of, recording

pytest.importorskip("triton")

SUBJECTS = {subject.name: subject for subject in counts.SUBJECTS}


@pytest.fixture(scope="module")
def missed() -> dict[str, list[str]]:
    """What misses its goal, of each layer at every shape and precision."""
    return {
        name: [
            f"{what} ({shape}, {dtype})"
            for shape in counts.SHAPES
            for dtype in counts.DTYPES.values()
            for what in counts.missed(subject, counts.record(subject, shape, dtype))
        ]
        for name, subject in SUBJECTS.items()
    }


@pytest.mark.parametrize("quantity", ["launches", "moves", "kept"])
@pytest.mark.parametrize("name", SUBJECTS)
def test_a_step_costs_no_more_than_its_goal(missed, name, quantity):
    names = {"moves": ("moves", "copies")}.get(quantity, (quantity,))
    assert not [what for what in missed[name] if any(word in what for word in names)]


@pytest.mark.parametrize("dtype", counts.DTYPES.values(), ids=str)
def test_channels_that_fit_into_a_cache_move_less_than_batch_norm(dtype):
    """A launch and one for the averages forward, one backward: x is read once, and so is the gradient."""
    step = counts.record(SUBJECTS["UCBNorm"], (64, 256, 8, 8), dtype)
    assert [len(each.launches) for each in (step.forward, step.backward)] == [2, 1]
    assert step.forward.reads + step.forward.writes <= 2.1
    assert step.backward.reads + step.backward.writes <= 3.1


def test_the_goals_are_those_that_were_set():
    goals = {subject.name: (subject.forward, subject.backward) for subject in counts.SUBJECTS}
    assert goals == {
        "BatchNorm2d": ((None, None, 0), (None, None, 0)),
        "UCBNorm": ((4, 3, 0), (4, 5, 0)),
        "UCBNorm, groups=1": ((4, 3, 3), (4, 5, 2)),
        "UCBNorm, update=weight": ((4, 3, 0), (5, 5, 0)),
        "UCBNorm, statistics=learned": ((4, 2, 0), (5, 3, 0)),
        "UCBNorm, evaluation": ((1, 2, 0), (3, 3, 0)),
        "UCBNorm, groups=1, evaluation": ((1, 2, 0), (3, 3, 2)),
        "SCBNorm": ((1, 2, 0), (2, 3, 0)),
        "SCBNorm, affine": ((1, 2, 0), (2, 3, 0)),
        "SCBNorm, evaluation, ids": ((2, 2, 0), (3, 3, 0)),
        "SCBNorm, evaluation, unknown": ((None, None, 0), (None, None, 0)),
        "SCBNormBase": ((3, 2, 0), (4, 3, 0)),
        "MixtureNorm": ((40, None, 0), (None, None, 0)),
        "MixtureNorm, evaluation": ((1, 2, 0), (3, 3, 2)),
    }
    assert (counts.SLACK, counts.GOALS_KEPT, counts.BUSY, counts.MULTIPROCESSORS) == (0.1, 1.05, 0.9, 132)


def total(launches: list[Launch]) -> tuple[int, float, float]:
    return len(launches), sum(each.reads for each in launches), sum(each.writes for each in launches)


def test_operators_that_launch_are_counted_and_views_are_not():
    x, y = torch.empty(4, 6, device="meta"), torch.empty(6, device="meta")
    host = torch.zeros(3)
    with recording() as recorder:
        x.t().reshape(2, 12)[0].unsqueeze(0)  # views, but the reshape, which copies
        assert total(recorder.take()) == (1, 96, 96)
        torch.empty_like(x).detach()
        torch.add(host, 1)
        torch.mul(x[:0], 2)  # holds nothing
        assert recorder.take() == []
        torch.add(x, y)  # y is read once, however often it is used
        assert total(recorder.take()) == (1, 96 + 24, 96)
        torch.add(y.expand(4, 6), x)
        x.copy_(y.expand(4, 6))
        x.zero_()
        assert total(recorder.take()) == (3, 96 + 24 + 24, 3 * 96)
        x.add_(x)
        assert total(recorder.take()) == (1, 96, 96)
        host.to("meta")
        assert len(recorder.take()) == 1
    assert bytes_of(torch.empty(3, 0)) == 0


def test_a_copy_is_what_an_operator_of_torch_writes_of_half_an_activation_or_more():
    launches = [Launch("copy_", 400, 50), Launch("clone", 0, 49), Launch("kernel", 400, 100, function=Kernel())]
    found = counts.Pass(launches, 100)
    assert found.copies == ["copy_"]
    assert [each.name for each in found.kernels] == ["kernel"]


class Kernel:
    """What is recorded of a kernel."""

    arg_names = ("x_ptr", "y_ptr", "size", "BLOCK")


def test_a_kernel_reads_what_was_there_and_writes_what_is_new():
    x, y = torch.empty(8, device="meta"), torch.empty(2, device="meta")
    with recording() as recorder:
        fresh = torch.empty_like(x, dtype=torch.bfloat16)
        recorder.kernel(Kernel, (5, 2), (x, fresh, 8), {"BLOCK": 4, "num_warps": 2})
        recorder.kernel(Kernel, (1,), (fresh, y, 8), {})  # written by now
        recorder.kernel(Kernel, (1,), (x, x), {})  # one tensor
        first, second, third = recorder.take()
    assert (first.name, first.reads, first.writes, first.programs) == ("Kernel", 32, 16, 10)
    assert (first.arguments["BLOCK"], first.options) == (4, {"num_warps": 2})
    assert (second.reads, second.writes) == (16 + 8, 0)
    assert third.reads == 32
    assert first.reads_activation(8)
    assert not first.reads_activation(9)
    assert not Launch("a", 0, 0, arguments={"y": y}, touched={"y": (0.0, 1.0)}).reads_activation(2)


def test_batch_norm_moves_what_is_known_of_it():
    step = counts.record(SUBJECTS["BatchNorm2d"], (64, 256, 8, 8), torch.float32)
    assert [round(each, 2) for each in (step.forward.reads, step.forward.writes)] == [2, 1]
    assert [round(each, 2) for each in (step.backward.reads, step.backward.writes)] == [4, 1]
    assert step.kept == pytest.approx(1, abs=0.01)


REAL = {"eps", "kappa", "momentum", "min_weight", "floor", "bessel", "least", "empty"}
"""What kernels are given that is no whole number."""


@pytest.mark.parametrize("name", [name for name in SUBJECTS if name != "BatchNorm2d"])
def test_sizes_and_strides_are_whole_numbers(name):
    """A size that is handed over as 2.0 would be compiled as a float32, which does not count far."""
    step = counts.record(SUBJECTS[name], (4, 6, 2, 2), torch.float32)
    for launch in (*step.forward.kernels, *step.backward.kernels):
        found = {argument for argument, value in launch.arguments.items() if isinstance(value, float)}
        assert found <= REAL, (launch.name, found)


def test_the_seventh_launch_is_found_missing():
    class Twice(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.mul(2).mul(3)

    subject = counts.Subject("Twice", lambda channels, num, device: Twice(), counts.Goal(1, 2), counts.Goal(2, 2))
    step = counts.record(subject, (2, 3, 4, 4), torch.float32)
    assert list(counts.missed(subject, step)) == [
        "forward launches 2, goal 1",
        "forward moves 4.00 x, goal 2 x + 0.1 x",
        "backward moves 4.00 x, goal 2 x + 0.1 x",
    ]


def test_a_program_of_each_multiprocessor_may_leave_tables_where_channels_share_a_posterior():
    """Three of 3 components and 256 channels, written and read by 132 of them: 2.4 of 4.2 MB."""
    subject = SUBJECTS["UCBNorm, groups=1"]
    step = counts.record(subject, (64, 256, 8, 8), torch.float32)
    beside = 2 * 132 * 3 * 3 * 256 * 4 / (64 * 256 * 8 * 8 * 4)
    (more,) = (
        round((3.1 + beside) * step.forward.size - sum(each.reads + each.writes for each in step.forward.launches)),
    )
    for extra, want in ((more - 1, []), (more + 1, ["forward moves 3.68 x, goal 3 x + 0.68 x"])):
        forward = counts.Pass([*step.forward.launches[1:], grown(step.forward.launches[0], extra)], step.forward.size)
        assert list(counts.missed(subject, dataclasses.replace(step, forward=forward))) == want


def grown(launched: Launch, extra: int) -> Launch:
    return dataclasses.replace(launched, reads=launched.reads + extra)


def grid(**other: Any) -> counts.Grid:
    values: dict[str, Any] = {
        "shape": (2, 3, 4, 4),
        "layout": "NCHW",
        "kernel": "k",
        "joint": True,
        "programs": 119,
        "locations": 8,
    }
    values |= {"where": "", **other}
    return counts.Grid(**values)


@pytest.mark.parametrize(
    ("other", "what"),
    [
        ({}, ""),
        ({"programs": 118}, "89% of 132 multiprocessors busy, goal 90%"),
        ({"locations": 4}, "tiles of 4 locations, goal 8"),
        ({"locations": 4, "layout": "NHWC"}, ""),
        ({"locations": 4, "joint": False}, ""),
        ({"locations": 4, "shape": (2, 3, 2, 2)}, ""),
        ({"programs": 10_000}, ""),
    ],
)
def test_a_grid_keeps_nine_tenths_of_the_device_busy(other, what):
    assert grid(**other).missed() == what


def test_every_kernel_that_reads_an_activation_fills_the_device():
    assert not [each for layout in bench.LAYOUTS for each in counts.grids((64, 256, 8, 8), layout) if each.missed()]


def test_the_command_prints_every_layer_and_fails_where_a_goal_is_missed(monkeypatch, capsys):
    monkeypatch.setattr(counts, "SHAPES", ((4, 3, 2, 2),))
    monkeypatch.setattr(counts.bench, "GPU_SHAPES", ((4, 3, 2, 2),))
    for subjects in (counts.SUBJECTS[:1], counts.SUBJECTS[:2]):
        monkeypatch.setattr(counts, "SUBJECTS", subjects)
        with pytest.raises(SystemExit) as end:
            counts.main([])
        lines = capsys.readouterr().out.splitlines()
        assert sum(line.startswith("| BatchNorm2d | 4x3x2x2 |") for line in lines) == 2
        bad = [line for line in lines if line.startswith("missed: ")]
        assert bool(end.value.code) == bool(bad) == (len(subjects) == 2)
        assert lines[-1] == f"{len(bad)} goals missed"
