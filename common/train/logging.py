"""Scalars and images of a run, in metrics.jsonl and in TensorBoard."""

import json
import math
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from common.runtime.atomic import naming

METRICS = "metrics.jsonl"
FINAL = "_final"
"""How the tags end of what is measured on `fid.final_samples`: numbers of samples do not share a tag."""
GROUPS = {
    "metric": "1_result",
    "adapt": "2_adaptation",
    "schedule/mu": "2_adaptation/mu",
    "loss": "2_loss",
    "samples": "3_samples",
    "adapt/ratio": "4_alignment",
    "discriminator": "4_discriminator",
    "audit": "4_audit",
    "gradient": "5_gradient",
    "schedule": "6_schedule",
    "time": "7_time",
    "health": "9_health",
}
"""TensorBoard sorts its groups by name and opens the first two; metrics.jsonl keeps the plain names."""
_ASIDE = {
    # the result that matters most: the first card
    "0_headline": re.compile(
        r"metric/(accuracy|gain|target_accuracy|fid_(?!\w*_(test|train|floor|centre|low|high|infinity|raw|final)$)\w+)"
    ),
    # the same images with another cluster named
    "8_by_cluster": re.compile(r"metric/\w+_as_\w+"),
    # nearly the same as an accuracy
    "4_averages": re.compile(r"metric/\w+_weighted_\w+"),
    # a distance and its floor come first, what explains them below
    "4_quality": re.compile(
        r"metric/((copies|train_gap|precision|recall|kid|inception_score)_\w+|diversity"
        rf"|fid_\w+_(centre|low|high|infinity|raw)({FINAL})?)"
    ),
}
"""Results that have another group than 1_result."""


def chart_name(tag: str) -> str:
    """Return what TensorBoard calls a tag: ``metric/error`` is ``1_result/error``."""
    for aside, results in _ASIDE.items():
        if results.fullmatch(tag):
            return f"{aside}/{tag.removeprefix('metric/')}"
    group, _, rest = tag.partition("/")
    inner = f"{group}/{rest.partition('/')[0]}"
    known = inner if inner in GROUPS else group
    return GROUPS.get(known, known) + tag.removeprefix(known) if rest else tag


