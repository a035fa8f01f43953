"""What a device is given to do: launches of torch's operators and of Triton's kernels, and the bytes they move.

Nothing is computed: activations and parameters are on the meta device, and kernels are recorded in place of being
launched. Layers run as they are, with the bodies of their custom operators; whatever kernels these launch, in
whatever order, is found by recording, not from a list of names.
"""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from common.norms.backends.namespace import NAMESPACE
from common.norms.kernels import launch

FREE = ("empty", "new_empty", "_unsafe_view", "detach", "alias", "lift", "_reshape_alias", "sym_", "is_same_size")
"""Beginnings of the names of operators that launch nothing, besides views."""
WRITES_ALONE = ("copy_", "fill_", "zero_")
"""Operators in place that do not read what they write to."""
TIMES = {"native_batch_norm": 2, "native_batch_norm_backward": 2}
"""How often an operator reads its inputs, where not once."""
Touch = tuple[float, float]


TABLES = ("mean", "var", "mean_row", "var_row", "weight")


def _sums_of_clusters(arguments: dict[str, Any]) -> Touch:
    """Return how often sums are read: once more for what all clusters have together."""
    return 1 + any(arguments[name] is not None for name in ("added_ptr", "affine_ptr")), 0


def _drawn(arguments: dict[str, Any]) -> Touch:
    """Return the share of all locations that are drawn."""
    return arguments["COUNT"] / (arguments["N"] * arguments["L"]), 0


def _sums_of_a_fit(arguments: dict[str, Any]) -> Touch:
    """Return how often sums are read: masses, once a group, for the weights too."""
    return 1 + 1 / (3 * arguments["D"]), 0


TOUCHES: dict[tuple[str, str], Touch | Callable[[dict[str, Any]], Touch]] = {
    ("scb_rows_kernel", "sums_ptr"): _sums_of_clusters,
    # of samples of unknown clusters alone
    ("scb_rows_kernel", "left_ptr"): (0, 0),
    **{("scb_unknown_fwd_kernel", f"{name}_ptr"): (0, 0) for name in ("x", "y", *TABLES, "bias")},
    **{("scb_unknown_bwd_kernel", f"{name}_ptr"): (0, 0) for name in ("x", "g", "dx", *TABLES, "left")},
    ("mixture_merge_kernel", "x_ptr"): (0, 0),  # the batch's first location
    ("mixture_gradients_kernel", "coefficients_ptr"): (1 / 4, 0),  # the last plane
    ("mixture_bwd_kernel", "coefficients_ptr"): (3 / 4, 0),  # the others
    # planes of a state
    ("mixture_channel_bwd_kernel", "state_ptr"): (7 / 8, 0),
    ("mixture_moments_kernel", "state_ptr"): (0, 4 / 8),
    ("mixture_merge_kernel", "state_ptr"): (1 / 8, 4 / 8),
    ("mixture_apply_kernel", "state_ptr"): (5 / 8, 0),
    ("mixture_sums_kernel", "state_ptr"): (4 / 8, 0),
    ("mixture_coefficients_kernel", "state_ptr"): (3 / 8, 0),
    ("mixture_bwd_kernel", "state_ptr"): (5 / 8, 0),
    ("mixture_gradients_kernel", "state_ptr"): (1 / 8, 0),
    ("mixture_logits_kernel", "state_ptr"): (0, 0),  # one channel of a plane
    ("draw_kernel", "x_ptr"): _drawn,
    ("em_step_kernel", "x_ptr"): (0, 0),  # the first location
    ("em_step_kernel", "sums_ptr"): _sums_of_a_fit,
    # two tables in turn
    ("em_step_kernel", "new_log_ptr"): (0, 1),
    ("em_step_kernel", "new_mean_ptr"): (0, 1),
    ("em_step_kernel", "new_var_ptr"): (0, 1),
    ("mixture_averages_kernel", "fit_logits_ptr"): (0, 1),
    ("mixture_averages_kernel", "fit_mean_ptr"): (0, 1),
    ("mixture_averages_kernel", "fit_log_var_ptr"): (0, 1),
    ("mixture_averages_kernel", "logits_ptr"): (0, 1),
    ("mixture_averages_kernel", "mean_ptr"): (1, 1),
    ("mixture_averages_kernel", "log_var_ptr"): (1, 1),
}
"""How often a kernel reads and writes an argument, (kernel, argument), where not its whole once: outputs are written,
others read. It may depend on the other arguments. The test of traffic counts under Triton's interpreter and fails where
that is wrong."""


AGAIN = ("mixture_channel_kernel", "mixture_channel_bwd_kernel")
"""Kernels that read activations twice, the second time from the cache of a multiprocessor, which holds them."""


@dataclass(frozen=True, eq=False)
class Launch:
    """A kernel of Triton's, or of torch's for an operator, that is launched."""

    name: str
    reads: float
    """Bytes."""
    writes: float
    """Bytes."""
    function: Any = None
    """Triton's kernel, or None."""
    arguments: dict[str, Any] = field(default_factory=dict)
    """Its arguments by name; tensors as they were."""
    touched: dict[str, tuple[float, float]] = field(default_factory=dict)
    """How often each tensor among the arguments is read and written, as a whole."""
    options: dict[str, Any] = field(default_factory=dict)
    """Of the compiler: ``num_warps`` and others."""
    grid: tuple[int, ...] = ()

    @property
    def programs(self) -> int:
        """How many blocks of threads there are."""
        return torch.Size(self.grid).numel()

    def reads_activation(self, size: int) -> bool:
        """Say whether a kernel of Triton's reads a tensor of so many elements, as x has."""
        return any(
            self.touched.get(name, (0, 0))[0] >= 0.5 and isinstance(value, Tensor) and value.numel() >= size
            for name, value in self.arguments.items()
        )


