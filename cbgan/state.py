"""Everything that a checkpoint of a GAN run holds."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cbgan.config import GanConfig
from cbgan.models import Discriminator, Generator
from common.errors import UsageError
from common.machine.device import memory_format
from common.machine.dist import Env
from common.machine.seeding import derive, generator
from common.runs import checkpoint
from common.runs.log import Means
from common.training.optimisation import parameter_groups


class GanState:
    """Networks, optimizers, gradient scalers, running means of the log, and the position.

    With several processes the networks' buffers (running averages) and the log's means differ between ranks; a
    checkpoint holds those of each.

    Args:
        cfg: the run's configuration.
        device: this process's device.
        env: this process among those of the run.

    The position ``at`` counts finished epochs, batches of the epoch under way, steps in all, and the last epoch
    that was evaluated (-1: none), with the lowest FID so far.
    """

    def __init__(self, cfg: GanConfig, device: torch.device, env: Env | None = None) -> None:
        env = env or Env()
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
        self.env = env
        self.g_ddp, self.d_ddp = env.wrap(self.g), env.wrap(self.d)
        self.at: dict[str, Any] = {"epoch": 0, "batch": 0, "step": 0, "evaluated": -1, "best_fid": None}

    def _parts(self) -> dict[str, Any]:
        names = ("g", "d", "opt_g", "opt_d", "scaler_g", "scaler_d", "means")
        return {name: getattr(self, name) for name in names}

    def state_dict(self) -> dict[str, Any]:
        """Return state dicts and plain values only; every rank has to call it."""
        state = {"at": dict(self.at)} | {name: part.state_dict() for name, part in self._parts().items()}
        if self.env.world > 1:
            own = {name: _on_cpu(dict(network.named_buffers())) for name, network in self._networks().items()}
            state["ranks"] = self.env.gather(own | {"means": _on_cpu(self.means.state_dict())})
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over a checkpoint's state, and of what differs between ranks this one's share."""
        self.at = dict(state["at"])
        for name, part in self._parts().items():
            part.load_state_dict(state[name])
        if self.env.world > 1:
            own = state["ranks"][self.env.rank]
            for name, network in self._networks().items():
                network.load_state_dict(own[name], strict=False)  # buffers only
            self.means.load_state_dict(own["means"])

    def _networks(self) -> dict[str, torch.nn.Module]:
        return {"g": self.g, "d": self.d}

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


def _on_cpu(values: Any) -> Any:
    """Copy the tensors of nested dictionaries to the CPU, so that any rank can read them."""
    if isinstance(values, Tensor):
        return values.detach().cpu().clone()
    return {name: _on_cpu(value) for name, value in values.items()} if isinstance(values, dict) else values


def noise(cfg: GanConfig, step: int, rows: int, device: torch.device, rank: int = 0) -> Tensor:
    """Draw the generator's input of one step from (seed, rank, step): N(0, 1), (rows, latent_dim)."""
    source = generator(cfg.seed, "noise", rank, step, device=device)
    return torch.randn(rows, cfg.latent_dim, generator=source, device=device)
