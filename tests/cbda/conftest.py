from pathlib import Path

import pytest
import torch
from PIL import Image

from common.machine.seeding import generator

CLASSES = ("cat", "dog", "fox")


def write_domain(root: Path, tint: int, count: int = 12, classes=CLASSES) -> Path:
    """Write images whose class shows as the row of a bright stripe, on a ground of noise of a tint."""
    for label, name in enumerate(classes):
        (root / name).mkdir(parents=True)
        for i in range(count):
            ground = torch.randint(0, 60, (8, 8, 3), generator=generator(label, str(tint), i), dtype=torch.uint8) + tint
            ground[2 * label + 1 : 2 * label + 3] = 255 - tint
            Image.fromarray(ground.numpy()).save(root / name / f"{i}.png")
    return root


@pytest.fixture(scope="session")
def domains(tmp_path_factory) -> Path:
    """Write train and test images of two domains: source/train, source/test, target/train and target/test."""
    root = tmp_path_factory.mktemp("domains")
    for number, domain in enumerate(("source", "target")):
        write_domain(root / domain / "train", 90 * number)
        write_domain(root / domain / "test", 90 * number, 4)
    bare = root / "target" / "bare"
    bare.mkdir()
    for path in sorted((root / "target" / "train").rglob("*.png")):
        Image.open(path).convert("L").resize((12, 9)).save(bare / f"{path.parent.name}-{path.name}")
    return root


@pytest.fixture
def tiny(tmp_path, domains) -> list[str]:
    """Return the flags of a run of 4 steps an epoch in this test's own folder."""
    flags = []
    for domain in ("source", "target"):
        flags += [f"--{domain}.name", "imagefolder", f"--{domain}.root", str(domains / domain / "train"),
                  f"--{domain}.test_root", str(domains / domain / "test")]  # fmt: skip
    return [*flags, "--data.size", "8", "--batch_size", "9", "--steps_per_epoch", "4", "--epochs", "2",
            "--evaluate_every", "1", "--log_every", "2", "--out", str(tmp_path)]  # fmt: skip
