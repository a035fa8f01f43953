"""State dicts of one kind of layer turned into those of another that computes the same."""

from collections.abc import Mapping

import torch
from torch import Tensor

from ..estimation import averages
from ..layer import FLAG


def scb_state_from_base(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Turn a state dict with SCBNormBase layers into that of the same model with SCBNorm layers.

    Exact: the rows are what the linear layers give, mu_k = W[:, k] + b. Other entries are passed on.

    Args:
        state: of one layer or of a whole model.

    Raises:
        ValueError: no SCBNormBase is in it.
    """
    new = dict(state)
    found = _prefixes(state, "mean.weight", "mean.bias", "log_var.weight", "log_var.bias", "initialized")
    for prefix in _at_least_one(found, "SCBNormBase"):
        for name in ("mean", "log_var"):
            weight, bias = new.pop(f"{prefix}{name}.weight"), new.pop(f"{prefix}{name}.bias")
            new[prefix + name] = (weight + bias[:, None]).T.contiguous()
    return new


def ucb_state_from_batch_norm(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Turn a state dict with BatchNorm layers into that of the same model with UCBNorm(C, 1) layers.

    Exact up to rounding, in evaluation and in further training with moving averages. Other entries are passed
    on, and every BatchNorm with running statistics is turned; for some of them only, use ``convert_norms``.

    Args:
        state: of one layer or of a whole model.

    Raises:
        ValueError: no BatchNorm with running statistics is in it.
    """
    new = dict(state)
    for prefix in _at_least_one(_prefixes(state, "running_mean", "running_var"), "BatchNorm"):
        mean, var = new.pop(f"{prefix}running_mean"), new.pop(f"{prefix}running_var")
        new.pop(f"{prefix}num_batches_tracked", None)
        new[f"{prefix}logits"] = torch.zeros_like(mean[:1])
        new[f"{prefix}mean"] = mean[None].clone()
        new[f"{prefix}log_var"] = averages.log_of(var.double())[None].to(var.dtype)
        new[f"{prefix}initialized"] = torch.ones((), dtype=FLAG, device=mean.device)
    return new


def _prefixes(state: Mapping[str, Tensor], *names: str) -> list[str]:
    """Return the prefixes under which the state holds all the names."""
    first = names[0]
    starts = [key.removesuffix(first) for key in state if key == first or key.endswith(f".{first}")]
    return [start for start in starts if all(start + name in state for name in names)]


def _at_least_one(prefixes: list[str], layer: str) -> list[str]:
    if not prefixes:
        raise ValueError(f"state: expected the state of at least one {layer}, found none")
    return prefixes
