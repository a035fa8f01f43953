"""Run a few training steps to estimate their cost (``--dry_run``); writes nothing."""

import itertools
import time
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from common.norms.base import NormLayer
from common.train.guard import StepGuard
from common.train.step import Loss, Metrics, MicroBatch, Step
from common.train.task import Task

_STEPS = 3
_MIB = 2**20
_LISTED = 10


class Steps:
    """Steps of training as the loop makes them, of which nothing is evaluated, logged or saved.

    Args:
        task: what is trained, which changes; after its last epoch come more.
    """

    def __init__(self, task: Task[Any]) -> None:
        self.task, self.state = task, task.new_state()
        self._guard = StepGuard(task.networks.values(), [f"loss/{name}" for name in task.optimizers], task.device)
        epochs = (task.loader.epoch(epoch, 0, self.state.seed) for epoch in itertools.count())
        self._batches = itertools.chain.from_iterable(epochs)

    def make(self, kind: type[Step] = Step) -> Step:
        """Make the next step with a `Step` of a kind, wait for the device, and return it.

        Raises:
            NonFiniteError: if a loss or gradient is not finite.
        """
        state, guard, cfg = self.state, self._guard, self.task.cfg
        step = kind(state, guard, next(self._batches), cfg)
        guard.begin(state.run.step + 1)
        self.task.train_step(step)
        guard.finish()
        state.update_averages(cfg.ema_decay, guard.good)
        state.run.step += 1
        guard.check()
        return step


class Timed(Step):
    """A step that notes how long each loss's share of it takes, the device's work included.

    Attributes:
        began: when the batches were on the device, by `time.perf_counter`.
        seconds: by the loss's name.
    """

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        synchronize(self._state.device)
        self.began = time.perf_counter()
        self.seconds: dict[str, float] = {}

    def optimize(self, name: str, loss: Loss, *, frozen: Sequence[str] = ()) -> Metrics:
        """Update as usual."""
        synchronize(self._state.device)
        began = time.perf_counter()
        metrics = super().optimize(name, loss, frozen=frozen)
        synchronize(self._state.device)
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - began
        return metrics


def synchronize(device: torch.device) -> None:
    """Wait until a device has done its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class _Measured(Step):
    """A step that notes how many bytes each loss keeps for its backward pass."""

    kept: int = 0

    def optimize(self, name: str, loss: Loss, *, frozen: Sequence[str] = ()) -> Metrics:
        """Update as usual."""
        weights = {p.untyped_storage().data_ptr() for net in self._state.networks.values() for p in net.parameters()}

        def noting(micro: MicroBatch) -> Tensor | tuple[Tensor, Metrics]:
            bytes_at: dict[int, int] = {}

            def note(tensor: Tensor) -> Tensor:
                if tensor.untyped_storage().data_ptr() not in weights:
                    bytes_at[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
                return tensor

            with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
                value = loss(micro)
            self.kept = max(self.kept, sum(bytes_at.values()))
            return value

        return super().optimize(name, noting, frozen=frozen)


def estimate(task: Task[Any]) -> str:
    """Describe parameters, memory and time of a run, one fact a line.

    Memory of activations is what a loss keeps for its backward pass, the largest such set of a step; time is
    measured on a few training steps and leaves evaluations out.
    """
    device, steps, seconds, kept = task.device, Steps(task), [], 0
    for _ in range(1 + _STEPS):
        began = time.perf_counter()
        step = steps.make(_Measured)
        seconds.append(time.perf_counter() - began)
        assert isinstance(step, _Measured)
        kept = max(kept, step.kept)
    each, total = sorted(seconds[1:])[_STEPS // 2], task.cfg.epochs * len(task.loader)
    weights = [p for network in task.networks.values() for p in network.parameters()]
    moments = [v for opt in task.optimizers.values() for s in opt.state.values() for v in s.values() if v.ndim]
    held = 2 * _bytes(weights) + _bytes(moments)  # as many gradients as weights
    sets = ", ".join(f"{len(images):,} {name}" for name, images in task.images.items())
    lines = [f"data: images of {task.images['train'].images.shape[-1]} pixels a side: {sets}"]
    lines += [_describe(network) for network in task.networks.values()]
    lines.append(
        f"memory: {held / _MIB:.1f} MiB for weights, gradients and the optimizers' state; {kept / _MIB:.1f} MiB of "
        "activations for a backward pass"
    )
    if device.type == "cuda":
        lines.append(f"memory: {torch.cuda.max_memory_allocated(device) / _MIB:.1f} MiB at the peak of a step")
    lines.append(
        f"time: {1000 * each:.0f} ms a step on {device} with {torch.get_num_threads()} threads, {len(task.loader):,} "
        f"steps an epoch, {timedelta(seconds=round(total * each))} for {total:,} steps; measurements come on top"
    )
    return "\n".join(lines)


def _describe(network: nn.Module) -> str:
    norms = {name: _count(layer) for name, layer in network.named_modules() if isinstance(layer, NormLayer | _NormBase)}
    listed = ", ".join(f"{count:,} in {name}" for name, count in norms.items())
    if len(norms) > _LISTED:
        listed = f"{sum(norms.values()):,} in {len(norms)} normalizations, {next(iter(norms))} to {list(norms)[-1]}"
    return f"{type(network).__name__}: {_count(network):,} parameters, of them {listed or 'none in normalizations'}"


def _count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def _bytes(tensors: Sequence[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
