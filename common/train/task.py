"""What an application hands over to the loop: its images, networks and optimizers, a step, and how it is measured."""

import contextlib
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Generic, Literal, TypeVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from common.data import ImageSet, Stream, View, hold_out, load, mirrored, plain, to_input
from common.norms import collect_health, log_scalars, mixture_layers
from common.runtime.device import autocast
from common.runtime.distributed import Env
from common.runtime.errors import Interrupted, UsageError
from common.train.config import RunConfig
from common.train.guard import Update
from common.train.logging import Log, listed

C = TypeVar("C", bound=RunConfig)
Better = Literal["higher", "lower"]
HELD_OUT = 0.1
"""Share of the training images that is held out where a choice needs them and no other share is asked for."""


@dataclass(frozen=True)
class Tracked:
    """A measured value that an epoch can be chosen by.

    Attributes:
        split: the images it is measured on.
        better: whether higher or lower is better.
        chosen_by_test: choosing an epoch by it would look at the images that results are reported on.
    """

    split: str
    better: Better
    chosen_by_test: bool = False

    def improves(self, value: float, best: float | None) -> bool:
        """Say whether a value is better than the best so far; NaN never is."""
        if math.isnan(value):
            return False
        return best is None or (value > best if self.better == "higher" else value < best)


@dataclass(frozen=True)
class Moment:
    """When, and with what at hand, a run is measured."""

    epoch: int
    step: int
    folder: Path
    log: Log
    should_stop: Callable[[], bool]
    """Asked between batches; it answers alike on all ranks, all of which have to ask."""
    report: Callable[[str], None]
    """Tells the user a line."""
    rewound_to: int = 0
    """The step from which on the run has its present learning rates: that of the last rewind, if there was any."""

    def go_on(self) -> None:
        """Raise Interrupted if the run was asked to stop."""
        if self.should_stop():
            raise Interrupted


