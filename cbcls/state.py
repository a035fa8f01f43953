"""Everything that a checkpoint of a classification run holds."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from cbcls.config import ClassifierConfig
from cbcls.shallow_cnn import ShallowCNN
from common.errors import UsageError
from common.machine.device import memory_format
from common.machine.seeding import derive
from common.runs import checkpoint
from common.runs.log import Means
from common.training.optimisation import parameter_groups


class ClassifierState:
    """Network, optimizer, gradient scaler, running means of the log, and the position.

    The position ``at`` counts finished epochs, batches of the epoch under way, steps in all, and the last epoch that
    was evaluated.
    """

    def __init__(self, cfg: ClassifierConfig, num_classes: int, device: torch.device) -> None:
        with torch.random.fork_rng(devices=[]):  # weights are drawn on the CPU, the same for every device
            torch.manual_seed(derive(cfg.seed, "weights"))
            self.network = ShallowCNN(num_classes, cfg.norm, cfg.seed)
        self.network.to(device)
        self.network.to(memory_format=memory_format(cfg.channels_last))  # pyright: ignore[reportCallIssue]
        self.optimizer = torch.optim.AdamW(parameter_groups(self.network, cfg.weight_decay), lr=cfg.lr, fused=True)
        self.scaler = torch.amp.GradScaler(device.type, enabled=cfg.precision == "fp16")
        self.means = Means()
        self.at = {"epoch": 0, "batch": 0, "step": 0, "evaluated": 0}

    def _parts(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in ("network", "optimizer", "scaler", "means")}

    def state_dict(self) -> dict[str, Any]:
        """Return state dicts and plain values only."""
        return {"at": dict(self.at)} | {name: part.state_dict() for name, part in self._parts().items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over a checkpoint's state."""
        self.at = dict(state["at"])
        for name, part in self._parts().items():
            part.load_state_dict(state[name])

    def load_weights(self, path: Path) -> None:
        """Take over the weights and buffers of another run's network.

        Raises:
            UsageError: if the file is not a checkpoint, or its network has other shapes.
        """
        try:
            self.network.load_state_dict(checkpoint.load(path)["network"])
        except checkpoint.DamagedCheckpoint as error:
            raise UsageError(f"init_from: {error}") from None
        except (KeyError, RuntimeError) as error:
            reason = " ".join(str(error).split())[:200]
            raise UsageError(f"init_from: {path} does not fit this configuration ({reason})") from None
