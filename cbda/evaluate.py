"""Measure an adapted model in both domains: ``python -m cbda.evaluate --run runs/cbda/NAME``."""

from common.cli.command import start

if __name__ == "__main__":
    start("cbda.evaluate")  # before torch is loaded, since it settles how threads wait; does not return

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from cbda.domains import load_domains
from cbda.evaluation import clusters_of
from cbda.export import load_model
from common.classification.measured import draw, measured
from common.cli.arguments import parse
from common.errors import UsageError
from common.machine.atomic import write_text_atomic
from common.machine.device import resolve_device
from common.metrics.scores import information, neighbourhood_density

_SPLITS = {"source": "test", "target": "target_test"}


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """Measure an adapted model on the test images of both domains, by every cluster that its layer can be told.

    Writes evaluation.json (accuracy, macro and weighted precision, recall and F1, a row for each class, confusion,
    calibration) and, for each domain by its own cluster, pictures of confusion and reliability.
    """

    run: Path | None = None
    """A run's folder, for instance runs/cbda/digits-digits_m-scb-seed0, or an exported model's."""
    out: Path | None = None
    """Where results go; null is the folder evaluation in that of the run."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:n."""

    def __post_init__(self) -> None:
        if self.run is None:
            raise ValueError("run: give the run's folder, --run runs/cbda/NAME")


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command.

    Raises:
        UsageError: if there is no such run, its images are not there, or they have other classes now.
    """
    cfg = parse(EvaluateConfig, argv, prog="python -m cbda.evaluate")
    assert cfg.run is not None  # EvaluateConfig refuses otherwise
    model, out = load_model(cfg.run, resolve_device(cfg.device)), cfg.out or cfg.run / "evaluation"
    images = load_domains(model.cfg)
    if images["train"].classes != model.classes:
        raise UsageError(f"run: the source in {model.cfg.source.name} has other classes now than the model knows")
    found: dict[str, Any] = {"clusters": {"headline": "own", "paper": "source"}, "domains": {}}
    for domain, split in _SPLITS.items():
        labels = images[split].labels if split in images else None
        shown = images[split if labels is not None else "target" if domain == "target" else "train"].images
        for cluster in clusters_of(model.cfg.norm.kind):
            logits = model.logits(shown, cluster)
            values = _measured(logits, labels, model.classes)
            found["domains"].setdefault(domain, {})[cluster] = values
            if labels is not None:
                print(f"{domain} as {cluster:8} accuracy {values['accuracy']:.3f}, macro F1 "
                      f"{values['macro']['f1']:.3f}, ECE {values['calibration']['error']:.3f}")  # fmt: skip
                if cluster == domain or len(clusters_of(model.cfg.norm.kind)) == 1:
                    draw(out, domain, values)
    write_text_atomic(out / "evaluation.json", json.dumps(found, indent=2) + "\n")
    print(f"results in {out}")


def _measured(logits: Tensor, labels: Tensor | None, classes: Sequence[str]) -> dict[str, Any]:
    """Return what is known of predictions as plain values; without labels, what can be known without."""
    values: dict[str, Any] = {
        "count": len(logits),
        "information": information(logits),
        "density": neighbourhood_density(logits),
    }
    return values if labels is None else values | measured(labels, logits, classes)
