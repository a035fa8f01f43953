"""What an application trains: its images, networks and optimizers, a step, and how networks are evaluated."""

import contextlib
import copy
import math
import sys
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Generic, Literal, TypeVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from common.data import ImageSet, StepLoader, Stream, View, hold_out, load, mirrored, plain, to_input
from common.norms import collect_health, log_scalars, mixture_layers
from common.runtime.device import autocast, memory_format
from common.runtime.distributed import Env
from common.runtime.errors import Interrupted, UsageError
from common.runtime.seeding import derive
from common.train.checkpoint import load_weights
from common.train.config import RunConfig
from common.train.logging import Log, listed
from common.train.state import TrainState
from common.train.step import Metrics, Step

C = TypeVar("C", bound=RunConfig)
Better = Literal["higher", "lower"]
HELD_OUT = 0.1
"""Share of the training images that is held out where a choice needs them and no other share is asked for."""


@dataclass(frozen=True)
class SelectionMetric:
    """A metric that epochs can be chosen by.

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
        if best is None:
            return not math.isnan(value)
        return value > best if self.better == "higher" else value < best


@dataclass(frozen=True)
class Detector:
    """Recognises a run that has collapsed.

    Attributes:
        find: from values by tag to the cause, or None.
        reads: which values: "steps", means since the last log line; "evaluation", those of an evaluation and, in a call
            of its own, the layers' health.
        remedy: what the user may try.
    """

    find: Callable[[Mapping[str, float]], str | None]
    reads: Literal["steps", "evaluation"]
    remedy: str = "a lower --lr, or --guard.action rewind"


@dataclass(frozen=True)
class TrainContext:
    """Where a task is trained.

    Attributes:
        dry_run: nothing will be evaluated.
        should_stop: asked while a task prepares its evaluation; all ranks have to ask, and get the same answer.
    """

    device: torch.device
    env: Env = field(default_factory=Env)
    dry_run: bool = False
    should_stop: Callable[[], bool] = lambda: False


@dataclass(frozen=True)
class EvalContext:
    """When, and with what at hand, networks are evaluated."""

    epoch: int
    step: int
    folder: Path
    log: Log
    should_stop: Callable[[], bool]
    """Asked between batches; all ranks have to ask, and get the same answer."""
    report: Callable[[str], None]
    """Prints a warning."""
    rewound_to: int = 0
    """The step to which the last rewind went back, since when the run has its present learning rates."""

    def go_on(self) -> None:
        """Raise Interrupted if the run was asked to stop."""
        if self.should_stop():
            raise Interrupted


class Task(ABC, Generic[C]):
    """What an application trains; the loop is in `common.train.loop`.

    A subclass makes everything in its ``__init__``: networks (here), then ``optimizers``, and what evaluates them.

    Args:
        cfg: the run's configuration.
        images: as `load_images` returns them.
        context: where it is trained.
        networks: makes the networks by name; torch's global generator is seeded from the run's seed.
        evaluated: names of the networks that are evaluated: as their averages, where ``cfg.ema_decay`` keeps these.

    Attributes:
        application: the folder of its runs, and the package of its command.
        command: the module that starts it: ``python -m APPLICATION.COMMAND``.
        config: its configuration's class.
        headline: tags to print of an evaluation; by default all.
        averages: exponential moving averages of networks, buffers included.
        ddp_networks: the networks wrapped so that gradients are averaged over ranks.
        optimizers: by the name of the loss that each minimises, made with ``fused=True``; "d" is logged as loss/d.
        detectors: of a collapse; the first that finds one counts.

    Raises:
        UsageError: if the images do not fill a step, or initial weights do not fit.
    """

    application: ClassVar[str]
    command: ClassVar[str] = "train"
    config: ClassVar[type[RunConfig]]
    headline: ClassVar[tuple[str, ...]] = ()
    optimizers: Mapping[str, Optimizer]
    detectors: Sequence[Detector] = ()

    def __init__(
        self,
        cfg: C,
        images: Mapping[str, ImageSet],
        context: TrainContext,
        networks: Callable[[], dict[str, nn.Module]],
        evaluated: Sequence[str],
    ) -> None:
        self.cfg, self.images, self.device, self.env = cfg, images, context.device, context.env
        self.loader = self._loader(0 if context.dry_run else cfg.data.workers)  # pyright: ignore[reportAttributeAccessIssue]
        self.networks = self._built(networks)
        self.evaluated = tuple(evaluated)
        copied = self.evaluated if cfg.ema_decay else ()
        self.averages = {name: copy.deepcopy(self.networks[name]).requires_grad_(False) for name in copied}
        if cfg.init_from is not None and not cfg.resume:
            load_weights(cfg.init_from, self.networks, self.averages)
        if cfg.compile:
            for network in self.networks.values():
                network.compile()
        self.ddp_networks = {
            name: self.env.wrap(network) if any(p.requires_grad for p in network.parameters()) else network
            for name, network in self.networks.items()
        }

    def _built(self, networks: Callable[[], dict[str, nn.Module]]) -> dict[str, nn.Module]:
        """Make the networks, and print their warnings, each once and without its place in the code."""
        with (
            warnings.catch_warnings(record=True) as caught,
            torch.random.fork_rng(devices=[]),  # weights are drawn on the CPU, the same for every device
        ):
            warnings.simplefilter("always", UserWarning)
            torch.manual_seed(derive(self.cfg.seed, "weights"))
            built = networks()
        for line in dict.fromkeys(str(warning.message) for warning in caught) if self.env.first else ():
            print(f"warning: {line}", file=sys.stderr)
        for network in built.values():
            network.to(self.device)
            network.to(memory_format=memory_format(self.cfg.channels_last))  # pyright: ignore[reportCallIssue]
        return built

    def _loader(self, workers: int) -> StepLoader:
        try:
            return StepLoader(
                self.streams(),
                steps_per_epoch=self.cfg.steps_per_epoch,
                grad_accum_steps=self.cfg.grad_accum_steps,
                workers=workers,
                rank=self.env.rank,
                world=self.env.world,
            )
        except ValueError as error:
            raise UsageError(str(error)) from None

    # What is known before there is a task.

    @classmethod
    @abstractmethod
    def selection_metrics(cls, cfg: Any) -> dict[str, SelectionMetric]:
        """Return the metrics that epochs can be chosen by; the first is the default choice."""

    @classmethod
    def selection(cls, cfg: Any) -> tuple[str, SelectionMetric] | None:
        """Return the metric that epochs are chosen by, if any are.

        Raises:
            UsageError: if there is no such metric, or it is measured on test images without best.allow_test_metric.
        """
        if not cfg.best.used:
            return None
        known = cls.selection_metrics(cfg)
        default, tag = next(iter(known)), cfg.best.by or next(iter(known))
        if tag not in known:
            raise UsageError(f"best.by: expected {' or '.join(known)}, got {tag}")
        if known[tag].chosen_by_test and not cfg.best.allow_test_metric:
            raise UsageError(
                f"best.by: {tag} is measured on {known[tag].split} images, which choices must not see; take {default}, "
                "or mark the run with --best.allow_test_metric"
            )
        return tag, known[tag]

    @classmethod
    def load_images(cls, cfg: Any) -> dict[str, ImageSet]:
        """Return the run's images by split: train, and where there are any, validation and test.

        Raises:
            UsageError: if they cannot be read, or do not suit this task.
        """
        return cls.with_validation(cfg, dict(load(cfg.data).items()))

    @classmethod
    def with_validation(cls, cfg: Any, images: dict[str, ImageSet]) -> dict[str, ImageSet]:
        """Return images with a share of "train" held out as "validation", if ``best`` or ``data`` asks for it.

        A data set's own validation images are taken in place of such a share.

        Raises:
            UsageError: if the settings contradict each other, or a class has too few images.
        """
        if "validation" in images:
            if cfg.data.validation is not None:
                raise UsageError(
                    f"data.validation: expected null, since the data set has {len(images['validation'])} validation "
                    f"images of its own, got {cfg.data.validation}"
                )
            return images
        selection, share = cls.selection(cfg), cfg.data.validation
        if selection is not None and selection[1].split == "validation":
            if share == 0:
                raise UsageError(f"data.validation: expected more than 0, since best.by {selection[0]} reads it, got 0")
            share = share or HELD_OUT
        if share:
            images = dict(images)
            images["train"], images["validation"] = hold_out(images["train"], share, cfg.seed)
        return images

    @classmethod
    def default_name(cls, cfg: Any) -> str:
        """Return the name of a run that is given none."""
        return f"{cfg.data.name}-{cfg.norm.kind}-seed{cfg.seed}"

    # Training.

    def view(self) -> View:
        """Return how training sees the images of "train"."""
        return mirrored if self.cfg.data.flip else plain  # pyright: ignore[reportAttributeAccessIssue]

    def streams(self) -> dict[str, Stream]:
        """Return the streams of a step's batches; a pass over "train" is an epoch."""
        return {"train": Stream(self.images["train"], self.cfg.batch_size, (self.view(),))}

    def new_state(self) -> TrainState:
        """Return the state before the first step."""
        return TrainState(
            self.cfg, self.device, self.env, self.networks, self.averages, self.ddp_networks, self.optimizers
        )

    @abstractmethod
    def train_step(self, step: Step) -> Metrics:
        """Do one step, a ``step.optimize`` for each optimizer, and return its metrics."""

    def log_metrics(self, means: Mapping[str, float]) -> Mapping[str, float]:
        """Return a log line's values, from the means of the steps' metrics since the last line."""
        return means

    # Evaluation.

    @property
    def evaluated_networks(self) -> dict[str, nn.Module]:
        """The networks as they are evaluated: their averages where there are any."""
        return self.networks | self.averages

    def should_evaluate(self, epoch: int) -> bool:
        """Return whether the networks are evaluated after this many epochs."""
        return epoch > 0 and (epoch % self.cfg.evaluate_every == 0 or epoch >= self.cfg.epochs)

    def recalibrate(self, name: str, network: nn.Module, go_on: Callable[[], None]) -> None:
        """Re-estimate the statistics of an evaluated network, as ``cfg.recalibrate`` says.

        Args:
            name: the network's.
            network: itself, or its average.
            go_on: called between batches, on all ranks; may raise `Interrupted`.

        Raises:
            NonFiniteError: if a layer's input is not finite.
        """

    @abstractmethod
    def evaluate(self, networks: Mapping[str, nn.Module], context: EvalContext) -> dict[str, float]:
        """Evaluate the networks and return the values to log, the same on every rank.

        Those that are ``evaluated`` have rank 0's statistics, re-estimated by ``recalibrate``.

        Raises:
            Interrupted: if ``context.should_stop`` said so; nothing is logged then.
        """

    def probe(self, networks: Mapping[str, nn.Module], step: int) -> None:
        """Run the networks once on a training batch, whose choice follows from the step, for the layers' health."""

    def health(self, step: int) -> tuple[dict[str, float], list[str]]:
        """Return the health of the networks' mixture layers by tag, and a warning for each thing that is wrong."""
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

    def better(self) -> Mapping[str, Better]:
        """Return, by tag, whether higher or lower is better of each logged value that has a best."""
        return {tag: metric.better for tag, metric in self.selection_metrics(self.cfg).items()}

    def eval_protocol(self) -> dict[str, object]:
        """Return what has to be equal for evaluated values to compare."""
        content = {f"content_{name}": images.content_hash for name, images in self.images.items()}
        return {**content, "recalibrated": self.cfg.recalibrate.protocol}

    def check_protocol(self, before: Mapping[str, object]) -> None:
        """Raise UsageError if a checkpoint's protocol differs from this process's."""
        differ = [name for name, value in self.eval_protocol().items() if name in before and before[name] != value]
        if differ:
            raise UsageError(f"resume: the run was measured otherwise ({', '.join(differ)} differ); start a new run")

    # What a run prints.

    def summary_line(self, values: Mapping[str, float]) -> list[str]:
        """Return the parts of the one-line summary of an evaluation that is printed when there is no progress bar."""
        shown = {name: values[name] for name in self.headline if name in values} or values
        return [f"{name} {value:.4g}" for name, value in shown.items()]

    def summary_rows(self, lines: list[dict[str, Any]], folder: Path) -> list[tuple[str, str]]:
        """Return the rows, label and text, that are printed of a finished run, from the lines of its log."""
        known = self.selection_metrics(self.cfg)
        last = {name: value for line in lines for name, value in line.items() if name in known}
        return [("last", listed(last))]

    # For losses and evaluations.

    def to_input(self, images: Tensor) -> Tensor:
        """Bring uint8 images (N, 3, S, S) to the device, in [-1, 1] and in the run's memory layout."""
        return to_input(images, self.device, channels_last=self.cfg.channels_last)

    def autocast(self) -> Any:
        """Return the autocast context of the run's precision."""
        return autocast(self.device, self.cfg.precision)
