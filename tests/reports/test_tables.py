import csv
import json
import statistics
from pathlib import Path

import numpy as np
import pytest

import common.tables
from common.runtime.command import run_command


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
    common.tables.main(argv)
    deviation = {"ucb": statistics.stdev([0.5, 0.6, 0.75]), "usage": statistics.stdev([1e-9, 0.2, 0.1])}
    assert capsys.readouterr().out.splitlines() == [
        "| norm.kind | norm.groups | seeds | metric/accuracy | health/usage |",
        "| --- | --- | --- | --- | --- |",
        f"| ucb | null | 0 1 2 | 0.6167 ± {deviation['ucb']:.2g} | 0.1 ± {deviation['usage']:.2g} |",
        "| bn | - | 0 | 0.25 | - |",
        "",
        "4 runs, each with its last value; a cell is mean ± standard deviation over seeds.",
        "epochs: 2; data: digits; commit: abc123; torch: 2.99; hardware: A processor, 1 of 8 cores.",
    ]


def test_what_rows_differ_in_without_being_named_is_told_but_for_what_a_layer_has_not(tmp_path, runs, capsys):
    norm = "{kind: ucb, groups: 4, num_components: 3, update: weight}"
    grouped = make_run(tmp_path, "e", seed=0, norm=norm, accuracy=0.5)
    plain = make_run(tmp_path, "f", seed=0, norm="{kind: bn, num_components: 9, update: null}", accuracy=0.5)
    tags = ["--tags", "metric/accuracy"]
    common.tables.main(["--runs", grouped, plain, *tags])
    assert "differ in" not in capsys.readouterr().out
    other = make_run(tmp_path, "g", seed=0, norm="{kind: mn, groups: 1, num_components: 3}", accuracy=0.5, lr=1)
    common.tables.main(["--runs", other, grouped, plain, *tags])
    assert capsys.readouterr().out.splitlines()[-1] == "The rows differ in norm.groups too."
    common.tables.main(["--runs", plain, *tags, "--settings", "norm.num_components", "norm.kind"])
    assert capsys.readouterr().out.splitlines()[0] == "| norm.kind | seeds | metric/accuracy |"


def test_a_run_counts_with_the_mean_of_its_last_values(runs, capsys):
    common.tables.main(["--runs", *runs, "--tags", "metric/accuracy", "--last", "2"])
    out = capsys.readouterr().out
    deviation = statistics.stdev([0.25, 0.3, 0.375])
    assert f"| ucb | 0 1 2 | 0.3083 ± {deviation:.2g} |" in out  # the accuracy before the last was 0
    assert "the mean of its 2 last values" in out


def test_a_value_that_was_not_finite_stays_visible(tmp_path, runs, capsys):
    last = make_run(tmp_path, "e", seed=1, norm="{kind: bn, groups: null}", accuracy=None)
    common.tables.main(["--runs", *runs, last, "--tags", "metric/accuracy"])
    assert "| bn | 0 1 | nan |" in capsys.readouterr().out


