"""What a layer of each kind costs in parameters, time and memory: ``python -m common.norms.costs``."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from common.cli.arguments import parse
from common.machine.device import resolve_device, set_threads
from common.norms.bench import (
    arguments,
    case,
    compare,
    line,
    machine,
    milliseconds,
    peak_bytes,
    quantiles,
    saved_bytes,
    step,
)
from common.norms.factory import make_norm

PLACES = {
    "third normalization of the shallow CNN": (256, 128, 8, 8),
    "second normalization of the generator": (64, 128, 16, 16),
    "image before the vision transformer": (216, 3, 32, 32),
}
"""Where the paper puts the layers: activations (N, C, H, W), N its batch size."""
_PAPER: dict[str, Any] = {"affine": False}
LAYERS: dict[str, tuple[str, dict[str, Any]]] = {
    "BN": ("bn", {}),
    "MN": ("mn", _PAPER),
    "SCB": ("scb", {}),
    "SCB-base": ("scb_base", {}),
    "UCB, learned": ("ucb", {"groups": 1, "update": "weight", **_PAPER}),
    "UCB, moving averages": ("ucb", {"groups": 1, **_PAPER}),
    "UCB, channel-wise": ("ucb", _PAPER),
}
"""Kind and options: those of the paper's equations, and last the default of this project, one posterior a channel."""
_PASSES = ("evaluation", "training, forward", "training, both")


@dataclass(frozen=True, kw_only=True)
class CostsConfig:
    """Print what BN, MN, SCB, SCB-base and UCB cost at three places of the paper's networks, as Markdown tables.

    Learned numbers and those kept in buffers; time of a pass in evaluation, and forward, and forward and backward in
    training, as ratios to BN's (medians with the 20-80 % spread, measured alternating in one process, in float32);
    memory that autograd keeps for the backward pass / that both passes hold at most, in sizes of the activation.
    """

    components: int = 3
    """Components or clusters K."""
    rounds: int = 11
    """Times that every layer is measured, in turn."""
    device: str = "auto"
    """auto (cuda where there is one), cpu, cuda or cuda:n."""
    threads: int = 0
    """CPU threads; 0 leaves the choice to torch."""

    def __post_init__(self) -> None:
        for name in ("components", "rounds"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected at least 1, got {getattr(self, name)}")
        if self.threads < 0:
            raise ValueError(f"threads: expected 0 or more, got {self.threads}")


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command.

    Raises:
        UsageError: a device that is none, or cannot be used here.
    """
    cfg = parse(CostsConfig, argv, prog="python -m common.norms.costs")
    device = resolve_device(cfg.device)
    set_threads(cfg.threads)
    print(f"{machine(device)}, K={cfg.components}, float32")
    for place, shape in PLACES.items():
        print(f"\n{place}, {'x'.join(map(str, shape))}\n")
        print(line(["layer", "learned", "kept", *_PASSES, "memory"]))
        print("|" + "---|" * (4 + len(_PASSES)))
        for row in table(shape, cfg.components, cfg.rounds, device):
            print(line(row), flush=True)


def table(shape: tuple[int, ...], components: int, rounds: int, device: torch.device) -> list[list[str]]:
    """Return a row for each layer: name, learned and kept numbers, three times, memory."""
    layers = {
        name: make_norm(kind, shape[1], components, **options).to(device) for name, (kind, options) in LAYERS.items()
    }
    times = _times(layers, shape, rounds, device)
    rows = []
    for name, layer in layers.items():
        learned, kept = count(layer)
        rows.append([name, f"{learned:,}", f"{kept:,}", *times[name], _memory(layer, shape, device)])
    return rows


def count(layer: nn.Module) -> tuple[int, int]:
    """Return how many numbers a layer learns by gradients, and how many of floating point it keeps in buffers."""
    learned = sum(p.numel() for p in layer.parameters() if p.requires_grad)
    return learned, sum(b.numel() for b in layer.buffers() if b.is_floating_point())


def _times(
    layers: dict[str, nn.Module], shape: tuple[int, ...], rounds: int, device: torch.device
) -> dict[str, list[str]]:
    cells: dict[str, list[str]] = {name: [] for name in layers}
    for passes in _PASSES:
        x, g = case(shape, "NCHW", device, backward=passes.endswith("both"))
        for layer in layers.values():
            layer.train()(*arguments(layer, x.detach()))  # mixtures are seeded before anything is measured
            layer.train(passes != "evaluation")
        runs: dict[str, Callable[[], object]] = {
            name: step(layer, x, g, backward=passes.endswith("both")) for name, layer in layers.items()
        }
        for run in runs.values():
            milliseconds(run, 1, device)  # what is made once, such as compiled code, is not counted
        times = compare(runs, rounds, device)
        base = times["BN"]
        for name, measured in times.items():
            if name == "BN":
                cells[name].append("{1:.2f} ms ({0:.2f}-{2:.2f})".format(*quantiles(base)))
            else:
                ratios = [a / b for a, b in zip(measured, base, strict=True)]
                cells[name].append("{1:.2f} ({0:.2f}-{2:.2f})".format(*quantiles(ratios)))
    return cells


def _memory(layer: nn.Module, shape: tuple[int, ...], device: torch.device) -> str:
    x, g = case(shape, "NCHW", device)
    run = step(layer.train(), x, g, backward=True)
    run()
    return f"{saved_bytes(run) / x.nbytes:.2f} / {peak_bytes(run, device) / x.nbytes:.2f}"
