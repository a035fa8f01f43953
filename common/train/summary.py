"""What a run leaves: lines for its user, and summary.json for reports and schedulers."""

import json
import math
import resource
from collections.abc import Mapping
from pathlib import Path
from shlex import quote
from statistics import median
from typing import Any

import torch

from common.runtime.atomic import write_text_atomic
from common.train.logging import listed, read_metrics
from common.train.state import RunState, TrainState
from common.train.task import SelectionMetric, Task

SUMMARY = "summary.json"


class Results:
    """The values a run has measured so far: ``metric/`` tags, and those that epochs can be chosen by.

    Args:
        known: the metrics that epochs can be chosen by.
        folder: of a run, whose log is read once.

    Attributes:
        last: by tag, the last value with its epoch and split; None where it was not finite.
        of_epoch: by epoch, the last value of each tag.
    """

    def __init__(self, known: Mapping[str, SelectionMetric], folder: Path | None = None) -> None:
        self._known = known
        self.last: dict[str, dict[str, Any]] = {}
        self.of_epoch: dict[int, dict[str, float | None]] = {}
        for line in [] if folder is None else read_metrics(folder):
            self.note(line["epoch"], line)

    def note(self, epoch: int, values: Mapping[str, float | None]) -> None:
        """Note the results among the values logged at an epoch."""
        for tag, value in values.items():
            if tag in self._known or tag.startswith("metric/"):
                split = self._known[tag].split if tag in self._known else None
                self.last[tag] = {"value": value, "epoch": epoch, "split": split}
                self.of_epoch.setdefault(epoch, {})[tag] = value


def write_summary(
    folder: Path,
    status: str,
    why: str | None,
    task: Task[Any],
    state: TrainState,
    results: Results,
) -> None:
    """Write summary.json atomically; docs/results.md says what it holds."""
    run, cfg = state.run, task.cfg
    best, selection = run.best, task.selection(cfg)
    if best is not None and selection is not None:
        best = {**best, "tag": selection[0], "split": selection[1].split, "chosen_by_test": selection[1].chosen_by_test,
                "with": results.of_epoch.get(best["epoch"], {})}  # fmt: skip
    content = {
        "state": status,
        "why": why,
        "epochs": {"done": run.epoch, "wanted": cfg.epochs},
        "step": run.step,
        "last": results.last,
        "best": best,
        "better": task.better(),
        "protocol": task.eval_protocol(),
        "images": {
            name: {"content_hash": images.content_hash, "count": len(images)} for name, images in task.images.items()
        },
        "seconds": {name: round(value, 3) for name, value in state.seconds.items()},
        "peak_memory_mib": round(peak_memory(task.device), 1),
        "collapsed": run.collapsed and {name: run.collapsed[name] for name in ("step", "cause")},
        "rewinds": run.rewinds,
    }
    write_text_atomic(folder / SUMMARY, json.dumps(_without_nan(content), indent=2) + "\n")


def closing_lines(task: Task[Any], folder: Path, run: RunState, warnings: list[str]) -> str:
    """Return what is printed at the end: results, layers' health, where things are, and what to do next."""
    lines, cfg, best = read_metrics(folder), task.cfg, run.best
    rows = [("run", str(folder)), *task.summary_rows(lines, folder)]
    if best is not None and best["epoch"] is not None and cfg.best.used:
        by_test = ", chosen by a value of test images" if cfg.best.allow_test_metric else ""
        rows.append(("best", f"{best['tag']} {best['value']:.4g} (epoch {best['epoch']}{by_test})"))
    if run.epoch < cfg.epochs:
        without = f"{run.epochs_without_improvement} evaluations without a better value"
        rows.append(("stopped", f"after {run.epoch} of {cfg.epochs} epochs: {without}"))
    speeds = [line["time/images_per_second"] for line in lines if "time/images_per_second" in line]
    if speeds:
        rows.append(("speed", f"{median(speeds):,.0f} images/s on {task.device}"))
    rows += _health_rows(lines)
    rows += [("warning", warning) for warning in warnings]
    if (found := run.collapsed) is not None:
        rows.append(("collapsed", f"in step {found['step']}: {found['cause']}; try {found['remedy']}"))
    rows += [("rewound", f"in step {r['step']} to step {r['to']}: {r['cause']}") for r in run.rewinds]
    rows.append(("charts", f"tensorboard --logdir {quote(str(cfg.out))} --host 127.0.0.1"))
    width = max(len(name) for name, _ in rows)
    return "\n" + "\n".join(f"{name:<{width}}  {text}" for name, text in rows)


def _health_rows(lines: list[dict[str, Any]]) -> list[tuple[str, str]]:
    last = {name: value for line in lines for name, value in line.items() if name.startswith("health/")}
    layers = dict.fromkeys(name.split("/")[1] for name in last)
    return [
        (f"health {layer}", listed({name: v for name, v in last.items() if name.split("/")[1] == layer}))
        for layer in layers
    ]


def peak_memory(device: torch.device) -> float:
    """Return the most memory in MiB: of the GPU's that tensors held, or of this process's on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


def _without_nan(value: Any) -> Any:
    """Replace numbers that are not finite by null; JSON has no word for them."""
    if isinstance(value, dict):
        return {name: _without_nan(inner) for name, inner in value.items()}
    if isinstance(value, list):
        return [_without_nan(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
