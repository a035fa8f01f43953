"""What layers cost: their counts by formula, times as ratios, memory in activations."""

import pytest
import torch

from common.errors import UsageError
from common.norms import bench
from common.norms.tools import costs

CPU = torch.device("cpu")


def test_the_table_has_the_papers_counts_and_ratios_to_batchnorm(monkeypatch, capsys):
    """Layers that take one, two, ... seven times BatchNorm's 8, 2 and 4 ms."""
    modes: list[list[bool]] = []
    ran: list[list[object]] = []

    def compare(runs, rounds, device):
        ran.append([run() for run in runs.values()])
        modes.append([layer.training for layer in made])
        return {name: [i * t for t in (8.0, 2.0, 4.0)[:rounds]] for i, name in enumerate(runs, 1)}

    made: list[torch.nn.Module] = []

    def make_norm(*args, **options):
        made.append(costs_make(*args, **options))
        return made[-1]

    costs_make = costs.make_norm
    monkeypatch.setattr(costs, "make_norm", make_norm)
    monkeypatch.setattr(costs, "compare", compare)
    monkeypatch.setattr(costs, "PLACES", {"here": (6, 5, 4, 4)})
    costs.main(["--components", "2", "--rounds", "3", "--device", "cpu"])
    title, place, table = capsys.readouterr().out.strip().split("\n\n")
    assert title.endswith("K=2, float32")
    assert place == "here, 6x5x4x4"
    header, _, *rows = table.splitlines()
    cells = {row[0]: row[1:] for row in ([cell.strip() for cell in row.split("|")[1:-1]] for row in rows)}
    k, c = 2, 5
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
    assert modes == [[False] * 7, [True] * 7, [True] * 7]
    assert [isinstance(each[0], tuple) for each in ran] == [False, False, True]  # gradients
    shape = ["evaluation", "training, forward", "training, both", "memory"]
    assert [cell.strip() for cell in header.split("|")[4:-1]] == shape


def test_layers_are_those_of_the_papers_equations_and_the_default():
    layers = {name: costs.make_norm(kind, 4, 3, **options) for name, (kind, options) in costs.LAYERS.items()}
    groups = {name: getattr(layer, "groups", None) for name, layer in layers.items()}
    assert groups == {"BN": None, "MN": 1, "SCB": None, "SCB-base": None, "UCB, learned": 1, "UCB, moving averages": 1,
                      "UCB, channel-wise": 4}  # fmt: skip


def test_memory_is_that_of_the_benchmark():
    x, g = bench.case((16, 8, 16, 16), "NCHW", CPU)
    run = bench.step(torch.nn.BatchNorm2d(8), x, g, backward=True)
    want = f"{bench.saved_bytes(run) / x.nbytes:.2f} / {bench.peak_bytes(run, CPU) / x.nbytes:.2f}"
    assert costs.table((16, 8, 16, 16), 2, 1, CPU)[0][-1] == want


def test_layers_of_known_clusters_are_given_all_of_them_in_turn():
    x = torch.zeros(7, 4, 2)
    for kind in ("scb", "scb_base"):
        _, cluster = bench.arguments(costs.make_norm(kind, 4, 3), x)
        assert cluster.tolist() == [0, 1, 2, 0, 1, 2, 0]
    (given,) = bench.arguments(costs.make_norm("ucb", 4, 3), x)
    assert given is x


@pytest.mark.parametrize(
    ("argv", "line"),
    [
        (["--components", "0"], "components: expected at least 1, got 0"),
        (["--rounds", "0"], "rounds: expected at least 1, got 0"),
        (["--threads", "-1"], "threads: expected 0 or more, got -1"),
        (["--device", "tpu"], "device: expected auto, cpu, cuda or cuda:n, got tpu"),
    ],
)
def test_bad_input_is_named(argv, line):
    with pytest.raises(UsageError, match=line):
        costs.main(argv)


def test_places_are_those_of_the_papers_networks():
    """256 CIFAR images in the shallow CNN's third layer, 64 in the generator's second, 216 in front of ViT."""
    assert list(costs.PLACES.values()) == [(256, 128, 8, 8), (64, 128, 16, 16), (216, 3, 32, 32)]
