"""Runs that earlier versions left interrupted go on, and end where those versions would have ended them."""

import json
import tarfile
from pathlib import Path

import pytest
from applications import APPLICATIONS
from run_comparison import final_state

from common.cli import arguments
from common.runs.checkpoint import load
from common.runs.log import read_metrics
from common.training.parts import upgraded

FIXTURES = Path(__file__).parent / "fixtures"


@pytest.mark.parametrize("name", ["cbgan", "cbcls"])
def test_a_run_of_schema_1_goes_on(name, tmp_path, cache, capsys):
    arguments._warn_once.cache_clear()  # it warns once a process
    with tarfile.open(FIXTURES / f"schema1_{name}.tar.xz") as archive:
        archive.extractall(tmp_path, filter="data")
    assert sum(path.stat().st_size for path in FIXTURES.glob(f"*{name}*")) < 1_000_000
    flags = ["--name", "old", "--out", str(tmp_path), "--resume", "--cache", str(cache)]
    APPLICATIONS[name].main([*flags, "--device", "cpu"])
    assert "data.groups: is called data.superclasses now" in capsys.readouterr().err
    # What the version that left the run logged from there on, on another machine: the same but for rounding, which
    # few test images magnify (one in 200 is half a point; an unsure network moves five), and for the classifier of
    # the FID, which each machine trains for itself (225 where the fixture was made, 261 elsewhere).
    expected = json.loads((FIXTURES / "expected.json").read_text())[name]
    lines = read_metrics(tmp_path / name / "old")[-len(expected) :]
    for ours, theirs in zip(lines, expected, strict=True):
        for tag, value in theirs.items():
            rel = {"metric/fid_classifier": 0.25, "loss/test": 0.05}.get(tag, 0.1 if "metric/" in tag else 2e-2)
            assert ours[tag] == pytest.approx(value, rel=rel, abs=2e-2), (ours["step"], tag)
    clock = final_state(tmp_path / name / "old")["clock"]
    with tarfile.open(FIXTURES / f"schema1_{name}.tar.xz") as archive:  # which knew no clock: it starts at 0
        archive.extractall(tmp_path / "again", filter="data")
    before = load(max((tmp_path / "again").rglob("step-*.pt")))
    assert upgraded(before)["clock"] == {"training": 0.0, "evaluation": 0.0}
    assert clock["training"] > 0
    assert len(list((tmp_path / name / "old" / "tensorboard").iterdir())) == 2  # its charts go on where they were
    assert not list((tmp_path / name / "old").glob("events*"))
