"""The loops of mixtures in C++: the ``compiled`` backend, on a CPU for float32 (see ``mixture.cpp``).

A compiler makes a library for each number of components, in a second or two; it is kept in
``~/.cache/cluster-based-norm/native`` (``XDG_CACHE_HOME`` in place of ``~/.cache``, if set) for all processes on
processors of that kind. One library serves all sizes and layouts.
"""

import contextlib
import ctypes
import functools
import hashlib
import math
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.graph import increment_version
from torch.nn import Parameter

from ... import mixture
from ...mixture import Components, FitRule, Rule
from .. import graphs, reference
from ..backend import Affine, Backend, Options
from ..eager import first_derivative_only
from ..reference import MixtureParams, Moments

SOURCE = Path(__file__).with_name("mixture.cpp")
OPTIONS = ("-std=c++17", "-O3", "-march=native", "-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math")
MOST_COMPONENTS = 16
NO_FLOOR = -1e30


@functools.cache
def _processor() -> str:
    """Describe what code for this processor may use: a folder may be shared by machines that differ."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith(("flags", "Features")):
                return line
    return f"{platform.machine()} {platform.processor()}"


def _folder() -> Path:
    parent = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    return parent / "cluster-based-norm" / "native"


@functools.cache
def _library(num_components: int, command: str) -> ctypes.CDLL | None:
    """Return the loops for a number of components, compiled now unless they were; None where that fails."""
    source = SOURCE.read_bytes()
    options = (*OPTIONS, f"-DCOMPONENTS={num_components}")
    key = "\n".join((command, *options, _processor(), torch.__version__)).encode()
    name = f"{num_components}-{hashlib.blake2b(source + key, digest_size=12).hexdigest()}.so"
    with tempfile.TemporaryDirectory(prefix="cluster-based-norm-") as aside:
        path = Path(aside) / name
        with contextlib.suppress(OSError, RuntimeError):  # the latter where there is no home
            folder = _folder()
            folder.mkdir(parents=True, exist_ok=True)
            if (folder / name).exists() or os.access(folder, os.W_OK):
                path = folder / name
        try:
            if not path.exists():
                _compile(command, options, path)
            return _declared(ctypes.CDLL(str(path)))
        except (OSError, subprocess.CalledProcessError):
            return None


def _compile(command: str, options: Sequence[str], path: Path) -> None:
    """Compile to a file that appears whole, for other processes may be doing the same."""
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        made = Path(folder) / path.name
        # The threads of torch, whose library is the one already loaded.
        subprocess.run(
            [command, *options, "-fopenmp", "-fPIC", "-shared", str(SOURCE), "-o", str(made)],
            check=True,
            capture_output=True,
        )
        made.replace(path)


_POINTER, _LONG, _INT, _FLOAT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int, ctypes.c_float
_SHAPE = (_LONG, _LONG, _LONG, _INT, _LONG)  # n, c, l, rows, groups


def _declared(library: ctypes.CDLL) -> ctypes.CDLL:
    library.state_size.argtypes, library.state_size.restype = (_LONG, _LONG), _LONG
    library.posteriors_size.argtypes, library.posteriors_size.restype = _SHAPE, _LONG
    library.forward.argtypes = (*[_POINTER] * 9, *_SHAPE, _FLOAT, _FLOAT, _FLOAT, _INT, _INT, _INT)
    library.backward.argtypes = (*[_POINTER] * 9, *_SHAPE, _FLOAT, _FLOAT, _INT, _INT)
    library.move_averages.argtypes = (*[_POINTER] * 4, _LONG, _LONG, _FLOAT, _INT, _FLOAT, _INT)
    library.fit_mixture.argtypes = (*[_POINTER] * 5, _LONG, _LONG, _LONG, _FLOAT, _FLOAT, _INT, _INT)
    for function in (library.forward, library.backward, library.move_averages, library.fit_mixture):
        function.restype = None
    return library


def compiler() -> str:
    """Return the command that compiles C++, whether or not there is one."""
    return os.environ.get("CXX", "g++")


@functools.cache  # every batch asks, and looking takes longer than a small batch
def _on_path(program: str) -> bool:
    return shutil.which(program) is not None


def library(num_components: int) -> Any:
    """Return the loops for a number of components, or None if there can be none here."""
    if not 0 < num_components <= MOST_COMPONENTS or not _on_path(compiler()):
        return None
    return _library(num_components, compiler())


def refusal_of_components(num_components: int) -> str | None:
    """Return why there are no loops for a number of components, 0 for clusters that are known; None if there are."""
    if not num_components:
        return "has loops for mixtures (ucb, mn) alone"
    if num_components > MOST_COMPONENTS:
        return f"has loops for at most {MOST_COMPONENTS} components"
    return None


def refusal(x: Tensor, num_components: int, *parameters: Tensor | None) -> str | None:
    """Return why the loops cannot compute x with these parameters, or None; compile them if need be."""
    if reason := refusal_of_components(num_components):
        return reason
    if graphs.watched(x):
        return "is closed to dispatch modes and subclasses of Tensor"
    for t in (x, *parameters):
        if t is None:
            continue
        if t.dtype != torch.float32 or t.device.type != "cpu":
            return f"needs float32 on a CPU, got {str(t.dtype).removeprefix('torch.')} on {t.device}"
        if type(t) not in (Tensor, Parameter):  # whose memory may hold anything
            return f"cannot read a {type(t).__name__}"
    if library(num_components) is None:
        why = "fails" if _on_path(compiler()) else "is not on the PATH"
        return f"needs a C++ compiler, but {compiler()!r} {why}; install one or set CXX"
    return None


def _pointers(*tensors: Tensor | None) -> Iterator[int | None]:
    return (None if t is None else t.data_ptr() for t in tensors)


def _laid_out(x: Tensor) -> tuple[Tensor, bool]:
    r"""Return x (N, C, \*) in a layout that the loops read, and whether the channels lie side by side."""
    if x.is_contiguous():
        return x, x.numel() == x.shape[0] * x.shape[1]
    if x.movedim(1, -1).is_contiguous():
        return x, True
    return x.contiguous(), x.numel() == x.shape[0] * x.shape[1]


def _shape(x: Tensor, rows: bool, groups: int) -> tuple[int, int, int, int, int]:
    samples, channels = x.shape[:2]
    return samples, channels, x.numel() // (samples * channels), rows, groups


def _forward(
    x: Tensor, mixture: Sequence[Tensor], weight: Tensor | None, bias: Tensor | None, options: Options
) -> tuple[Tensor, Tensor, Tensor]:
    """Return y, a state, and the posteriors that the backward pass needs."""
    log, mean, var = (t.contiguous() for t in mixture)
    lib = library(len(mean))
    x, rows = _laid_out(x)
    shape = _shape(x, rows, options.groups)
    y, state = torch.empty_like(x), mean.new_empty(lib.state_size(mean.shape[1], options.groups))
    learned = options.statistics == "learned"
    tau = mean.new_empty(0 if learned else lib.posteriors_size(*shape))
    pointers = _pointers(x, y, state, tau, log, mean, var, weight, bias)
    floor = math.log(options.min_weight) if options.min_weight else NO_FLOOR
    numbers = options.eps, floor, options.kappa(len(mean)), options.stored, learned, torch.get_num_threads()
    lib.forward(*pointers, *shape, *numbers)
    return y, state, tau


class _Mixture(Function):
    """Eqs. 6-9, or Eq. 15, and an affine map: y, and a state, which carries no gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
        *mixture, weight, bias, options = arguments
        y, state, tau = _forward(x, mixture, weight, bias, options)
        ctx.save_for_backward(x, state, tau, weight)
        ctx.options, ctx.num = options, len(mixture[0])
        ctx.mark_non_differentiable(state)
        return y, state

    @staticmethod
    @first_derivative_only
    def backward(ctx: Any, g: Tensor, *_: Tensor) -> tuple:
        """Return the gradients of x, log, mean, var, weight and bias."""
        (x, state, tau, weight), options = ctx.saved_tensors, ctx.options
        x, rows = _laid_out(x)
        if g.stride() != x.stride():
            g = torch.empty_like(x).copy_(g)
        dx, channels = torch.empty_like(x), x.shape[1]
        affine = None if weight is None else x.new_empty(2, channels)
        both = log = None
        if any(ctx.needs_input_grad[1:4]):
            both, log = x.new_empty(2, ctx.num, channels), x.new_empty(ctx.num, channels)
        pointers = _pointers(x, g, dx, state, tau, weight, affine, both, log)
        learned = options.statistics == "learned"
        numbers = options.eps, options.kappa(ctx.num), learned, torch.get_num_threads()
        library(ctx.num).backward(*pointers, *_shape(x, rows, options.groups), *numbers)
        of_mixture = (None, None, None) if both is None or log is None else (log.sum(1), *both.unbind())
        return dx, *of_mixture, *((None, None) if affine is None else affine.unbind()), None


