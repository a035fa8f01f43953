"""Time the layers against BatchNorm: ``python -m common.norms.bench``."""

import itertools
import platform
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.profiler import ProfilerActivity, profile

from . import functional
from .command import Parser, run_command, whole
from .machine import commit, cpu_model
from .registry import make_norm
from .scb_norm import SCBNorm, SCBNormBase
from .ucb_norm import UCBNorm

SHAPES = ((64, 256, 8, 8), (64, 128, 16, 16), (128, 3, 32, 32), (256, 128, 8, 8), (216, 3, 32, 32))
GPU_SHAPES = (*SHAPES, (64, 64, 112, 112))
"""Where there is memory and time for a map as large as a classifier's first."""
FORWARD, BOTH, EVALUATION = "forward", "both", "evaluation"
TIMED: dict[str, tuple[tuple[tuple[int, ...], ...], tuple[torch.dtype, ...], tuple[str, ...]]] = {
    "cpu": (SHAPES, (torch.float32,), (FORWARD, BOTH)),
    "cuda": (GPU_SHAPES, (torch.float32, torch.bfloat16), (EVALUATION, FORWARD, BOTH)),
}
"""Shapes, precisions and passes to time, by a device's type."""
COMPONENTS = 3
LAYOUTS = {"NCHW": torch.contiguous_format, "NHWC": torch.channels_last}
PLACES = {
    "third normalization of the shallow CNN": (256, 128, 8, 8),
    "second normalization of the generator": (64, 128, 16, 16),
    "image before the vision transformer": (216, 3, 32, 32),
}
"""Where the paper puts the layers: activations (N, C, H, W), N its batch size."""
_PAPER: dict[str, Any] = {"affine": False}
TABLE1: dict[str, tuple[str, dict[str, Any]]] = {
    "BN": ("bn", {}),
    "MN": ("mn", _PAPER),
    "SCB": ("scb", {}),
    "SCB-base": ("scb_base", {}),
    "UCB, learned": ("ucb", {"groups": 1, "update": "weight", **_PAPER}),
    "UCB, moving averages": ("ucb", {"groups": 1, **_PAPER}),
    "UCB, channel-wise": ("ucb", _PAPER),
}
"""Kind and options of the layers of Table I, and last the default of this project, one posterior a channel."""


def layers(channels: int, backend: str) -> dict[str, nn.Module]:
    """Return the layers that are compared with BatchNorm, in training mode."""
    mixtures: dict[str, nn.Module] = {
        "UCB joint": UCBNorm(channels, COMPONENTS, groups=1, backend=backend),
        "UCB channel-wise": UCBNorm(channels, COMPONENTS, backend=backend),
    }
    return mixtures if backend == "compiled" else {"SCB": SCBNorm(channels, COMPONENTS, backend=backend), **mixtures}


def arguments(layer: nn.Module, x: Tensor) -> tuple[Tensor, ...]:
    """Return what a layer takes of x (N, C, *): x alone, or x and a cluster for each sample, all of them in turn."""
    if not isinstance(layer, SCBNorm | SCBNormBase):
        return (x,)
    return x, torch.arange(len(x), device=x.device) % layer.num_clusters


def step(layer: nn.Module, x: Tensor, g: Tensor, *, backward: bool) -> Callable[[], object]:
    """Return one run of a layer on x (N, C, *), with or without its backward pass for the gradient g."""
    given = arguments(layer, x)
    inputs = [x, *(p for p in layer.parameters() if p.requires_grad)]

    def forward() -> Tensor:
        with torch.no_grad():
            return layer(*given)

    return (lambda: torch.autograd.grad(layer(*given), inputs, g)) if backward else forward


def milliseconds(run: Callable[[], object], repeats: int, device: torch.device) -> float:
    """Return the mean time of a run over some repeats."""
    synchronize = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    synchronize()
    start = time.perf_counter()
    for _ in range(repeats):
        run()
    synchronize()
    return (time.perf_counter() - start) * 1e3 / repeats


def compare(runs: dict[str, Callable[[], object]], rounds: int, device: torch.device) -> dict[str, list[float]]:
    """Time every run in turn, round after round, so that a change of the machine's pace meets all alike."""
    repeats = {name: max(1, round(10 / milliseconds(run, 2, device))) for name, run in runs.items()}
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            times[name].append(milliseconds(run, repeats[name], device))
    return times


def quantiles(values: list[float]) -> tuple[float, float, float]:
    """Return the 20, 50 and 80 % quantiles."""
    ordered = sorted(values)
    low, middle, high = (ordered[round(q * (len(ordered) - 1))] for q in (0.2, 0.5, 0.8))
    return low, middle, high


