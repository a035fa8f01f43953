"""One training step, as a task sees it: micro-batches, and losses that become updates."""

import contextlib
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from common.data import Batch
from common.runtime.device import autocast
from common.train.config import RunConfig
from common.train.guard import StepGuard
from common.train.state import TrainState


@dataclass(frozen=True)
class MicroBatch:
    """A share of a step's batch, as much as is computed at once.

    Attributes:
        batches: a batch of every stream, on the device.
        number: counted through the run; draws follow from it, the seed and the rank.
        seed: of its draws.
    """

    batches: Mapping[str, Batch]
    number: int
    seed: int

    def __getitem__(self, stream: str) -> Batch:
        return self.batches[stream]


@dataclass(frozen=True)
class Metrics:
    """What a step logs: detached scalars by tag, the same tags on all ranks.

    Attributes:
        step: logged as means over the steps between two log lines.
        epoch: logged as means over those steps of an epoch that have them.
    """

    step: Mapping[str, Tensor] = field(default_factory=dict)
    epoch: Mapping[str, Tensor] = field(default_factory=dict)

    def __or__(self, other: "Metrics") -> "Metrics":
        return Metrics({**self.step, **other.step}, {**self.epoch, **other.epoch})


Loss = Callable[[MicroBatch], Tensor | tuple[Tensor, Metrics]]
"""From a micro-batch to a scalar, and what else is to be logged of it."""


class Step:
    """One step of a task: wraps ranks, precision, gradient accumulation, clipping and the guard.

    Args:
        state: networks and optimizers.
        guard: keeps what is not finite away from them.
        batches: of every micro-batch, in the order in which gradients are accumulated.
        cfg: says precision and clipping.
        progress: share of the run, as its schedule counts it, that was done before this step.
    """

    def __init__(
        self,
        state: TrainState,
        guard: StepGuard,
        batches: Sequence[Mapping[str, Batch]],
        cfg: RunConfig,
        progress: float = 0.0,
    ) -> None:
        self.progress = progress
        first = state.run.step * len(batches)
        self.micro_batches = [
            MicroBatch({name: batch.to(state.device) for name, batch in streams.items()}, first + number, state.seed)
            for number, streams in enumerate(batches)
        ]
        self._state, self._guard, self._cfg = state, guard, cfg

    def optimize(self, name: str, loss: Loss, *, frozen: Sequence[str] = ()) -> Metrics:
        """Update what optimizer ``name`` holds by the gradient of the mean of ``loss`` over the micro-batches.

        Args:
            name: an optimizer.
            loss: runs under the run's precision.
            frozen: networks whose own weights get no gradients; those that flow through them do.

        Returns:
            The mean loss as loss/NAME, the 2-norm of its gradient as gradient/NAME, and the means of what ``loss`` logs
            besides.
        """
        state, found = self._state, (defaultdict[str, list[Tensor]](list), defaultdict[str, list[Tensor]](list))

        def losses() -> Iterator[Tensor]:
            for micro in self.micro_batches:
                with contextlib.ExitStack() as stack:
                    if micro is not self.micro_batches[-1]:  # ranks average their gradients once a step
                        for network in state.ddp_networks.values():
                            if isinstance(network, DistributedDataParallel):
                                stack.enter_context(network.no_sync())
                    with autocast(state.device, self._cfg.precision):
                        returned = loss(micro)
                    value, metrics = returned if isinstance(returned, tuple) else (returned, Metrics())
                    for lists, values in zip(found, (metrics.step, metrics.epoch), strict=True):
                        for tag, scalar in values.items():
                            lists[tag].append(scalar.detach())
                    yield value  # the guard goes backward here

        optimizer, scaler = state.optimizers[name], state.scalers[name]
        with contextlib.ExitStack() as stack:
            for network in frozen:
                stack.enter_context(_frozen(state.networks[network]))
            mean, norm = self._guard.update(
                f"loss/{name}", losses(), len(self.micro_batches), optimizer, scaler, self._cfg.grad_clip_norm
            )
        of_step, of_epoch = ({tag: torch.stack(values).mean(0) for tag, values in lists.items()} for lists in found)
        return Metrics({f"loss/{name}": mean, f"gradient/{name}": norm, **of_step}, of_epoch)


@contextlib.contextmanager
def _frozen(network: nn.Module) -> Iterator[None]:
    network.requires_grad_(False)
    try:
        yield
    finally:
        network.requires_grad_(True)
