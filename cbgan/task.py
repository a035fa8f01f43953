"""Train a DCGAN and measure it: ``python -m cbgan.train``."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from cbgan.config import GanConfig
from cbgan.evaluation import Evaluation, recalibrate
from cbgan.networks.dcgan import Discriminator, Generator
from cbgan.noise import noise
from cbgan.objective import STALLED, Objective, collapse_of_losses, collapse_of_values, gradient_variances
from common.data import ImageSet
from common.metrics.fid import other_split
from common.norms import preserved_statistics
from common.runtime.command import run_command
from common.runtime.errors import UsageError
from common.train.guard import Update, frozen
from common.train.loop import train
from common.train.optim import parameter_groups
from common.train.task import Better, Method, Moment, Tracked


class Gan(Method[GanConfig]):
    """A GAN: a step updates the discriminator, then the generator, on one batch of real images.

    chainer-gan-lib, which the recipe follows otherwise, updates the generator first, on the same generated images.
    """

    application = "cbgan"
    config = GanConfig
    averaged = ("g",)

    @classmethod
    def tracked(cls, cfg: GanConfig) -> dict[str, Tracked]:
        """Return the FID against the reference images, then that against the others."""
        other, tag = other_split(cfg.fid.reference), f"metric/fid_{cfg.fid.extractor}"
        return {tag: Tracked(cfg.fid.reference, "lower"), f"{tag}_{other}": Tracked(other, "lower")}

    @classmethod
    def load(cls, cfg: GanConfig) -> dict[str, ImageSet]:
        """Return the images; a conditional GAN's have labels, of as many classes as its layers have clusters."""
        images = super().load(cfg)
        if cfg.conditional and (found := images["train"].num_classes) != cfg.norm.num_components:
            what = f"{cfg.data.name} has {found} classes" if found else f"the images of {cfg.data.name} have no labels"
            hint = f"--norm.num_components {found}" if found else "a norm.kind without clusters, such as ucb"
            raise UsageError(
                f"norm.num_components: {cfg.norm.kind} takes the classes as clusters, and {what}; expected {hint}, got "
                f"{cfg.norm.num_components}"
            )
        return images

    def build(self) -> dict[str, nn.Module]:
        """Make generator and discriminator."""
        cfg = self.cfg
        g = Generator(cfg.width, cfg.latent_dim, cfg.norm, cfg.data.size, cfg.base_size, cfg.seed)
        return {"g": g, "d": Discriminator(cfg.width, cfg.data.size, g.num_classes, spectral=cfg.spectral)}

    def optimize(self, networks: Mapping[str, nn.Module]) -> dict[str, Optimizer]:
        """Make Adam for each."""
        cfg = self.cfg
        return {
            name: torch.optim.Adam(
                parameter_groups(network, cfg.weight_decay), lr=cfg.lr, betas=(cfg.beta1, cfg.beta2), fused=True
            )
            for name, network in networks.items()
        }

    def step(self, update: Update) -> None:
        """Update the discriminator, then the generator."""
        objective = Objective(self)
        update.descend("d", objective.discriminator)
        with frozen(self.networks["d"]):  # and unwrapped: none of its gradients are computed, or averaged over ranks
            update.descend("g", objective.generator)
        update.values |= objective.shown()
        if (update.parts[-1].number + 1) % (self.cfg.log_every * self.cfg.accumulate) == 0:
            update.values |= gradient_variances(self.networks)

    def prepare(self, should_stop: Callable[[], bool]) -> None:
        """Measure the real images."""
        self.evaluation = Evaluation(self.cfg, self.images, self.device, should_stop, self.env)

    def better(self) -> Mapping[str, Better]:
        """Return it of what is measured; the losses of a game have no best, nor has diversity, of which 1 is real."""
        return self.evaluation.better()

    def passport(self) -> dict[str, object]:
        """Return what a FID of this run is comparable by."""
        return {**super().passport(), **self.evaluation.passport()}

    def accept(self, passport: Mapping[str, object]) -> None:
        """Take a classifier trained anew, on another machine, for the one the run has been measured by."""
        known = dict(passport)
        if self.cfg.fid.extractor == "classifier":
            self.evaluation.note_extractor(known.pop("extractor_id", None))
        super().accept(known)

    def due(self, epoch: int) -> bool:
        """Measure every ``evaluate_every`` epochs, the untrained generator and at the end; without FID, only draw."""
        every = self.cfg.evaluate_every or self.cfg.checkpoint_every
        return (epoch % every == 0 or epoch == self.cfg.epochs) and bool(epoch or self.cfg.evaluate_every)

    def recalibrate(self, name: str, network: nn.Module, go_on: Callable[[], None]) -> None:
        """Estimate the generator's statistics from samples."""
        recalibrate(self.cfg, network, self.evaluation.class_counts(), self.device, go_on)

    def evaluate(self, networks: Mapping[str, nn.Module], moment: Moment) -> dict[str, float]:
        """Measure the generator, as trained too where its average is what is measured, and draw what it makes."""
        g, raw = networks["g"], self.networks["g"]
        assert isinstance(g, Generator)
        assert isinstance(raw, Generator)
        if raw is g:
            return self.evaluation.run(g, moment)
        with preserved_statistics(raw):
            self.recalibrate("g", raw, moment.go_on)
            return self.evaluation.run(g, moment, raw)

    def told(self, values: Mapping[str, float]) -> list[str]:
        """Return the FID in short, or how images differ where it is not measured."""
        return self.evaluation.told(values) or super().told(values)

    def probe(self, networks: Mapping[str, nn.Module], step: int) -> None:
        """Generate a batch in training mode."""
        z = noise(self.cfg, step, self.cfg.batch_size, self.device, self.env.rank)
        networks["g"](z, self.evaluation.labels(len(z)))

    def collapse(self, means: Mapping[str, float]) -> str | None:
        """Say so when the discriminator has won."""
        return collapse_of_losses(means)

    def collapse_measured(self, values: Mapping[str, float]) -> str | None:
        """Say so when the game has stalled, samples have become alike, or a layer's component is dead."""
        return collapse_of_values(values, self.evaluation.most)

    def remedy(self, cause: str) -> str:
        """Return what helps a discriminator that learns nothing, or one that has won."""
        if cause.startswith(STALLED):
            return "--loss logistic --spectral false --lr 2e-4 (docs/gan.md)"
        return "--guard.action rewind, --r1 10, --spectral true or a lower --lr (docs/gan.md)"

    def closing(self, lines: list[dict[str, Any]], folder: Path) -> list[tuple[str, str]]:
        """Return FID, classes found, and what to do next."""
        return self.evaluation.closing(lines, folder)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command."""
    train(Gan, argv)


if __name__ == "__main__":
    run_command(main)