def spread(values: list[float], unit: str = "") -> str:
    """Return the median with the 20-80 % spread."""
    low, middle, high = quantiles(values)
    return f"{middle:.2f}{unit} ({low:.2f}-{high:.2f})"


def ratios(times: list[float], base: list[float]) -> list[float]:
    """Return times as ratios to those that were measured in the same rounds."""
    return [a / b for a, b in zip(times, base, strict=True)]


def case(
    shape: tuple[int, ...],
    layout: str,
    device: torch.device,
    *,
    backward: bool = True,
    dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor]:
    """Return an activation and an output gradient."""
    x, g = (torch.randn(shape, device=device, dtype=dtype).contiguous(memory_format=LAYOUTS[layout]) for _ in range(2))
    return x.requires_grad_(backward), g


def time_row(
    shape: tuple[int, ...],
    layout: str,
    backends: list[str],
    rounds: int,
    device: torch.device,
    dtype: torch.dtype = torch.float32,
) -> Iterator[str]:
    """Yield a row for each kind of pass that is timed on the device: BatchNorm's time, and ratios to it."""
    for passes in TIMED[device.type][2]:
        backward = passes == BOTH
        x, g = case(shape, layout, device, backward=backward, dtype=dtype)
        bench: dict[str, nn.Module] = {"BatchNorm2d": nn.BatchNorm2d(shape[1])}
        for backend in backends:
            bench |= {f"{name} {backend}": layer for name, layer in layers(shape[1], backend).items()}
        for layer in bench.values():
            layer.to(device).train(passes != EVALUATION)
        runs = {name: step(layer, x, g, backward=backward) for name, layer in bench.items()}
        times = compare(runs, rounds, device)
        base = times.pop("BatchNorm2d")
        name = layout if dtype == torch.float32 else f"{layout}, {str(dtype).removeprefix('torch.')}"
        cells = ["x".join(map(str, shape)), name, passes, spread(base)]
        yield line([*cells, *(spread(ratios(measured, base)) for measured in times.values())])


def saved_bytes(run: Callable[[], object]) -> int:
    """Return the bytes that autograd keeps for a run's backward pass, each storage counted once."""
    kept: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with saved_tensors_hooks(pack, lambda t: t):
        run()
    return sum(kept.values())


def peak_bytes(run: Callable[[], object], device: torch.device) -> int:
    """Return the most bytes that a run holds at once beyond what was held before."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        return torch.cuda.max_memory_allocated(device) - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    held = most = 0
    # The events of the profiler's own table leave out what an operator allocates inside.
    for event in profiler.profiler.kineto_results.events():  # pyright: ignore[reportOptionalMemberAccess]
        if event.name() == "[memory]":
            held += event.nbytes()  # pyright: ignore[reportAttributeAccessIssue]
            most = max(most, held)
    return most


def memory_row(shape: tuple[int, ...], backends: list[str], device: torch.device) -> str:
    """Return a row of memory: kept for the backward pass and held at most, in sizes of the activation."""
    x, g = case(shape, "NCHW", device)
    cells = ["x".join(map(str, shape))]
    bench = {"BatchNorm2d": nn.BatchNorm2d(shape[1])}
    for backend in backends:
        bench |= {f"{name} {backend}": layer for name, layer in layers(shape[1], backend).items()}
    return line([*cells, *(memory(layer.to(device), x, g) for layer in bench.values())])


def memory(layer: nn.Module, x: Tensor, g: Tensor) -> str:
    """Return what a layer keeps for the backward pass and holds at most in training, in sizes of x."""
    run = step(layer.train(), x, g, backward=True)
    run()  # compilation is not counted
    return " / ".join(f"{amount / x.nbytes:.2f}" for amount in (saved_bytes(run), peak_bytes(run, x.device)))


def table1_rows(shape: tuple[int, ...], rounds: int, device: torch.device) -> list[list[str]]:
    """Return a row for each layer of Table I: name, learned and kept numbers, three times, memory."""
    layers = {
        name: make_norm(kind, shape[1], COMPONENTS, **options).to(device) for name, (kind, options) in TABLE1.items()
    }
    rows = {name: [name, *(f"{numbers:,}" for numbers in count(layer))] for name, layer in layers.items()}
    for passes in (EVALUATION, FORWARD, BOTH):
        x, g = case(shape, "NCHW", device, backward=passes == BOTH)
        for layer in layers.values():
            layer.train()(*arguments(layer, x.detach()))  # mixtures are seeded before anything is measured
            layer.train(passes != EVALUATION)
        runs = {name: step(layer, x, g, backward=passes == BOTH) for name, layer in layers.items()}
        for run in runs.values():
            milliseconds(run, 1, device)  # compilation is not counted
        times = compare(runs, rounds, device)
        for name, measured in times.items():
            bn = times["BN"]
            rows[name].append(spread(bn, " ms") if name == "BN" else spread(ratios(measured, bn)))
    x, g = case(shape, "NCHW", device)
    return [[*rows[name], memory(layer, x, g)] for name, layer in layers.items()]


def count(layer: nn.Module) -> tuple[int, int]:
    """Return how many numbers a layer learns by gradients, and how many statistics it keeps in buffers."""
    learned = sum(p.numel() for p in layer.parameters() if p.requires_grad)
    kept = [b for name, b in layer.named_buffers() if b.is_floating_point() and name != "initialized"]
    return learned, sum(b.numel() for b in kept)


def line(cells: list[str]) -> str:
    """Return a line of a Markdown table."""
    return f"| {' | '.join(cells)} |"


def head(titles: Sequence[str]) -> str:
    """Return the two lines that a Markdown table begins with."""
    return f"{line(list(titles))}\n|{'---|' * len(titles)}"


def machine(device: torch.device) -> str:
    """Return the machine and the code that numbers were measured with."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_model()
    code = f"torch {torch.__version__}, Python {platform.python_version()}, commit {commit()}"
    return f"{name}, {torch.get_num_threads()} threads, {code}"


