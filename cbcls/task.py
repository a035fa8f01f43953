"""The classifier that is trained: its loss, how it is evaluated, and how it may collapse."""

import json
import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from shlex import quote
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from cbcls.config import ClassifierConfig
from cbcls.evaluation import Evaluator, recalibrate
from cbcls.models import build_classifier
from common.data import ImageSet, PerImage, View, load
from common.data.augmentation import Augmentation
from common.data.clusters import with_clusters
from common.metrics.scores import METRICS
from common.runtime.atomic import write_text_atomic
from common.runtime.errors import UsageError
from common.runtime.seeding import drawing
from common.train.logging import listed
from common.train.optim import make_optimizer
from common.train.step import Metrics, MicroBatch, Step
from common.train.task import Better, Detector, EvalContext, SelectionMetric, Task, TrainContext

CATEGORIES = "categories.json"
"""In a run's folder: names of its classes and clusters, in the order of their numbers."""
CHARTS = {
    "loss": [f"loss/{name}" for name in ("train_eval", "validation", "test")],
    "error": [f"metric/{name}error" for name in ("train_", "validation_", "")],
}
"""What TensorBoard shows in one picture."""


class ClassifierTask(Task[ClassifierConfig]):
    """Cross-entropy on labelled images."""

    application = "cbcls"
    config = ClassifierConfig
    headline = (
        "loss/test", "metric/accuracy", "metric/validation_accuracy", "loss/train_eval", "metric/train_accuracy",
    )  # fmt: skip

    def __init__(self, cfg: ClassifierConfig, images: Mapping[str, ImageSet], context: TrainContext) -> None:
        def networks() -> dict[str, nn.Module]:
            train = images["train"]
            return {"network": build_classifier(cfg, train.num_classes, len(train.cluster_names), train)}

        super().__init__(cfg, images, context, networks, evaluated=("network",))
        decay = cfg.weight_decay / (cfg.lr if cfg.decay == "absolute" else 1)
        network = self.networks["network"]
        made = make_optimizer(cfg.optimizer, network, lr=cfg.lr, weight_decay=decay, nesterov=True)
        self.optimizers = {"train": made}
        self.evaluator = Evaluator(cfg, images, self.device, self.env)
        self.detectors = [Detector(self.is_worse_than_guesses, "steps")]

    @classmethod
    def selection_metrics(cls, cfg: ClassifierConfig) -> dict[str, SelectionMetric]:
        """Return the values of validation images, and those of test images, which need best.allow_test_metric."""
        known = {}
        for split, prefix, by_test in (("validation", "validation_", False), ("test", "", True)):
            for name, metric in METRICS.items():
                if metric.better is not None:
                    known[f"metric/{prefix}{name}"] = SelectionMetric(split, metric.better, by_test)
            known[f"loss/{split}"] = SelectionMetric(split, "lower", by_test)
        return known

    @classmethod
    def load_images(cls, cfg: ClassifierConfig) -> dict[str, ImageSet]:
        """Return labelled images with their clusters: to train and to test on, and to validate on if any are.

        Raises:
            UsageError: if they cannot be had, or labels, a second class or images to test on are missing.
        """
        splits = load(cfg.data)
        train, test = splits.train, splits.test
        if train.labels is None:
            raise UsageError(f"data.root: {train.name} has no labels; a classifier needs one sub-folder a class")
        if train.num_classes < 2:
            raise UsageError(f"data.root: a classifier needs at least 2 classes, {train.name} has {train.num_classes}")
        if test is None:
            raise UsageError("data.test_root: expected a folder of labelled images held apart from training, got null")
        if test.labels is None:
            raise UsageError(f"data.test_root: {test.name} has no labels; expected the sub-folders of data.root")
        return cls.with_validation(cfg, dict(with_clusters(splits, cfg.clusters).items()))

    @classmethod
    def default_name(cls, cfg: ClassifierConfig) -> str:
        """Return the name of a run without one: data, the network unless it is the shallow CNN, layer and seed."""
        model = "" if cfg.model.name == "shallow_cnn" else re.sub(r"[^\w.-]+", "-", cfg.model.name) + "-"
        onehot = "-onehot" if cfg.model.onehot_cluster else ""
        return f"{cfg.data.name}-{model}{cfg.norm.kind}{onehot}-seed{cfg.seed}"

    def view(self) -> View:
        """Return what training shows of images."""
        data = self.cfg.data
        return super().view() if data.augment == "none" else PerImage(Augmentation(data.augment, data.size, data.flip))

    def train_step(self, step: Step) -> Metrics:
        """Update the network."""
        return step.optimize("train", self.loss)

    def loss(self, micro: MicroBatch) -> Tensor:
        """Return the cross-entropy of a micro-batch."""
        batch = micro["train"]
        cluster = self.images["train"].clusters_at(batch.index, self.device)
        with drawing(micro.seed, "dropout", self.env.rank, micro.number):
            logits = self.ddp_networks["network"](self.to_input(batch.images), cluster)
        return F.cross_entropy(logits, batch.labels)

    def is_worse_than_guesses(self, means: Mapping[str, float]) -> str | None:
        """Say so when the network does worse than one that knows nothing."""
        constant = math.log(self.images["train"].num_classes)
        if means["loss/train"] <= 2 * constant:
            return None
        return f"the training loss {means['loss/train']:.3g} is more than twice that of equal guesses, {constant:.3g}"

    def recalibrate(self, name: str, network: nn.Module, go_on: Callable[[], None]) -> None:
        """Estimate statistics from training images."""
        recalibrate(self.cfg, network, self.images["train"], self.device, go_on)

    def evaluate(self, networks: Mapping[str, nn.Module], context: EvalContext) -> dict[str, float]:
        """Measure loss and scores on the test images, and the validation images if there are any."""
        values = self.evaluator.scores(networks["network"], context.go_on)
        if self.env.first:
            train = self.images["train"]
            names = {"classes": train.classes, "clusters": train.cluster_names}
            write_text_atomic(context.folder / CATEGORIES, json.dumps(names) + "\n")  # for those without the images
            context.log.charts(CHARTS)
        return values

    def probe(self, networks: Mapping[str, nn.Module], step: int) -> None:
        """Classify one batch of training images, the same all through a run, in training mode."""
        images = self.evaluator.health_images
        with drawing(self.cfg.seed, "probe", step):
            networks["network"](self.to_input(images.images[:]), images.clusters_at(slice(None), self.device))

    def better(self) -> Mapping[str, Better]:
        """Return it of the losses and of each metric, on training images too."""
        of_training: dict[str, Better] = {f"metric/train_{name}": m.better for name, m in METRICS.items() if m.better}
        return {**super().better(), **of_training, "loss/train": "lower", "loss/train_eval": "lower"}

    def eval_protocol(self) -> dict[str, object]:
        """Return what the images are, and what clusters the network is given of them."""
        clusters = {name: images.clusters_hash for name, images in self.images.items() if self.cfg.uses_clusters}
        return super().eval_protocol() | {f"clusters_{name}": value for name, value in clusters.items()}

    def summary_rows(self, lines: list[dict[str, Any]], folder: Path) -> list[tuple[str, str]]:
        """Return the last scores, what the leak audit found, and how to measure more."""
        rows, latest = [], {name: value for line in lines for name, value in line.items()}
        for split, prefix, loss in (("test", "", "test"), ("validation", "validation_", "validation"),
                                    ("train", "train_", "train_eval")):  # fmt: skip
            if (value := latest.get(f"loss/{loss}")) is not None:
                scores = {name: latest[tag] for name in METRICS.names() if (tag := f"metric/{prefix}{name}") in latest}
                rows.append((split, f"loss {value:.4g}, {listed(scores)}"))
        prefix = "audit/accuracy_"
        audited = {tag.removeprefix(prefix): value for tag, value in latest.items() if tag.startswith(prefix)}
        if audited:
            chance = {"chance_given_the_cluster": latest["audit/chance_given_cluster"]}
            rows.append(("clusters", listed({"known": latest["metric/accuracy"], **audited, **chance})))
            if latest["audit/flagged"]:
                rows.append(("LEAK", "test clusters tell of labels: quote the accuracy with clusters unknown, or the "
                             "gain over a baseline that is given them (docs/leak-audit.md)"))  # fmt: skip
        return [
            *rows,
            ("evaluate", f"python -m cbcls.evaluate --run {quote(str(folder))}"),
            ("paper's run", "python -m cbcls.train --config shallow --config cifar10 --config ucb --device cuda"),
        ]
