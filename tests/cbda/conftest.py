import contextlib
import io
from pathlib import Path

import pytest
from domains import write_domain
from PIL import Image

import cbda.adamatch


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


def flags_of(domains: Path, out: Path) -> list[str]:
    """Return the flags of a run of 4 steps an epoch."""
    flags = []
    for domain in ("source", "target"):
        flags += [f"--{domain}.name", "imagefolder", f"--{domain}.root", str(domains / domain / "train"),
                  f"--{domain}.test_root", str(domains / domain / "test")]  # fmt: skip
    return [*flags, "--data.size", "8", "--batch_size", "9", "--steps_per_epoch", "4", "--epochs", "2",
            "--evaluate_every", "1", "--log_every", "2", "--out", str(out)]  # fmt: skip


@pytest.fixture
def tiny(tmp_path, domains) -> list[str]:
    """Return the flags of a run of 4 steps an epoch in this test's own folder."""
    return flags_of(domains, tmp_path)


@pytest.fixture(scope="session")
def runs(tmp_path_factory, domains) -> Path:
    """Train an epoch with clusters and one without a layer, and return the folder of the runs, scb and none."""
    out = tmp_path_factory.mktemp("runs")
    for kind in ("scb", "none"):
        flags = ["--epochs", "1", "--lr", "0.1", "--norm.kind", kind, "--name", kind]
        cbda.adamatch.main([*flags_of(domains, out), *flags])
    return out / "cbda"


@pytest.fixture(scope="session")
def finished(tmp_path_factory, domains) -> tuple[Path, str]:
    """Train two epochs of which the best is kept, and return the run's folder and what was printed."""
    out = tmp_path_factory.mktemp("finished")
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        cbda.adamatch.main([*flags_of(domains, out), "--best.keep"])
    return out / "cbda" / "imagefolder-imagefolder-scb-seed0", printed.getvalue()
