"""Check how this machine computes the layers: ``python -m common.norms.doctor``."""

import itertools
import math
import os
import platform
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from . import bench, functional
from .agreement import Case, budget, cluster_results, error, mixture_case, mixture_results
from .command import Parser, run_command
from .machine import cpu_model, version

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
COMPONENTS = (1, 3)
SHAPES: dict[tuple[int, ...], tuple[str, ...]] = {
    (5, 6): ("contiguous",),
    (3, 6, 2, 7): ("contiguous", "channels_last"),
}
"""(N, C = 6, *), hardly a power of two among them, and layouts."""
DRAWS = 8
"""Inputs of one shape that the reference's error is taken from: in a single one it may be lucky."""
TIMED: dict[str, tuple[tuple[tuple[int, ...], torch.dtype], ...]] = {
    "cpu": (((64, 128, 16, 16), torch.float32),),
    "cuda": tuple(
        (shape, dtype)
        for shape in ((64, 256, 8, 8), (64, 256, 32, 32), (64, 64, 112, 112))
        for dtype in (torch.float32, torch.bfloat16)
    ),
}
"""Shapes and precisions to time, by the device's type."""
ROUNDS = 5
ACCESSES = {"SCB": (2, 2, 5), "UCB joint": (2, 3, 8), "UCB channel-wise": (2, 3, 8)}
"""The least times that x, y, g and dx are read or written, together, by layers at their defaults: in evaluation, and in
training forward, and forward + backward."""

Results = dict[str, Tensor]


class Check(NamedTuple):
    """A computation whose output, gradients and moments are compared."""

    name: str
    run: Callable[[Case, str], Results]
    """On a case, by a backend."""
    of_clusters: bool = False
    """Whether clusters are given, and no mixture."""


class Oracle(NamedTuple):
    """An input, what float64 makes of it, and the error that each result may have."""

    case: Case
    exact: Results
    allowed: dict[str, float]


class Finding(NamedTuple):
    """The largest error of a backend in one check and precision."""

    share: float
    """Of the error allowed; infinite if a result is not finite, or there is none."""
    text: str

    @property
    def agrees(self) -> bool:
        """Whether the error is within its budget."""
        return self.share <= 1


def _cluster(case: Case, backend: str, *, ids: str, posterior: str) -> Results:
    x, _, mean, _, _ = case
    cluster = torch.arange(len(x), device=x.device) % len(mean)
    if ids == "mixed":
        cluster[::2] = -1
    return cluster_results(case, None if ids == "unknown" else cluster, backend, unknown_posterior=posterior)


def _mixture(case: Case, backend: str, *, groups: int, statistics: str) -> Results:
    results, moments = mixture_results(case, backend, groups=groups, statistics=statistics)
    return results | ({} if moments is None else moments._asdict())


def checks() -> Iterator[Check]:
    """Yield the comparisons."""
    for ids in ("known", "mixed", "unknown"):
        yield Check(f"SCB, {ids} ids", partial(_cluster, ids=ids, posterior="location"), of_clusters=True)
    yield Check("SCB, unknown ids, by sample", partial(_cluster, ids="unknown", posterior="sample"), of_clusters=True)
    for (name, groups), statistics in itertools.product(
        {"joint": 1, "grouped": 2, "channel-wise": 6}.items(), ("batch", "learned")
    ):
        yield Check(f"mixture, {name}, {statistics}", partial(_mixture, groups=groups, statistics=statistics))


def _cast(case: Case, activation: torch.dtype, parameters: torch.dtype) -> Case:
    x, log_lambda, mean, var, g = case
    return x.to(activation), log_lambda.to(parameters), mean.to(parameters), var.to(parameters), g.to(activation)


def _place(case: Case, layout: str, device: torch.device) -> Case:
    def lay(t: Tensor) -> Tensor:
        return t.movedim(1, -1).contiguous().movedim(-1, 1) if layout == "channels_last" else t

    x, log_lambda, mean, var, g = (t.to(device) for t in case)
    return lay(x), log_lambda, mean, var, lay(g)


