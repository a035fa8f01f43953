"""The classifiers that are trained on two domains: their losses, how they are evaluated, and how they may collapse."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cbda.adaptation.algorithm import Terms, adamatch
from cbda.adaptation.collapse import collapse
from cbda.adaptation.gradients import gradients_differ, gradients_vary, logits_vary
from cbda.adaptation.losses import Alignment, ramp, source_cross_entropy
from cbda.config import AdaMatchConfig
from cbda.domains import domain_streams, load_domains
from cbda.evaluation import CLUSTERS, Evaluator, recalibrate
from cbda.models import build_networks
from cbda.networks.classifier import SOURCE
from common.data import ImageSet, Stream
from common.networks.pixels import pixels_of
from common.runtime.atomic import write_text_atomic
from common.runtime.errors import UsageError
from common.train.optim import make_optimizer
from common.train.step import Metrics, MicroBatch, Step
from common.train.task import Better, Detector, EvalContext, SelectionMetric, Task, TrainContext

CLASSES = "classes.json"
"""In a run's folder: the names of its classes, in the order of the logits."""
CHARTS = {
    "accuracy": [f"metric/{name}accuracy" for name in ("target_", "source_", "source_only_target_")],
    "pseudo-labels": [
        f"adapt/{name}" for name in ("pseudo_label_accuracy_oracle", "mask_rate", "threshold", "largest_class")
    ],
    "gradient variance, source": [f"gradient/source_variance_{how}" for how in ("mean", "shared", "max")],
    "gradient variance, target": [f"gradient/target_variance_{how}" for how in ("mean", "shared", "max")],
}
"""What TensorBoard shows in one picture."""
_CLASSES_CHARTED = 20


