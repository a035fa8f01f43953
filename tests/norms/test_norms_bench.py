"""The benchmark prints a table of every layer."""

import subprocess
import sys

import pytest
import torch
from refusals import refused

from common import norms
from common.norms import bench


def test_the_table_has_a_row_for_each_shape_and_pass(monkeypatch, capsys):
    """Three rounds of 2, 4 and 8 ms a BatchNorm, and of layers that take two, three and four times as long."""
    ran: list[bool] = []

    def compare(runs, rounds, device):
        ran.extend(isinstance(run(), tuple) for run in runs.values())
        return {name: [i * t for t in (8.0, 2.0, 4.0)[:rounds]] for i, name in enumerate(runs, 1)}

    monkeypatch.setitem(bench.TIMED, "cpu", (((4, 6, 2, 2),), *bench.TIMED["cpu"][1:]))
    monkeypatch.setattr(bench, "compare", compare)
    bench.main(["--backends", "eager", "--rounds", "3", "--device", "cpu"])
    assert ran == 2 * (4 * [False] + 4 * [True])  # outputs, gradients
    times, memory = capsys.readouterr().out.strip().split("\n\n")[1:]
    header, rule, *rows = times.splitlines()
    assert header.count("|") == rule.count("|") == 8
    cells = [[cell.strip() for cell in row.split("|")[1:-1]] for row in rows]
    assert [row[1:3] for row in cells] == [
        ["NCHW", "forward"], ["NCHW", "both"], ["NHWC", "forward"], ["NHWC", "both"]
    ]  # fmt: skip
    for row in cells:
        assert row[3:] == ["4.00 (2.00-8.00)", "2.00 (2.00-2.00)", "3.00 (3.00-3.00)", "4.00 (4.00-4.00)"]
    header, rule, row = memory.splitlines()
    assert header.count("|") == rule.count("|") == row.count("|") == 6


def test_memory_is_what_autograd_keeps_and_what_is_held_at_once():
    ones = torch.ones(5, requires_grad=True)
    assert bench.saved_bytes(lambda: (ones * ones) * (ones * 2)) == 3 * 5 * 4  # each of three tensors once
    x, g = bench.case((16, 8, 32, 32), "NCHW", torch.device("cpu"))
    run = bench.step(torch.nn.BatchNorm2d(8), x, g, backward=True)
    assert x.nbytes <= bench.saved_bytes(run) <= x.nbytes + 8 * 8 * 4
    # The output and the gradient of x at least; an intermediate of the same size at most.
    assert 2 * x.nbytes <= bench.peak_bytes(run, x.device) <= 3.1 * x.nbytes


def test_table_1_has_the_papers_counts_and_ratios_to_batchnorm(monkeypatch, capsys):
    """Layers that take one, two, ... seven times BatchNorm's 8, 2 and 4 ms."""
    made: list[torch.nn.Module] = []
    modes: list[list[bool]] = []
    ran: list[list[object]] = []

    def make_norm(*args, **options):
        made.append(norms.make_norm(*args, **options))
        return made[-1]

    def compare(runs, rounds, device):
        ran.append([run() for run in runs.values()])
        modes.append([layer.training for layer in made])
        return {name: [i * t for t in (8.0, 2.0, 4.0)[:rounds]] for i, name in enumerate(runs, 1)}

    monkeypatch.setattr(bench, "make_norm", make_norm)
    monkeypatch.setattr(bench, "compare", compare)
    monkeypatch.setattr(bench, "PLACES", {"here": (16, 8, 16, 16)})
    bench.main(["--table1", "true", "--rounds", "3", "--device", "cpu"])
    title, place, table = capsys.readouterr().out.strip().split("\n\n")
    assert title.endswith("K=3, float32")
    assert place == "here, 16x8x16x16"
    _, _, *rows = table.splitlines()
    cells = {row[0]: row[1:] for row in ([cell.strip() for cell in row.split("|")[1:-1]] for row in rows)}
    k, c = 3, 8
    mixture = 2 * k * c + k
    learned = {"BN": 2 * c, "MN": 0, "SCB": 2 * k * c, "SCB-base": 2 * (k * c + c), "UCB, learned": mixture,
               "UCB, moving averages": 0, "UCB, channel-wise": 0}  # fmt: skip
    assert {name: int(row[0]) for name, row in cells.items()} == learned
    kept = {name: int(row[1]) for name, row in cells.items()}
    assert kept == {**dict.fromkeys(learned, 0), "BN": 2 * c, "MN": 2 * mixture, "UCB, moving averages": mixture,
                    "UCB, channel-wise": mixture}  # fmt: skip
    assert cells["BN"][2:5] == ["4.00 ms (2.00-8.00)"] * 3
    for number, row in enumerate(list(cells.values())[1:], 2):
        assert row[2:5] == [f"{number}.00 ({number}.00-{number}.00)"] * 3
    x, g = bench.case((16, 8, 16, 16), "NCHW", torch.device("cpu"))
    assert cells["BN"][5] == bench.memory(torch.nn.BatchNorm2d(8), x, g)
    assert modes == [[False] * 7, [True] * 7, [True] * 7]
    assert [isinstance(each[0], tuple) for each in ran] == [False, False, True]  # gradients
    groups = [getattr(layer, "groups", None) for layer in made]
    assert groups == [None, 1, None, None, 1, 1, 8]  # the paper's equations, and last this project's default


def test_quantiles_are_those_of_the_sorted_values():
    assert bench.quantiles([5.0, 1.0, 4.0, 2.0, 3.0, 6.0]) == pytest.approx((2.0, 3.0, 5.0))


BAD = {
    "--backends fast": "backends: expected one of 'auto', 'reference', 'eager', 'compiled', 'triton', got 'fast'",
    "--backends": "backends: expected at least one argument",
    "--device tpu": "device: expected auto, cpu, cuda or cuda:n, got tpu",
    "--rounds 0": "rounds: expected a whole number of at least 1, got 0",
    "--rounds few\n": "rounds: expected a whole number of at least 1, got few\\n",
    "--threads -1": "threads: expected a whole number of at least 0, got -1",
    "--table1 maybe": "table1: expected true or false, got maybe",
    "--table1 --backends eager": "backends: expected none with table1, whose layers choose their own, got ['eager']",
    "--round=3": "--round: no such option; did you mean --rounds?",
    "--quickly": "--quickly: no such option; see --help",
}


def test_bad_input_is_one_line(capsys):
    for argv, line in BAD.items():
        assert refused(capsys, bench.main, *argv.split(" ")) == f"error: {line}"


@pytest.mark.parametrize(("into", "status"), [("| head -0", 141), ("> /dev/full", 4)])
def test_what_cannot_be_printed_ends_with_a_status(monkeypatch, into, status):
    monkeypatch.delenv("PYTHONUNBUFFERED", raising=False)  # argparse hides a write that fails, but no flush
    command = f"set -o pipefail; {sys.executable} -m common.norms.bench --help {into}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False)
    assert done.returncode == status
    assert done.stderr == ("" if status == 141 else "error: No space left on device; make room, then start again\n")
