"""What a finished run tells its user."""

from pathlib import Path
from statistics import median
from typing import Any

from cbgan.config import GanConfig
from cbgan.evaluation import Evaluation
from common.runs.log import read_metrics


def closing_summary(cfg: GanConfig, folder: Path, evaluation: Evaluation) -> str:
    """Return the closing lines: results, layer health, where things are, and what to do next."""
    lines = read_metrics(folder)
    rows = [("run", str(folder)), *_fid_rows(lines, evaluation)]
    speeds = [line["time/images_per_second"] for line in lines if "time/images_per_second" in line]
    if speeds:
        rows.append(("speed", f"{median(speeds):,.0f} images/s on {evaluation.device}"))
    rows += _health_rows(lines)
    rows += [("warning", warning) for warning in evaluation.warnings]
    rows += [
        ("pictures", str(folder / "samples")),
        ("charts", f"tensorboard --logdir {cfg.out} --host 127.0.0.1"),
        ("evaluate", f"python -m cbgan.evaluate --run {folder}"),
        ("paper's run", "python -m cbgan.train --config configs/cbgan/paper_ucb.yaml --device cuda"),
    ]
    width = max(len(name) for name, _ in rows)
    return "\n" + "\n".join(f"{name:<{width}}  {text}" for name, text in rows)


def fid_series(lines: list[dict[str, Any]], tag: str) -> list[tuple[int, float]]:
    """Return (epoch, FID) pairs in the order measured."""
    return [(line["epoch"], line[tag]) for line in lines if line.get(tag) is not None]


def _fid_rows(lines: list[dict[str, Any]], evaluation: Evaluation) -> list[tuple[str, str]]:
    if evaluation.fid is None:
        return [("FID", "not measured (fid.every is 0)")]
    series = fid_series(lines, evaluation.fid.tag)
    (first_epoch, first), (best_epoch, best), (last_epoch, last) = (
        series[0],
        min(series, key=lambda pair: pair[1]),
        series[-1],
    )
    text = f"first {first:.4g} (epoch {first_epoch}), best {best:.4g} ({best_epoch}), last {last:.4g} ({last_epoch})"
    if evaluation.fid.floor is not None:
        text += f"; real test images {evaluation.fid.floor:.4g}"
    rows = [(f"FID ({evaluation.fid.extractor.name})", text)]
    if evaluation.latest is not None and evaluation.latest.classes is not None:
        classes = evaluation.latest.classes
        found = sum(n > 0 for n in classes)
        rows.append(("classes", f"{found} of {len(classes)} found among {sum(classes):,} samples"))
    return rows


def _health_rows(lines: list[dict[str, Any]]) -> list[tuple[str, str]]:
    last: dict[str, float] = {}
    for line in lines:
        last.update({name: value for name, value in line.items() if name.startswith("health/")})
    layers = dict.fromkeys(name.split("/")[1] for name in last)
    return [
        (
            f"health {layer}",
            ", ".join(
                f"{name.split('/')[2].replace('_', ' ')} {value:.3g}"
                for name, value in last.items()
                if name.split("/")[1] == layer and value is not None
            ),
        )
        for layer in layers
    ]
