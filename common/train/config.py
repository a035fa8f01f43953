"""The settings that every run has: where it is kept, how it executes, and how it trains."""

import contextlib
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeVar

import torch

from common.norms.config import NormConfig
from common.runtime.cli import flatten, parse, read, shown, to_dict, to_yaml
from common.runtime.device import Precision
from common.runtime.errors import UsageError
from common.runtime.fields import MAY_CHANGE, changeable
from common.runtime.paths import expanded, texts_to_paths
from common.runtime.plugins import MissingPlugin
from common.train.run_dir import missing_plugins

C = TypeVar("C", bound="RunConfig")

NOT_STORED = ("name", "out", "resume", "dry_run")
"""Settings that say how to call a run, not what it computes; config.yaml leaves them out."""


def _check_least(least: int, values: Mapping[str, float | None]) -> None:
    """Raise ValueError for the first value, by its setting's name, below ``least``."""
    for name, value in values.items():
        if value is not None and value < least:
            raise ValueError(f"{name}: expected {f'at least {least}' if least else '0 or more'}, got {value}")


@dataclass(frozen=True, kw_only=True)
class ScheduleConfig:
    """How learning rates change over a run; they follow from the position alone."""

    kind: Literal["constant", "step", "cosine", "partial_cosine"] = "constant"
    """constant; step: times factor at each milestone; cosine: half a cosine from 1 to floor over the whole run;
    partial_cosine: the first part of a cosine, from 1 to floor."""
    milestones: list[int] = field(default_factory=list)
    """step: epochs, in rising order, after which the rate is multiplied by factor."""
    factor: float = 0.1
    """step: what the rate is multiplied by."""
    floor: float = 0.0
    """cosine, partial_cosine: the share of the rate that is left at the end."""
    epoch_steps: int | None = None
    """Steps an epoch has for schedules that follow the share of the run; null is how many it has."""

    def __post_init__(self) -> None:
        if bool(self.milestones) != (self.kind == "step"):
            clear = f"; a configuration's are cleared by --schedule '{{kind: {self.kind}, milestones: []}}'"
            raise ValueError(
                f"schedule.milestones: expected epochs for schedule.kind step and none otherwise, got "
                f"{self.milestones} for {self.kind}{clear if self.milestones else ''}"
            )
        if self.milestones != sorted(set(self.milestones)) or min(self.milestones, default=1) < 1:
            raise ValueError(f"schedule.milestones: expected rising epochs from 1 on, got {self.milestones}")
        if self.factor <= 0:
            raise ValueError(f"schedule.factor: expected more than 0, got {self.factor}")
        _check_least(1, {"schedule.epoch_steps": self.epoch_steps})
        if not 0 <= self.floor <= 1:
            raise ValueError(f"schedule.floor: expected 0 to 1, got {self.floor}")


@dataclass(frozen=True, kw_only=True)
class BestConfig:
    """Which epoch of a run is chosen, and by what."""

    keep: bool = False
    """Keep the checkpoint of the best epoch as checkpoints/best.pt."""
    patience: int = 0
    """Stop after so many evaluations without a better value; 0 trains all epochs."""
    by: str | None = None
    """The logged value that says what is better; null is the command's own choice."""
    allow_test_metric: bool = False
    """Allow a value measured on test images; the run is then marked as chosen by test images."""

    def __post_init__(self) -> None:
        _check_least(0, {"best.patience": self.patience})

    @property
    def used(self) -> bool:
        """Whether anything is chosen."""
        return self.keep or self.patience > 0


@dataclass(frozen=True, kw_only=True)
class GuardConfig:
    """What happens to a run that is found collapsed."""

    action: Literal["warn", "stop", "rewind"] = "warn"
    """warn once; stop (exit status 3); or rewind to the last good checkpoint and draw anew from there, also after a
    loss or gradient that is not finite, which otherwise stops the run."""
    lr_factor: float = 0.5
    """Learning rates are multiplied by this at each rewind."""
    max_rewinds: int = 3
    """Rewinds of a run; after so many the next collapse stops it."""

    def __post_init__(self) -> None:
        if not 0 < self.lr_factor <= 1:
            raise ValueError(f"guard.lr_factor: expected more than 0 and at most 1, got {self.lr_factor}")
        _check_least(0, {"guard.max_rewinds": self.max_rewinds})


