"""The two names under which this code is installed: what belongs to the package of the other name is refused.

Each of ``common.norms`` and ``cbnorm`` has classes, kinds and cluster ids of its own, and would overlook the other's.
"""

import sys
from typing import Any

from torch import nn

OWN: str = __package__ or ""
OTHER = "cbnorm" if OWN == "common.norms" else "common.norms"
ADVICE = "use common.norms in the suite and its plug-ins, cbnorm in your own code, and one of them throughout a model"
_OTHER_LAYERS = {
    f"{OTHER}.base.NormLayer",
    *(f"{OTHER}.baselines.{name}" for name in ("BatchNorm", "InstanceNorm", "DomainBatchNorm")),
}


def refuse_other_layers(model: nn.Module) -> None:
    """Raise ValueError if a model has a layer of the other package."""
    for name, module in model.named_modules():
        if any(f"{cls.__module__}.{cls.__name__}" in _OTHER_LAYERS for cls in type(module).__mro__):
            where = f" at {name}" if name else ""
            raise ValueError(f"model: expected layers of {OWN}, got {OTHER}.{type(module).__name__}{where}; {ADVICE}")


def other_module(name: str) -> Any:
    """Return a module of the other package, or None if nothing has imported it."""
    return sys.modules.get(f"{OTHER}.{name}")
