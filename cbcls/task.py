"""Train a classifier and measure it: ``python -m cbcls.train``."""

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from shlex import quote
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer

from cbcls.config import ClassifierConfig
from cbcls.evaluation import CHARTS, HEADLINE, Evaluation, check_labels, choosable, closing_rows, recalibrate
from cbcls.models import build_classifier
from common.data import ImageSet, PerImage, View, load
from common.data.augmentation import Augmentation
from common.data.clusters import with_clusters
from common.metrics.scores import METRICS
from common.runtime.command import run_command
from common.runtime.seeding import drawing
from common.train.guard import Part, Update
from common.train.loop import train
from common.train.optim import make_optimizer
from common.train.task import Better, Method, Moment, Tracked


class Classification(Method[ClassifierConfig]):
    """Cross-entropy on labelled images."""

    application = "cbcls"
    config = ClassifierConfig
    headline = HEADLINE
    averaged = ("network",)

    @classmethod
    def tracked(cls, cfg: ClassifierConfig) -> dict[str, Tracked]:
        """Return the values of validation images, and those of test images, which only an oracle may choose by."""
        return choosable()

    def better(self) -> Mapping[str, Better]:
        """Return it of the losses and of each metric, on training images too."""
        of_training: dict[str, Better] = {f"metric/train_{name}": m.better for name, m in METRICS.items() if m.better}
        return {**super().better(), **of_training, "loss/train": "lower", "loss/train_seen": "lower"}

    @classmethod
    def load(cls, cfg: ClassifierConfig) -> dict[str, ImageSet]:
        """Return labelled images with their clusters: to train and to test on, and to validate on if any are."""
        splits = load(cfg.data)
        check_labels(dict(splits.items()))
        return cls.with_validation(cfg, dict(with_clusters(splits, cfg.clusters).items()))

    def default_name(self) -> str:
        """Return what a run without a name is called."""
        told = "-told" if self.cfg.model.cluster_input else ""
        return f"{self.cfg.data.name}-{self.cfg.model.prefix}{self.cfg.norm.kind}{told}-seed{self.cfg.seed}"

    def view(self) -> View:
        """Return what training shows of images."""
        data = self.cfg.data
        return super().view() if data.augment == "none" else PerImage(Augmentation(data.augment, data.size, data.flip))

    def build(self) -> dict[str, nn.Module]:
        """Make the classifier."""
        images = self.images["train"]
        return {"network": build_classifier(self.cfg, images.num_classes, len(images.cluster_names), images)}

    def optimize(self, networks: Mapping[str, nn.Module]) -> dict[str, Optimizer]:
        """Make AdamW, Adam or SGD."""
        cfg = self.cfg
        decay = cfg.weight_decay / (cfg.lr if cfg.decay == "absolute" else 1)
        made = make_optimizer(cfg.optimizer, networks["network"], lr=cfg.lr, weight_decay=decay, nesterov=True)
        return {"train": made}

    def step(self, update: Update) -> None:
        """Update the network."""

        def loss(part: Part) -> Tensor:
            batch = part["train"]
            cluster = self.images["train"].clusters_at(batch.index, self.device)
            with drawing(part.seed, "dropout", self.env.rank, part.number):
                logits = self.wrapped["network"](self.to_input(batch.images), cluster)
            return F.cross_entropy(logits, batch.labels)

        update.descend("train", loss)

    def prepare(self, should_stop: Callable[[], bool]) -> None:
        """Choose the images that the layers' health is measured on."""
        self.evaluation = Evaluation(self.cfg, self.images, self.device, self.env)

    def recalibrate(self, name: str, network: nn.Module, go_on: Callable[[], None]) -> None:
        """Estimate statistics from training images."""
        recalibrate(self.cfg, network, self.images["train"], self.device, go_on)

    def evaluate(self, networks: Mapping[str, nn.Module], moment: Moment) -> dict[str, float]:
        """Measure loss and scores on the test images, and the validation images if there are any."""
        values = self.evaluation.scores(networks["network"], moment.go_on)
        if self.env.first:
            self.evaluation.write_categories(moment.folder)
            moment.log.charts(CHARTS)
        return values

    def probe(self, networks: Mapping[str, nn.Module], step: int) -> None:
        """Classify one batch of training images, the same all through a run, in training mode."""
        images = self.evaluation.health_images
        with drawing(self.cfg.seed, "probe", step):
            networks["network"](self.to_input(images.images[:]), images.clusters_at(slice(None), self.device))

    def passport(self) -> dict[str, object]:
        """Return what the images are, and what clusters the network is told of them."""
        clusters = {name: images.clusters_hash for name, images in self.images.items() if self.cfg.told_clusters}
        return super().passport() | {f"clusters_{name}": value for name, value in clusters.items()}

    def collapse(self, means: Mapping[str, float]) -> str | None:
        """Say so when the network does worse than one that knows nothing."""
        constant = math.log(self.images["train"].num_classes)
        if means["loss/train"] <= 2 * constant:
            return None
        return f"the training loss {means['loss/train']:.3g} is more than twice that of equal guesses, {constant:.3g}"

    def closing(self, lines: list[dict[str, Any]], folder: Path) -> list[tuple[str, str]]:
        """Return the last scores, what the leak audit found, and how to measure more."""
        rows = closing_rows({name: value for line in lines for name, value in line.items()})
        return [
            *rows,
            ("evaluate", f"python -m cbcls.evaluate --run {quote(str(folder))}"),
            ("paper's run", "python -m cbcls.train --config shallow --config cifar10 --config ucb --device cuda"),
        ]


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command."""
    train(Classification, argv)


if __name__ == "__main__":
    run_command(main)