@dataclass(frozen=True, kw_only=True)
class RecalibrateConfig:
    """Which stored statistics are estimated anew before each measurement, and from what (docs/results.md)."""

    layers: Literal["all", "mn", "none"] = "all"
    """all: of every layer that stores any, BatchNorm, BatchNorm by domain and mixtures, so that kinds compare; mn: of
    Mixture Normalization alone, as it was published, beside the others' moving averages; none."""
    images: int = 2048
    """Training images (cbgan: samples) to estimate them from; cbda: of both domains, in the shares that a step has."""
    batch_size: int = 256
    """Images of these at once: the more, the nearer to what layers are fed in evaluation."""

    def __post_init__(self) -> None:
        _check_least(2, {"recalibrate.images": self.images, "recalibrate.batch_size": self.batch_size})

    @property
    def protocol(self) -> str:
        """What runs are compared by."""
        return self.layers if self.layers == "none" else f"{self.layers}, {self.images} images by {self.batch_size}"


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Every application's configuration starts with this."""

    name: str | None = None
    """The run's name under OUT/application; without it a fresh one such as digits-ucb-seed0 is taken."""
    out: Path = Path("runs")
    """The folder that holds all runs."""
    resume: bool | Literal["auto"] = False
    """Go on with the run NAME from its newest whole checkpoint; auto starts it where there is none yet."""
    plugins: list[str] = field(default_factory=list)
    """Modules to import first, by the names that import takes, which add kinds of layers, data sets or metrics of your
    own (docs/configuration.md)."""
    init_from: Path | None = None
    """A checkpoint file whose weights (not optimizer or position) a new run starts from."""
    dry_run: bool = False
    """Print parameters and estimates of memory and time, write nothing, and exit."""
    seed: int = 0
    """What every random draw of the run follows from, together with its position."""
    device: str = field(default="auto", metadata=MAY_CHANGE)
    """auto, cpu, cuda or cuda:n; auto is CUDA where there is one."""
    precision: Precision = "fp32"
    """Precision of convolutions and linear maps (autocast); fp16 scales its gradients."""
    channels_last: bool | None = None
    """Keep images and weights as NHWC in memory: the same values up to rounding, at another speed; null does so on a
    CPU, but for networks of timm and GANs wider than 128, which it slows down (docs/benchmarks.md)."""
    deterministic: bool = False
    """On CUDA, use only kernels whose results repeat bit for bit; some are slower."""
    compile: bool = False
    """Run the networks through torch.compile: slow to start, then faster on a GPU."""
    threads: int = field(default=0, metadata=MAY_CHANGE)
    """CPU threads; 0 is torch's choice within the container's quota, or what a resumed run had. Results repeat bit
    for bit only with the same number."""
    log_every: int = field(default=10, metadata=MAY_CHANGE)
    """Steps between two log lines; on CUDA the host waits for the device only then."""
    checkpoint_every: int = field(default=1, metadata=MAY_CHANGE)
    """Epochs between two checkpoints."""
    checkpoint_keep: list[int] = field(default_factory=list, metadata=MAY_CHANGE)
    """Epochs whose checkpoints are kept for good, as checkpoints/epoch-0025.pt, beside the last two."""
    cache: Path = field(default=Path("~/.cache/cluster-based-norm"), metadata=MAY_CHANGE)
    """Folder for what several runs share: statistics of real images, feature extractors, downloads."""
    least_evaluate_every: ClassVar[int] = 1
    of_any_length: ClassVar[str] = "--schedule.kind constant"
    """Flags with which nothing follows the run's length."""
    epochs: int = field(default=1, metadata=MAY_CHANGE)
    """Passes over the training images."""
    evaluate_every: int = 1
    """Epochs between two measurements; the last is always measured."""
    steps_per_epoch: int | None = None
    """Steps that make an epoch; null is one pass over the training images."""
    batch_size: int = 64
    """Images a step; the last, smaller batch of a pass is left out."""
    grad_accum_steps: int = 1
    """Parts of a step, each of batch_size images, whose gradients are averaged: larger steps in the same memory."""
    lr: float = 1e-3
    """Learning rate."""
    weight_decay: float = 0.0
    """Weight decay; biases and what normalization layers learn are left out of it."""
    grad_clip_norm: float | None = None
    """Scale gradients down to at most this 2-norm; null never does."""
    ema_decay: float = 0.0
    """Decay of an exponential moving average of weights and buffers, which then is what is evaluated; 0 keeps none."""
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    best: BestConfig = field(default_factory=BestConfig)
    guard: GuardConfig = field(default_factory=GuardConfig)
    norm: NormConfig = field(default_factory=NormConfig)
    recalibrate: RecalibrateConfig = field(default_factory=RecalibrateConfig)

    def __post_init__(self) -> None:
        texts_to_paths(self)
        if self.name is not None and (not self.name or self.name.startswith(".") or "/" in self.name):
            raise ValueError(f"name: expected a plain folder name, got {self.name!r}")
        if self.resume and self.name is None:
            raise ValueError("resume: which run? Give its --name")
        counts = ("epochs", "grad_accum_steps", "log_every", "checkpoint_every", "steps_per_epoch")
        _check_least(1, {name: getattr(self, name) for name in counts})
        _check_least(2, {"batch_size": self.batch_size})  # batch statistics
        _check_least(self.least_evaluate_every, {"evaluate_every": self.evaluate_every})
        _check_least(0, {name: getattr(self, name) for name in ("seed", "threads", "weight_decay")})
        if min(self.checkpoint_keep, default=1) < 1:
            raise ValueError(f"checkpoint_keep: expected epochs from 1 on, got {self.checkpoint_keep}")
        for name in ("lr", "grad_clip_norm"):
            if (value := getattr(self, name)) is not None and not value > 0:
                raise ValueError(f"{name}: expected more than 0, got {value}")
        if not 0 <= self.ema_decay < 1:
            raise ValueError(f"ema_decay: expected 0 up to, not including, 1, got {self.ema_decay}")

    @property
    def fast_in_nhwc(self) -> bool:
        """Whether training steps on a CPU were no slower in NHWC than in NCHW (docs/benchmarks.md)."""
        return True

    @property
    def follows_length(self) -> bool:
        """Whether what a step does depends on how many epochs there will be, so that a resumed run keeps them."""
        return self.schedule.kind in ("cosine", "partial_cosine")

    def resolved(self: C) -> C:
        """Return the configuration as a run stores it, with what follows from other settings written out."""
        channels_last = self.channels_last
        if channels_last is None:
            on_cpu = self.device == "cpu" or (self.device == "auto" and not torch.cuda.is_available())
            channels_last = on_cpu and self.fast_in_nhwc
        return replace(self, norm=self.norm.resolved(), channels_last=channels_last)

    def check_backend(self, device: torch.device, dtype: torch.dtype = torch.float32) -> None:
        """Raise UsageError if the layers ask for a backend that cannot run on a device, on activations of a dtype."""
        if self.norm.backend == "auto":
            return
        try:
            self.norm.backend_on(device, dtype)
        except ValueError as error:
            raise UsageError(str(error)) from None


