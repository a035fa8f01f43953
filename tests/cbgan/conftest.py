import os
import subprocess
import sys
from pathlib import Path

import pytest

TINY = ["--width", "8", "--batch_size", "125", "--latent_dim", "16", "--log_every", "3",
        "--fid.every", "1", "--fid.samples", "60", "--fid.batch_size", "20"]  # fmt: skip
"""Flags of a run of 8 steps an epoch that takes a second an epoch."""


@pytest.fixture(scope="session")
def cache(tmp_path_factory) -> Path:
    """Share trained classifiers between the tests of this folder."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def tiny(tmp_path, cache) -> list[str]:
    """Return the flags of a tiny run in this test's own folder."""
    return [*TINY, "--out", str(tmp_path), "--cache", str(cache)]


@pytest.fixture
def launch():
    """Return a function that runs a script of this folder, or a module, with one thread, in one or more processes."""

    def run(what: str, *args: str, processes: int = 1) -> subprocess.CompletedProcess[str]:
        start = [what] if what.endswith(".py") else ["-m", what]
        torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
        return subprocess.run(
            [sys.executable, *(["-W", "error"] if processes == 1 else torchrun), *start, *args],
            capture_output=True, text=True, timeout=300, check=False, cwd=Path(__file__).parent,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )  # fmt: skip

    return run
