"""What a run would cost, from a few real steps, without writing anything."""

import time
from datetime import timedelta

import torch
from torch import Tensor, nn

from cbcls.config import ClassifierConfig
from cbcls.evaluation import to_input
from cbcls.state import ClassifierState
from common.data.batches import Batches
from common.data.image_set import Splits
from common.errors import UsageError
from common.machine.device import autocast
from common.training.guard import StepGuard

_STEPS = 3
_MIB = 2**20


def estimate(cfg: ClassifierConfig, splits: Splits, device: torch.device) -> str:
    """Describe parameters, memory and time of a run, one fact a line.

    Memory is what a step keeps for its backward pass; time is measured on a few training steps and leaves the
    measurements on the test images out.
    """
    from cbcls.train import step  # noqa: PLC0415 - the trainer offers this estimate, so it imports this module

    try:
        batches = Batches(splits.train, cfg.batch_size, cfg.seed, flip=cfg.data.flip, workers=0)
    except ValueError as error:
        raise UsageError(str(error)) from None
    state = ClassifierState(cfg, splits.train.num_classes, device)
    guard = StepGuard([state.network], ["loss/train"], device)
    images, labels, _ = next(batches.epoch(0))
    x, labels = to_input(images, device, cfg), labels.to(device)
    seconds = []
    for number in range(1, 2 + _STEPS):
        began = time.perf_counter()
        guard.begin(number)
        step(cfg, state, guard, x, labels)
        guard.finish()
        guard.check()  # waits for the device
        seconds.append(time.perf_counter() - began)
    each, total = sorted(seconds[1:])[_STEPS // 2], cfg.epochs * len(batches)
    return "\n".join(
        [
            f"network: {_count(state.network):,} parameters, of them {_count(state.network.norm3):,} in norm3 "
            f"({cfg.norm.kind}; moving averages are not parameters)",
            f"memory: {_bytes_for_backward(cfg, state, x) / _MIB:.1f} MiB of activations kept for a backward pass",
            f"time: {1000 * each:.0f} ms a step on {device} with {torch.get_num_threads()} threads, {len(batches):,} "
            f"steps an epoch, {timedelta(seconds=round(total * each))} for {total:,} steps; tests come on top",
        ]
    )


def _count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def _bytes_for_backward(cfg: ClassifierConfig, state: ClassifierState, x: Tensor) -> int:
    kept: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    weights = {p.untyped_storage().data_ptr() for p in state.network.parameters()}
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor), autocast(x.device, cfg.precision):
        logits = state.network(x)
    del logits
    return sum(size for pointer, size in kept.items() if pointer not in weights)
