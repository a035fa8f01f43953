"""Activation checkpointing: the forward pass runs again inside the backward pass, and has to give the same output.

By then the first pass has moved the stored mixture. So a layer keeps the mixture of that pass, which is small, wherever
autograd keeps nothing: without gradients, or under hooks for saved tensors.
"""

import functools
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes, _get_current_dispatch_mode
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

from . import graphs

P = ParamSpec("P")
R = TypeVar("R")
SELECTIVE = type(create_selective_checkpoint_contexts([])[0])
"""Torch's mode that counts the operators of a selective checkpoint, or marks them in a graph; its name is private."""
MOST = 8
"""Forward passes of a layer that are kept until their backward pass, where they keep a mixture."""
SAMPLED = 64
"""About the number of values of an activation by which passes are told apart."""


@dataclass
class _Pass:
    shape: torch.Size
    sample: Tensor
    given: tuple[Tensor, ...]
    training: bool
    graph: "weakref.ref[Any] | None"
    """A hook that lives as long as the pass's graph; None without gradients."""
    repeated: bool = False

    def is_lost(self) -> bool:
        """Return whether no backward pass can come any more."""
        return self.graph is not None and self.graph() is None


_passes: "weakref.WeakKeyDictionary[nn.Module, list[_Pass]]" = weakref.WeakKeyDictionary()


def running() -> bool:
    """Return whether a backward pass calls this: a forward pass is then one that is repeated."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


def _hooks() -> tuple[Any, Any] | None:
    """Return the hooks that pack and unpack what autograd saves, which each checkpoint makes anew."""
    return torch._C._autograd._top_saved_tensors_default_hooks(True)  # pyright: ignore[reportAttributeAccessIssue]


def _may_follow() -> bool:
    """Return whether a later pass may recompute what the backward pass needs."""
    if graphs.unseen() or torch.is_inference_mode_enabled():
        return False
    return not torch.is_grad_enabled() or _hooks() is not None


def _sample(x: Tensor) -> Tensor:
    """Copy some tens of values of x, spread over all its dimensions."""
    each = max(2, round(SAMPLED ** (1 / x.ndim)))
    steps = [max(1, -(-size // each)) for size in x.shape]
    return x.detach()[tuple(slice(step // 2, None, step) for step in steps)].nan_to_num()


def _alike(a: Tensor, b: Tensor) -> bool:
    """Return whether two samples differ by no more than sums in another order do."""
    return bool((a.float() - b.float()).norm() <= 0.01 * b.float().norm())


def _waiting(layer: nn.Module) -> list[_Pass]:
    return [p for p in _passes.get(layer, []) if not p.is_lost()]


def remember(layer: nn.Module, x: Tensor, given: Sequence[Tensor], most: int = MOST) -> None:
    """Keep copies of what a forward pass of the layer over x was given, if it may be repeated; of the last ``most``."""
    if not running() and _may_follow():
        hooks = _hooks() if torch.is_grad_enabled() else None
        graph = None if hooks is None else weakref.ref(hooks[0])
        with _disable_current_modes():
            copies = tuple(t.detach().clone() for t in given)
            found = _Pass(x.shape, _sample(x), copies, layer.training, graph)
        _passes[layer] = [*(p for p in _waiting(layer) if not p.repeated), found][-most:]


def keeps(layer: nn.Module) -> bool:
    """Return whether this is a pass to ``recall``: a repeated one of a layer that has kept some."""
    return running() and layer in _passes


@_disable_current_modes()
def recall(layer: nn.Module, x: Tensor) -> tuple[Tensor, ...]:
    """Return what the pass that is repeated over x was given.

    Raises:
        RuntimeError: the layer kept nothing like it; or several passes over the same values wait for their backward
            pass, which were given other things.
    """
    waiting = _waiting(layer)
    # A reentrant checkpoint runs the first pass without gradients, and repeats it with them under no hooks.
    graded = _hooks() is not None and torch.is_grad_enabled()
    found = [p for p in waiting if p.shape == x.shape and p.training == layer.training]
    sample = _sample(x)
    found = [p for p in found if p.sample.equal(sample)] or [p for p in found if _alike(p.sample, sample)]
    found = [p for p in found if (p.graph is not None) == graded] or found
    found = [p for p in found if not p.repeated] or found
    if not found:
        raise RuntimeError(
            f"activation checkpointing: a backward pass runs {type(layer).__name__} over values that are not those of "
            f"the last forward passes without gradients or under a checkpoint, of which it keeps {len(waiting)}"
        )
    *others, last = found
    if any(not _equal(p.given, last.given) for p in others):
        raise RuntimeError(
            f"activation checkpointing: {len(found)} forward passes of {type(layer).__name__} over the same values "
            "wait for a backward pass and cannot be told apart; run the backward pass of each before the next one"
        )
    last.repeated = True
    return last.given


def _equal(a: Sequence[Tensor], b: Sequence[Tensor]) -> bool:
    return len(a) == len(b) and all(map(torch.equal, a, b))


@_disable_current_modes()
def copies(*tensors: Tensor) -> list[Tensor]:
    """Copy tensors in a repeated pass, hidden from selective checkpoints, which refuse operators of that pass alone."""
    return [t.clone() for t in tensors]


def computed_once(function: Callable[P, R]) -> Callable[P, R]:
    """Hide from selective checkpoints what a repeated pass omits: they pair the operators of both by their order."""

    @functools.wraps(function)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> R:
        if torch.compiler.is_compiling() or not isinstance(_get_current_dispatch_mode(), SELECTIVE):
            return function(*args, **kwargs)
        with _disable_current_modes():
            return function(*args, **kwargs)

    return wrapped


def save_in_graphs(operator: Any) -> None:
    """Let a graph that holds a checkpoint save what an operator of ``custom_op`` returns: it reads what later moves."""

    def saved(mode: Any, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        policy, mode.policy_fn = mode.policy_fn, lambda *_, **__: CheckpointPolicy.MUST_SAVE
        try:
            return mode.__torch_dispatch__(func, types, args, kwargs)
        finally:
            mode.policy_fn = policy

    operator.register_torch_dispatch(SELECTIVE, saved)
