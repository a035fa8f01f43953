"""Studies run by Snakemake: settings are checked first, what fails is listed, the rest is collected into a page."""

import fcntl
import importlib
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from common.reports.claims import read_claims
from common.reports.study import read_study
from common.runtime.errors import UsageError

ROOT = Path(__file__).parents[2]
SCALES = ("smoke", "small", "full")


@pytest.fixture
def check(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "workflow"))
    monkeypatch.chdir(ROOT)
    return importlib.import_module("plan").check


def snakemake(study: Path, *flags: str) -> subprocess.CompletedProcess[str]:
    argv = [sys.executable, "-m", "snakemake", "-s", str(ROOT / "workflow/Snakefile"), "--cores", "1", "--keep-going",
            "--quiet", "rules", *flags, "--config", f"study={study}", "page=page"]  # fmt: skip
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        argv, cwd=study.parent, env=environment, capture_output=True, text=True, timeout=300, check=False
    )


@pytest.mark.parametrize("scale", SCALES)
def test_a_study_of_the_paper_has_settings_that_exist_and_arms_for_its_claims(scale, check, monkeypatch):
    study = read_study(ROOT / "workflow" / f"{scale}.yaml")
    if scale == "small":  # whose images are folders that a user puts there
        monkeypatch.setattr(Path, "exists", lambda self: True)
    check(study)
    assert study.claims is not None
    for claim in read_claims(ROOT / study.claims):
        if claim.experiment in study.untested:
            continue
        arms = {
            *claim.treated,
            *claim.control,
            *claim.controls,
            *([claim.paper_control] if claim.paper_control else []),
        }
        assert arms <= study.experiments[claim.experiment].arms.keys(), claim.id


def test_a_mistake_is_found_before_the_first_run(tmp_path, check):
    experiment = {"command": "cbcls.train", "seeds": [0], "arms": {"bn": "--norm.kind bn"}}
    mistakes = {
        "arms": (
            {"bn": "--norm.kin bn"},
            "experiments.x.arms.bn: --norm.kin: no such option; did you mean --norm.kind?",
        ),
        "flags": ("--data.name imagefolder --data.root nowhere", "arms.bn: data.root: there is no folder nowhere"),
        "command": (
            "cbcls.evaluate",
            "expected a command of cbgan.train, cbda.adamatch, cbcls.train, got cbcls.evaluate",
        ),
    }
    for entry, (value, said) in mistakes.items():
        content = {"runs": "runs", "results": "r.jsonl", "experiments": {"x": experiment | {entry: value}}}
        (tmp_path / "study.yaml").write_text(yaml.safe_dump(content))
        with pytest.raises(UsageError) as caught:
            check(read_study(tmp_path / "study.yaml"))
        assert said in str(caught.value)
    done = snakemake(tmp_path / "study.yaml")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
    with open(tmp_path / ".snakemake" / "study.lock", "w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        assert "another one runs in" in snakemake(tmp_path / "study.yaml").stderr


def test_the_example_of_the_page_runs_and_a_run_that_fails_is_listed(tmp_path):
    text = (ROOT / "docs" / "studies.md").read_text()
    study, claims = re.findall(r"^```yaml\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    study = study.replace(
        "--data.size 32 --epochs 20", "--data.size 8 --epochs 1 --batch_size 4 --recalibrate.images 8"
    )
    study = study.replace("in: --norm.kind in", "in: --norm.kind in --init_from nothing.pt").replace(
        "0, 1, 2, 3, 4", "0"
    )
    (tmp_path / "study.yaml").write_text(study)
    (tmp_path / "claims.yaml").write_text(claims)
    pixels = np.random.default_rng(0).integers(0, 256, (40, 8, 8, 3), dtype=np.uint8)
    for number, image in enumerate(pixels):
        folder = tmp_path / "photos" / ("train" if number < 32 else "test") / ("cat" if number % 2 else "dog")
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(folder / f"{number}.png")
    done = snakemake(tmp_path / "study.yaml")
    assert done.returncode == 1, done.stderr
    assert "not done: runs/photos/log/photos/in-seed0.txt" in done.stderr
    assert "nothing.pt" in (tmp_path / "runs/photos/log/photos/in-seed0.txt").read_text()
    page = (tmp_path / "page" / "page.md").read_text()
    assert "| ucb | 1 of 1 | " in page
    assert "| in | 0 of 1 | missing |" in page
    assert "**not tested**" in page
