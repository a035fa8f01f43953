import csv
import json
import statistics
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from refusals import refused

from common.tables import main

ACCURACY = ["--tags", "metric/accuracy"]
BETTER = {"metric/accuracy": "higher", "loss/train": "lower"}


def make_run(
    folder: Path, name: str, accuracies: list[float | None], *, seed: int = 0, norm: str = "{kind: ucb, groups: null}",
    more: str = "", logged: dict[str, float] | None = None, **summary: Any,
) -> str:  # fmt: skip
    """Write a run of steps 1, 2, ..., two an epoch, with a loss each; accuracy is measured after each epoch."""
    path = folder / name
    path.mkdir()
    (path / "config.yaml").write_text(f"seed: {seed}\nepochs: 2\nnorm: {norm}\n{more or 'data: {name: digits}'}\n")
    lines: list[dict[str, float | None]] = []
    for epoch, accuracy in enumerate(accuracies):
        lines += [{"step": step, "epoch": epoch, "loss/train": 100.0 - step} for step in (2 * epoch + 1, 2 * epoch + 2)]
        lines.append({"step": 2 * epoch + 2, "epoch": epoch + 1, "metric/accuracy": accuracy, **(logged or {})})
    (path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    session = {"commit": "abc123", "versions": {"torch": "2.99"}, "threads": 1,
               "hardware": {"cpu": "A processor", "cores": 8, "gpu": None}}  # fmt: skip
    (path / "environment.json").write_text(json.dumps({"sessions": [session]}))
    summary = {"state": "finished", "protocol": {}, "better": BETTER} | summary
    (path / "summary.json").write_text(json.dumps(summary))
    return str(path)


@pytest.fixture
def runs(tmp_path) -> list[str]:
    ucb = {0.5: 1e-9, 0.6: 0.2, 0.75: 0.1}
    return [
        *(make_run(tmp_path, "abc"[seed], [0, accuracy], seed=seed, logged={"health/usage": usage})
          for seed, (accuracy, usage) in enumerate(ucb.items())),
        make_run(tmp_path, "d", [0, 0.25], norm="{kind: bn, groups: null}"),
    ]  # fmt: skip


def columns(out: str) -> dict[str, str]:
    head, _, row = (line.strip("| ").split(" | ") for line in out.splitlines()[:3])
    return dict(zip(head, row, strict=True))


def test_rows_are_means_over_seeds_of_what_was_logged_last(runs, capsys):
    main(["--runs", *runs, "--settings", "norm.kind", "norm.groups", *ACCURACY, "health/usage"])
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
    main(["--runs", *runs, *ACCURACY, "--last", "2"])
    out = capsys.readouterr().out
    assert f"| ucb | 0 1 2 | 0.3083 ± {statistics.stdev([0.25, 0.3, 0.375]):.2g} |" in out
    assert "the mean of its 2 last values" in out


def test_what_rows_differ_in_without_being_named_is_listed_but_for_what_a_layer_has_not(tmp_path, capsys):
    norms = ["{kind: ucb, groups: 4, num_components: 3, update: weight}", "{kind: bn, num_components: 9, update: null}",
             "{kind: mn, groups: 1, num_components: 3}"]  # fmt: skip
    grouped, plain, other = (make_run(tmp_path, norm[7:9], [0.5], norm=norm) for norm in norms)
    main(["--runs", grouped, plain, *ACCURACY])
    assert "differ in" not in capsys.readouterr().out
    main(["--runs", other, grouped, plain, *ACCURACY])
    assert capsys.readouterr().out.splitlines()[-1] == "The rows differ in norm.groups too."
    main(["--runs", plain, *ACCURACY, "--settings", "norm.num_components", "norm.kind"])
    assert capsys.readouterr().out.splitlines()[0] == "| norm.kind | seeds | metric/accuracy |"


def test_values_at_epochs_are_the_last_and_the_best_by_then(tmp_path, capsys):
    first = make_run(tmp_path, "a", [0.3, 0.9, 0.5, 0.95], state="running")
    tags = [*ACCURACY, "loss/train"]
    main(["--runs", first, *tags, "--at", "1", "3"])
    out = capsys.readouterr().out
    assert columns(out) == {
        "norm.kind": "ucb", "seeds": "0",
        "metric/accuracy at 1": "0.3", "metric/accuracy best to 1": "0.3",
        "metric/accuracy at 3": "0.5", "metric/accuracy best to 3": "0.9",
        "loss/train at 1": "98", "loss/train best to 1": "98",  # steps 1 and 2 are epoch 1, whose lines say 0
        "loss/train at 3": "94", "loss/train best to 3": "94",
    }  # fmt: skip
    assert "its last value by the end of epoch 1 or 3 and its best so far" in out
    second = make_run(tmp_path, "b", [0.1, None, 0.4], seed=1)
    main(["--runs", first, second, *ACCURACY, "--at", "3", "--last", "3"])
    got = columns(capsys.readouterr().out)
    assert got["metric/accuracy at 3"] == "nan"  # one of its last three was not finite
    assert got["metric/accuracy best to 3"] == f"0.65 ± {statistics.stdev([0.9, 0.4]):.2g}"

    for better, want in (({"metric/accuracy": "lower"}, "0.3"), ({}, None)):
        run = make_run(tmp_path, f"run-{want}", [0.3, 0.9, 0.5], better=better)
        capsys.readouterr()
        main(["--runs", run, *ACCURACY, "--at", "3"])
        assert columns(capsys.readouterr().out).get("metric/accuracy best to 3") == want
    assert "at: expected epochs from 0 on, got -1" in refused(capsys, main, "--runs", first, *tags, "--at", "-1")
    line = refused(capsys, main, "--runs", first, *tags, "--at", "0")
    assert f"at: {first} has no metric/accuracy by epoch 0" in line


def test_runs_that_did_not_come_so_far_are_left_out_and_named(tmp_path, runs, capsys):
    short = make_run(tmp_path, "short", [0.3], seed=7, state="stopped")
    unmeasured = make_run(tmp_path, "unmeasured", [0.3, 0.4], seed=8, state="running")
    for more in ([], ["--at", "2"]):
        main(["--runs", *runs, short, unmeasured, *ACCURACY, *more])
        out = capsys.readouterr().out
        left_out = f"{short} has 1 of 2 epochs, stopped; {unmeasured} has 2 of 2 epochs, running"
        assert out.splitlines()[-1] == f"Left out: {left_out}."
        assert "| ucb | 0 1 2 |" in out
    line = refused(capsys, main, "--runs", short, *ACCURACY)
    assert f"runs: none is finished: {short} has 1 of 2 epochs, stopped; wait" in line
    line = refused(capsys, main, "--runs", short, *ACCURACY, "--at", "9")
    assert f"at: no run is past epoch 9: {short} has 1 of 2 epochs" in line


def test_the_value_of_the_chosen_epoch_stands_beside_the_last(tmp_path, capsys):
    def run(name: str, seed: int, epoch: int, accuracy: float | None, **more: object) -> str:
        best = {"value": 0.1, "epoch": epoch, "tag": "loss/validation", "split": "validation", "chosen_by_test": False,
                "with": {"metric/accuracy": accuracy}, **more}  # fmt: skip
        return make_run(tmp_path, name, [0.3, 0.9, 0.5], seed=seed, best=best)

    runs = [run("a", 0, 2, 0.9), run("b", 1, 1, 0.3)]
    main(["--runs", *runs, *ACCURACY, "--chosen"])
    out = capsys.readouterr().out
    got = columns(out)
    assert got["metric/accuracy"] == "0.5 ± 0"
    assert got["metric/accuracy at the chosen epoch"] == f"0.6 ± {statistics.stdev([0.9, 0.3]):.2g}"
    assert "Epochs chosen by loss/validation (validation images): 2, 1." in out
    by_test = run("c", 2, 2, None, tag="metric/accuracy", split="test", chosen_by_test=True)
    main(["--runs", by_test, *ACCURACY, "--chosen", "--at", "1"])
    out = capsys.readouterr().out
    assert list(columns(out).values()) == ["ucb", "2", "0.3", "0.3", "nan"]
    assert "Epochs chosen by metric/accuracy (test images, a test metric): 2." in out
    line = refused(capsys, main, "--runs", *runs, "--tags", "loss/train", "--chosen")
    assert f"tags: {runs[0]} measured no loss/train in epoch 2, which it chose" in line
    none = make_run(tmp_path, "d", [0.3], best=None)
    assert f"chosen: {none} chose no epoch" in refused(capsys, main, "--runs", none, *ACCURACY, "--chosen")


def test_the_folders_of_the_data_are_named_and_both_domains(tmp_path, capsys):
    for number, (data, text) in enumerate({
        "data: {name: imagefolder, root: x/train, test_root: x/test}": "imagefolder in x/train and x/test",
        "source: {name: digits}\ntarget: {name: imagefolder, root: photos}": "digits to imagefolder in photos",
    }.items()):  # fmt: skip
        main(["--runs", make_run(tmp_path, str(number), [0.5], more=data), *ACCURACY])
        assert f"data: {text}; " in capsys.readouterr().out


def test_a_csv_holds_unrounded_means_and_deviations(tmp_path, runs, capsys):
    main(["--runs", *runs, *ACCURACY, "health/usage", "--out", f"{tmp_path}/t.csv"])
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
    odd = make_run(tmp_path, "odd", [2e-9], norm="{kind: 'a_b&50%$#{}~^\\c', groups: null}")
    main(["--runs", *runs, odd, *ACCURACY, "--out", f"{tmp_path}/t.tex"])
    lines = (tmp_path / "t.tex").read_text().splitlines()
    deviation = statistics.stdev([0.5, 0.6, 0.75])
    assert lines[:9] == [
        r"\begin{tabular}{llr}",
        r"\hline",
        r"norm.kind & seeds & metric/accuracy \\",
        r"\hline",
        rf"ucb & 0 1 2 & $0.6167 \pm {deviation:.2g}$ \\",
        r"bn & 0 & $0.25$ \\",
        r"a\_b\&50\%\$\#\{\}\textasciitilde{}\textasciicircum{}\textbackslash{}c & 0 & $2 \cdot 10^{-9}$ \\",
        r"\hline",
        r"\end{tabular}",
    ]
    assert all(line.startswith("% ") for line in lines[9:])
    tag = make_run(tmp_path, "tag", [1.0], logged={"metric/macro_f1": 0.5})
    main(["--runs", tag, "--tags", "metric/macro_f1", "--out", f"{tmp_path}/u.tex"])
    assert r"metric/macro\_f1" in (tmp_path / "u.tex").read_text()
    capsys.readouterr()
    main(["--runs", *runs, *ACCURACY, "--out", f"{tmp_path}/t.md"])
    assert capsys.readouterr().out == (tmp_path / "t.md").read_text() + f"written: {tmp_path}/t.md\n"


def test_a_file_is_replaced_only_by_force_and_its_ending_is_known(tmp_path, runs, capsys):
    (tmp_path / "t.csv").write_text("mine")
    argv = ["--runs", *runs, *ACCURACY, "--out", f"{tmp_path}/t.csv"]
    assert f"out: {tmp_path}/t.csv exists; add --force" in refused(capsys, main, *argv)
    assert (tmp_path / "t.csv").read_text() == "mine"
    main([*argv, "--force"])
    assert (tmp_path / "t.csv").read_text().startswith("norm.kind,")
    line = refused(capsys, main, *argv[:-1], f"{tmp_path}/t.xlsx")
    assert f"out: expected a file that ends in .csv, .tex, .md, got {tmp_path}/t.xlsx" in line
    assert "out: cannot write" in refused(capsys, main, *argv[:-1], f"{tmp_path}/t.csv/u.csv")


def test_runs_that_were_measured_otherwise_are_refused(tmp_path, capsys):
    base = {"extractor": "classifier", "extractor_id": "a", "n_real": 1000, "content_test": "x", "content_train": "x"}
    base |= {"recalibrated": "all, 2048 images by 256"}
    changes = {"n_real": 500, "content_test": "y", "content_train": "y", "extractor_id": "b", "resize": "none"}
    changes |= {"recalibrated": "mn, 2048 images by 256"}
    first = make_run(tmp_path, "first", [0.5], norm="{kind: bn}", logged={"metric/fid": 1}, protocol=base)
    others = {name: make_run(tmp_path, name, [0.5], logged={"metric/fid": 1}, protocol=base | {name: value})
              for name, value in changes.items()}  # fmt: skip
    fid, loss = ["--tags", "metric/fid"], ["--tags", "loss/train"]
    refusals = [("n_real", fid), ("content_test", fid), ("content_test", ACCURACY)]
    for name, tags in (*refusals, ("recalibrated", fid), ("recalibrated", ACCURACY)):
        line = refused(capsys, main, "--runs", first, others[name], *tags)
        assert f"runs: {first} and {others[name]} were measured otherwise ({name} differ)" in line
    # Accuracy does not depend on how FID is measured, nor a value on what was held out of training by another seed;
    # a classifier trained anew has other weights, and what one of them does not know is not compared.
    alike = [("n_real", ACCURACY), ("content_train", ACCURACY), ("extractor_id", fid), ("resize", fid)]
    for name, tags in (*alike, ("content_test", loss), ("recalibrated", loss)):
        main(["--runs", first, others[name], *tags])
    svhn = make_run(tmp_path, "svhn", [0.5], more="data: {name: svhn}", protocol=base | {"content_test": "y"})
    capsys.readouterr()
    main(["--runs", first, svhn, *ACCURACY, "--settings", "data.name"])  # rows of two data sets
    assert [line.split(" | ")[0] for line in capsys.readouterr().out.splitlines()[2:4]] == ["| digits", "| svhn"]


def test_distances_of_other_numbers_of_samples_are_refused(tmp_path, capsys):
    logged = {"metric/fid_x": 9.0, "metric/fid_x_final": 8.0, "metric/classes_found": 3.0}
    runs = [make_run(tmp_path, f"{kind}{count}", [0.5], norm=f"{{kind: {kind}}}", logged=logged,
                     more=f"fid: {{samples: {count}, final_samples: {final}}}")
            for kind, final in (("bn", 500), ("ucb", 600)) for count in (100, 200)]  # fmt: skip
    for tag in ("metric/fid_x", "metric/classes_found"):
        line = refused(capsys, main, "--runs", runs[0], runs[3], "--tags", tag)
        assert f"runs: {runs[0]} and {runs[3]} were measured otherwise (fid.samples differ)" in line
        main(["--runs", runs[0], runs[2], "--tags", tag])
    line = refused(capsys, main, "--runs", runs[0], runs[2], "--tags", "metric/fid_x_final")
    assert "were measured otherwise (fid.final_samples differ)" in line
    main(["--runs", runs[0], runs[3], *ACCURACY])
    for tag in ("metric/fid_x", "metric/fid_x_final"):
        main(["--runs", runs[0], runs[1], "--tags", tag, "--settings", "fid.samples"])


def test_floors_that_differ_are_refused(tmp_path, capsys):
    tags = ("metric/fid_x", "metric/fid_x_test", "metric/fid_x_final", "metric/fid_x_test_final")
    runs = [make_run(tmp_path, kind, [0.5], norm=f"{{kind: {kind}}}",
                     logged=dict.fromkeys(tags, 9.0) | {"metric/fid_x_floor": floor})
            for kind, floor in (("bn", 3.0), ("ucb", 4.0), ("mn", 3.01))]  # fmt: skip
    for tag in tags:
        line = refused(capsys, main, "--runs", *runs, "--tags", tag)
        assert f"runs: metric/fid_x_floor is 3 in {runs[0]} and 4 in {runs[1]}" in line
    main(["--runs", runs[0], runs[2], "--tags", "metric/fid_x"])  # another machine's rounding


def test_bad_input_is_one_line(tmp_path, runs, capsys):
    grouped = make_run(tmp_path, "g", [0.5], norm="{kind: ucb, groups: 1}")
    without = make_run(tmp_path, "w", [0.5], seed=3)
    for argv, line in (
        (ACCURACY, "runs: name at least one"),
        (["--runs", *runs], "tags: name at least one"),
        (["--runs", *runs, *ACCURACY, "--last", "0"], "last: expected at least 1, got 0"),
        (["--runs", str(tmp_path), *ACCURACY], "is not a run's folder"),
        (["--runs", *runs, "--tags", "loss/g"], "has no loss/g; it has health/usage, loss/train, metric/accuracy"),
        (["--runs", *runs, *ACCURACY, "--settings", "norm.kinds"], "has no norm.kinds; it has epochs, norm.kind"),
        (["--runs", runs[0], runs[0], *ACCURACY], "same settings and seed"),
        (["--runs", *runs, grouped, *ACCURACY], f"{runs[0]} and {grouped} differ in norm.groups"),
        (["--runs", *runs, without, "--tags", "health/usage"], f"{without} has no health/usage"),
    ):
        assert line in refused(capsys, main, *argv)
