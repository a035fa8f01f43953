"""Parameter groups for optimizers."""

from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _NormBase

from common.norms.layer import NormLayer


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