def runnable(device: torch.device) -> list[str]:
    """Return the backends in closed form that can run on a device."""
    return [backend for backend in ("eager", "compiled", "triton") if refusal(backend, device) is None]


def refusal(backend: str, device: torch.device, dtype: torch.dtype = torch.float32) -> str | None:
    """Return why a backend cannot run on the device in a precision, or None if it can."""
    try:
        functional.choose_backend(backend, torch.empty(0, device=device, dtype=dtype), COMPONENTS)
    except ValueError as refused:
        return str(refused).removeprefix("backend: ")
    return None


DESCRIPTION = """\
Print Markdown tables of the layers' time and memory, as ratios to nn.BatchNorm2d and to the activation's size.

Times are medians with the 20-80 % spread, measured alternating in one process, in training mode, in float32; on a
GPU in bfloat16 and in evaluation too, and of a larger map. Layers are at their defaults. Memory is what autograd
keeps for the backward pass / what forward and backward hold at most.
"""


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command.

    Raises:
        SystemExit: with status 2, for an unknown device or backend, or one that cannot run here.
    """
    parser = Parser(f"python -m {__package__}.bench", DESCRIPTION)
    parser.add_argument(
        "--backends",
        nargs="+",
        default=[],
        help="how the layers compute: eager compiled triton reference; none given is all that can run but the last",
    )
    parser.add_switch(
        "--table1",
        False,
        "print the paper's Table I instead: numbers that BN, MN, SCB, SCB-base and UCB learn and keep in buffers, "
        "their time in evaluation and training, and memory, at three places of the paper's networks",
    )
    parser.add_argument("--rounds", type=whole(1), default=11, help="times that every layer is measured, in turn")
    parser.add_device()
    parser.add_argument("--threads", type=whole(0), default=0, help="CPU threads; 0 leaves the choice to torch")
    args = parser.parse_args(argv)
    if args.table1 and args.backends:
        parser.error(f"backends: expected none with table1, whose layers choose their own, got {args.backends}")
    for backend in args.backends:
        if reason := refusal(backend, args.device):
            parser.error(f"backends: {reason}")
    if args.threads:
        torch.set_num_threads(args.threads)
    if args.table1:
        _print_table1(args.rounds, args.device)
    else:
        _print_comparison(args.backends or runnable(args.device), args.rounds, args.device)


def _print_table1(rounds: int, device: torch.device) -> None:
    print(f"{machine(device)}, K={COMPONENTS}, float32")
    titles = ["layer", "learned", "kept", "evaluation", "training, forward", "training, both", "memory"]
    for place, shape in PLACES.items():
        print(f"\n{place}, {'x'.join(map(str, shape))}\n\n{head(titles)}")
        print(*map(line, table1_rows(shape, rounds, device)), sep="\n", flush=True)


def _print_comparison(backends: list[str], rounds: int, device: torch.device) -> None:
    shapes, dtypes, _ = TIMED[device.type]
    others = ", unless said otherwise" if len(dtypes) > 1 else ""
    print(f"{machine(device)}, K={COMPONENTS}, float32, training mode{others}\n")
    titles = [f"{title}, {backend}" for backend in backends for title in layers(2, backend)]
    print(head(["shape", "layout", "passes", "BatchNorm2d, ms", *titles]))
    for shape, layout, dtype in itertools.product(shapes, LAYOUTS, dtypes):
        for row in time_row(shape, layout, backends, rounds, device, dtype):
            print(row, flush=True)
    print("\n" + head(["shape", "BatchNorm2d", *titles]))
    for shape in shapes:
        print(memory_row(shape, backends, device), flush=True)


if __name__ == "__main__":
    run_command(main)
