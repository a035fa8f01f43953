"""What two runs must share to count as the same."""

from pathlib import Path

import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from common.runs.checkpoint import Checkpoints
from common.runs.log import read_metrics


def final_state(folder: Path) -> dict:
    state, reports = Checkpoints(folder / "checkpoints").load_latest()
    assert state is not None
    assert reports == []
    return state


def assert_same(ours, theirs, where: str = "state") -> None:
    """Compare nested state dicts exactly."""
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
    elif not where.endswith("log_position"):  # logged speeds differ in length
        assert ours == theirs, where


def logged(folder: Path) -> list[dict]:
    return [{k: v for k, v in line.items() if not k.startswith("time/")} for line in read_metrics(folder)]


def charted(folder: Path) -> dict[str, list[tuple[int, float]]]:
    events = EventAccumulator(str(folder / "tensorboard")).Reload()
    tags = [tag for tag in events.Tags()["scalars"] if not tag.startswith("time/")]
    # A measurement repeated after a kill may stand twice in the events of one step; it must be the same then.
    return {tag: sorted({(event.step, event.value) for event in events.Scalars(tag)}) for tag in tags}