def oracles(check: Check, dtype: torch.dtype) -> list[Oracle]:
    """Return a check's inputs with x and g in dtype; computed on the CPU, whatever device is examined.

    In float64 the reference has nothing more exact to be compared with: the budget is float32's, scaled by the
    ratio of their roundings.
    """
    measured = torch.float32 if dtype == torch.float64 else dtype
    scale = torch.finfo(dtype).eps / torch.finfo(measured).eps
    found = []
    for num, shape in itertools.product(COMPONENTS, SHAPES):
        draws = [mixture_case(shape, num, torch.float32, seed) for seed in range(DRAWS)]
        cases = [_cast(case, measured, torch.float32) for case in draws]
        exact = [check.run(_cast(case, torch.float64, torch.float64), "reference") for case in cases]
        plain = [check.run(case, "reference") for case in cases]
        allowed = {
            name: scale * max(budget(want[name], got[name]) for want, got in zip(exact, plain, strict=True))
            for name in exact[0]
        }
        found.append(Oracle(_cast(cases[0], dtype, torch.promote_types(dtype, torch.float32)), exact[0], allowed))
    return found


def examine(check: Check, backend: str, inputs: list[Oracle], device: torch.device) -> Finding:
    """Return the largest error of a backend over the inputs, each in every layout."""
    found = [_largest(check, backend, each, layout, device) for each in inputs for layout in SHAPES[each.case[0].shape]]
    return max(found, key=lambda finding: finding.share)


def _largest(check: Check, backend: str, oracle: Oracle, layout: str, device: torch.device) -> Finding:
    x, log_lambda, *_ = oracle.case
    where = f"at K={len(log_lambda)}, x {tuple(x.shape)} {layout} {_name(x.dtype)}"
    try:
        got = check.run(_place(oracle.case, layout, device), backend)
        errors = {name: error(want, got[name]) for name, want in oracle.exact.items()}
    except Exception as raised:  # whatever a broken installation raises is what the doctor looks for
        line = next(iter(str(raised).splitlines()), "")
        return Finding(math.inf, f"{type(raised).__name__} {where}: {line}")
    worst = Finding(0.0, "")
    for name, found in errors.items():
        allowed = oracle.allowed[name]
        share = 0.0 if found == 0 else found / allowed if allowed and math.isfinite(found) else math.inf
        if share > worst.share:
            worst = Finding(share, f"{name} errs by {found:.1e}, {share:.1f} times what is allowed, {where}")
    return worst


def compare(backends: Sequence[str], device: torch.device) -> tuple[int, list[str]]:
    """Print a line for each check and backend; return how many there were, and what disagrees."""
    print(f"\n{'error / allowed':<34}{'backend':<12}", *(f"{_name(dtype):>9}" for dtype in DTYPES))
    count, wrong = 0, []
    for check in checks():
        inputs = {dtype: oracles(check, dtype) for dtype in DTYPES}
        for backend in backends:
            if check.of_clusters and backend == "compiled":
                continue
            able = [dtype for dtype in DTYPES if bench.refusal(backend, device, dtype) is None]
            found = {dtype: examine(check, backend, inputs[dtype], device) for dtype in able}
            cells = [f"{found[dtype].share:>9.2f}" if dtype in found else f"{'-':>9}" for dtype in DTYPES]
            bad = [f"{backend}: {check.name}: {each.text}" for each in found.values() if not each.agrees]
            print(f"{check.name:<34}{backend:<12}", *cells, "  DISAGREES" if bad else "  ok", flush=True)
            count, wrong = count + 1, wrong + bad
    return count, wrong


def time_backends(backends: Sequence[str], device: torch.device) -> None:
    """Print how near each backend comes to the bandwidth of a copy of x, were it to move no more than it must."""
    for shape, dtype in TIMED[device.type]:
        _time_backends(backends, device, shape, dtype)