def long_run(folder: Path, name: str, *, seed: int, accuracies: list[float | None], data: str = "name: digits") -> str:
    """Write a run of steps 1, 2, ..., two an epoch, with a loss each; accuracy is measured after each epoch."""
    path = folder / name
    path.mkdir()
    (path / "config.yaml").write_text(f"seed: {seed}\nepochs: 9\nnorm: {{kind: bn}}\ndata: {{{data}}}\n")
    lines: list[dict[str, float | None]] = []
    for epoch, accuracy in enumerate(accuracies):
        lines += [{"step": step, "epoch": epoch, "loss/train": 100.0 - step} for step in (2 * epoch + 1, 2 * epoch + 2)]
        lines.append({"step": 2 * epoch + 2, "epoch": epoch + 1, "metric/accuracy": accuracy})
    (path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(path)


def columns(out: str) -> dict[str, str]:
    head, _, row = (line.strip("| ").split(" | ") for line in out.splitlines()[:3])
    return dict(zip(head, row, strict=True))


def test_values_at_epochs_are_the_last_and_the_best_by_then(tmp_path, capsys):
    better = {"metric/accuracy": "higher", "loss/train": "lower"}
    first = note(long_run(tmp_path, "a", seed=0, accuracies=[0.3, 0.9, 0.5, 0.95]), better=better)
    tags = ["--tags", "metric/accuracy", "loss/train"]
    common.tables.main(["--runs", first, *tags, "--at", "1", "3"])  # of a run that is not finished
    out = capsys.readouterr().out
    assert columns(out) == {
        "norm.kind": "bn", "seeds": "0",
        "metric/accuracy at 1": "0.3", "metric/accuracy best to 1": "0.3",
        "metric/accuracy at 3": "0.5", "metric/accuracy best to 3": "0.9",
        "loss/train at 1": "98", "loss/train best to 1": "98",  # steps 1 and 2 are epoch 1, whose lines say 0
        "loss/train at 3": "94", "loss/train best to 3": "94",
    }  # fmt: skip
    assert "its last value by the end of epoch 1 or 3 and its best so far" in out
    second = note(long_run(tmp_path, "b", seed=1, accuracies=[0.1, None, 0.4]), better=better)
    common.tables.main(["--runs", first, second, "--tags", "metric/accuracy", "--at", "3", "--last", "3"])
    got = columns(capsys.readouterr().out)
    assert got["metric/accuracy at 3"] == "nan"  # one of its last three was not finite
    assert got["metric/accuracy best to 3"] == f"0.65 ± {statistics.stdev([0.9, 0.4]):.2g}"
    common.tables.main(["--runs", first, second, "--tags", "metric/accuracy", "--at", "4"])
    out = capsys.readouterr().out
    assert columns(out)["seeds"] == "0"
    assert f"Left out: {second} has 3 of 9 epochs." in out
    assert "at: expected epochs from 0 on, got -1" in refused(capsys, "--runs", first, *tags, "--at", "-1")
    assert f"at: {first} has no metric/accuracy by epoch 0" in refused(capsys, "--runs", first, *tags, "--at", "0")


def test_the_best_is_as_the_run_says_and_there_is_none_without_a_direction(tmp_path, capsys):
    for way, want in (("higher", "0.9"), ("lower", "0.3"), (None, None)):
        better = {} if way is None else {"metric/accuracy": way}
        run = note(long_run(tmp_path, f"run-{way}", seed=0, accuracies=[0.3, 0.9, 0.5]), better=better)
        common.tables.main(["--runs", run, "--tags", "metric/accuracy", "--at", "3"])
        got = columns(capsys.readouterr().out)
        assert (got["metric/accuracy at 3"], got.get("metric/accuracy best to 3")) == ("0.5", want)


def test_the_value_of_the_chosen_epoch_stands_beside_the_last(tmp_path, capsys):
    def run(name: str, seed: int, epoch: int, accuracy: float | None, **more: object) -> str:
        best = {"value": 0.1, "epoch": epoch, "tag": "loss/validation", "split": "validation", "chosen_by_test": False,
                "with": {"metric/accuracy": accuracy}, **more}  # fmt: skip
        made = long_run(tmp_path, name, seed=seed, accuracies=[0.3, 0.9, 0.5])
        return note(made, state="finished", best=best)  # of nine epochs: it stopped early

    runs = [run("a", 0, 2, 0.9), run("b", 1, 1, 0.3)]
    common.tables.main(["--runs", *runs, "--tags", "metric/accuracy", "--chosen"])
    out = capsys.readouterr().out
    got = columns(out)
    assert got["metric/accuracy"] == "0.5 ± 0"
    assert got["metric/accuracy at the chosen epoch"] == f"0.6 ± {statistics.stdev([0.9, 0.3]):.2g}"
    assert "Epochs chosen by loss/validation (validation images): 2, 1." in out
    common.tables.main(["--runs", runs[0], "--tags", "metric/accuracy", "--chosen", "--at", "1"])
    assert list(columns(capsys.readouterr().out).values()) == ["bn", "0", "0.3", "0.9"]
    by_test = run("c", 2, 2, None, tag="metric/accuracy", split="test", chosen_by_test=True)
    common.tables.main(["--runs", by_test, "--tags", "metric/accuracy", "--chosen"])
    out = capsys.readouterr().out
    assert columns(out)["metric/accuracy at the chosen epoch"] == "nan"
    assert "Epochs chosen by metric/accuracy (test images, a test metric): 2." in out
    line = refused(capsys, "--runs", *runs, "--tags", "loss/train", "--chosen")
    assert f"tags: {runs[0]} measured no loss/train in epoch 2, which it chose" in line
    none = note(long_run(tmp_path, "d", seed=0, accuracies=[0.3]), state="finished", best=None)
    line = refused(capsys, "--runs", none, "--tags", "metric/accuracy", "--chosen")
    assert f"chosen: {none} chose no epoch" in line


def test_the_folder_of_the_data_is_named(tmp_path, capsys):
    data = "name: imagefolder, root: photos/train, test_root: photos/test"
    run = long_run(tmp_path, "a", seed=0, accuracies=[0.5], data=data)
    common.tables.main(["--runs", run, "--tags", "metric/accuracy", "--at", "1"])
    assert "data: imagefolder in photos/train and photos/test; " in capsys.readouterr().out


def test_both_domains_are_named(tmp_path, capsys):
    run = long_run(tmp_path, "a", seed=0, accuracies=[0.5], data="size: 32")
    with Path(run, "config.yaml").open("a") as config:
        config.write("source: {name: digits}\ntarget: {name: imagefolder, root: photos}\n")
    common.tables.main(["--runs", run, "--tags", "metric/accuracy", "--at", "1"])
    assert "data: digits to imagefolder in photos; " in capsys.readouterr().out


def test_a_csv_holds_unrounded_means_and_deviations(tmp_path, runs, capsys):
    argv = ["--runs", *runs, "--tags", "metric/accuracy", "health/usage"]
    common.tables.main([*argv, "--out", f"{tmp_path}/t.csv"])
    assert capsys.readouterr().out.splitlines()[-1] == f"written: {tmp_path}/t.csv"
    with open(tmp_path / "t.csv", newline="") as file:
        ucb, bn = csv.DictReader(file)
    accuracies = [0.5, 0.6, 0.75]
    assert (ucb["norm.kind"], ucb["seeds"], bn["norm.kind"], bn["seeds"]) == ("ucb", "0 1 2", "bn", "0")
    assert float(ucb["metric/accuracy mean"]) == pytest.approx(sum(accuracies) / 3, rel=1e-15)
    assert float(ucb["metric/accuracy deviation"]) == pytest.approx(np.std(accuracies, ddof=1), rel=1e-14)
    assert (bn["metric/accuracy mean"], bn["metric/accuracy deviation"]) == ("0.25", "")
    assert (bn["health/usage mean"], bn["health/usage deviation"]) == ("", "")


def test_latex_escapes_what_it_would_take_for_commands(tmp_path, runs, capsys):
    odd = make_run(tmp_path, "odd", seed=0, norm="{kind: 'a_b&50%$#{}~^\\c', groups: null}", accuracy=2e-9)
    common.tables.main(["--runs", *runs, odd, "--tags", "metric/accuracy", "--out", f"{tmp_path}/t.tex"])
    lines = (tmp_path / "t.tex").read_text().splitlines()
    deviation = statistics.stdev([0.5, 0.6, 0.75])
    assert lines[:6] == [
        r"\begin{tabular}{llr}",
        r"\hline",
        r"norm.kind & seeds & metric/accuracy \\",
        r"\hline",
        rf"ucb & 0 1 2 & $0.6167 \pm {deviation:.2g}$ \\",
        r"bn & 0 & $0.25$ \\",
    ]
    name = r"a\_b\&50\%\$\#\{\}\textasciitilde{}\textasciicircum{}\textbackslash{}c"
    assert lines[6] == name + r" & 0 & $2 \cdot 10^{-9}$ \\"
    assert lines[7:9] == [r"\hline", r"\end{tabular}"]
    assert all(line.startswith("% ") for line in lines[9:])
    tag = make_run(tmp_path, "tag", seed=0, norm="{kind: bn}", accuracy=1.0)
    Path(tag, "metrics.jsonl").write_text('{"step": 1, "epoch": 2, "metric/macro_f1": 0.5}\n')
    common.tables.main(["--runs", tag, "--tags", "metric/macro_f1", "--out", f"{tmp_path}/u.tex"])
    assert r"metric/macro\_f1" in (tmp_path / "u.tex").read_text()
    capsys.readouterr()
    common.tables.main(["--runs", *runs, "--tags", "metric/accuracy", "--out", f"{tmp_path}/t.md"])
    assert capsys.readouterr().out == (tmp_path / "t.md").read_text() + f"written: {tmp_path}/t.md\n"


def test_a_file_is_replaced_only_by_force_and_its_ending_is_known(tmp_path, runs, capsys):
    (tmp_path / "t.csv").write_text("mine")
    argv = ["--runs", *runs, "--tags", "metric/accuracy", "--out", f"{tmp_path}/t.csv"]
    assert f"out: {tmp_path}/t.csv exists; add --force" in refused(capsys, *argv)
    assert (tmp_path / "t.csv").read_text() == "mine"
    common.tables.main([*argv, "--force"])
    assert (tmp_path / "t.csv").read_text().startswith("norm.kind,")
    line = refused(capsys, *argv[:-1], f"{tmp_path}/t.xlsx")
    assert f"out: expected a file that ends in .csv, .tex, .md, got {tmp_path}/t.xlsx" in line
    assert "out: cannot write" in refused(capsys, *argv[:-1], f"{tmp_path}/t.csv/u.csv")


def note(run: str, **summary: object) -> str:
    Path(run, "summary.json").write_text(json.dumps({"protocol": {}, **summary}))
    return run


def note_protocol(run: str, **protocol: object) -> str:
    return note(run, protocol=protocol)


def test_runs_that_were_measured_otherwise_are_refused(tmp_path, capsys):
    sound = {"extractor": "classifier", "extractor_id": "a", "n_real": 1000, "content_test": "x", "content_train": "x"}
    sound |= {"recalibrated": "all, 2048 images by 256"}
    changes = {"n_real": 500, "content_test": "y", "content_train": "y", "extractor_id": "b", "resize": "none"}
    changes |= {"recalibrated": "mn, 2048 images by 256"}
    logged = {"metric_fid": 1, "loss_train": 2}
    first = note_protocol(make_run(tmp_path, "first", seed=0, norm="{kind: bn}", accuracy=0.5, **logged), **sound)
    others = {}
    for name, value in changes.items():
        run = make_run(tmp_path, name, seed=0, norm="{kind: ucb}", accuracy=0.5, **logged)
        others[name] = note_protocol(run, **(sound | {name: value}))
    fid, accuracy = ["--tags", "metric/fid"], ["--tags", "metric/accuracy"]
    statistics = [("recalibrated", fid), ("recalibrated", accuracy)]
    for name, tags in (("n_real", fid), ("content_test", fid), ("content_test", accuracy), *statistics):
        line = refused(capsys, "--runs", first, others[name], *tags)
        assert f"runs: {first} and {others[name]} were measured otherwise ({name} differ)" in line
    # Accuracy does not depend on how FID is measured, nor a value on what was held out of training by another seed;
    # a classifier trained anew has other weights, and what one of them does not know is not compared.
    for name, tags in (("n_real", accuracy), ("content_train", accuracy), ("extractor_id", fid), ("resize", fid)):
        common.tables.main(["--runs", first, others[name], *tags])
    for name in ("content_test", "recalibrated"):
        common.tables.main(["--runs", first, others[name], "--tags", "loss/train"])
    Path(others["content_test"], "config.yaml").write_text("seed: 0\nepochs: 2\nnorm: {kind: bn}\ndata: {name: svhn}\n")
    argv = ["--runs", first, others["content_test"], *accuracy, "--settings", "data.name"]
    capsys.readouterr()
    common.tables.main(argv)  # rows of two data sets
    assert [line.split(" | ")[0] for line in capsys.readouterr().out.splitlines()[2:4]] == ["| digits", "| svhn"]


def test_distances_of_other_numbers_of_samples_are_refused(tmp_path, capsys):
    runs = []
    for kind, final in (("bn", 500), ("ucb", 600)):
        for count in (100, 200):
            run = make_run(tmp_path, f"{kind}{count}", seed=0, norm=f"{{kind: {kind}}}", accuracy=0.5)
            with open(Path(run, "config.yaml"), "a") as file:
                file.write(f"fid: {{samples: {count}, final_samples: {final}}}\n")
            with open(Path(run, "metrics.jsonl"), "a") as file:
                file.write(json.dumps({"step": 9, "epoch": 2, "metric/fid_x": 9.0, "metric/fid_x_final": 8.0,
                                       "metric/classes_found": 3.0}) + "\n")  # fmt: skip
            runs.append(run)
    for tag in ("metric/fid_x", "metric/classes_found"):
        line = refused(capsys, "--runs", runs[0], runs[3], "--tags", tag)
        assert f"runs: {runs[0]} and {runs[3]} were measured otherwise (fid.samples differ)" in line
        common.tables.main(["--runs", runs[0], runs[2], "--tags", tag])
    line = refused(capsys, "--runs", runs[0], runs[2], "--tags", "metric/fid_x_final")
    assert "were measured otherwise (fid.final_samples differ)" in line
    common.tables.main(["--runs", runs[0], runs[1], "--tags", "metric/fid_x_final", "--settings", "fid.samples"])
    common.tables.main(["--runs", runs[0], runs[3], "--tags", "metric/accuracy"])
    common.tables.main(["--runs", runs[0], runs[1], "--tags", "metric/fid_x", "--settings", "fid.samples"])


def test_floors_that_differ_are_refused(tmp_path, capsys):
    runs = []
    for kind, floor in (("bn", 3.0), ("ucb", 4.0), ("mn", 3.01)):
        runs.append(make_run(tmp_path, kind, seed=0, norm=f"{{kind: {kind}}}", accuracy=0.5))
        line = {"step": 9, "epoch": 2, "metric/fid_x": 9.0, "metric/fid_x_test": 9.0, "metric/fid_x_floor": floor,
                "metric/fid_x_final": 9.0, "metric/fid_x_test_final": 9.0}  # fmt: skip
        with open(Path(runs[-1], "metrics.jsonl"), "a") as file:
            file.write(json.dumps(line) + "\n")
    for tag in ("metric/fid_x", "metric/fid_x_test", "metric/fid_x_final", "metric/fid_x_test_final"):
        line = refused(capsys, "--runs", *runs, "--tags", tag)
        assert f"runs: metric/fid_x_floor is 3 in {runs[0]} and 4 in {runs[1]}" in line
    common.tables.main(["--runs", runs[0], runs[2], "--tags", "metric/fid_x"])  # another machine's rounding


def refused(capsys, *argv: str) -> str:
    capsys.readouterr()
    with pytest.raises(SystemExit) as left:
        run_command(lambda: common.tables.main(argv))
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
    line = refused(capsys, "--runs", runs[0], *tags)
    assert f"runs: none is finished: {runs[0]} has 2 of 3 epochs; wait" in line
    common.tables.main(["--runs", *runs, *tags])
    assert f"Left out: {runs[0]} has 2 of 3 epochs." in capsys.readouterr().out
    assert f"at: no run is past epoch 9: {runs[0]} has 2 of 3 epochs; " in refused(
        capsys, "--runs", *runs, *tags, "--at", "9"
    )
    config.write_text(config.read_text().replace("epochs: 3", "epochs: 2"))
    for more in ((), ("--at", "2")):  # trained to its end, and not measured there yet
        note(runs[0], state="running")
        common.tables.main(["--runs", *runs, *tags, *more])
        assert f"Left out: {runs[0]} has 2 of 2 epochs, running." in capsys.readouterr().out
    Path(runs[1], "environment.json").write_text("[]")
    assert f"runs: {runs[1]} cannot be read" in refused(capsys, "--runs", runs[1], *tags)
    Path(without, "summary.json").write_text("[]")
    assert f"runs: {without} cannot be read" in refused(capsys, "--runs", without, *tags)
