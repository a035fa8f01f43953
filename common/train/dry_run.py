"""Real steps of a run that is none: what they cost, without writing anything."""

import itertools
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from common.data import Feed
from common.norms.layer import NormLayer
from common.train.config import RunConfig
from common.train.guard import Part, StepGuard, Update
from common.train.state import Parts
from common.train.task import Method

_STEPS = 3
_MIB = 2**20


class Steps:
    """Steps of training as the loop makes them, of which nothing is measured, logged or saved.

    Args:
        cfg: the run's configuration.
        method: what is trained.
        feed: the batches, from the first on; after the last epoch come more.
        parts: networks, optimizers and their like, which change.
    """

    def __init__(self, cfg: RunConfig, method: Method[Any], feed: Feed, parts: Parts) -> None:
        self.cfg, self.method, self.parts = cfg, method, parts
        self._guard = StepGuard(parts.networks.values(), [f"loss/{name}" for name in parts.optimizers], method.device)
        epochs = (feed.epoch(epoch, 0, parts.seed) for epoch in itertools.count())
        self._batches = itertools.chain.from_iterable(epochs)

    def make(self, kind: type[Update] = Update) -> Update:
        """Make the next step with an update of a kind, wait for the device, and return the update.

        Raises:
            NonFiniteError: if a loss or gradient is not finite.
        """
        cfg, parts, guard = self.cfg, self.parts, self._guard
        update = kind(parts, guard, next(self._batches), self.method.device, cfg.precision, cfg.clip)
        guard.begin(parts.at["step"] + 1)
        self.method.step(update)
        guard.finish()
        parts.average(cfg.ema, guard.good)
        parts.at["step"] += 1
        guard.check()
        return update


class Timed(Update):
    """An update that notes how long each loss's share of it takes, the device's work included.

    Attributes:
        began: when the batches were on the device, by `time.perf_counter`.
        seconds: by the loss's name.
    """

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        synchronize(self._device)
        self.began = time.perf_counter()
        self.seconds: dict[str, float] = {}

    def descend(self, name: str, loss: Callable[[Part], Tensor]) -> None:
        """Update as usual."""
        synchronize(self._device)
        began = time.perf_counter()
        super().descend(name, loss)
        synchronize(self._device)
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - began


def synchronize(device: torch.device) -> None:
    """Wait until a device has done what it was told."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class _Measured(Update):
    """An update that notes how many bytes each loss keeps for its backward pass."""

    kept: int = 0

    def descend(self, name: str, loss: Callable[[Part], Tensor]) -> None:
        """Update as usual."""
        weights = {p.untyped_storage().data_ptr() for net in self._parts.networks.values() for p in net.parameters()}

        def noting(part: Part) -> Tensor:
            bytes_at: dict[int, int] = {}

            def note(tensor: Tensor) -> Tensor:
                if tensor.untyped_storage().data_ptr() not in weights:
                    bytes_at[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
                return tensor

            with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
                value = loss(part)
            self.kept = max(self.kept, sum(bytes_at.values()))
            return value

        super().descend(name, noting)


def estimate(cfg: RunConfig, method: Method[Any], feed: Feed, parts: Parts) -> str:
    """Describe parameters, memory and time of a run, one fact a line.

    Memory of activations is what a loss keeps for its backward pass, the largest such set of a step; time is
    measured on a few training steps and leaves measurements out.
    """
    device, steps = method.device, Steps(cfg, method, feed, parts)
    seconds, kept = [], 0
    for _ in range(1 + _STEPS):
        began = time.perf_counter()
        update = steps.make(_Measured)
        seconds.append(time.perf_counter() - began)
        assert isinstance(update, _Measured)
        kept = max(kept, update.kept)
    each, total = sorted(seconds[1:])[_STEPS // 2], cfg.epochs * len(feed)
    weights = [p for network in parts.networks.values() for p in network.parameters()]
    state = [v for opt in parts.optimizers.values() for s in opt.state.values() for v in s.values() if v.ndim]
    held = 2 * _bytes(weights) + _bytes(state)  # as many gradients as weights
    sets = ", ".join(f"{len(images):,} {name}" for name, images in method.images.items())
    lines = [f"data: images of {method.images['train'].images.shape[-1]} pixels a side: {sets}"]
    lines += [_describe(network) for network in parts.networks.values()]
    lines.append(
        f"memory: {held / _MIB:.1f} MiB for weights, gradients and the optimizers' state; {kept / _MIB:.1f} MiB of "
        "activations for a backward pass"
    )
    if device.type == "cuda":
        lines.append(f"memory: {torch.cuda.max_memory_allocated(device) / _MIB:.1f} MiB at the peak of a step")
    lines.append(
        f"time: {1000 * each:.0f} ms a step on {device} with {torch.get_num_threads()} threads, {len(feed):,} steps "
        f"an epoch, {timedelta(seconds=round(total * each))} for {total:,} steps; measurements come on top"
    )
    return "\n".join(lines)


def _describe(network: nn.Module) -> str:
    norms = {name: _count(layer) for name, layer in network.named_modules() if isinstance(layer, NormLayer | _NormBase)}
    listed = ", ".join(f"{count:,} in {name}" for name, count in norms.items())
    return f"{type(network).__name__}: {_count(network):,} parameters, of them {listed or 'none in normalizations'}"


def _count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def _bytes(tensors: Sequence[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
