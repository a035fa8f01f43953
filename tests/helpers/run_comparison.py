"""What two runs must share to count as the same."""

import json
from pathlib import Path
from typing import Any

import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from common.train.checkpoint import Checkpoints
from common.train.logging import read_metrics


def final_state(folder: Path) -> dict[str, Any]:
    state, reports = Checkpoints(folder / "checkpoints").load_latest()
    assert state is not None
    assert reports == []
    return state


def assert_same(ours: Any, theirs: Any, where: str = "state") -> None:
    """Compare nested state dicts exactly, but for what depends on the clock."""
    if where.endswith(("log_position", "seconds")):  # logged speeds differ in length
        return
    assert type(ours) is type(theirs), where
    if isinstance(ours, dict):
        assert ours.keys() == theirs.keys(), where
        for key in ours:
            assert_same(ours[key], theirs[key], f"{where}.{key}")
    elif isinstance(ours, list | tuple):
        assert len(ours) == len(theirs), where
        for number, pair in enumerate(zip(ours, theirs, strict=True)):
            assert_same(*pair, f"{where}[{number}]")
    elif isinstance(ours, torch.Tensor):
        assert ours.dtype == theirs.dtype, where
        assert torch.equal(ours, theirs), where
    else:
        assert ours == theirs, where


def logged(folder: Path) -> list[dict[str, Any]]:
    return [{k: v for k, v in line.items() if not k.startswith("time/")} for line in read_metrics(folder)]


def charted(folder: Path) -> dict[str, list[tuple[int, str]]]:
    events = EventAccumulator(str(folder)).Reload()
    tags = [tag for tag in events.Tags()["scalars"] if "_time/" not in tag]
    # A measurement repeated after a kill may stand twice in the events of one step; it must be the same then.
    return {tag: sorted({(event.step, repr(event.value)) for event in events.Scalars(tag)}) for tag in tags}  # nan too


def summarised(folder: Path) -> dict[str, Any]:
    summary = json.loads((folder / "summary.json").read_text())
    return {name: value for name, value in summary.items() if name not in ("seconds", "peak_memory_mib")}


def assert_same_runs(ours: Path, theirs: Path) -> None:
    """Compare the last checkpoints, logs, summaries, charts and pictures of two runs."""
    assert summarised(ours) == summarised(theirs)
    assert_same(final_state(ours), final_state(theirs))
    assert logged(ours) == logged(theirs)
    assert charted(ours) == charted(theirs)
    for picture in theirs.glob("samples/*"):
        assert (ours / "samples" / picture.name).read_bytes() == picture.read_bytes()