def resume_config(cls: type[C], argv: Sequence[str] | None, path: Path) -> C:
    """Read the configuration of a resumed run: its own config.yaml, then the command line.

    Args:
        cls: the configuration's class.
        argv: the command line, which holds ``--resume``.
        path: the run's folder.

    Raises:
        UsageError: if the command line changes what a resumed run keeps, or config.yaml holds no such configuration.
    """
    stored = stored_config(cls, path)
    given = ["--config", str(path / "config.yaml"), *(sys.argv[1:] if argv is None else argv)]
    before, free = dict(flatten(to_dict(stored.resolved()))), set(changeable(cls))
    if stored.follows_length:
        free.remove("epochs")
    try:
        config = parse(cls, given)
    except MissingPlugin:
        raise
    except UsageError:  # that a setting may not change comes before what its change makes of other settings
        asked = {name: value for name, value in flatten(read(cls, given)) if value is not None and name != "config"}
        paths = {name: str(expanded(value, name)) for name, value in asked.items() if isinstance(value, Path)}
        _refuse_changes(cls, before, asked | paths, free)
        raise
    _refuse_changes(cls, before, dict(flatten(to_dict(config.resolved()))), free)
    with contextlib.suppress(OSError, ValueError, KeyError):  # of a run that has no summary yet
        done = json.loads((path / "summary.json").read_text(encoding="utf-8"))["epochs"]["done"]
        if config.epochs < done:
            raise UsageError(f"epochs: expected at least the {done} that the run has done, got {config.epochs}")
    return config


def stored_config(cls: type[C], path: Path) -> C:
    """Read the configuration of a run, and import its plugins.

    Raises:
        UsageError: if a plugin of the run is missing, or its config.yaml holds no such configuration.
    """
    file = path / "config.yaml"
    try:
        return parse(cls, ["--config", str(file)])
    except MissingPlugin:
        raise
    except UsageError as error:
        if missing := missing_plugins(path):
            raise MissingPlugin(
                f"plugins: the run had {' and '.join(missing)}, which is not installed here; install it"
            ) from error
        place = "" if str(file) in str(error) else f"config: {file}: "
        raise UsageError(f"{place}{error}; restore the file as the run wrote it") from None


def _refuse_changes(cls: type[RunConfig], before: Mapping[str, Any], now: Mapping[str, Any], free: set[str]) -> None:
    for name, value in now.items():
        if name not in (*NOT_STORED, *free, "init_from") and value != before[name]:
            if name == "epochs":
                raise UsageError(
                    f"epochs: the run has {before[name]}, which its schedule follows, got {value}; to train for longer "
                    f"start a new run (--init_from takes this one's weights), or begin with {cls.of_any_length}"
                )
            raise UsageError(
                f"{name}: the run has {shown(before[name])}, got {shown(value)}; leave it out, or start a new run by "
                f"another --name, since a resumed one keeps its settings (free to change: {', '.join(sorted(free))})"
            )


def stored_yaml(config: RunConfig) -> str:
    """Return the text of config.yaml: what the run computes, without how it was called."""
    return to_yaml({name: value for name, value in to_dict(config).items() if name not in NOT_STORED})
