"""Cluster ids for the layers of a model whose own code knows nothing of them."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn

from . import functional
from .backends import checkpointing, graphs
from .base import fx_leaf
from .baselines import DomainBatchNorm
from .scb_norm import SCBNorm, SCBNormBase
from .two_names import ADVICE, OTHER, OWN, other_module, refuse_other_layers

_ids: ContextVar[Tensor | None] = ContextVar("cluster_ids", default=None)
_GIVE_IDS = f"call the model inside `with clusters(ids):`, of {OWN}"
MOST = 128
"""Passes of which a layer keeps the ids for activation checkpointing."""
_in_graph: list[Tensor | None] = []
"""Ids of the blocks that a graph which is being made holds; torch.compile cannot trace the write of a ContextVar."""


@contextmanager
def clusters(ids: Tensor | None) -> Iterator[None]:
    """Give the samples of every model called inside the block their cluster ids.

    Converted layers of kind "scb", "scb_base" and "dsbn" read them; an explicit ``cluster`` argument goes
    first. Blocks nest, the inner one holding, and each thread or asynchronous task has its own. What activation
    checkpointing computes again has the ids that it had at first. Around torch.export or torch.jit.trace ids would be
    constants of the graph: trace ``WithClusters(model)``.

    Args:
        ids: int64 (N,), one a sample, -1 for unknown in evaluation; None hides an outer block's.

    Raises:
        ValueError: ids are not int64 (N,).
        RuntimeError: a layer in the block is exported or traced.

    Example:
        >>> with clusters(labels):
        ...     logits = model(images)
    """
    if ids is not None and not (isinstance(ids, Tensor) and ids.dtype == torch.int64 and ids.ndim == 1):
        raise ValueError(f"ids: expected an int64 tensor (N,) or None, got {functional.describe(ids)}")
    if graphs.traced():
        _in_graph.append(ids)
        try:
            yield
        finally:
            _in_graph.pop()
        return
    token = _ids.set(ids)
    try:
        yield
    finally:
        _ids.reset(token)


class WithClusters(nn.Module):
    r"""A converted model that takes its samples' cluster ids as a second input, as a graph needs them.

    Args:
        model: called as ``model(x)``.

    Shape:
        x as the model's; cluster int64 (N,), or None; output as the model's.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        refuse_other_layers(model)
        self.model = model

    def forward(self, x: Tensor, cluster: Tensor | None = None) -> Any:
        """Call the model with x inside ``clusters(cluster)``."""
        with clusters(cluster):
            return self.model(x)


def current_ids() -> Tensor | None:
    """Return the cluster ids of the innermost block."""
    return _in_graph[-1] if _in_graph else _ids.get()


def _routed(layer: nn.Module, cluster: Tensor | None, x: Tensor) -> Tensor | None:
    if cluster is not None:
        return cluster
    if checkpointing.keeps(layer):
        given = checkpointing.recall(layer, x)
        return given[0] if given else None  # the block may have been left, or be another
    ids = current_ids()
    if ids is None:
        other = other_module("cluster_context")
        if other is not None and other.current_ids() is not None:
            raise RuntimeError(f"clusters: expected a block of {OWN} around its layer, got one of {OTHER}; {ADVICE}")
        checkpointing.remember(layer, x, [], MOST)
        return None
    if not _in_graph and graphs.exported():
        raise RuntimeError(
            "clusters: a block around torch.export or torch.jit.trace makes its ids constants of the graph; trace "
            "WithClusters(model), which takes them as its second input"
        )
    ids = ids.to(x.device)
    checkpointing.remember(layer, x, [ids], MOST)
    return ids


class _Routed(nn.Module):
    _give_ids = _GIVE_IDS

    @fx_leaf
    def forward(self, x: Tensor, cluster: Tensor | None = None) -> Tensor:
        r"""Normalise x (N, C, \*) by cluster (N,)."""
        return super().forward(x, _routed(self, cluster, x))


class RoutedSCBNorm(_Routed, SCBNorm):
    """SCBNorm in a converted model: ids that it is not given come from ``clusters``."""


class RoutedSCBNormBase(_Routed, SCBNormBase):
    """SCBNormBase in a converted model: ids that it is not given come from ``clusters``."""


class RoutedDomainBatchNorm(_Routed, DomainBatchNorm):
    """DomainBatchNorm in a converted model: ids that it is not given come from ``clusters``."""


ROUTED: dict[str, Callable[..., nn.Module]] = {
    "scb": RoutedSCBNorm,
    "scb_base": RoutedSCBNormBase,
    "dsbn": RoutedDomainBatchNorm,
}
