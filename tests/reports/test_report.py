"""Runs beside the paper's numbers: which belong where, and what is computed."""

import json
import re
from pathlib import Path

import yaml
from refusals import refused

from common.report import main

SHALLOW = {"model": {"name": "shallow_cnn"}, "data": {"name": "cifar10"}, "lr": 0.001, "epochs": 100,
           "batch_size": 256, "weight_decay": 1e-4, "optimizer": "adamw"}  # fmt: skip


def make_run(folder: Path, name: str, settings: dict, lines: list[dict], content: str = "a" * 64) -> str:
    path = folder / name
    path.mkdir(parents=True)
    (path / "config.yaml").write_text(yaml.safe_dump(settings))
    (path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (path / "environment.json").write_text('{"sessions": []}')
    (path / "summary.json").write_text(json.dumps({"protocol": {"content_test": content}, "better": {}}))
    return str(path)


def shallow(folder: Path, name: str, kind: str, seed: int, accuracy: dict[int, float], **changed) -> str:
    settings = SHALLOW | {"seed": seed, "norm": {"kind": kind, "num_components": 3}} | changed
    lines = [{"step": e, "epoch": e, "metric/accuracy": value} for e, value in accuracy.items()]
    return make_run(folder, name, settings, lines)


def tables(text: str) -> dict[str, list[list[str]]]:
    found = {}
    for part in re.split("^## ", text, flags=re.MULTILINE)[1:]:
        rows = [line for line in part.splitlines() if line.startswith("|")]
        found[part.splitlines()[0]] = [[cell.strip() for cell in row.split("|")[1:-1]] for row in rows]
    return found


def test_a_page_has_the_papers_value_the_last_and_the_best_by_each_epoch(tmp_path, capsys):
    runs = [
        shallow(tmp_path, "a", "ucb", 0, {20: 0.9, 25: 0.5, 50: 0.6, 75: 0.3, 100: 0.8}),
        shallow(tmp_path, "b", "ucb", 1, {20: 0.7, 25: 0.7, 50: 0.8, 75: 0.5, 100: 0.6}),
        shallow(tmp_path, "c", "bn", 5, {25: 0.25, 50: 0.125}),
    ]
    main(["--runs", *runs])
    text = capsys.readouterr().out
    found = tables(text)
    assert list(found) == ["Table V: shallow CNN, cifar10, learning rate 0.001"]
    header, _, *rows = found["Table V: shallow CNN, cifar10, learning rate 0.001"]
    assert header == ["layer", "seeds", "epoch", "accuracy, paper", "accuracy", "accuracy, best so far"]
    assert rows == [
        ["ucb", "0 1", "25", "85.15", "60 ± 14", "80 ± 14"],
        ["ucb", "0 1", "50", "85.8", "70 ± 14", "85 ± 7.1"],
        ["ucb", "0 1", "75", "87.97", "40 ± 14", "85 ± 7.1"],
        ["ucb", "0 1", "100", "87.97", "70 ± 14", "85 ± 7.1"],
        ["bn", "5", "25", "84.34", "25", "25"],
        ["bn", "5", "50", "86.49", "12.5", "25"],
        ["bn", "5", "75", "86.41", "-", "-"],
        ["bn", "5", "100", "86.9", "-", "-"],
    ]
    assert "- Measured by: content_test aaaaaaaaaaaa." in text
    assert "best checkpoint so far" in text
    assert "mean ± standard deviation over seeds" in text
    assert "differs from" not in text
    assert "Other runs" not in text


def test_what_differs_from_the_paper_and_from_each_other_is_named(tmp_path, capsys):
    runs = [
        shallow(tmp_path, "a", "ucb", 0, {25: 0.5}, epochs=30),
        shallow(tmp_path, "b", "ucb", 0, {25: 0.6}, batch_size=64),
    ]
    main(["--runs", *runs])
    text = capsys.readouterr().out
    names = [row[0] for row in tables(text)["Table V: shallow CNN, cifar10, learning rate 0.001"][2:]]
    assert set(names) == {"ucb, batch_size 256, epochs 30", "ucb, batch_size 64, epochs 100"}
    assert "- ucb, batch_size 256, epochs 30 differs from what the paper states: epochs 30 instead of 100." in text
    assert "differs from what the paper states: batch_size 64 instead of 256." in text


def test_runs_of_no_experiment_are_listed_and_layers_without_numbers_too(tmp_path, capsys):
    runs = [
        shallow(tmp_path, "a", "ucb", 0, {25: 0.5}, data={"name": "digits"}),
        shallow(tmp_path, "b", "in", 0, {25: 0.5}),
        shallow(tmp_path, "c", "mn", 0, {25: 0.5}, lr=0.005),
    ]
    main(["--runs", *runs])
    text = capsys.readouterr().out
    assert list(tables(text)) == ["Table V: shallow CNN, cifar10, learning rate 0.005", "Other runs"]
    assert [line[2:] for line in text.splitlines() if line.startswith(f"- {tmp_path}")] == runs[:2]


def test_low_values_are_the_best_of_fid_and_end_values_of_adaptation(tmp_path, capsys):
    gan = {"seed": 0, "latent_dim": 128, "data": {"name": "cifar100"}, "norm": {"kind": "ucb"}, "epochs": 20}
    fid = [{"step": e, "epoch": e, "metric/fid_inception": v} for e, v in ((5, 90.0), (10, 150.0), (20, 100.0))]
    adapt = {"seed": 3, "source": {"name": "mnist"}, "target": {"name": "svhn"}, "norm": {"kind": "none"}, "epochs": 9}
    score = [{"step": e, "epoch": e, "metric/target_accuracy": v} for e, v in ((1, 0.5), (9, 0.25))]
    main(["--runs", make_run(tmp_path, "g", gan, fid), make_run(tmp_path, "a", adapt, score)])
    found = tables(capsys.readouterr().out)
    assert found["Figure 10: DCGAN, cifar100, FID"][2:5] == [
        ["ucb", "0", "10", "142", "150", "90"],
        ["ucb", "0", "20", "96", "100", "90"],
        ["ucb", "0", "50", "79", "-", "-"],
    ]
    known = adapt | {"norm": {"kind": "scb"}}
    by_cluster = [line | {"metric/target_accuracy_as_source": 0.125} for line in score]
    main(["--runs", make_run(tmp_path, "s", known, by_cluster)])
    row = tables(capsys.readouterr().out)["Table VI: AdaMatch, SVHN (target)"][2]
    assert row[:6] == ["scb", "3", "9", "54.7", "12.5", "12.5"]  # the paper names the source's cluster
    row = found["Table VI: AdaMatch, SVHN (target)"][2]
    assert row[:6] == ["none", "3", "9", "25.08", "25", "50"]
    assert row[6:9] == ["31.64", "-", "-"]  # precision is not logged


def test_bad_input_is_one_line(tmp_path, capsys):
    run = shallow(tmp_path, "a", "ucb", 0, {25: 0.5})
    line = {"step": 1, "epoch": 1, "metric/accuracy": 0.5}
    other = make_run(tmp_path, "b", SHALLOW | {"seed": 0, "norm": {"kind": "bn"}}, [line], content="b" * 64)
    page = tmp_path / "page.md"
    page.write_text("mine")
    for argv, line in (
        ([], "runs: name at least one"),
        (["--runs", run, "--out", "page.txt"], "out: expected a file that ends in .md, got page.txt"),
        (["--runs", str(tmp_path)], "is not a run's folder"),
        (["--runs", run, run], "same settings and seed"),
        (["--runs", run, other], "were measured otherwise (content_test differ)"),
        (["--runs", run, "--out", str(page)], "page.md exists; add --force"),
    ):
        assert line in refused(capsys, main, *argv)
    assert page.read_text() == "mine"
    main(["--runs", run, "--out", str(page), "--force"])
    assert capsys.readouterr().out == page.read_text() + f"written: {page}\n"
