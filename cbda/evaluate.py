"""Measure an adapted model in both domains: ``python -m cbda.evaluate --run runs/cbda/NAME``."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from matplotlib.ticker import LogFormatter
from torch import Tensor

from cbda.domains import load_domains
from cbda.evaluation import TESTED, clusters_of
from cbda.export import AdaptedModel, load_model
from cbda.networks.divergence import collect_activation, divergences
from common.classification.measured import draw, measured
from common.classification.stored import run_folder
from common.data import ImageSet
from common.metrics.scores import information, neighbourhood_density
from common.reports.embedding import Panel, collect_features, draw_panels, project
from common.reports.figures import drawing_style, write_figure
from common.runtime.atomic import write_text_atomic
from common.runtime.cli import parse
from common.runtime.command import run_command
from common.runtime.device import resolve_device
from common.runtime.errors import UsageError
from common.runtime.paths import refuse_overwriting
from common.runtime.seeding import permutation

_RESULTS = "evaluation.json"


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """Measure an adapted model on the test images of both domains, by every cluster that its layer can be given.

    Writes evaluation.json (accuracy, macro and weighted precision, recall and F1, a row for each class, confusion,
    calibration, and how far the domains are apart in each layer) and, for each domain by its own cluster, pictures of
    confusion and reliability, of those distances, and of both domains' features by t-SNE.
    """

    run: Path | None = None
    """A run's folder, for instance runs/cbda/digits-digits_m-scb-seed0, or an exported model's."""
    checkpoint: str = "last"
    """Which checkpoint of the run: last, best, or the number of an epoch that was kept (checkpoint_keep)."""
    out: Path | None = None
    """Where results go; null is the folder evaluation in that of the run."""
    tsne: int = 500
    """Images of each domain whose features are drawn by t-SNE; 0 draws none."""
    force: bool = False
    """Write over results that are there."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:n."""

    def __post_init__(self) -> None:
        if self.tsne < 0:
            raise ValueError(f"tsne: expected 0 or more, got {self.tsne}")
        if self.run is None:
            raise ValueError("run: give the run's folder, --run runs/cbda/NAME")


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command.

    Raises:
        UsageError: if there is no such run, its images are not there, or they have other classes now.
    """
    cfg = parse(EvaluateConfig, argv, prog="python -m cbda.evaluate")
    assert cfg.run is not None  # EvaluateConfig refuses otherwise
    out = cfg.out or run_folder(cfg.run) / "evaluation"
    refuse_overwriting(out / _RESULTS, force=cfg.force)
    model = load_model(cfg.run, resolve_device(cfg.device), checkpoint=cfg.checkpoint)
    images = load_domains(model.cfg)
    if images["train"].classes != model.classes:
        raise UsageError(f"run: the source in {model.cfg.source.name} has other classes now than the model knows")
    found: dict[str, Any] = {
        "checkpoint": cfg.checkpoint,
        "epoch": model.epoch,
        "clusters": {"headline": "own", "paper": "source"},
        "domains": {},
    }
    for domain, split in TESTED.items():
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
    found["divergence"] = _apart(model, images, out, cfg.tsne)
    write_text_atomic(out / _RESULTS, json.dumps(found, indent=2) + "\n")
    print(f"results of epoch {model.epoch} in {out}")


def _apart(model: AdaptedModel, images: Mapping[str, ImageSet], out: Path, count: int) -> dict[str, float]:
    """Return how far the domains are apart in each layer, each by its own cluster; draw that, and their features."""
    activations, features, labels = [], [], []
    for domain, training in (("source", "train"), ("target", "target")):
        shown = images.get(TESTED[domain], images[training])
        cluster = domain if domain in clusters_of(model.cfg.norm.kind) else "source"
        with collect_activation(model.network) as activation, collect_features(model.network) as feature:
            model.logits(shown.images, cluster)
        chosen = permutation(len(shown), model.cfg.seed, "t-SNE", domain)[:count].sort().values
        activations.append(activation)
        features.append(torch.cat(feature)[chosen])
        labels.append(torch.full_like(chosen, -1) if shown.labels is None else shown.labels[chosen])
    apart = divergences(*activations)
    _draw_by_layer(out / "divergence", apart)
    if count:
        domains = torch.tensor([0] * len(labels[0]) + [1] * len(labels[1]))
        perplexity = min(30.0, max(1.0, (len(domains) - 2) / 3))
        try:
            points = project(torch.cat(features), seed=model.cfg.seed, perplexity=perplexity)
            by_class = Panel(points, torch.cat(labels), model.classes, "by class")
            draw_panels(out / "tsne", [by_class, Panel(points, domains, ("source", "target"), "by domain")])
        except ValueError as error:  # too few of them, or all the same: of a network that says so, no failure
            print(f"no t-SNE: {error}")
    return apart


def _draw_by_layer(path: Path, divergence: Mapping[str, float]) -> None:
    with drawing_style():
        figure = Figure(figsize=(min(12.0, 2.0 + 0.28 * len(divergence)), 4.5), layout="constrained")
        axes = figure.subplots()
        axes.plot(range(len(divergence)), list(divergence.values()), "o-", color="#0072B2")
        axes.set_xticks(range(len(divergence)), list(divergence), rotation=90, fontsize=8)
        axes.set(title="source and target by layer", ylabel="symmetric KL divergence", yscale="log")
        axes.yaxis.set_major_formatter(LogFormatter())
        axes.yaxis.set_minor_formatter(LogFormatter())  # names ticks where values span less than a decade
        write_figure(figure, path)


def _measured(logits: Tensor, labels: Tensor | None, classes: Sequence[str]) -> dict[str, Any]:
    """Return what is known of predictions as plain values; without labels, what can be known without."""
    values: dict[str, Any] = {
        "count": len(logits),
        "information": information(logits),
        "density": neighbourhood_density(logits),
    }
    return values if labels is None else values | measured(labels, logits, classes)


if __name__ == "__main__":
    run_command(main)
