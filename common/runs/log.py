"""Scalars and images of a run: the same names in metrics.jsonl and in TensorBoard."""

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

METRICS = "metrics.jsonl"


class Log:
    """Writes metrics.jsonl and TensorBoard events into a run's folder.

    Args:
        folder: the run's folder.
        step: the step the run goes on from; TensorBoard drops what older event files say about later steps.
        position: length of metrics.jsonl, in bytes, when the checkpoint of that step was written; what follows
            is cut away, since those steps will be run and logged again.
        active: False for a rank that writes nothing; its log takes everything and keeps none of it.
    """

    def __init__(self, folder: Path, step: int = 0, position: int = 0, *, active: bool = True) -> None:
        self._active = active
        if not active:
            return
        path = folder / METRICS
        resumed = path.exists()
        if resumed:
            os.truncate(path, min(position, path.stat().st_size))
        self._file = path.open("a", encoding="utf-8")
        self._events = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1 if resumed else None)

    def scalars(self, step: int, epoch: int, values: Mapping[str, float]) -> None:
        """Log named numbers at a step; those not finite become null in JSON, which has no word for them."""
        if not self._active:
            return
        finite = {name: value if math.isfinite(value) else None for name, value in values.items()}
        self._file.write(json.dumps({"step": step, "epoch": epoch, **finite}) + "\n")
        self._file.flush()
        for name, value in values.items():
            self._events.add_scalar(name, value, step)

    def chart(self, title: str, tags: list[str]) -> None:
        """Show several scalars in one chart (TensorBoard's custom scalars page)."""
        if self._active:
            self._events.add_custom_scalars({title: {title: ["Multiline", tags]}})

    def image(self, step: int, tag: str, image: Tensor) -> None:
        """Log an image to TensorBoard, uint8 (3, H, W)."""
        if self._active:
            self._events.add_image(tag, image, step)

    def sync(self) -> int:
        """Put everything logged so far on the disk, so that no checkpoint outlives its log.

        Returns:
            The length of metrics.jsonl in bytes, which belongs into that checkpoint.
        """
        if not self._active:
            return 0
        self._file.flush()
        os.fsync(self._file.fileno())
        self._events.flush()
        return os.fstat(self._file.fileno()).st_size

    def close(self) -> None:
        """Finish both files."""
        if self._active:
            self._file.close()
            self._events.close()


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """Read a run's metrics.jsonl, a dict a line; a last line cut short by a crash is left out."""
    lines: list[dict[str, Any]] = []
    for text in (folder / METRICS).read_text(encoding="utf-8").splitlines():
        try:
            lines.append(json.loads(text))
        except json.JSONDecodeError:
            break
    return lines


class Means:
    """Running means of named scalars, added up on the device and read when they are logged.

    Its state belongs into a checkpoint, so that a run stopped between two log lines writes the same next one.
    """

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._count = 0

    def add(self, values: Mapping[str, Tensor]) -> None:
        """Add one step's values, detached scalars on any device; no waiting."""
        for name, value in values.items():
            now = value.detach().float()
            self._sums[name] = self._sums[name].to(now.device) + now if name in self._sums else now
        self._count += 1

    def pop(self) -> dict[str, float]:
        """Return the means since the last call and start anew (waits for the device)."""
        if not self._count:
            return {}
        sums = torch.stack(list(self._sums.values())).tolist()  # one transfer for all
        means = {name: value / self._count for name, value in zip(self._sums, sums, strict=True)}
        self._sums, self._count = {}, 0
        return means

    def state_dict(self) -> dict[str, Any]:
        """Return sums and count."""
        return {"sums": dict(self._sums), "count": self._count}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over sums and count; sums read from a file join the device of the next value."""
        self._sums, self._count = dict(state["sums"]), state["count"]
