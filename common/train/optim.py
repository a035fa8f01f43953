"""Optimizers, which parameters they decay, and learning rates by position."""

import math
from typing import Any, Literal

import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.optim import Optimizer

from common.norms.base import NormLayer
from common.train.config import ScheduleConfig


def make_optimizer(
    kind: Literal["adamw", "adam", "sgd"],
    module: nn.Module,
    *,
    lr: float,
    weight_decay: float = 0.0,
    eps: float = 1e-8,
    nesterov: bool = False,
) -> Optimizer:
    """Make an optimizer of a module's parameters that masks steps which are not finite (fused).

    Args:
        kind: AdamW; Adam; or SGD with momentum 0.9. The last two add weight decay to the gradient.
        module: whose parameters that require a gradient are optimised, by `parameter_groups`.
        lr: learning rate.
        weight_decay: see above.
        eps: of AdamW and Adam.
        nesterov: of SGD's momentum.
    """
    groups = parameter_groups(module, weight_decay)
    if kind == "sgd":
        return torch.optim.SGD(groups, lr=lr, momentum=0.9, nesterov=nesterov, fused=True)
    make = torch.optim.AdamW if kind == "adamw" else torch.optim.Adam
    return make(groups, lr=lr, eps=eps, fused=True)


def parameter_groups(module: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Split a module's parameters into those that decay and those that must not.

    Decay pulls towards zero, which is right for the weights of linear maps and wrong for biases and for what a
    normalization layer learns: its scales, and the means and log-variances of its components.

    Returns:
        Two groups, decaying and not, in the module's order; together they hold every parameter that requires a
        gradient exactly once.
    """
    spared: set[int] = set()
    for layer in module.modules():
        if isinstance(layer, NormLayer | _NormBase | nn.LayerNorm | nn.GroupNorm | nn.RMSNorm):
            spared.update(id(parameter) for parameter in layer.parameters())
    parameters = [(name, p) for name, p in module.named_parameters() if p.requires_grad]
    decaying = [p for name, p in parameters if id(p) not in spared and not name.endswith("bias")]
    kept = [p for name, p in parameters if id(p) in spared or name.endswith("bias")]
    return [{"params": decaying, "weight_decay": weight_decay}, {"params": kept, "weight_decay": 0.0}]


def schedule_factor(schedule: ScheduleConfig, step: int, steps_per_epoch: int, epochs: int) -> float:
    """Return what learning rates are multiplied by in a step, counted from 0 through the run.

    "step" changes after whole epochs. With the `progress` p, "cosine" goes from 1 at step 0 towards ``floor`` at the
    run's end, ``floor + (1 - floor) (1 + cos(pi p)) / 2``, and "partial_cosine" along the first part of a cosine,
    ``cos(arccos(floor) p)``.
    """
    if schedule.kind == "step":
        return schedule.factor ** sum(step >= epoch * steps_per_epoch for epoch in schedule.milestones)
    if schedule.kind == "cosine":
        share = progress(schedule, step, steps_per_epoch, epochs)
        return schedule.floor + (1 - schedule.floor) * (1 + math.cos(math.pi * share)) / 2
    if schedule.kind == "partial_cosine":
        return math.cos(math.acos(schedule.floor) * progress(schedule, step, steps_per_epoch, epochs))
    return 1.0


def progress(schedule: ScheduleConfig, step: int, steps_per_epoch: int, epochs: int) -> float:
    """Return the share, at most 1, of the run that was done before a step, as the schedule counts its steps."""
    return min(1.0, step / ((schedule.epoch_steps or steps_per_epoch) * epochs))
