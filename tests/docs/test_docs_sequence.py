"""The pages of the GAN's first day, their commands run one after another as a reader would, on less."""

import contextlib
import importlib
import shlex
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from test_docs import ROOT, commands

PAGES = ("getting-started", "configuration", "evaluation", "gan")
SMALL = ["--width", "8", "--latent_dim", "16", "--data.size", "8", "--steps_per_epoch", "2", "--fid.samples", "60",
         "--fid.final_samples", "60"]  # fmt: skip
NOT_HERE = ("PATH", "inception", "dinov2", "srun", "10000", "digits_m")  # a reader's files, downloads, what takes long


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


def test_the_commands_run_in_the_order_of_the_pages(folder, monkeypatch):
    monkeypatch.chdir(folder)
    lines = [line for page in PAGES for line in commands(ROOT / "docs" / f"{page}.md")]
    for line in lines:
        _, _, module, *flags = shlex.split(line, comments=True)
        if any(word in line for word in NOT_HERE):
            continue
        if module == "cbgan.train":
            flags += ["--cache", "cache", *([] if "--resume" in flags else SMALL)]
        with contextlib.suppress(SystemExit):  # of --print_config
            importlib.import_module(module).main(flags)
    runs = {path.name for path in (folder / "runs" / "cbgan").iterdir()}
    assert {"first", "longer", "steady", "photos", "one-again", "by-class"} <= runs
    assert (folder / "first.png").stat().st_size
    assert (folder / "walk.gif").stat().st_size
