"""Everything that a checkpoint of a run holds: networks, optimizers, averages of weights, and the position."""

import copy
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from common.runtime.device import memory_format
from common.runtime.distributed import Env
from common.runtime.errors import UsageError
from common.runtime.seeding import derive
from common.train import checkpoint
from common.train.config import RunConfig
from common.train.logging import Means


class Parts:
    """What training changes, on the device.

    With several processes the networks' buffers (running averages) and the log's means differ between ranks; a
    checkpoint holds those of each.

    Args:
        cfg: the run's configuration.
        device: this process's device.
        env: this process among those of the run.
        build: makes the networks, on the CPU.
        optimize: makes their optimizers, one for each loss.
        averaged: names of the networks to keep an average of, where ``cfg.ema`` asks for it.

    Attributes:
        means: of what steps note, since the last log line.
        epoch_means: of what some steps note for their epoch, since its start.
        averages: copies of networks that hold exponential moving averages of their weights and buffers.
        statistics: the buffers, by network, by which these weights were measured; none before they are.
        at: the position: finished ``epoch`` s, ``batch`` of the epoch under way, ``step`` in all, the last epoch
            ``evaluated`` (-1: none), the ``best`` value with its epoch, evaluations ``waited`` since, the step of the
            last ``good`` checkpoint to rewind to, that of the last one that was measured and found ``sound``, when and
            why the run was first found ``collapsed`` and went on, and the ``rewinds`` so far with step and cause.
        clock: seconds spent in ``training`` and ``evaluation``.
    """

    def __init__(
        self,
        cfg: RunConfig,
        device: torch.device,
        env: Env,
        build: Callable[[], dict[str, nn.Module]],
        optimize: Callable[[Mapping[str, nn.Module]], Mapping[str, Optimizer]],
        averaged: Sequence[str],
    ) -> None:
        self.env, self._seed = env, cfg.seed
        with torch.random.fork_rng(devices=[]):  # weights are drawn on the CPU, the same for every device
            torch.manual_seed(derive(cfg.seed, "weights"))
            self.networks = build()
        for network in self.networks.values():
            network.to(device)
            network.to(memory_format=memory_format(cfg.channels_last))  # pyright: ignore[reportCallIssue]
        chosen = averaged if cfg.ema else ()
        self.averages = {name: copy.deepcopy(self.networks[name]).requires_grad_(False) for name in chosen}
        if cfg.compile:
            for network in self.networks.values():
                network.compile()
        self.optimizers = optimize(self.networks)
        self._rates = {name: [group["lr"] for group in opt.param_groups] for name, opt in self.optimizers.items()}
        fp16 = cfg.precision == "fp16"
        self.scalers = {name: torch.amp.GradScaler(device.type, enabled=fp16) for name in self.optimizers}
        self.wrapped = {
            name: env.wrap(network) if any(p.requires_grad for p in network.parameters()) else network
            for name, network in self.networks.items()
        }
        self.means, self.epoch_means = Means(), Means()
        self.at: dict[str, Any] = {"epoch": 0, "batch": 0, "step": 0, "evaluated": -1, "best": None, "waited": 0,
                                   "good": None, "sound": None, "collapsed": None, "rewinds": []}  # fmt: skip
        self.clock = {"training": 0.0, "evaluation": 0.0}
        self.statistics: dict[str, dict[str, Tensor]] = {}

    @property
    def seed(self) -> int:
        """What draws of training follow from: the run's seed, and another one after each rewind."""
        attempt = len(self.at["rewinds"])
        return derive(self._seed, "attempt", attempt) if attempt else self._seed

    @property
    def measured(self) -> dict[str, nn.Module]:
        """The networks as they are measured: by their averages where there are any."""
        return self.networks | self.averages

    def note_statistics(self, name: str) -> None:
        """Keep the buffers that a measured network has now, for those who use it as it is measured."""
        network = self.measured[name]
        stored = network.state_dict().keys() & dict(network.named_buffers()).keys()
        self.statistics[name] = {key: buffer.clone() for key, buffer in network.named_buffers() if key in stored}

    def set_learning_rates(self, factor: float) -> float:
        """Set every learning rate to ``factor`` times its first; return the first optimizer's first one."""
        for name, optimizer in self.optimizers.items():
            for group, rate in zip(optimizer.param_groups, self._rates[name], strict=True):
                group["lr"] = rate * factor
        return next(iter(self.optimizers.values())).param_groups[0]["lr"]

    @torch.no_grad()
    def average(self, decay: float, good: Tensor) -> None:
        """Move the averages by ``1 - decay`` towards the networks if ``good`` (a scalar on the device) is true."""
        weight = (1 - decay) * good.float()
        for name, average in self.averages.items():
            ours, theirs = average.state_dict(keep_vars=True), self.networks[name].state_dict(keep_vars=True)
            for key, mean in ours.items():
                if mean.is_floating_point():
                    mean.lerp_(theirs[key].to(mean.dtype), weight.to(mean.dtype))
                else:
                    mean.copy_(torch.where(good, theirs[key], mean))

    def _means(self) -> dict[str, Means]:
        return {"means": self.means, "epoch_means": self.epoch_means}

    def _groups(self) -> dict[str, Mapping[str, Any]]:
        return {name: getattr(self, name) for name in ("networks", "averages", "optimizers", "scalers")}

    def state_dict(self) -> dict[str, Any]:
        """Return state dicts and plain values only; every rank has to call it."""
        state: dict[str, Any] = {"at": copy.deepcopy(self.at), "clock": dict(self.clock)}
        state["statistics"] = self.statistics
        for group, parts in self._groups().items():
            state[group] = {name: part.state_dict() for name, part in parts.items()}
        state |= {name: means.state_dict() for name, means in self._means().items()}
        if self.env.world > 1:
            own = {
                group: {name: dict(network.named_buffers()) for name, network in self._groups()[group].items()}
                for group in ("networks", "averages")
            }
            state["ranks"] = self.env.gather(_on_cpu(own | {name: state[name] for name in self._means()}))
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over a checkpoint's state, and of what differs between ranks this one's share."""
        self.at, self.clock = copy.deepcopy(state["at"]), dict(state["clock"])
        self.statistics = state["statistics"]
        for group, parts in self._groups().items():
            for name, part in parts.items():
                part.load_state_dict(state[group][name])
        own: Mapping[str, Any] = state
        if self.env.world > 1:
            own = state["ranks"][self.env.rank]
            for group in ("networks", "averages"):
                for name, network in self._groups()[group].items():
                    network.load_state_dict(own[group][name], strict=False)  # buffers only
        for name, means in self._means().items():
            means.load_state_dict(own[name])

    def load_weights(self, path: Path) -> None:
        """Take over the weights and buffers of another run's networks.

        Raises:
            UsageError: if the file is not a checkpoint, or its networks have other shapes.
        """
        try:
            state = checkpoint.load(path)["networks"]
            for name, network in self.networks.items():
                network.load_state_dict(state[name])
            for name, average in self.averages.items():
                average.load_state_dict(state[name])
        except checkpoint.DamagedCheckpoint as error:
            raise UsageError(f"init_from: {error}; expected a run's checkpoint, such as checkpoints/best.pt") from None
        except (KeyError, RuntimeError) as error:
            reason = " ".join(str(error).split())[:200]
            raise UsageError(
                f"init_from: {path} does not fit this configuration ({reason}); expected a checkpoint of a run "
                "with the same networks and layers"
            ) from None


def _on_cpu(values: Any) -> Any:
    """Copy the tensors of nested dictionaries to the CPU, so that any rank can read them."""
    if isinstance(values, Tensor):
        return values.detach().cpu().clone()
    return {name: _on_cpu(value) for name, value in values.items()} if isinstance(values, dict) else values
