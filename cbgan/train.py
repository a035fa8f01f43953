"""Train a DCGAN and measure it: ``python -m cbgan.train``."""

from common.cli.command import start

if __name__ == "__main__":
    start("cbgan.train")  # before torch is loaded, since it settles how threads wait; does not return

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from cbgan.config import GanConfig
from cbgan.evaluation import Evaluation
from cbgan.losses import discriminator_loss, generator_loss
from cbgan.models import Discriminator, Generator
from cbgan.noise import noise
from common.metrics.fid import other_split
from common.training.loop import train
from common.training.method import Method, Moment, Tracked
from common.training.optimisation import parameter_groups
from common.training.update import Part, Update, frozen

_LEAST_LOSS = 1e-3
"""A discriminator whose loss is below it tells every image apart, and the generator learns nothing more."""


class Gan(Method[GanConfig]):
    """The non-saturating GAN: a step updates the discriminator, then the generator, on one batch."""

    application = "cbgan"
    config = GanConfig
    averaged = ("g",)

    @classmethod
    def tracked(cls, cfg: GanConfig) -> dict[str, Tracked]:
        """Return the FID against the reference images, then that against the others."""
        other, tag = other_split(cfg.fid.reference), f"metric/fid_{cfg.fid.extractor}"
        return {tag: Tracked(cfg.fid.reference, "lower"), f"{tag}_{other}": Tracked(other, "lower")}

    def build(self) -> dict[str, nn.Module]:
        """Make generator and discriminator."""
        cfg = self.cfg
        g = Generator(cfg.width, cfg.latent_dim, cfg.norm, cfg.data.size, cfg.base_size, cfg.seed)
        return {"g": g, "d": Discriminator(cfg.width, cfg.data.size)}

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
        """Update the discriminator, then the generator; each sees images of its own noise."""
        g, d = self.networks["g"], self.networks["d"]

        def loss_d(part: Part) -> Tensor:
            real = self.to_input(part["train"].images)
            with torch.no_grad():  # this half does not train the generator
                fake = g(self._noise(part)[0])
            return discriminator_loss(self.wrapped["d"](real), self.wrapped["d"](fake))

        def loss_g(part: Part) -> Tensor:
            return generator_loss(d(self.wrapped["g"](self._noise(part)[1])))

        update.descend("d", loss_d)
        with frozen(d):  # and unwrapped: none of its gradients are computed, or averaged over ranks
            update.descend("g", loss_g)

    def _noise(self, part: Part) -> tuple[Tensor, Tensor]:
        """Draw the generator's inputs of a part, for the discriminator's update and for its own."""
        rows = 2 * len(part["train"].images)
        return noise(self.cfg, part.number, rows, self.device, self.env.rank, part.seed).chunk(2)  # pyright: ignore[reportReturnType]

    def prepare(self, should_stop: Callable[[], bool]) -> None:
        """Measure the real images."""
        self.evaluation = Evaluation(self.cfg, self.images, self.device, should_stop, self.env)

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
        """Measure every ``fid.every`` epochs, the untrained generator and at the end; without FID, only draw."""
        every = self.cfg.fid.every or self.cfg.checkpoint_every
        return (epoch % every == 0 or epoch == self.cfg.epochs) and bool(epoch or self.cfg.fid.every)

    def evaluate(self, networks: Mapping[str, nn.Module], moment: Moment) -> dict[str, float]:
        """Measure the generator and draw a grid of what it makes."""
        g = networks["g"]
        assert isinstance(g, Generator)
        return self.evaluation.run(g, moment)

    def probe(self, networks: Mapping[str, nn.Module], step: int) -> None:
        """Generate a batch in training mode."""
        networks["g"](noise(self.cfg, step, self.cfg.batch_size, self.device, self.env.rank))

    def collapse(self, means: Mapping[str, float]) -> str | None:
        """Say so when the discriminator has won."""
        if means["loss/d"] >= _LEAST_LOSS:
            return None
        return f"the discriminator's loss is {means['loss/d']:.2g}, less than {_LEAST_LOSS:g}: it has won"

    def closing(self, lines: list[dict[str, Any]], folder: Path) -> list[tuple[str, str]]:
        """Return FID, classes found, and what to do next."""
        return self.evaluation.closing(lines, folder)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command."""
    train(Gan, argv)
