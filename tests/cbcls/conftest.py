from pathlib import Path

import pytest
import torch
from PIL import Image

from common.machine.seeding import generator

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


@pytest.fixture
def tiny(tmp_path, pictures) -> list[str]:
    """Return the flags of a run of 4 steps an epoch in this test's own folder."""
    folders = ["--data.root", str(pictures / "train"), "--data.test_root", str(pictures / "test")]
    return ["--data.name", "imagefolder", *folders, "--data.size", "8", "--batch_size", "15", "--log_every", "3",
            "--out", str(tmp_path)]  # fmt: skip
