import json
from pathlib import Path

import pytest

import common.reports.tables
from common.cli.command import run_command


def make_run(folder: Path, name: str, *, seed: int, norm: str, accuracy: float | None, **more: float) -> str:
    """Write a run of 2 epochs whose accuracy was 0 before the last one."""
    path = folder / name
    path.mkdir()
    (path / "config.yaml").write_text(f"seed: {seed}\nepochs: 2\nnorm: {norm}\ndata: {{name: digits}}\n")
    values = [
        {"metric/accuracy": 0.0},
        {"metric/accuracy": accuracy},
        *({k.replace("_", "/"): v} for k, v in more.items()),
    ]
    lines = [{"step": 4 * i, "epoch": min(i, 2), **value} for i, value in enumerate(values, 1)]
    (path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    session = {"commit": "abc123", "versions": {"torch": "2.99"}, "threads": 1,
               "hardware": {"cpu": "A processor", "cores": 8, "gpu": None}}  # fmt: skip
    (path / "environment.json").write_text(json.dumps({"sessions": [session]}))
    return str(path)


@pytest.fixture
def runs(tmp_path) -> list[str]:
    ucb, bn = "{kind: ucb, groups: null}", "{kind: bn, groups: null}"
    return [
        make_run(tmp_path, "a", seed=0, norm=ucb, accuracy=0.5, health_usage=1e-9),
        make_run(tmp_path, "b", seed=1, norm=ucb, accuracy=0.6, health_usage=0.2),
        make_run(tmp_path, "c", seed=2, norm=ucb, accuracy=0.75, health_usage=0.1),
        make_run(tmp_path, "d", seed=0, norm=bn, accuracy=0.25),
    ]


def test_rows_are_means_over_seeds_of_what_was_logged_last(runs, capsys):
    argv = ["--runs", *runs, "--settings", "norm.kind", "norm.groups", "--tags", "metric/accuracy", "health/usage"]
    common.reports.tables.main(argv)
    assert capsys.readouterr().out.splitlines() == [
        "| norm.kind | norm.groups | seeds | metric/accuracy | health/usage |",
        "| --- | --- | --- | --- | --- |",
        "| ucb | null | 0 1 2 | 0.617 (0.5 to 0.75) | 0.1 (1e-09 to 0.2) |",
        "| bn | null | 0 | 0.25 | - |",
        "",
        "4 runs, each with its last value; a cell is the mean over seeds (least to largest).",
        "epochs: 2; data: digits; commit: abc123; torch: 2.99; hardware: A processor, 1 of 8 cores.",
    ]


def test_what_rows_differ_in_without_being_named_is_told(tmp_path, runs, capsys):
    grouped = make_run(tmp_path, "e", seed=0, norm="{kind: in, groups: 4, affine: true}", accuracy=0.5)
    common.reports.tables.main(["--runs", *runs, grouped, "--tags", "metric/accuracy"])
    assert capsys.readouterr().out.splitlines()[-1] == "The rows differ in norm.groups, norm.affine too."


def test_a_run_counts_with_the_mean_of_its_last_values(runs, capsys):
    common.reports.tables.main(["--runs", *runs, "--tags", "metric/accuracy", "--last", "2"])
    out = capsys.readouterr().out
    assert "| ucb | 0 1 2 | 0.308 (0.25 to 0.375) |" in out  # the accuracy before the last was 0
    assert "the mean of its 2 last values" in out


def test_a_value_that_was_not_finite_stays_visible(tmp_path, runs, capsys):
    last = make_run(tmp_path, "e", seed=1, norm="{kind: bn, groups: null}", accuracy=None)
    common.reports.tables.main(["--runs", *runs, last, "--tags", "metric/accuracy"])
    assert "| bn | 0 1 | nan |" in capsys.readouterr().out


def refused(capsys, *argv: str) -> str:
    with pytest.raises(SystemExit) as left:
        run_command(lambda: common.reports.tables.main(argv))
    captured = capsys.readouterr()
    assert left.value.code == 2
    assert len(captured.err.splitlines()) == 1
    assert not captured.out
    return captured.err


def test_bad_input_is_one_line(tmp_path, runs, capsys):
    tags = ["--tags", "metric/accuracy"]
    assert "runs: name at least one" in refused(capsys, *tags)
    assert "tags: name at least one" in refused(capsys, "--runs", *runs)
    assert "last: expected at least 1, got 0" in refused(capsys, "--runs", *runs, *tags, "--last", "0")
    assert "is not a run's folder" in refused(capsys, "--runs", str(tmp_path), *tags)
    assert "has no loss/g; it has health/usage, metric/accuracy" in refused(capsys, "--runs", *runs, "--tags", "loss/g")
    line = refused(capsys, "--runs", *runs, *tags, "--settings", "norm.kinds")
    assert "has no norm.kinds; it has epochs, norm.kind" in line
    assert "same settings and seed" in refused(capsys, "--runs", runs[0], runs[0], *tags)
    grouped = make_run(tmp_path, "g", seed=0, norm="{kind: ucb, groups: 1}", accuracy=0.5)
    assert f"{runs[0]} and {grouped} differ in norm.groups" in refused(capsys, "--runs", *runs, grouped, *tags)
    without = make_run(tmp_path, "w", seed=3, norm="{kind: ucb, groups: null}", accuracy=0.5)
    assert f"{without} has no health/usage" in refused(capsys, "--runs", *runs, without, "--tags", "health/usage")
    config = Path(runs[0], "config.yaml")
    config.write_text(config.read_text().replace("epochs: 2", "epochs: 3"))
    assert f"{runs[0]} is not finished, it has 2 of 3 epochs" in refused(capsys, "--runs", runs[0], *tags)
    Path(runs[1], "environment.json").write_text("[]")
    assert f"runs: {runs[1]} cannot be read" in refused(capsys, "--runs", runs[1], *tags)
