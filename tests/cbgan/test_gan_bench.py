"""Times of GANs' steps beside one another."""

from types import SimpleNamespace

import pytest
from refusals import refused

from cbgan import bench
from cbgan.networks.dcgan import Generator
from common.norms import BatchNorm, UCBNorm
from common.train.dry_run import Steps, Timed

FLAGS = ["--data.size", "8", "--batch_size", "50", "--device", "cpu", "--rounds", "3"]


def test_steps_are_compared_with_batchnorms_at_each_width(monkeypatch, capsys):
    """Three rounds of 8, 2 and 4 ms a step with BatchNorm, and of one that takes twice as long."""
    timed: list[dict[str, Steps]] = []

    def compare(runs, rounds, device):
        timed.append({kind: run.__self__ for kind, run in runs.items()})
        for run in runs.values():
            run()
        return {kind: [i * t for t in (8.0, 2.0, 4.0)[:rounds]] for i, kind in enumerate(runs, 1)}

    monkeypatch.setattr(bench, "compare", compare)
    shares = {"data": 0.01, "d": 0.5, "g": 0.25, "rest": 0.24}
    monkeypatch.setattr(bench, "shares", lambda steps, rounds: shares)
    bench.main([*FLAGS, "--widths", "8", "16", "--kinds", "ucb", "bn", "--norm.groups", "2"])
    title, table = capsys.readouterr().out.strip().split("\n\n")
    assert title.endswith("; batches of 50 images of 8 pixels, fp32")
    header, rule, *rows = ([cell.strip() for cell in row.split("|")[1:-1]] for row in table.splitlines())
    assert header == ["width", "norm", "step", "data", "d", "g", "rest"]
    assert len(rule) == len(header)
    parts = ["1.0%", "50.0%", "25.0%", "24.0%"]
    assert rows == [
        [width, *cells, *parts]
        for width in ("8", "16")
        for cells in (["bn", "4 ms (2-8)"], ["ucb", "2.00 (2.00-2.00)"])
    ]
    for width, runs in zip((8, 16), timed, strict=True):
        for kind, layer in (("bn", BatchNorm), ("ucb", UCBNorm)):
            generator = runs[kind].state.networks["g"]
            assert isinstance(generator, Generator)
            assert isinstance(generator.norm1, layer)
            assert generator.norm1.num_features == width // 2
            assert runs[kind].state.run.step == 1
            assert not isinstance(generator.norm1, UCBNorm) or generator.norm1.groups == 2


def test_shares_of_a_step_are_medians_and_make_it_whole(monkeypatch):
    """Steps of 10, 10 and 20 s; what is in neither part is left."""
    ends = iter([0.0, 10.0, 10.0, 20.0, 20.0, 40.0])
    monkeypatch.setattr(bench, "time", SimpleNamespace(perf_counter=lambda: next(ends)))
    told = iter([(1.0, 3.0, 4.0), (12.0, 5.0, 2.0), (25.0, 5.0, 5.0)])

    class Made(Timed):
        def __init__(self):
            self.began, d, g = next(told)
            self.seconds = {"d": d, "g": g}

    steps = SimpleNamespace(make=lambda kind: Made())
    found = bench.shares(steps, 3)  # pyright: ignore[reportArgumentType]
    assert found == {"data": 0.2, "d": 0.3, "g": 0.25, "rest": 0.2}  # left are 2, 1 and 5 s


def test_a_real_step_is_divided(capsys):
    bench.main([*FLAGS, "--widths", "8", "--kinds", "ucb", "--rounds", "1"])
    row = capsys.readouterr().out.splitlines()[-1]
    shares = [float(cell.strip().removesuffix("%")) for cell in row.split("|")[4:-1]]
    assert sum(shares) == pytest.approx(100, abs=0.3)
    assert min(shares[1:3]) > 5


def test_bad_input(capsys):
    for flags, line in {
        "--kinds foo": "kinds: expected one of ",
        "--widths 12": "widths: expected a multiple of 8, got 12",
        "--widths 16 --width 16": "width: expected it left out, since widths says what is timed, got 16",
        "--norm.kind bn": "norm.kind: expected it left out, since kinds says what is timed, got bn",
        "--rounds 0": "rounds: expected at least 1, got 0",
        "--kinds scb": "norm.num_components: scb takes the classes as clusters",
    }.items():
        assert line in refused(capsys, bench.main, *FLAGS, *flags.split())
