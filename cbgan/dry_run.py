"""What a run would cost, from a few real steps, without writing anything."""

import time
from datetime import timedelta

import torch
from torch import Tensor, nn

from cbgan.config import GanConfig
from cbgan.losses import generator_loss
from cbgan.state import GanState, noise
from common.data.batches import Batches
from common.data.image_set import Splits, to_float
from common.errors import UsageError
from common.machine.device import autocast, memory_format
from common.training.guard import StepGuard

_STEPS = 3
_MIB = 2**20


def estimate(cfg: GanConfig, splits: Splits, device: torch.device) -> str:
    """Describe parameters, memory and time of a run, one fact a line.

    Memory of activations is what a generator update keeps for its backward pass, the largest such set of a step;
    time is measured on a few training steps and leaves the measurements of FID out.
    """
    from cbgan.train import step  # noqa: PLC0415 - the trainer offers this estimate, so it imports this module

    try:
        batches = Batches(splits.train, cfg.batch_size, cfg.seed, flip=cfg.data.flip, workers=0)
    except ValueError as error:
        raise UsageError(str(error)) from None
    state = GanState(cfg, device)
    guard = StepGuard([state.g, state.d], ["loss/d", "loss/g"], device)
    real = to_float(next(batches.epoch(0))[0].to(device)).contiguous(memory_format=memory_format(cfg.channels_last))
    activations = _bytes_for_backward(cfg, state, real)
    seconds = []
    for number in range(1 + _STEPS):
        began = time.perf_counter()
        guard.begin(number + 1)
        step(cfg, state, guard, real)
        guard.finish()
        guard.check()  # waits for the device
        seconds.append(time.perf_counter() - began)
    each = sorted(seconds[1:])[_STEPS // 2]
    total = cfg.epochs * len(batches)
    parameters = sum(p.numel() * p.element_size() for net in (state.g, state.d) for p in net.parameters())
    lines = [
        f"data: {len(splits.train):,} training images of {splits.train.images.shape[-1]} x "
        f"{splits.train.images.shape[-1]} ({splits.train.name}), "
        f"{'no' if splits.test is None else f'{len(splits.test):,}'} held apart",
        f"generator: {_count(state.g):,} parameters, of them {_count(state.g.norm1):,} in norm1 and "
        f"{_count(state.g.norm2):,} in norm2 ({cfg.norm.kind}; moving averages are not parameters)",
        f"discriminator: {_count(state.d):,} parameters",
        f"memory: {4 * parameters / _MIB:.1f} MiB for weights, gradients and Adam's two moments; "
        f"{activations / _MIB:.1f} MiB of activations for a backward pass",
    ]
    if device.type == "cuda":
        lines.append(f"memory: {torch.cuda.max_memory_allocated(device) / _MIB:.1f} MiB at the peak of a step")
    lines.append(
        f"time: {1000 * each:.0f} ms a step on {device} with {torch.get_num_threads()} threads, {len(batches):,} steps "
        f"an epoch, {timedelta(seconds=round(total * each))} for {total:,} steps; measuring FID comes on top"
    )
    return "\n".join(lines)


def _count(network: nn.Module) -> int:
    return sum(p.numel() for p in network.parameters())


def _bytes_for_backward(cfg: GanConfig, state: GanState, real: Tensor) -> int:
    kept: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    weights = {p.untyped_storage().data_ptr() for net in (state.g, state.d) for p in net.parameters()}
    buffers = {b: b.clone() for net in (state.g, state.d) for b in net.buffers()}
    with (
        torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor),
        autocast(real.device, cfg.precision),
    ):
        loss = generator_loss(state.d(state.g(noise(cfg, 0, len(real), real.device))))
    del loss
    for buffer, saved in buffers.items():
        buffer.copy_(saved)
    return sum(size for pointer, size in kept.items() if pointer not in weights)
