import contextlib
import io
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import cbgan.train
import common.metrics.fid
from common.data import ImageSet
from common.metrics.classifier import Classifier

TINY = ["--width", "8", "--batch_size", "125", "--latent_dim", "16", "--data.size", "8", "--lr", "0.1",
        "--log_every", "3", "--evaluate_every", "1", "--fid.samples", "60", "--fid.batch_size", "20"]  # fmt: skip
"""Flags of a run of 8 steps an epoch that makes images of 8 pixels, different ones after the first epoch."""


class QuickClassifier(Classifier):
    """A classifier that knows little and is soon there."""

    def __init__(self, train: ImageSet, test: ImageSet | None, cache: Path, device: torch.device | str) -> None:
        super().__init__(train, test, cache, device, steps=100)


@pytest.fixture(scope="session", autouse=True)
def quick_classifier() -> Iterator[None]:
    """Measure every generator of this folder by a classifier that is soon trained, though it knows little."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(common.metrics.fid, "Classifier", QuickClassifier)
        patch.setattr(common.metrics.fid, "MOST_FLAT", 1.0)
        yield


@pytest.fixture(scope="session")
def cache(tmp_path_factory) -> Path:
    """Share trained classifiers between the tests of this folder."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="session")
def unmeasured(tmp_path_factory, cache) -> Path:
    """Train an epoch under the name run without measuring anything, and return where runs are written."""
    out = tmp_path_factory.mktemp("unmeasured")
    flags = [*TINY, "--epochs", "1", "--evaluate_every", "0", "--name", "run"]
    cbgan.train.main([*flags, "--out", str(out), "--cache", str(cache)])
    return out


@pytest.fixture(scope="session")
def measured(tmp_path_factory, cache) -> tuple[Path, str]:
    """Train two epochs, measured before and after each, and return the run's folder and what was printed."""
    out = tmp_path_factory.mktemp("measured")
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        cbgan.train.main([*TINY, "--epochs", "2", "--out", str(out), "--cache", str(cache)])
    return out / "cbgan" / "digits-ucb-seed0", printed.getvalue()


@pytest.fixture
def tiny(tmp_path, cache) -> list[str]:
    """Return the flags of a tiny run in this test's own folder."""
    return [*TINY, "--out", str(tmp_path), "--cache", str(cache)]
