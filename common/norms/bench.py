"""Time the layers against BatchNorm: ``python -m common.norms.bench``."""

import platform
import time
from collections.abc import Callable

import torch
from jsonargparse import auto_cli
from torch import Tensor, nn

from common.norms import SCBNorm, UCBNorm

SHAPES = ((64, 256, 8, 8), (64, 128, 16, 16), (128, 3, 32, 32))
COMPONENTS = 3


def layers(channels: int, backend: str) -> dict[str, nn.Module]:
    """Return the layers of a table's columns, in training mode."""
    return {
        "SCB": SCBNorm(channels, COMPONENTS, backend=backend),
        "UCB joint": UCBNorm(channels, COMPONENTS, groups=1, backend=backend),
        "UCB channel-wise": UCBNorm(channels, COMPONENTS, backend=backend),
    }


def step(layer: nn.Module, x: Tensor, g: Tensor, *, backward: bool) -> Callable[[], object]:
    """Return one run of a layer on x (N, C, *), with or without its backward pass for the gradient g."""
    arguments = (x, torch.arange(len(x), device=x.device) % COMPONENTS) if isinstance(layer, SCBNorm) else (x,)
    inputs = [x, *(p for p in layer.parameters() if p.requires_grad)]

    def forward() -> Tensor:
        with torch.no_grad():
            return layer(*arguments)

    return (lambda: torch.autograd.grad(layer(*arguments), inputs, g)) if backward else forward


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


def row(shape: tuple[int, ...], *, backward: bool, backend: str, rounds: int, device: torch.device) -> str:
    """Return one row of the table: BatchNorm's time, and every layer's ratio to it with its spread."""
    x = torch.randn(shape, device=device).requires_grad_(backward)
    g = torch.randn(shape, device=device)
    bench = {"BatchNorm2d": nn.BatchNorm2d(shape[1]), **layers(shape[1], backend)}
    runs = {name: step(layer.to(device), x, g, backward=backward) for name, layer in bench.items()}
    times = compare(runs, rounds, device)
    base = times.pop("BatchNorm2d")
    cells = ["x".join(map(str, shape)), "forward + backward" if backward else "forward"]
    cells.append("{1:.2f} ({0:.2f}-{2:.2f})".format(*quantiles(base)))
    for measured in times.values():
        ratios = [a / b for a, b in zip(measured, base, strict=True)]
        cells.append("{1:.1f} ({0:.1f}-{2:.1f})".format(*quantiles(ratios)))
    return f"| {' | '.join(cells)} |"


def main(backend: str = "auto", rounds: int = 11, device: str = "cpu") -> None:
    """Print a Markdown table of times, as ratios to nn.BatchNorm2d: median and 20-80 % spread.

    Args:
        backend: how the layers compute: auto, reference or eager.
        rounds: times that every layer is measured, in turn.
        device: where, for instance cpu or cuda.
    """
    where = torch.device(device)
    name = torch.cuda.get_device_name(where) if where.type == "cuda" else platform.processor() or platform.machine()
    print(f"{name}, {torch.get_num_threads()} threads, torch {torch.__version__}, ", end="")
    print(f"Python {platform.python_version()}, K={COMPONENTS}, float32, training mode, backend {backend}\n")
    print("| shape | pass | BatchNorm2d, ms |", " | ".join(f"{title} / BN" for title in layers(2, backend)), "|")
    print("|" + "---|" * (3 + len(layers(2, backend))))
    for shape in SHAPES:
        for backward in (False, True):
            print(row(shape, backward=backward, backend=backend, rounds=rounds, device=where), flush=True)


if __name__ == "__main__":
    auto_cli(main)
