"""Adapt a classifier from one domain to another by AdaMatch: ``python -m cbda.adamatch``."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from cbda.adaptation.gradients import logits_vary
from cbda.adaptation.losses import Alignment
from cbda.adaptation.objective import Objective, collapse, shares_of_passing
from cbda.config import AdaMatchConfig
from cbda.domains import domain_streams, load_domains
from cbda.evaluation import HEADLINE, Evaluation, better, check_choice, choosable, closing_rows, recalibrate
from cbda.models import build_networks
from common.data import ImageSet, Stream
from common.networks.pixels import pixels_of
from common.runtime.command import run_command
from common.runtime.distributed import Env
from common.train.guard import Update
from common.train.loop import train
from common.train.optim import make_optimizer
from common.train.task import Better, Method, Moment, Tracked


class AdaMatch(Method[AdaMatchConfig]):
    """AdaMatch (Berthelot et al., ICLR 2022), and beside it a network that sees the source alone."""

    application = "cbda"
    command = "adamatch"
    config = AdaMatchConfig
    headline = HEADLINE

    def __init__(
        self, cfg: AdaMatchConfig, images: Mapping[str, ImageSet], device: torch.device, env: Env | None = None
    ) -> None:
        super().__init__(cfg, images, device, env)
        self.averaged = ("adamatch", "source_only") if cfg.source_only else ("adamatch",)

    @classmethod
    def tracked(cls, cfg: AdaMatchConfig) -> dict[str, Tracked]:
        """Return the values that need no label of the target, and the target's accuracy, which an oracle may see."""
        return choosable()

    def better(self) -> Mapping[str, Better]:
        """Return it of scores in both domains and of the source's losses; pseudo-labels change what the target's is."""
        return better()

    @classmethod
    def load(cls, cfg: AdaMatchConfig) -> dict[str, ImageSet]:
        """Return both domains' images, see `load_domains`, and of the source those to validate on if any are."""
        images = cls.with_validation(cfg, load_domains(cfg))
        check_choice(cls.choice(cfg), images)
        return images

    def default_name(self) -> str:
        """Return what a run without a name is called."""
        cfg = self.cfg
        return f"{cfg.source.name}-{cfg.target.name}-{cfg.norm.kind}-seed{cfg.seed}"

    def streams(self) -> dict[str, Stream]:
        """Return source, target and, if there are any, labelled target images, each seen weakly and strongly."""
        return domain_streams(self.cfg, self.images, self.env.world)

    def build(self) -> dict[str, nn.Module]:
        """Make the classifier, what alignment remembers, and the classifier of the source alone."""
        return build_networks(self.cfg, self.images["train"].num_classes)

    def optimize(self, networks: Mapping[str, nn.Module]) -> dict[str, Optimizer]:
        """Make Adam or SGD for each classifier."""
        cfg = self.cfg
        return {
            name: make_optimizer(cfg.optimizer, networks[name], lr=cfg.lr, weight_decay=cfg.weight_decay, eps=1e-7)
            for name in self.averaged
        }

    def step(self, update: Update) -> None:
        """Update the classifier by AdaMatch's loss, and the other one by the source's."""
        objective = Objective(self, update.progress)
        update.descend("adamatch", objective.adamatch)
        objective.show(update)
        if self.cfg.source_only:
            update.descend("source_only", objective.source_only)

    def health(self, step: int) -> tuple[dict[str, float], list[str]]:
        """Return the layers' health and, if asked for, the variance of the gradients of all logits by domain."""
        values, warnings = super().health(step)
        if self.cfg.logits_variance:
            network = self.networks["adamatch"]
            values |= logits_vary(self.evaluation.training_logits(network, step), network)
        return values, warnings

    def shown(self, means: Mapping[str, float]) -> Mapping[str, float]:
        """Return shares of the pseudo-labels that passed; where none did, none."""
        return shares_of_passing(means)

    def to_input(self, images: Tensor) -> Tensor:
        """Bring uint8 images (N, 3, S, S) to the device, in the range of ``model.pixels``."""
        return pixels_of(super().to_input(images), self.cfg.model.pixels)

    def prepare(self, should_stop: Callable[[], bool]) -> None:
        """Choose what is measured."""
        self.evaluation = Evaluation(self.cfg, self.images, self.device, self.to_input, self.env)

    def recalibrate(self, name: str, network: nn.Module, go_on: Callable[[], None]) -> None:
        """Estimate statistics from training images of both domains, or of the one that the network sees."""
        alone = name == "source_only"
        recalibrate(self.cfg, network, self.images, self.device, source_only=alone, go_on=go_on)

    def evaluate(self, networks: Mapping[str, nn.Module], moment: Moment) -> dict[str, float]:
        """Measure both classifiers in both domains."""
        return self.evaluation.values(networks, moment)

    def probe(self, networks: Mapping[str, nn.Module], step: int) -> None:
        """Classify a batch of each domain's training images, the same all through a run, in training mode."""
        _, parts, clusters = zip(*self.evaluation.same_images(), strict=True)
        ids = [cluster for cluster, images in zip(clusters, parts, strict=True) for _ in images]
        networks["adamatch"](self.to_input(torch.cat(parts)), torch.tensor(ids, device=self.device))

    def collapse(self, means: Mapping[str, float]) -> str | None:
        """Say so when the source is lost, all pseudo-labels pass a falling threshold, or they are of one class."""
        alignment = self.networks["alignment"]
        assert isinstance(alignment, Alignment)
        classes, batch_size = self.images["train"].num_classes, self.cfg.batch_size * self.env.world
        return collapse(self.cfg.method, alignment.watch, means, classes, batch_size)

    def closing(self, lines: list[dict[str, Any]], folder: Path) -> list[tuple[str, str]]:
        """Return the last accuracies of both networks, by the cluster that was named."""
        return closing_rows(lines, folder, source_only=self.cfg.source_only)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command."""
    train(AdaMatch, argv)


if __name__ == "__main__":
    run_command(main)