class AdaMatchTask(Task[AdaMatchConfig]):
    """AdaMatch (Berthelot et al., ICLR 2022), and beside it a network that sees the source alone."""

    application = "cbda"
    command = "adamatch"
    config = AdaMatchConfig
    headline = (
        "metric/source_accuracy", "metric/target_accuracy", "metric/gain", "metric/target_information",
        "metric/validation_accuracy",
    )  # fmt: skip

    def __init__(self, cfg: AdaMatchConfig, images: Mapping[str, ImageSet], context: TrainContext) -> None:
        classifiers = ("adamatch", "source_only") if cfg.source_only else ("adamatch",)
        super().__init__(
            cfg, images, context, lambda: build_networks(cfg, images["train"].num_classes), evaluated=classifiers
        )
        self.optimizers = {
            name: make_optimizer(cfg.optimizer, self.networks[name], lr=cfg.lr, weight_decay=cfg.weight_decay, eps=1e-7)
            for name in classifiers
        }
        alignment = self.networks["alignment"]
        assert isinstance(alignment, Alignment)
        self.alignment = alignment
        self.evaluator = Evaluator(cfg, images, self.device, self.to_input, self.env)
        self.detectors = [Detector(self.has_collapsed, "steps")]

    @classmethod
    def selection_metrics(cls, cfg: AdaMatchConfig) -> dict[str, SelectionMetric]:
        """Return the values without target labels, and the target's accuracy, which needs best.allow_test_metric."""
        return {
            "metric/validation_accuracy": SelectionMetric("validation", "higher"),
            "loss/validation": SelectionMetric("validation", "lower"),
            "metric/target_information": SelectionMetric("target", "higher"),
            "metric/target_density": SelectionMetric("target", "higher"),
            "metric/target_accuracy": SelectionMetric("target_test", "higher", chosen_by_test=True),
        }

    @classmethod
    def load_images(cls, cfg: AdaMatchConfig) -> dict[str, ImageSet]:
        """Return both domains' images, see `load_domains`, and of the source those to validate on if any are.

        Raises:
            UsageError: if there are none of the images that best.by is measured on.
        """
        images, selection = cls.with_validation(cfg, load_domains(cfg)), cls.selection(cfg)
        if selection is not None and selection[1].split not in images:
            raise UsageError(f"best.by: {selection[0]} needs labels, and the target {images['target'].name} has none")
        return images

    @classmethod
    def default_name(cls, cfg: AdaMatchConfig) -> str:
        """Return what a run without a name is called."""
        return f"{cfg.source.name}-{cfg.target.name}-{cfg.norm.kind}-seed{cfg.seed}"

    def streams(self) -> dict[str, Stream]:
        """Return source, target and, if there are any, labelled target images, each seen weakly and strongly."""
        return domain_streams(self.cfg, self.images, self.env.world)

    def to_input(self, images: Tensor) -> Tensor:
        """Bring uint8 images (N, 3, S, S) to the device, in the range of ``model.pixels``."""
        return pixels_of(super().to_input(images), self.cfg.model.pixels)

    def train_step(self, step: Step) -> Metrics:
        """Update the classifier by AdaMatch's loss, and the other one by the source's."""
        mu = ramp(step.progress, self.cfg.method.warmup)
        metrics = step.optimize("adamatch", lambda micro: self.adamatch_loss(micro, mu))
        if self.cfg.source_only:
            metrics |= step.optimize("source_only", self.source_only_loss)
        return metrics | Metrics({"schedule/mu": torch.tensor(mu)})

    def adamatch_loss(self, micro: MicroBatch, mu: float) -> tuple[Tensor, Metrics]:
        """Return the source's loss, plus the labelled target's if any, plus ``mu`` times the target's."""
        cfg, network = self.cfg, self.networks["adamatch"]
        terms = adamatch(cfg.method, micro, self.ddp_networks["adamatch"], self.alignment, self.to_input)
        gradients: dict[str, Tensor] = {}  # which few steps measure
        if self._due(micro, cfg.variance_every):
            gradients |= gradients_vary(terms, network)
        if self._due(micro, cfg.noise_every):
            gradients |= gradients_differ(cfg.method, terms, micro["train"].labels, network)
        supervised = terms.source if terms.labelled is None else terms.source + terms.labelled
        metrics = self.adaptation_metrics(terms, micro["target"].labels)
        return supervised + mu * terms.target, Metrics(step=metrics, epoch=gradients)

    def source_only_loss(self, micro: MicroBatch) -> Tensor:
        """Return the loss of the classifier that sees the source alone, on the same images."""
        source = micro["train"]
        x = self.to_input(torch.cat(source.views))
        logits = self.ddp_networks["source_only"](x, torch.full((len(x),), SOURCE, device=x.device))
        return source_cross_entropy(logits.float(), source.labels, self.cfg.method.source_loss or "mean")

    def adaptation_metrics(self, terms: Terms, labels: Tensor) -> dict[str, Tensor]:
        """Return what tells whether adaptation works, by tag (docs/adaptation.md).

        Args:
            terms: of AdaMatch's loss.
            labels: the target's (T,), which are only measured by.
        """
        values = {
            "loss/source": terms.source,
            "loss/target": terms.target,
            "adapt/threshold": terms.threshold,
            "adapt/source_accuracy": terms.accuracy,
            "adapt/largest_class": terms.shares.max(),
            "adapt/mask_rate": terms.mask.float().mean(),
        }
        if terms.labelled is not None:
            values["loss/target_labelled"] = terms.labelled
        if self.images["target"].labels is not None:
            values["adapt/passing_right"] = (terms.mask & (terms.pseudo.argmax(1) == labels)).float().mean()
        classes = self.images["train"].classes
        if len(classes) <= _CLASSES_CHARTED and self.cfg.method.alignment != "none":
            values |= {f"adapt/ratio/{name}": ratio for name, ratio in zip(classes, terms.ratio, strict=True)}
        return values

    def _due(self, micro: MicroBatch, every: int) -> bool:
        """Return whether a metric is due on this micro-batch: the last one of one step in ``every``."""
        return every > 0 and (micro.number + 1) % (every * self.cfg.grad_accum_steps) == 0

    def log_metrics(self, means: Mapping[str, float]) -> Mapping[str, float]:
        """Return shares of the target's images as shares of the pseudo-labels that passed, if any did."""
        values = dict(means)
        right, largest = values.pop("adapt/passing_right", None), values.pop("adapt/largest_class", 0.0)
        if passed := values["adapt/mask_rate"]:
            values["adapt/largest_class"] = largest / passed
            if right is not None:
                values["adapt/pseudo_label_accuracy_oracle"] = right / passed
        return values

    def has_collapsed(self, means: Mapping[str, float]) -> str | None:
        """Say so when the source is lost, all pseudo-labels pass a falling threshold, or they are of one class."""
        classes, batch_size = self.images["train"].num_classes, self.cfg.batch_size * self.env.world
        return collapse(self.cfg.method, self.alignment.watch, means, classes, batch_size)

    def recalibrate(self, name: str, network: nn.Module, go_on: Callable[[], None]) -> None:
        """Estimate statistics from training images of both domains, or of the one that the network sees."""
        alone = name == "source_only"
        recalibrate(self.cfg, network, self.images, self.device, source_only=alone, go_on=go_on)

    def evaluate(self, networks: Mapping[str, nn.Module], context: EvalContext) -> dict[str, float]:
        """Measure both classifiers in both domains."""
        values = self.evaluator.values(networks, context)
        if self.env.first:
            context.log.charts(CHARTS)
            write_text_atomic(context.folder / CLASSES, json.dumps(self.images["train"].classes) + "\n")
        return values

    def probe(self, networks: Mapping[str, nn.Module], step: int) -> None:
        """Classify a batch of each domain's training images, the same all through a run, in training mode."""
        _, parts, clusters = zip(*self.evaluator.same_images(), strict=True)
        ids = [cluster for cluster, images in zip(clusters, parts, strict=True) for _ in images]
        networks["adamatch"](self.to_input(torch.cat(parts)), torch.tensor(ids, device=self.device))

    def health(self, step: int) -> tuple[dict[str, float], list[str]]:
        """Return the layers' health and, if asked for, the variance of the gradients of all logits by domain."""
        values, warnings = super().health(step)
        if self.cfg.logits_variance:
            network = self.networks["adamatch"]
            values |= logits_vary(self.evaluator.training_logits(network, step), network)
        return values, warnings

    def better(self) -> Mapping[str, Better]:
        """Return it of scores in both domains and of the source's losses; pseudo-labels change what the target's is."""
        names = ("accuracy", "weighted_precision", "weighted_recall", "weighted_f1")
        scores = [f"metric/{domain}_{name}" for domain in ("source", "target") for name in names]
        scores += [f"{score}_as_{cluster}" for score in scores for cluster in CLUSTERS]
        alone = ("metric/source_only_source_accuracy", "metric/source_only_target_accuracy", "metric/gain")
        losses = ("loss/source", "loss/source_only")
        return {**dict.fromkeys([*scores, *alone], "higher"), **dict.fromkeys(losses, "lower"), **super().better()}

    def summary_rows(self, lines: list[dict[str, Any]], folder: Path) -> list[tuple[str, str]]:
        """Return the last accuracies of both networks, and those by each cluster."""
        last = {name: value for line in lines for name, value in line.items() if name.startswith("metric/")}

        def both(prefix: str) -> str:
            found = {domain: last.get(f"metric/{prefix}{domain}_accuracy") for domain in ("source", "target")}
            known = [f"{domain} {100 * value:.1f} %" for domain, value in found.items() if value is not None]
            return ", ".join(known) or "no labels to measure by"

        rows = [("source only", both("source_only_"))] if self.cfg.source_only else []
        rows.append(("AdaMatch", both("")))
        by = {name: last.get(f"metric/target_accuracy_as_{name}") for name in CLUSTERS}
        by_cluster = [f"{100 * value:.1f} % as {name}" for name, value in by.items() if value is not None]
        if by_cluster:
            rows.append(("by cluster", f"target {', '.join(by_cluster)}; the paper names the source's for both"))
        return [
            *rows,
            ("picture", str(folder / "samples" / "predictions.png")),
            ("paper's run", "python -m cbda.adamatch --config configs/cbda/paper_scb.yaml --device cuda"),
        ]
