"""What is measured of a generator while it trains: FID, classes found, pictures, health of the layers."""

import math
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor
from torchvision.utils import make_grid, save_image

from cbgan.config import GanConfig
from cbgan.models import Generator
from cbgan.state import noise
from common.data.image_set import Splits, to_uint8
from common.machine.device import autocast
from common.machine.dist import Env
from common.machine.seeding import generator
from common.metrics.fid import Fid, FidResult
from common.norms import collect_health, log_scalars, mixture_layers
from common.runs.log import Log

GRID = 64
"""Images in a grid, eight a row."""
SEED = 314159
"""The noise that generators are measured on is the same for every run, whatever its seed."""


class Evaluation:
    """Measures a generator every ``fid.every`` epochs, before training and at the end.

    Args:
        cfg: the run's configuration; with ``fid.every`` 0 nothing but pictures and health is made.
        splits: the run's real images.
        device: where the generator is.
        should_stop: asked between batches; it answers alike on all ranks.
        env: this process among those of the run; they share each measurement.

    Raises:
        UsageError: if the feature extractor cannot be had.
        Interrupted: if ``should_stop`` says so while the real images are measured.
    """

    def __init__(
        self,
        cfg: GanConfig,
        splits: Splits,
        device: torch.device,
        should_stop: Callable[[], bool] | None = None,
        env: Env | None = None,
    ) -> None:
        self.cfg, self.device = cfg, device
        self.should_stop, self.env = should_stop, env or Env()
        self.fid = Fid(cfg.fid, splits, cfg.cache, device, should_stop, self.env) if cfg.fid.every else None
        self.latest: FidResult | None = None
        if self.env.first and self.fid is not None and self.fid.warning is not None:
            print(f"warning: {self.fid.warning}", file=sys.stderr)
        self.warnings: list[str] = []
        self._told: set[str] = set()

    def due(self, epoch: int) -> bool:
        """Say whether the generator is measured after this many epochs."""
        every = self.cfg.fid.every
        return bool(every) and (epoch % every == 0 or epoch == self.cfg.epochs)

    def count(self, epoch: int) -> int:
        """Return how many images the measurement after this many epochs generates."""
        final = self.cfg.fid.final_samples
        return final if final is not None and epoch == self.cfg.epochs else self.cfg.fid.samples

    def passport(self) -> Mapping[str, object]:
        """Return what a FID of this run is comparable by."""
        return {} if self.fid is None else self.fid.passport()

    def chart(self, log: Log) -> None:
        """Put the FID and its floor into one chart (TensorBoard's Custom Scalars page)."""
        if self.fid is not None:
            tags = [self.fid.tag] if self.fid.floor is None else [self.fid.tag, self.fid.floor_tag]
            log.chart("FID", tags)

    def measure(self, g: Generator, count: int) -> FidResult:
        """Measure FID (and classes, where the extractor knows them) on ``count`` images in evaluation mode.

        Raises:
            Interrupted: if ``should_stop`` says so on the way.
        """
        assert self.fid is not None
        z = fixed_noise(count, g.latent_dim, self.device)
        training = g.training
        try:
            with self.env.buffers_of_first(g):  # running averages differ between ranks
                return self.fid.measure(lambda start, n: self.sample(g, z[start : start + n]), count, self.should_stop)
        finally:
            g.train(training)

    @torch.no_grad()
    def sample(self, g: Generator, z: Tensor) -> Tensor:
        """Generate uint8 images (N, 3, S, S) in evaluation mode from noise (N, latent_dim)."""
        g.eval()
        with autocast(self.device, self.cfg.precision):
            images = g(z)
        return to_uint8(images)

    def run(self, g: Generator, epoch: int, step: int, log: Log, folder: Path) -> float:
        """Measure, log and draw; return the FID.

        Raises:
            Interrupted: if ``should_stop`` says so on the way; nothing is logged then.
        """
        assert self.fid is not None
        count = self.count(epoch)
        self.latest = result = self.measure(g, count)
        values = {self.fid.tag: result.fid}
        if self.fid.floor is not None:
            values[self.fid.floor_tag] = self.fid.floor
        if result.classes is not None:
            values["metric/classes_found"] = float(sum(n > 0 for n in result.classes))
        log.scalars(step, epoch, values)
        if self.env.first:
            self.draw(g, epoch, step, log, folder)
        return result.fid

    def draw(self, g: Generator, epoch: int, step: int, log: Log, folder: Path) -> None:
        """Write a grid of generated images, from the same noise every time, as PNG and to TensorBoard."""
        training = g.training
        images = self.sample(g, fixed_noise(GRID, g.latent_dim, self.device))
        g.train(training)
        log.image(step, "samples/generated", save_grid(images, folder / f"epoch-{epoch:04d}.png"))

    def health(self, g: Generator, epoch: int, step: int, log: Log) -> dict[str, float]:
        """Measure and log the health of the generator's mixture layers on a fresh training-mode batch."""
        if not mixture_layers(g):
            return {}
        with collect_health(g) as found, torch.no_grad(), autocast(self.device, self.cfg.precision):
            g(noise(self.cfg, step, self.cfg.batch_size, self.device, self.env.rank))
        values = log_scalars(found)
        log.scalars(step, epoch, values)
        self.warnings = [f"{name}: {line}" for name, state in found.items() for line in state.warnings()]
        return values

    def new_warnings(self) -> list[str]:
        """Return what is wrong with a layer that had no warning so far: once a layer, not once an epoch."""
        new = [line for line in self.warnings if line.split(":")[0] not in self._told]
        self._told.update(line.split(":")[0] for line in new)
        return new


def fixed_noise(count: int, latent_dim: int, device: torch.device) -> Tensor:
    """Return the noise that generators are measured on, N(0, 1), (count, latent_dim): the same on every device."""
    return torch.randn(count, latent_dim, generator=generator(SEED, "evaluation")).to(device)


def save_grid(images: Tensor, path: Path) -> Tensor:
    """Write uint8 images (N, 3, S, S) as a near-square grid and return it, uint8 (3, H, W)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    grid = make_grid(images.cpu(), nrow=math.ceil(math.sqrt(len(images))), padding=1)
    save_image(grid.float() / 255, path)
    return grid
