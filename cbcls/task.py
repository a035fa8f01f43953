"""The classifier that is trained: its loss, how it is evaluated, and how it may collapse."""

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from shlex import quote
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from cbcls.config import ClassifierConfig
from cbcls.evaluation import CHARTS, HEADLINE, Evaluator, check_labels, recalibrate, selection_metrics, summary_rows
from cbcls.models import build_classifier
from common.data import ImageSet, PerImage, View, load
from common.data.augmentation import Augmentation
from common.data.clusters import with_clusters
from common.metrics.scores import METRICS
from common.runtime.seeding import drawing
from common.train.optim import make_optimizer
from common.train.step import Metrics, MicroBatch, Step
from common.train.task import Better, Detector, EvalContext, SelectionMetric, Task, TrainContext


class ClassifierTask(Task[ClassifierConfig]):
    """Cross-entropy on labelled images."""

    application = "cbcls"
    config = ClassifierConfig
    headline = HEADLINE

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
        return selection_metrics()

    @classmethod
    def load_images(cls, cfg: ClassifierConfig) -> dict[str, ImageSet]:
        """Return labelled images with their clusters: to train and to test on, and to validate on if any are."""
        splits = load(cfg.data)
        check_labels(dict(splits.items()))
        return cls.with_validation(cfg, dict(with_clusters(splits, cfg.clusters).items()))

    @classmethod
    def default_name(cls, cfg: ClassifierConfig) -> str:
        """Return what a run without a name is called."""
        onehot = "-onehot" if cfg.model.onehot_cluster else ""
        return f"{cfg.data.name}-{cfg.model.prefix}{cfg.norm.kind}{onehot}-seed{cfg.seed}"

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
            self.evaluator.write_categories(context.folder)
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
        clusters = {name: images.clusters_hash for name, images in self.images.items() if self.cfg.told_clusters}
        return super().eval_protocol() | {f"clusters_{name}": value for name, value in clusters.items()}

    def summary_rows(self, lines: list[dict[str, Any]], folder: Path) -> list[tuple[str, str]]:
        """Return the last scores, what the leak audit found, and how to measure more."""
        rows = summary_rows({name: value for line in lines for name, value in line.items()})
        return [
            *rows,
            ("evaluate", f"python -m cbcls.evaluate --run {quote(str(folder))}"),
            ("paper's run", "python -m cbcls.train --config shallow --config cifar10 --config ucb --device cuda"),
        ]
