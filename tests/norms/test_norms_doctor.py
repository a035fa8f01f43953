"""The doctor agrees with sound backends, finds a sick one, and says in one line what it cannot examine."""

import subprocess
import sys

import pytest
import torch

from common.norms import doctor, functional
from common.norms.backends import eager

NAMES = [check.name for check in doctor.checks()]


@pytest.fixture(autouse=True)
def few_inputs(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(functional, "BACKENDS", ("auto", "reference", "eager", "triton"))
    monkeypatch.setattr(doctor, "DTYPES", (torch.float32, torch.bfloat16))
    monkeypatch.setattr(doctor, "SHAPES", {(3, 6, 2, 7): ("contiguous", "channels_last")})
    monkeypatch.setattr(doctor, "TIMED", {"cpu": (((4, 6, 2, 3), torch.float32),)})


def run(capsys, *argv: str) -> tuple[int, list[str]]:
    with pytest.raises(SystemExit) as end:
        doctor.main(["--device", "cpu", *argv])
    assert isinstance(end.value.code, int)
    return end.value.code, capsys.readouterr().out.splitlines()


def verdicts(lines: list[str]) -> dict[tuple[str, str], str]:
    """Return the last word of the line of each check and backend."""
    return {
        (name, backend): line.split()[-1]
        for name in NAMES
        for backend in functional.BACKENDS
        for line in lines
        if line.startswith(name + " ") and line[len(name) :].split()[0] == backend
    }


def test_sound_backends_agree(capsys):
    code, lines = run(capsys)
    assert [line for line in lines if line.startswith("triton: cannot run here: 'triton' needs")]
    here = [backend for backend in functional.BACKENDS if f"{backend}: can run" in lines]
    assert {"auto", "reference", "eager"} <= set(here)
    assert verdicts(lines) == {(name, backend): "ok" for name in NAMES for backend in here}
    assert lines[-1] == f"{len(NAMES) * len(here)} checks: all agree with the reference"
    assert code == 0
    for name in doctor.ACCESSES:  # timed
        rows = [line.removeprefix(name).split() for line in lines if line.startswith(name + " ")]
        assert [row[0] for row in rows] == [backend for backend in here if backend != "auto"]


def test_the_share_of_the_bandwidth_is_what_must_be_moved_in_the_time_of_a_copy(capsys, monkeypatch):
    """A copy of 288 bytes, read and written, takes 2 us here, a forward pass 4 us and both passes 10 us."""

    def compare(runs, rounds, device):
        for run in runs.values():
            run()
        assert runs["both"]()[0].shape == (4, 6, 2, 3)  # gradients
        assert not runs["forward"]().requires_grad
        return {name: [time] * rounds for name, time in zip(runs, (0.002, 0.004, 0.004, 0.010), strict=True)}

    monkeypatch.setattr(doctor.bench, "compare", compare)
    doctor.time_backends(["eager"], torch.device("cpu"))
    rows = [line.rsplit("eager", 1) for line in capsys.readouterr().out.splitlines() if "eager" in line]
    speed = f"{2 * 4 * 4 * 6 * 2 * 3 / 2e-6 / 1e9:.1f}"
    # SCB reads x and writes y; in both passes reads x and g too and writes dx. A mixture reads x twice each way, g too,
    # but in evaluation once.
    assert {name.strip(): cells.split() for name, cells in rows} == {
        "SCB": ["50.0%", "50.0%", "50.0%", speed],
        "UCB joint": ["50.0%", "75.0%", "80.0%", speed],
        "UCB channel-wise": ["50.0%", "75.0%", "80.0%", speed],
    }


def test_a_gradient_that_is_wrong_by_a_thousandth_is_named(capsys, monkeypatch):
    right = eager.Eager.normalise

    def wrong(self, x, *arguments):
        return right(self, 1.001 * x - 0.001 * x.detach(), *arguments)

    monkeypatch.setattr(eager.Eager, "normalise", wrong)
    monkeypatch.setattr(doctor, "DTYPES", (torch.float32,))
    code, lines = run(capsys)
    found = verdicts(lines)
    assert code == 1
    assert not any("bandwidth" in line for line in lines)  # a wrong result has no speed
    for name in NAMES:
        assert found[name, "reference"] == "ok"
        sick = name.startswith("mixture") or "mixed" in name or "unknown" in name  # Eq. 12 is Eq. 15
        assert found[name, "eager"] == ("DISAGREES" if sick else "ok"), name
    report = [line for line in lines if line.startswith("eager: mixture, joint, batch: dx errs by ")]
    assert len(report) == 1
    assert "disagreements" in lines[-1]


@pytest.mark.parametrize("broken", ["raises", "nan"])
def test_a_backend_that_breaks_down_is_named(capsys, monkeypatch, broken):
    def normalise(self, x, params, affine, options):
        if broken == "raises":
            raise RuntimeError("no kernel image\nand a long story")
        return (x + sum(t.sum() for t in params)) * torch.nan, None

    monkeypatch.setattr(eager.Eager, "normalise", normalise)
    code, lines = run(capsys, "--bandwidth", "false")
    assert code == 1
    (report,) = [line for line in lines if line.startswith("eager: mixture, joint, learned: ") and "float32" in line]
    assert ("RuntimeError at K=" in report and report.endswith("no kernel image")) == (broken == "raises")
    assert verdicts(lines)["SCB, known ids", "eager"] == "ok"


def test_the_command_ends_with_status_2_and_one_line():
    command = [sys.executable, "-m", "common.norms.doctor", "--device", "cuda:9"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert done.stderr.startswith("error: device: cuda:9 asked for")
