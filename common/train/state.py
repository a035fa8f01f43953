"""Everything that a checkpoint of a run holds: networks, optimizers, averages of weights, and the position."""

import copy
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from common.runtime.distributed import Env
from common.runtime.seeding import derive
from common.train.config import RunConfig
from common.train.logging import Means


@dataclass
class RunState:
    """Where a run is.

    Attributes:
        epoch: epochs that are done.
        batch: steps done of the epoch under way.
        step: steps done in all.
        last_checkpoint: the step of the last scheduled checkpoint, to which a rewind goes back.
        last_evaluated: the epoch after which the networks were last evaluated; -1 before the first time.
        last_evaluated_checkpoint: the step of the last checkpoint in which an evaluation found no collapse.
        best: ``value``, ``epoch`` and ``tag`` of the best evaluation.
        epochs_without_improvement: evaluations since then.
        collapsed: ``step``, ``cause`` and ``remedy`` of the first collapse that the run went on from.
        rewinds: ``step``, where it went back ``to``, and ``cause`` of each.
    """

    epoch: int = 0
    batch: int = 0
    step: int = 0
    last_checkpoint: int | None = None
    last_evaluated: int = -1
    last_evaluated_checkpoint: int | None = None
    best: dict[str, Any] | None = None
    epochs_without_improvement: int = 0
    collapsed: dict[str, Any] | None = None
    rewinds: list[dict[str, Any]] = field(default_factory=list)


class TrainState:
    """What training changes; networks, averages and optimizers are those of a `common.train.task.Task`.

    With several processes the networks' buffers (running averages) and the log's means differ between ranks; a
    checkpoint holds those of each.

    Attributes:
        scalers: of gradients in float16, by optimizer.
        statistics: the buffers, by network, with which these weights were evaluated; empty before.
        step_metrics: means of the steps' metrics since the last log line.
        epoch_metrics: means over those steps of the epoch that return them.
        run: the position.
        seconds: spent in ``training`` and ``evaluation``.
    """

    def __init__(
        self,
        cfg: RunConfig,
        device: torch.device,
        env: Env,
        networks: Mapping[str, nn.Module],
        averages: Mapping[str, nn.Module],
        ddp_networks: Mapping[str, nn.Module],
        optimizers: Mapping[str, Optimizer],
    ) -> None:
        self.device, self.env, self._seed = device, env, cfg.seed
        self.networks, self.averages, self.ddp_networks, self.optimizers = networks, averages, ddp_networks, optimizers
        self._rates = {name: [group["lr"] for group in opt.param_groups] for name, opt in optimizers.items()}
        fp16 = cfg.precision == "fp16"
        self.scalers = {name: torch.amp.GradScaler(device.type, enabled=fp16) for name in optimizers}
        self.statistics: dict[str, dict[str, Tensor]] = {}
        self.step_metrics, self.epoch_metrics = Means(), Means()
        self.run = RunState()
        self.seconds = {"training": 0.0, "evaluation": 0.0}

    @property
    def seed(self) -> int:
        """The seed of training's draws: the run's, and another one after each rewind."""
        attempt = len(self.run.rewinds)
        return derive(self._seed, "attempt", attempt) if attempt else self._seed

    def note_statistics(self, name: str) -> None:
        """Keep the buffers with which a network is evaluated, for those who load it from a checkpoint."""
        network = self.averages.get(name, self.networks[name])
        stored = network.state_dict().keys() & dict(network.named_buffers()).keys()
        self.statistics[name] = {key: buffer.clone() for key, buffer in network.named_buffers() if key in stored}

    def set_learning_rates(self, factor: float) -> float:
        """Set every learning rate to ``factor`` times its first; return the first optimizer's first one."""
        for name, optimizer in self.optimizers.items():
            for group, rate in zip(optimizer.param_groups, self._rates[name], strict=True):
                group["lr"] = rate * factor
        return next(iter(self.optimizers.values())).param_groups[0]["lr"]

    @torch.no_grad()
    def update_averages(self, decay: float, good: Tensor) -> None:
        """Move the averages by ``1 - decay`` towards the networks if ``good`` (a scalar on the device) is true."""
        weight = (1 - decay) * good.float()
        for name, average in self.averages.items():
            ours, theirs = average.state_dict(keep_vars=True), self.networks[name].state_dict(keep_vars=True)
            for key, mean in ours.items():
                if mean.is_floating_point():
                    mean.lerp_(theirs[key].to(mean.dtype), weight.to(mean.dtype))
                else:
                    mean.copy_(torch.where(good, theirs[key], mean))

    def _networks(self) -> dict[str, Mapping[str, nn.Module]]:
        return {"networks": self.networks, "averages": self.averages}

    def _stateful(self) -> dict[str, Mapping[str, Any]]:
        return self._networks() | {"optimizers": self.optimizers, "scalers": self.scalers}

    def _metrics(self) -> dict[str, Means]:
        return {"step_metrics": self.step_metrics, "epoch_metrics": self.epoch_metrics}

    def state_dict(self) -> dict[str, Any]:
        """Return state dicts and plain values only; every rank has to call it."""
        state: dict[str, Any] = {"run": asdict(self.run), "seconds": dict(self.seconds), "statistics": self.statistics}
        for group, parts in self._stateful().items():
            state[group] = {name: part.state_dict() for name, part in parts.items()}
        means = {name: metrics.state_dict() for name, metrics in self._metrics().items()}
        if self.env.world > 1:
            own = {
                group: {name: dict(network.named_buffers()) for name, network in networks.items()}
                for group, networks in self._networks().items()
            }
            state["ranks"] = self.env.gather(_on_cpu(own | means))
        return state | means

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Load a checkpoint's state, and of what differs between ranks this one's."""
        self.run, self.seconds = RunState(**copy.deepcopy(state["run"])), dict(state["seconds"])
        self.statistics = state["statistics"]
        for group, parts in self._stateful().items():
            for name, part in parts.items():
                part.load_state_dict(state[group][name])
        own: Mapping[str, Any] = state
        if self.env.world > 1:
            own = state["ranks"][self.env.rank]
            for group, networks in self._networks().items():
                for name, network in networks.items():
                    network.load_state_dict(own[group][name], strict=False)  # buffers only
        for name, metrics in self._metrics().items():
            metrics.load_state_dict(own[name])


def _on_cpu(values: Any) -> Any:
    """Copy the tensors of nested dictionaries to the CPU, so that any rank can read them."""
    if isinstance(values, Tensor):
        return values.detach().cpu().clone()
    return {name: _on_cpu(value) for name, value in values.items()} if isinstance(values, dict) else values
