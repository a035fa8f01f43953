import contextlib
import io
from pathlib import Path

import pytest
import torch
from PIL import Image

import cbcls.train
from common.runtime.seeding import generator

CLASSES = 6


@pytest.fixture(scope="session")
def pictures(tmp_path_factory) -> Path:
    """Write 10 training and 3 test images of noise for each of six classes."""
    root = tmp_path_factory.mktemp("pictures")
    for split, count in (("train", 10), ("test", 3)):
        for label in range(CLASSES):
            folder = root / split / f"class{label}"
            folder.mkdir(parents=True)
            for i in range(count):
                noise = torch.randint(0, 256, (8, 8, 3), generator=generator(label, split, i), dtype=torch.uint8)
                Image.fromarray(noise.numpy()).save(folder / f"{i}.png")
    return root


def flags_of(pictures: Path, out: Path) -> list[str]:
    folders = ["--data.root", str(pictures / "train"), "--data.test_root", str(pictures / "test")]
    return ["--data.name", "imagefolder", *folders, "--data.size", "8", "--batch_size", "15", "--log_every", "3",
            "--out", str(out)]  # fmt: skip


@pytest.fixture(scope="session")
def runs(tmp_path_factory, pictures) -> Path:
    """Train runs of two epochs of 3 steps, and return their folder.

    ``plain`` (bn, the first epoch and the best kept), ``scb`` (given classes), ``onehot`` (its baseline), ``mn``.
    """
    out = tmp_path_factory.mktemp("runs")
    classes = ["--clusters.by", "classes"]
    for name, flags in {
        "plain": ["--norm.kind", "bn", "--checkpoint_keep", "1", "--best.keep"],
        "scb": [*classes, "--norm.kind", "scb", "--norm.num_components", "6"],
        "onehot": [*classes, "--norm.kind", "bn", "--model.onehot_cluster"],
        "mn": ["--norm.kind", "mn", "--recalibrate.images", "30", "--recalibrate.batch_size", "15"],
    }.items():
        cbcls.train.main([*flags_of(pictures, out), "--epochs", "2", "--lr", "0.01", "--name", name, *flags])
    return out / "cbcls"


@pytest.fixture(scope="session")
def finished(tmp_path_factory, pictures) -> tuple[Path, str]:
    """Train two epochs, and return the run's folder and what was printed."""
    out = tmp_path_factory.mktemp("out")
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        cbcls.train.main([*flags_of(pictures, out), "--epochs", "2"])
    return out / "cbcls" / "imagefolder-ucb-seed0", printed.getvalue()


@pytest.fixture
def tiny(tmp_path, pictures) -> list[str]:
    """Return the flags of a run of 4 steps an epoch in this test's own folder."""
    return flags_of(pictures, tmp_path)
