"""Time training steps of GANs that differ in their layers alone: ``python -m cbgan.bench``."""

import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace

import torch

from cbgan.config import GanConfig
from cbgan.networks.losses import Loss
from cbgan.task import GanTask
from common.data import ImageSet
from common.norms.bench import compare, head, line, machine, quantiles
from common.norms.config import NormConfig
from common.runtime.cli import parse
from common.runtime.command import run_command
from common.runtime.device import DTYPES, resolve_device, set_threads
from common.train.dry_run import Steps, Timed
from common.train.task import TrainContext

_PARTS = ("data", "d", "g")
_CALLED = {"width": "widths", "norm.kind": "kinds"}


@dataclass(frozen=True, kw_only=True)
class BenchConfig(GanConfig):
    """Print how long a training step takes with each kind of layer, as a Markdown table.

    Milliseconds with BatchNorm, and ratios to it with the others: medians of steps that are made in turn in one
    process, with their 20-80 % spread; then the share of a step that goes to making its batch, to the discriminator's
    update, to the generator's, and to what is left: copies of buffers, averages, checks. Settings of a run are those of
    the steps, but for width and norm.kind.
    """

    kinds: list[str] = field(default_factory=lambda: ["ucb", "mn"])
    """Kinds of layers, by norm.kind; bn is always measured. Those that take clusters make the GAN a conditional one,
    with norm.num_components classes."""
    widths: list[int] = field(default_factory=lambda: [64, 256, 512])
    """Channels of the widest layers; the paper's network has 512."""
    rounds: int = 11
    """Steps of each GAN."""
    loss: Loss = "logistic"
    """hinge, or the non-saturating logistic loss, which is the paper's."""
    spectral: bool = False
    """Spectral normalization of the discriminator's weights, in place of its BatchNorm, which is the paper's."""
    augment: list[str] = field(default_factory=lambda: ["none"])
    """Changes to what the discriminator sees of both kinds of images: some of color, translation, cutout; or none."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("kinds", "widths"):
            if not getattr(self, name):
                raise ValueError(f"{name}: expected at least one, got none")
        if self.rounds < 1:
            raise ValueError(f"rounds: expected at least 1, got {self.rounds}")
        for name, value, usual in (("width", self.width, GanConfig.width), ("norm.kind", self.norm.kind, "ucb")):
            if value != usual:
                raise ValueError(f"{name}: expected it left out, since {_CALLED[name]} says what is timed, got {value}")
        for width in self.widths:
            for kind in self.kinds:
                self.of(kind, width)  # which refuses what cannot be

    def of(self, kind: str, width: int) -> GanConfig:
        """Return the configuration of a run with such layers.

        Raises:
            ValueError: if there can be none.
        """
        given = {each.name: getattr(self, each.name) for each in fields(GanConfig)}
        try:
            norm = NormConfig(kind=kind) if kind == "bn" else replace(self.norm, kind=kind)  # options are the others'
            return GanConfig(**given | {"width": width, "norm": norm}).resolved()
        except ValueError as error:
            raise ValueError(re.sub(r"^(width|norm\.kind):", lambda of: f"{_CALLED[of[1]]}:", str(error))) from None


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command.

    Raises:
        UsageError: a device that is none or cannot be used here, or images that cannot be had or fill no step.
    """
    cfg = parse(BenchConfig, argv, prog="python -m cbgan.bench")
    device = resolve_device(cfg.device)
    set_threads(cfg.threads)
    kinds = list(dict.fromkeys(["bn", *cfg.kinds]))
    images = {kind: GanTask.load_images(cfg.of(kind, cfg.widths[0])) for kind in kinds}["bn"]
    for number, width in enumerate(cfg.widths):
        found = rows(cfg, kinds, width, images, device)
        if not number:
            print(f"{machine(device)}; batches of {cfg.batch_size} images of {cfg.data.size} pixels, {cfg.precision}\n")
            print(head(["width", "norm", "step", *_PARTS, "rest"]))
        print(*map(line, found), sep="\n", flush=True)


def rows(
    cfg: BenchConfig, kinds: Sequence[str], width: int, images: Mapping[str, ImageSet], device: torch.device
) -> list[list[str]]:
    """Return the cells of a width's rows, the first of which is BatchNorm's."""
    steps = {}
    for kind in kinds:
        of = cfg.of(kind, width)
        of.check_backend(device, DTYPES[of.precision])
        steps[kind] = Steps(GanTask(of, images, TrainContext(device, dry_run=True)))
    runs: dict[str, Callable[[], object]] = {kind: each.make for kind, each in steps.items()}
    times = compare(runs, cfg.rounds, device)
    found = []
    for kind in kinds:
        ratios = [own / base for own, base in zip(times[kind], times["bn"], strict=True)]
        text = "{1:.4g} ms ({0:.4g}-{2:.4g})" if kind == "bn" else "{1:.2f} ({0:.2f}-{2:.2f})"
        cell = text.format(*quantiles(times["bn"] if kind == "bn" else ratios))
        found.append([str(width), kind, cell, *(f"{share:.1%}" for share in shares(steps[kind], cfg.rounds).values())])
    return found


def shares(steps: Steps, rounds: int) -> dict[str, float]:
    """Return the shares of a step's time by part, and of what is left ("rest"), medians over rounds."""
    seen: dict[str, list[float]] = {name: [] for name in (*_PARTS, "rest")}
    for _ in range(rounds):
        began = time.perf_counter()
        step = steps.make(Timed)
        whole = time.perf_counter() - began
        assert isinstance(step, Timed)
        parts = {"data": step.began - began, **step.seconds}
        for name, seconds in (parts | {"rest": whole - sum(parts.values())}).items():
            seen[name].append(seconds / whole)
    return {name: quantiles(values)[1] for name, values in seen.items()}


if __name__ == "__main__":
    run_command(main)