class Method(ABC, Generic[C]):
    """One application's training method; the loop is in `common.train.loop`.

    Attributes:
        application: the folder of its runs, and the package of its command.
        command: the module that starts it: ``python -m APPLICATION.COMMAND``.
        config: its configuration's class.
        headline: tags of what is printed of a measurement, as far as it has them; by default all.
        averaged: names of the networks that are measured, and that `ema` keeps an average of for it.
        networks: what `build` returned, on the device; the loop sets them before anything else is called.
        wrapped: the same networks as gradients are to flow through them, averaged over ranks.
    """

    application: ClassVar[str]
    command: ClassVar[str] = "train"
    config: ClassVar[type[RunConfig]]
    headline: ClassVar[tuple[str, ...]] = ()
    averaged: tuple[str, ...]

    def __init__(self, cfg: C, images: Mapping[str, ImageSet], device: torch.device, env: Env | None = None) -> None:
        self.cfg, self.images, self.device, self.env = cfg, images, device, env or Env()
        self.networks: dict[str, nn.Module] = {}
        self.wrapped: dict[str, nn.Module] = {}

    @classmethod
    @abstractmethod
    def tracked(cls, cfg: Any) -> dict[str, Tracked]:
        """Return the measured values that epochs can be chosen by; the first is the default choice."""

    def better(self) -> Mapping[str, Better]:
        """Return whether higher or lower is better of each logged value that has a best, by tag."""
        return {tag: tracked.better for tag, tracked in self.tracked(self.cfg).items()}

    @property
    def workers(self) -> int:
        """Processes that gather batches; with 0 a thread does."""
        return self.cfg.data.workers  # pyright: ignore[reportAttributeAccessIssue]

    def default_name(self) -> str:
        """Return what a run without a name is called."""
        data = self.cfg.data  # pyright: ignore[reportAttributeAccessIssue]
        return f"{data.name}-{self.cfg.norm.kind}-seed{self.cfg.seed}"

    @classmethod
    def load(cls, cfg: Any) -> dict[str, ImageSet]:
        """Return the run's images by split: train, and where there are any, validation and test.

        Raises:
            UsageError: if they cannot be had, or do not serve this method.
        """
        return cls.with_validation(cfg, dict(load(cfg.data).items()))

    @classmethod
    def with_validation(cls, cfg: Any, images: dict[str, ImageSet]) -> dict[str, ImageSet]:
        """Return images of which a share of "train" is held out as "validation", if one was asked for or is needed.

        Where the data set has validation images of its own, they are taken.

        Raises:
            UsageError: if that was refused, or a class has too few images.
        """
        if "validation" in images:
            if cfg.data.validation is not None:
                raise UsageError(
                    f"data.validation: expected null, since the data set has {len(images['validation'])} validation "
                    f"images of its own, got {cfg.data.validation}"
                )
            return images
        choice = cls.choice(cfg)
        needed, share = choice is not None and choice[1].split == "validation", cfg.data.validation
        if needed and share == 0:
            raise UsageError(f"data.validation: expected more than 0, since best.by {choice[0]} reads it, got 0")  # pyright: ignore[reportOptionalSubscript]
        if share or (needed and share is None):
            images = dict(images)
            images["train"], images["validation"] = hold_out(images["train"], share or HELD_OUT, cfg.seed)
        return images

    @classmethod
    def choice(cls, cfg: Any) -> tuple[str, Tracked] | None:
        """Return the value that epochs are chosen by, if any are.

        Raises:
            UsageError: if there is no such value, or it is measured on test images and not marked as an oracle.
        """
        if not cfg.best.used:
            return None
        known = cls.tracked(cfg)
        default, tag = next(iter(known)), cfg.best.by or next(iter(known))
        if tag not in known:
            raise UsageError(f"best.by: expected {' or '.join(known)}, got {tag}")
        if known[tag].chosen_by_test and not cfg.best.oracle:
            raise UsageError(
                f"best.by: {tag} is measured on {known[tag].split} images, which choices must not see; take {default}, "
                "or mark the run with --best.oracle"
            )
        return tag, known[tag]

    def view(self) -> View:
        """Return what training shows of the images of "train"."""
        return mirrored if self.cfg.data.flip else plain  # pyright: ignore[reportAttributeAccessIssue]

    def streams(self) -> dict[str, Stream]:
        """Return what training draws from; a pass of "train" is an epoch."""
        return {"train": Stream(self.images["train"], self.cfg.batch_size, (self.view(),))}

    @abstractmethod
    def build(self) -> dict[str, nn.Module]:
        """Make the networks, on the CPU; what torch's global generator gives follows from the run's seed."""

    @abstractmethod
    def optimize(self, networks: Mapping[str, nn.Module]) -> Mapping[str, Optimizer]:
        """Make an optimizer (``fused=True``) for each loss: that of optimizer "d" is logged as loss/d."""

    def prepare(self, should_stop: Callable[[], bool]) -> None:
        """Make what measuring needs, before the run's folder is made.

        Raises:
            Interrupted: if ``should_stop`` said so on the way.
        """

    @abstractmethod
    def step(self, update: Update) -> None:
        """Do one step of the method: an ``update.descend`` for each optimizer."""

    def due(self, epoch: int) -> bool:
        """Say whether the networks are measured after this many epochs."""
        return epoch > 0 and (epoch % self.cfg.evaluate_every == 0 or epoch >= self.cfg.epochs)

    def recalibrate(self, name: str, network: nn.Module, go_on: Callable[[], None]) -> None:
        """Estimate anew, as ``cfg.recalibrate`` says, the statistics of one of the networks that are ``averaged``.

        Args:
            name: which one.
            network: as it is to be measured.
            go_on: called between batches, on all ranks alike.

        Raises:
            Interrupted: if ``go_on`` raises it.
            NonFiniteError: if a layer is fed what is not finite.
        """

    @abstractmethod
    def evaluate(self, networks: Mapping[str, nn.Module], moment: Moment) -> dict[str, float]:
        """Measure the networks and return the values to log; every rank returns the same.

        Those that are ``averaged`` have rank 0's statistics, estimated anew by ``recalibrate``.

        Raises:
            Interrupted: if ``moment.should_stop`` said so; nothing is logged then.
        """

    def probe(self, networks: Mapping[str, nn.Module], step: int) -> None:
        """Run the networks once on a training batch, whose choice follows from the step, for the layers' health."""

    def shown(self, means: Mapping[str, float]) -> Mapping[str, float]:
        """Return what the log shows, from the means over its steps of what `step` noted, by tag."""
        return means

    def told(self, values: Mapping[str, float]) -> list[str]:
        """Return what is printed of a measurement where there is no bar to look at, from its values by tag."""
        shown = {name: values[name] for name in self.headline if name in values} or values
        return [f"{name} {value:.4g}" for name, value in shown.items()]

    def collapse(self, means: Mapping[str, float]) -> str | None:
        """Say what is wrong with a run whose logged means show that it has collapsed."""
        return None

    def collapse_measured(self, values: Mapping[str, float]) -> str | None:
        """Say what is wrong with a run that has collapsed by what it measured, or by its layers' health."""
        return None

    def remedy(self, cause: str) -> str:
        """Return what to try after a collapse, by its cause."""
        return "a lower --lr, or --guard.action rewind"

    def closing(self, lines: list[dict[str, Any]], folder: Path) -> list[tuple[str, str]]:
        """Return what a finished run tells its user, from the lines of its log: a name and a text each."""
        last = {name: value for line in lines for name, value in line.items() if name in self.tracked(self.cfg)}
        return [("last", listed(last))]

    def passport(self) -> dict[str, object]:
        """Return what the measured values are comparable by."""
        content = {f"content_{name}": images.content_hash for name, images in self.images.items()}
        return {**content, "recalibrated": self.cfg.recalibrate.protocol}

    def accept(self, passport: Mapping[str, object]) -> None:
        """Compare the passport of a checkpoint with this process's.

        Raises:
            UsageError: naming what differs.
        """
        differ = [name for name, value in self.passport().items() if name in passport and passport[name] != value]
        if differ:
            raise UsageError(f"resume: the run was measured otherwise ({', '.join(differ)} differ); start a new run")

    def health(self, step: int) -> tuple[dict[str, float], list[str]]:
        """Return the health of the networks' mixture layers by tag, and what is wrong with them."""
        values: dict[str, float] = {}
        warnings: list[str] = []
        with contextlib.ExitStack() as stack:
            every = [
                stack.enter_context(collect_health(network))
                for network in self.networks.values()
                if mixture_layers(network)
            ]
            if every:
                with torch.no_grad(), self.autocast():
                    self.probe(self.networks, step)
        for found in every:
            values |= log_scalars(found)
            warnings += [f"{name}: {line}" for name, state in found.items() for line in state.warnings()]
        return values, warnings

    def to_input(self, images: Tensor) -> Tensor:
        """Bring uint8 images (N, 3, S, S) to the device, in [-1, 1] and in the run's memory layout."""
        return to_input(images, self.device, channels_last=self.cfg.channels_last)

    def autocast(self) -> Any:
        """Return the autocast context of the run's precision."""
        return autocast(self.device, self.cfg.precision)
