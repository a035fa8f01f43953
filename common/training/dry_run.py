"""What a run would cost, from a few real steps, without writing anything."""

import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from common.data import Feed
from common.norms.layer import NormLayer
from common.training.config import RunConfig
from common.training.method import Method
from common.training.parts import Parts
from common.training.update import Part, StepGuard, Update

_STEPS = 3
_MIB = 2**20


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
    device = method.device
    guard = StepGuard(parts.networks.values(), [f"loss/{name}" for name in parts.optimizers], device)
    batches = next(feed.epoch(0, 0, parts.seed))
    seconds, kept = [], 0
    for number in range(1 + _STEPS):
        began = time.perf_counter()
        update = _Measured(parts, guard, batches, device, cfg.precision, cfg.clip)
        guard.begin(number + 1)
        method.step(update)
        guard.finish()
        guard.check()  # waits for the device
        kept = max(kept, update.kept)
        seconds.append(time.perf_counter() - began)
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
