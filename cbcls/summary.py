"""What a finished run tells its user."""

from pathlib import Path
from statistics import median

import torch

from cbcls.config import ClassifierConfig
from common.runs.log import read_metrics


def closing_summary(cfg: ClassifierConfig, folder: Path, device: torch.device, warnings: list[str]) -> str:
    """Return the closing lines: results, layer health, where things are, and what to do next."""
    lines = read_metrics(folder)
    latest = {name: value for line in lines for name, value in line.items()}
    scores = {name.removeprefix("metric/"): value for name, value in latest.items() if name.startswith("metric/")}
    health = {name.removeprefix("health/"): value for name, value in latest.items() if name.startswith("health/")}
    speeds = [line["time/images_per_second"] for line in lines if "time/images_per_second" in line]
    rows = [
        ("run", str(folder)),
        ("test", f"loss {latest['loss/test']:.4g}, {_listed(scores)} (epoch {cfg.epochs})"),
    ]
    if speeds:
        rows.append(("speed", f"{median(speeds):,.0f} images/s on {device}"))
    if health:
        rows.append(("health", _listed(health)))
    rows += [("warning", warning) for warning in warnings]
    rows += [
        ("charts", f"tensorboard --logdir {cfg.out} --host 127.0.0.1"),
        ("paper's run", "python -m cbcls.train --config configs/cbcls/shallow_cifar10.yaml --device cuda"),
    ]
    width = max(len(name) for name, _ in rows)
    return "\n" + "\n".join(f"{name:<{width}}  {text}" for name, text in rows)


def _listed(values: dict[str, float | None]) -> str:
    return ", ".join(
        f"{name.split('/')[-1].replace('_', ' ')} {value:.3g}" for name, value in values.items() if value is not None
    )
