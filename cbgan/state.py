"""Everything that a checkpoint of a GAN run holds."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cbgan.config import GanConfig
from cbgan.models import Discriminator, Generator
from common import checkpoint
from common.device import memory_format
from common.errors import UsageError
from common.log import Means
from common.optim import parameter_groups
from common.seeding import derive, generator


class GanState:
    """Networks, optimizers, gradient scalers, running means of the log, and the position.

    The position ``at`` counts finished epochs, batches of the epoch under way, steps in all, and the last epoch
    that was evaluated (-1: none), with the lowest FID so far.
    """

    def __init__(self, cfg: GanConfig, device: torch.device) -> None:
        with torch.random.fork_rng(devices=[]):  # weights are drawn on the CPU, the same for every device
            torch.manual_seed(derive(cfg.seed, "weights"))
            self.g = Generator(cfg.width, cfg.latent_dim, cfg.norm, cfg.data.size, cfg.base_size, cfg.seed)
            self.d = Discriminator(cfg.width, cfg.data.size)
        for network in (self.g, self.d):
            network.to(device)
            network.to(memory_format=memory_format(cfg.channels_last))  # pyright: ignore[reportCallIssue]
        self.opt_g, self.opt_d = (
            torch.optim.Adam(
                parameter_groups(network, cfg.weight_decay),
                lr=cfg.lr,
                betas=(cfg.beta1, cfg.beta2),
                fused=True,
            )
            for network in (self.g, self.d)
        )
        fp16 = cfg.precision == "fp16"
        self.scaler_g, self.scaler_d = (torch.amp.GradScaler(device.type, enabled=fp16) for _ in range(2))
        self.means = Means()
        self.at: dict[str, Any] = {"epoch": 0, "batch": 0, "step": 0, "evaluated": -1, "best_fid": None}

    def _parts(self) -> dict[str, Any]:
        names = ("g", "d", "opt_g", "opt_d", "scaler_g", "scaler_d", "means")
        return {name: getattr(self, name) for name in names}

    def state_dict(self) -> dict[str, Any]:
        """Return state dicts and plain values only."""
        return {"at": dict(self.at)} | {name: part.state_dict() for name, part in self._parts().items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over a checkpoint's state."""
        self.at = dict(state["at"])
        for name, part in self._parts().items():
            part.load_state_dict(state[name])

    def load_weights(self, path: Path) -> None:
        """Take over the weights and buffers of another run's networks.

        Raises:
            UsageError: if the file is not a checkpoint, or its networks have other shapes.
        """
        try:
            state = checkpoint.load(path)
            self.g.load_state_dict(state["g"])
            self.d.load_state_dict(state["d"])
        except checkpoint.DamagedCheckpoint as error:
            raise UsageError(f"init_from: {error}") from None
        except (KeyError, RuntimeError) as error:
            reason = " ".join(str(error).split())[:200]
            raise UsageError(f"init_from: {path} does not fit this configuration ({reason})") from None


def noise(cfg: GanConfig, step: int, rows: int, device: torch.device, rank: int = 0) -> Tensor:
    """Draw the generator's input of one step from (seed, rank, step): N(0, 1), (rows, latent_dim)."""
    source = generator(cfg.seed, "noise", rank, step, device=device)
    return torch.randn(rows, cfg.latent_dim, generator=source, device=device)