def _time_backends(backends: Sequence[str], device: torch.device, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x, g = torch.randn(2, *shape, device=device).to(dtype)
    y, size = torch.empty_like(x), x.numel() * x.element_size()
    print(f"\nshare of a copy's bandwidth, x {'x'.join(map(str, shape))} {_name(dtype)}, K={bench.COMPONENTS}")
    memory_title = f"{'peak memory, x':>16}" if device.type == "cuda" else ""
    titles = f"{'evaluation':>12}{'forward':>10}{'+ backward':>12}{'copy, GB/s':>12}{memory_title}"
    print(f"{'':<34}{'backend':<12}{titles}")
    for (name, accesses), backend in itertools.product(ACCESSES.items(), backends):
        if name not in bench.layers(shape[1], backend):
            continue
        layer, evaluated = (bench.layers(shape[1], backend)[name].to(device).train(train) for train in (True, False))
        forward = bench.step(layer, x, g, backward=False)
        both = bench.step(layer, x.detach().requires_grad_(), g, backward=True)
        evaluation = bench.step(evaluated, x, g, backward=False)
        runs = {"copy": lambda: y.copy_(x), "evaluation": evaluation, "forward": forward, "both": both}
        times = bench.compare(runs, ROUNDS, device)
        shares = [
            _median([moved / 2 * c / t for c, t in zip(times["copy"], times[run], strict=True)])
            for run, moved in zip(("evaluation", "forward", "both"), accesses, strict=True)
        ]
        cells = f"{shares[0]:>12.1%}{shares[1]:>10.1%}{shares[2]:>12.1%}"
        speed = 2 * size / _median(times["copy"]) / 1e6
        memory = f"{bench.peak_bytes(both, device) / size:>16.1f}" if device.type == "cuda" else ""
        print(f"{name:<34}{backend:<12}{cells}{speed:>12.1f}{memory}", flush=True)


def _median(values: list[float]) -> float:
    return bench.quantiles(values)[1]


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def describe(device: torch.device) -> Iterator[str]:
    """Yield what the machine has, a line each."""
    triton = version("triton") or "not installed"
    yield f"Python {platform.python_version()}, torch {torch.__version__}, triton {triton}"
    yield f"CPU: {cpu_model()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads"
    yield f"CUDA: {torch.version.cuda or 'not in this build of torch'}, {torch.cuda.device_count()} devices"
    for index in range(torch.cuda.device_count()):
        gpu = torch.cuda.get_device_properties(index)
        yield f"cuda:{index}: {gpu.name}, sm_{gpu.major}{gpu.minor}, {gpu.total_memory / 2**30:.0f} GiB"
    compiler = next(filter(None, map(shutil.which, (os.environ.get("CXX", "g++"), "g++", "clang++"))), "none found")
    yield f"C++ compiler: {compiler}"
    if os.environ.get("TRITON_INTERPRET") == "1":
        yield "TRITON_INTERPRET=1: kernels are interpreted, not compiled"
    yield f"examined: {device}"


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command; the exit status is 1 if a backend that can run disagrees.

    Raises:
        SystemExit: at its end; with status 2 for an unknown or missing device.
    """
    what = "Compare every backend of the layers with the float64 reference, and time it against a copy of its input."
    parser = Parser(f"python -m {__package__}.doctor", what)
    parser.add_device()
    parser.add_switch("--bandwidth", True, "measure the share of the device's copy bandwidth that each backend reaches")
    args = parser.parse_args(argv)
    device = args.device
    print(*describe(device), sep="\n")
    print()
    able = []
    for backend in functional.BACKENDS:
        reasons = [bench.refusal(backend, device, dtype) for dtype in DTYPES]
        if None in reasons:
            able.append(backend)
            print(f"{backend}: can run")
        else:
            print(f"{backend}: cannot run here: {reasons[DTYPES.index(torch.float32)]}")
    count, wrong = compare(able, device)
    if args.bandwidth and not wrong:  # a wrong result has no speed
        # auto is one of the others; on a CPU triton is interpreted, which says nothing about its speed
        skipped = ("auto", "triton") if device.type == "cpu" else ("auto",)
        time_backends([backend for backend in able if backend not in skipped], device)
    print(*(f"\n{line}" for line in wrong), sep="")
    print(f"{count} checks: {'all agree with the reference' if not wrong else f'{len(wrong)} disagreements'}")
    sys.exit(int(bool(wrong)))


if __name__ == "__main__":
    run_command(main)
