from pathlib import Path

import pytest
from domains import write_domain
from PIL import Image


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
