import os
import signal
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
OURS = {"common", "cbnorm", "cbgan", "cbda", "cbcls", "docs", *(path.stem for path in (ROOT / "tests").rglob("*.py"))}


# A shell starts what it runs in the background with SIGINT ignored, and nohup ignores SIGHUP; runs would keep to that.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)


def pytest_configure(config):
    """Make a warning an error where these modules cause it; another library may warn of itself in any release."""
    config.addinivalue_line("filterwarnings", rf"error:::({'|'.join(sorted(OURS))})(\.|$)")


@pytest.fixture(autouse=True)
def own_surroundings(tmp_path_factory, monkeypatch):
    """Keep caches of tests apart from the user's, and let their subprocesses find this checkout, installed or not."""
    monkeypatch.setenv("HOME", str(tmp_path_factory.mktemp("home")))
    paths = [str(ROOT), str(ROOT / "tests" / "helpers"), os.environ.get("PYTHONPATH", "")]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, paths)))


@pytest.fixture(autouse=True)
def same_draws():
    """Let a test draw the same numbers each time, whatever ran before it."""
    torch.manual_seed(0)
