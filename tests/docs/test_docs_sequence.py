"""The pages' commands run one after another as a reader would, on less."""

import contextlib
import importlib
import re
import shlex
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from test_docs import ROOT, commands

from cbda import load_model

GAN = ("getting-started", "configuration", "evaluation", "gan")
LESS = {
    "cbgan.train": ["--cache", "cache", "--width", "8", "--latent_dim", "16", "--data.size", "8", "--steps_per_epoch",
                    "2", "--fid.samples", "60", "--fid.final_samples", "60"],
    "cbcls.train": ["--steps_per_epoch", "2", "--epochs", "16", "--evaluate_every", "16", "--recalibrate.images",
                    "128"],
    "cbda.adamatch": ["--steps_per_epoch", "2", "--epochs", "1", "--recalibrate.images", "128"],
}  # fmt: skip
NOT_HERE = re.compile(
    "PATH|FILE|NAME|TOLD|seed[12]|srun|cuda|inception|dinov2|cifar|oxford|10000|--data.name digits_m|pets"
)
"""A reader's own files and runs, downloads, GPUs, and what takes long."""


@pytest.fixture
def folder(tmp_path) -> Path:
    """Return a folder with the configurations and a reader's photos, with and without classes."""
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    draw = np.random.default_rng(0)
    for name in ("photos/cats", "photos/dogs", "unsorted"):
        (tmp_path / name).mkdir(parents=True)
        for number in range(10):
            pixels = draw.integers(0, 256, (12, 12, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / name / f"{number}.png")
    return tmp_path


def follow(pages: Iterable[str]) -> None:
    """Run the commands of pages in their order."""
    for line in [line for page in pages for line in commands(ROOT / "docs" / f"{page}.md")]:
        _, _, module, *flags = shlex.split(line, comments=True)
        if NOT_HERE.search(line):
            continue
        if "--resume" not in flags:
            flags += LESS.get(module, [])
        with contextlib.suppress(SystemExit):  # of --print_config
            importlib.import_module(module).main(flags)


def test_the_commands_of_the_gan_run_in_the_order_of_its_pages(folder, monkeypatch):
    monkeypatch.chdir(folder)
    follow(GAN)
    runs = {path.name for path in (folder / "runs" / "cbgan").iterdir()}
    assert {"first", "longer", "steady", "photos", "one-again", "by-class"} <= runs
    assert (folder / "first.png").stat().st_size
    assert (folder / "walk.gif").stat().st_size


@pytest.mark.full
@pytest.mark.parametrize(
    ("page", "made"),
    [
        ("classification", "clusters/digits.json"),
        ("figures", "embedding.png"),
        ("adaptation", "runs/cbda/digits-digits_m-scb-seed0/evaluation/evaluation.json"),
    ],
)
def test_those_of_another_page_do(folder, monkeypatch, page, made):
    monkeypatch.chdir(folder)
    follow([page])
    assert (folder / made).stat().st_size


@pytest.mark.full
def test_photographs_are_adapted_as_the_page_says(folder, monkeypatch):
    monkeypatch.chdir(folder)
    draw = np.random.default_rng(0)
    for name in ("train/cat", "train/dog", "test/cat", "test/dog"):
        (folder / "own" / name).mkdir(parents=True)
        for number in range(20):
            pixels = draw.integers(0, 256, (40, 50, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / "own" / name / f"{number}.png")
    page = ROOT / "docs" / "adaptation.md"
    code = re.findall(r"^```python\n(.*?)^```", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)[0]
    exec(code.replace("PATH", "own"), {})
    halves = [
        {path.stem for path in (folder / "pets" / half / "train/cat").iterdir()} for half in ("clean", "degraded")
    ]
    assert [len(half) for half in halves] == [10, 10]
    assert not halves[0] & halves[1]
    for line in commands(page):
        if "pets" in line:
            less = line.replace("resnet18", "test_resnet").replace("--data.size 224", "--data.size 32")
            _, _, module, *flags = shlex.split(less.replace("--batch_size 16", "--batch_size 8"))
            flags += [] if "--resume" in flags else LESS.get(module, [])
            importlib.import_module(module).main(flags)
    assert load_model("pets/adapted").classes == ("cat", "dog")
    assert (folder / "runs/cbda/pets/evaluation/evaluation.json").stat().st_size
    assert (folder / "predictions.png").stat().st_size