class Log:
    """Writes metrics.jsonl and TensorBoard events into a run's folder.

    Args:
        folder: the run's folder.
        step: the step to resume from; TensorBoard drops later steps of older event files.
        position: the length of metrics.jsonl, in bytes, at the checkpoint of that step; the rest is cut off, since
            those steps will be run and logged again.
        settings: the run's settings by dotted name, for TensorBoard's pages of text and hyperparameters.
        results: tags to list with those hyperparameters.
        active: False for ranks that write nothing.
    """

    def __init__(
        self,
        folder: Path,
        step: int = 0,
        position: int = 0,
        *,
        settings: Mapping[str, Any] | None = None,
        results: Sequence[str] = (),
        active: bool = True,
    ) -> None:
        self._active = active
        if not active:
            return
        from torch.utils.tensorboard import SummaryWriter  # noqa: PLC0415 - takes a second, which --help need not

        path = self._path = folder / METRICS
        resumed = path.exists()
        if resumed:
            os.truncate(path, min(position, path.stat().st_size))
        self._file = path.open("a", encoding="utf-8")
        self._folder = folder
        with naming(folder):
            self._events = SummaryWriter(str(folder), purge_step=step + 1 if resumed else None)
            if settings is not None:
                self._show(settings, results)

    def _show(self, settings: Mapping[str, Any], results: Sequence[str]) -> None:
        """Write settings as text and hyperparameters; add_hparams would make a run of its own for them."""
        from torch.utils.tensorboard.summary import hparams  # noqa: PLC0415 - as above

        self._events.add_text("settings", "\n".join(f"    {name}: {value}" for name, value in settings.items()))
        plain = {
            name: value if isinstance(value, bool | int | float | str) else str(value)
            for name, value in settings.items()
        }
        for summary in hparams(plain, {chart_name(tag): None for tag in results}):
            self._events._get_file_writer().add_summary(summary)

    def scalars(self, step: int, epoch: int, values: Mapping[str, float]) -> None:
        """Log named numbers at a step; those not finite become null in JSON, which has no word for them."""
        if not self._active:
            return
        finite = {name: value if math.isfinite(value) else None for name, value in values.items()}
        with naming(self._path):
            self._file.write(json.dumps({"step": step, "epoch": epoch, **finite}) + "\n")
            self._file.flush()
        with naming(self._folder):  # what TensorBoard's thread met comes out here, in flush, or in close
            for name, value in values.items():
                self._events.add_scalar(chart_name(name), value, step)

    def charts(
        self, charts: Mapping[str, Sequence[str]], bands: Mapping[str, tuple[str, str, str]] | None = None
    ) -> None:
        """Lay out TensorBoard's custom scalars page; the last call holds.

        Args:
            charts: tags by title, each a line in that chart.
            bands: by title, the tags of a line and of the lower and upper end of a band around it.
        """
        if self._active:
            # TensorBoard takes a line's tag for the beginning of a regular expression's match.
            lines = {title: ["Multiline", [f"{chart_name(tag)}$" for tag in tags]] for title, tags in charts.items()}
            margins = {title: ["Margin", [chart_name(tag) for tag in tags]] for title, tags in (bands or {}).items()}
            with naming(self._folder):
                self._events.add_custom_scalars({title: {title: chart} for title, chart in (lines | margins).items()})

    def image(self, step: int, tag: str, image: Tensor) -> None:
        """Log an image to TensorBoard, uint8 (3, H, W)."""
        if self._active:
            with naming(self._folder):
                self._events.add_image(chart_name(tag), image, step)

    def sync(self) -> int:
        """Flush everything to disk before a checkpoint, and return the length of metrics.jsonl in bytes."""
        if not self._active:
            return 0
        with naming(self._path):
            self._file.flush()
            os.fsync(self._file.fileno())
        with naming(self._folder):
            self._events.flush()
        return os.fstat(self._file.fileno()).st_size

    def close(self) -> None:
        """Finish both files."""
        if self._active:
            try:
                with naming(self._path):
                    self._file.close()
            finally:
                with naming(self._folder):
                    self._events.close()


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """Read a run's metrics.jsonl, a dict a line, up to a line that a crash cut short."""
    lines: list[dict[str, Any]] = []
    for text in (folder / METRICS).read_text(encoding="utf-8").splitlines():
        try:
            lines.append(json.loads(text))
        except json.JSONDecodeError:
            break
    return lines


def listed(values: dict[str, float | None]) -> str:
    """Return "accuracy 0.93, macro f1 0.92" of values by tag, those that were not finite left out."""
    shown = ((name.split("/")[-1].replace("_", " "), value) for name, value in values.items())
    return ", ".join(f"{name} {value:.3g}" for name, value in shown if value is not None)


class Means:
    """Running means of named scalars, added up on the device and read when they are logged."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._counts: dict[str, int] = {}

    def add(self, values: Mapping[str, Tensor]) -> None:
        """Add one step's scalars; the device does not wait. Names may differ from step to step."""
        for name, value in values.items():
            now = value.detach().float()
            self._sums[name] = self._sums[name].to(now.device) + now if name in self._sums else now
            self._counts[name] = self._counts.get(name, 0) + 1

    def pop(self) -> dict[str, float]:
        """Return each name's mean over the steps that had it since the last call (waits for the device)."""
        if not self._counts:
            return {}
        sums = torch.stack(list(self._sums.values())).tolist()  # one transfer for all
        means = {name: value / self._counts[name] for name, value in zip(self._sums, sums, strict=True)}
        self._sums, self._counts = {}, {}
        return means

    def state_dict(self) -> dict[str, Any]:
        """Return sums and counts."""
        return {"sums": dict(self._sums), "counts": dict(self._counts)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Load sums and counts."""
        self._sums = dict(state["sums"])
        self._counts = dict(state["counts"])