def bytes_of(t: Tensor) -> int:
    """Return the bytes of the elements of t that differ: an expanded dimension is stored once."""
    distinct = 1
    for size, stride in zip(t.shape, t.stride(), strict=True):
        distinct *= size if stride or not size else 1
    return distinct * t.element_size()


def _bodies() -> dict[str, Callable[..., Any]]:
    """Return the functions behind this package's operators, by qualified name."""
    from torch._library.custom_ops import OPDEFS  # noqa: PLC0415 - no public way leads from an operator to its body

    return {name: op._init_fn for name, op in OPDEFS.items() if name.startswith(f"{NAMESPACE}::")}


class Recorder(TorchDispatchMode):
    """Record every launch, in order, in ``launches``, while it is entered with ``recording``."""

    def __init__(self, device: str = "meta") -> None:
        super().__init__()
        self.device = device
        self.launches: list[Launch] = []
        self._bodies = _bodies()
        self._written: set[int] = set()
        self._fresh: dict[int, Any] = {}  # storages by address, which keeps them and so the address

    def take(self) -> list[Launch]:
        """Return what was recorded since the last call."""
        taken, self.launches = self.launches, []
        return taken

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        body = self._bodies.get(func.name())
        if body is not None:
            with self:
                return body(*args, **kwargs)
        out = func(*args, **kwargs)
        name = func.overloadpacket.__name__
        outputs = [t for t in pytree.tree_leaves(out) if self._ours(t)]
        inputs = [t for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        if name.startswith(("empty", "new_empty")):
            for t in outputs:
                self._fresh[t.untyped_storage()._cdata] = t
            return out
        if func.is_view or name.startswith(FREE) or not (outputs or any(map(self._ours, inputs))):
            return out
        read = inputs[1:] if name in WRITES_ALONE else inputs
        for t in outputs:
            self._written_to(t)
        if any(t.numel() for t in outputs) or not outputs:
            once = {id(t): t for t in read}.values()
            reads = TIMES.get(name, 1) * sum(map(bytes_of, once))
            self.launches.append(Launch(name, reads, sum(map(bytes_of, outputs))))
        return out

    def _ours(self, value: object) -> bool:
        return isinstance(value, Tensor) and value.device.type == self.device

    def _written_to(self, t: Tensor) -> None:
        self._fresh.pop(t.untyped_storage()._cdata, None)

    def kernel(self, function: Any, grid: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Record the launch of a kernel of Triton's."""
        names = function.arg_names
        arguments = dict(zip(names, args, strict=False)) | {n: v for n, v in kwargs.items() if n in names}
        options = {n: v for n, v in kwargs.items() if n not in names}
        tensors = {n: v for n, v in arguments.items() if isinstance(v, Tensor)}
        touched = {}
        for argument, t in tensors.items():
            rule: Any = (0.0, 1.0) if t.untyped_storage()._cdata in self._fresh else (1.0, 0.0)
            rule = TOUCHES.get((function.__name__, argument), rule)
            touched[argument] = rule(arguments) if callable(rule) else rule
        for argument, t in tensors.items():
            if touched[argument][1]:
                self._written_to(t)
        once: dict[object, tuple[float, float]] = {}
        for argument, t in tensors.items():  # a tensor given twice is one
            where = (t.untyped_storage()._cdata, t.storage_offset(), t.shape)
            reads, writes = (times * bytes_of(t) for times in touched[argument])
            before = once.get(where, (0.0, 0.0))
            once[where] = max(reads, before[0]), max(writes, before[1])
        self.launches.append(
            Launch(
                name=function.__name__,
                reads=sum(reads for reads, _ in once.values()),
                writes=sum(writes for _, writes in once.values()),
                function=function,
                arguments=arguments,
                touched=touched,
                options=options,
                grid=tuple(grid),
            )
        )


def _no_refusal(x: Tensor) -> None:
    """Refuse nothing; a mock would take as long as a launch."""


def _nothing(*_: Any, **__: Any) -> contextlib.AbstractContextManager[None]:
    return contextlib.nullcontext()


@contextlib.contextmanager
def on_any_device() -> Iterator[None]:
    """Let the Triton backend take tensors on any device, as if it were a GPU."""
    with mock.patch.object(launch, "refusal", _no_refusal), mock.patch.object(torch.cuda, "device", _nothing):
        yield


@contextlib.contextmanager
def replaced_kernels(run: Callable[..., Any]) -> Iterator[None]:
    """Call run(kernel, grid, args, kwargs) in place of launching a kernel of Triton's, on any device.

    What it returns, if not None, is launched in its place from then on, as a compiled kernel.
    """
    from triton.runtime.interpreter import InterpretedFunction  # noqa: PLC0415 - an optional dependency
    from triton.runtime.jit import JITFunction  # noqa: PLC0415

    def replaced(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        return run(self, grid, args, kwargs)

    with (
        on_any_device(),
        mock.patch.object(launch, "COMPILED", {}),  # what was launched before is not launched past this
        mock.patch.object(JITFunction, "run", replaced),
        mock.patch.object(InterpretedFunction, "run", replaced),
    ):
        yield


@contextlib.contextmanager
def recording(device: str = "meta") -> Iterator[Recorder]:
    """Record what is launched on tensors of a device."""
    recorder = Recorder(device)
    autocast = mock.patch.object(torch, "autocast", _nothing)  # it knows no meta device
    with replaced_kernels(recorder.kernel), autocast, recorder:
        yield recorder