class Cpu(Backend):
    """The closed forms of mixtures as loops in C++, for float32 on a CPU.

    A state is one vector: the terms of the densities and the batch's moments, as ``State`` of mixture.cpp says.
    """

    copies_params = False

    def normalise(
        self, x: Tensor, params: MixtureParams, affine: Affine, options: Options
    ) -> tuple[Tensor, Tensor | None]:
        """See ``Backend``; a mixture that is stored in parameters has its gradients through torch."""
        if options.stored and params.mean.requires_grad:
            params = MixtureParams(*params.plain(options.min_weight))
            options = options._replace(stored=False, min_weight=0.0)
        y, state = _Mixture.apply(reference.flatten(x), *params, *affine, options)  # pyright: ignore[reportGeneralTypeIssues]
        return y.reshape(x.shape), None if options.statistics == "learned" else state

    def moments(self, state: Tensor, num_components: int, groups: int) -> Moments:
        """Return views of a state."""
        channels = (len(state) - num_components * groups - num_components) // (4 * num_components)
        tables = state[: 4 * num_components * channels].view(4, num_components, channels)
        mass = state[tables.numel() : tables.numel() + num_components * groups].view(num_components, groups)
        return Moments(mass, tables[2], tables[3])

    def update(
        self,
        params: MixtureParams,
        state: Tensor,
        groups: int,
        rule: Rule,
        fit: tuple[MixtureParams | None, MixtureParams] | None = None,
    ) -> None:
        """See ``Backend``."""
        if not all(t.is_contiguous() for t in params):
            super().update(params, state, groups, rule, fit)
            return
        num, channels = params.mean.shape
        if fit is not None:
            mixture.store_fit(fit, self.moments(state, num, groups))
        momentum, average, min_weight, shared, _ = rule
        pointers = _pointers(*params, state)
        library(num).move_averages(*pointers, channels, groups, momentum, average == "paper", min_weight, shared)
        increment_version(tuple(params))

    def _em(self, points: Tensor, start: Components, rule: FitRule) -> Components:
        weight, mean, var = (t.clone(memory_format=torch.contiguous_format) for t in start)
        least, points = mixture.variance_floor(points).contiguous(), points.contiguous()
        pointers = _pointers(points, weight, mean, var, least)
        numbers = rule.groups, rule.eps, mixture.EMPTY, rule.steps, torch.get_num_threads()
        library(len(mean)).fit_mixture(*pointers, *points.shape, *numbers)
        return Components(weight, mean, var)
