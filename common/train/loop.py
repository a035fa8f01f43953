"""The loop of every application: from a run's folder, or its newest checkpoint, to the last epoch."""

import contextlib
import errno
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, NoReturn

import torch
from tqdm import tqdm

from common.data import Batch, ImageSet
from common.norms import preserved_statistics
from common.runtime.cli import flatten, to_dict
from common.runtime.command import StopRequest
from common.runtime.device import DTYPES, resolve_device
from common.runtime.distributed import Env, group, local_device
from common.runtime.errors import Interrupted, NonFiniteError, Stopped
from common.train.checkpoint import Checkpoints
from common.train.config import RunConfig
from common.train.dry_run import estimate
from common.train.guard import StepGuard
from common.train.logging import Log
from common.train.optim import progress, schedule_factor
from common.train.setup import OpenRunDir, configure, resume_command
from common.train.step import Step
from common.train.summary import Results, closing_lines, peak_memory, write_summary
from common.train.task import EvalContext, Task, TrainContext


def train(kind: type[Task[Any]], argv: Sequence[str] | None = None) -> None:
    """Run the command that trains a task: ``python -m APPLICATION.train``.

    Raises:
        UsageError, NonFiniteError, Stopped: as `common.runtime.command.run_command` reports them.
    """
    cfg = configure(kind, argv)
    device = local_device(resolve_device(cfg.device))
    with group(device) as env:
        images = env.rank0_first(lambda: kind.load_images(cfg))
        cfg.check_backend(device, DTYPES[cfg.precision])
        if not cfg.dry_run:
            with StopRequest() as stop:
                Trainer(kind, cfg, images, device, stop, env).run()
        elif env.first:
            print(estimate(make_task(kind, cfg, images, TrainContext(device, dry_run=True))))


def make_task(
    kind: type[Task[Any]], cfg: RunConfig, images: Mapping[str, ImageSet], context: TrainContext
) -> Task[Any]:
    """Construct a task."""
    return kind(cfg, images, context)  # pyright: ignore[reportCallIssue]


class _Collapsed(Exception):
    """The run is to go back to its last checkpoint, or if that may have collapsed too, to the last evaluated one."""

    def __init__(self, cause: str, *, evaluated: bool = False) -> None:
        super().__init__(cause)
        self.evaluated = evaluated


class Trainer:
    """One run. With several processes each has one on its share of every step's images; rank 0 alone writes."""

    def __init__(
        self,
        kind: type[Task[Any]],
        cfg: RunConfig,
        images: Mapping[str, ImageSet],
        device: torch.device,
        stop: StopRequest,
        env: Env,
    ) -> None:
        self.device, self.stop, self.env = device, stop, env
        self.losses: dict[str, float] = {}
        self.layer_warnings: list[str] = []
        self.warned: set[str] = set()
        self.selection = kind.selection(cfg)
        self.run_dir = OpenRunDir(kind, cfg, device, env)
        try:
            self.task = make_task(kind, cfg, images, TrainContext(device, env, should_stop=self.stop_requested))
            self.state = self.task.new_state()
            self.folder, self.cfg = self.run_dir.open()
            self.checkpoints = Checkpoints(self.folder / "checkpoints")
            env.on_rank0(self.checkpoints.remove_leftovers)
            self.restore()
        except BaseException as error:
            self.run_dir.close()
            if not isinstance(error, Interrupted):
                raise
            raise Stopped(env.largest(stop.signum or 0), "stopped before the run began") from None
        self.guard = StepGuard(self.task.networks.values(), [f"loss/{name}" for name in self.task.optimizers], device)
        self.bar = tqdm(
            total=cfg.epochs * len(self.task.loader),
            initial=self.state.run.step,
            unit="step",
            disable=not (env.first and sys.stderr.isatty()),
            dynamic_ncols=True,
        )
        self.start_clock()

    def run(self) -> None:
        """Train, evaluate, log and save.

        Raises:
            Stopped: after saving, if a signal asked for it.
            NonFiniteError: if a loss or gradient was not finite, or a collapsed run was to stop.
        """
        status, why = "failed", None
        try:
            if self.env.on_rank0(lambda: not self.checkpoints.paths()):
                self.state.run.last_evaluated_checkpoint = self.state.run.step
                self.save(scheduled=True)  # so that a run can be resumed from its first moment on
            self.summarise("running", None)
            while not self.finished():
                try:
                    if self.evaluation_due():
                        self.evaluate()
                    else:
                        self.train_epoch()
                except _Collapsed as collapsed:
                    self.rewind(str(collapsed), evaluated=collapsed.evaluated)
            self.bar.close()
            status = "finished"
        except Stopped as stopped:
            status, why = "stopped", str(stopped).split("; go on")[0]
            raise
        except BaseException as error:
            why = f"{type(error).__name__}: {error}"
            raise
        finally:
            self.bar.close()
            try:
                self.log.close()
            finally:
                self.summarise(status, why)
                self.run_dir.close()
        if self.env.first:
            print(closing_lines(self.task, self.folder, self.state.run, self.layer_warnings))

    def finished(self) -> bool:
        """Return whether all epochs are done, or patience is over."""
        run, patience = self.state.run, self.cfg.best.patience
        enough = bool(patience) and run.epochs_without_improvement >= patience
        return not self.evaluation_due() and (run.epoch >= self.cfg.epochs or enough)

    def evaluation_due(self) -> bool:
        """Return whether the networks are to be evaluated now."""
        run = self.state.run
        return run.last_evaluated < run.epoch and self.task.should_evaluate(run.epoch)

    def checkpoint_due(self) -> bool:
        """Return whether a checkpoint is scheduled after this epoch."""
        epoch, cfg = self.state.run.epoch, self.cfg
        return epoch >= cfg.epochs or epoch % cfg.checkpoint_every == 0 or epoch in cfg.checkpoint_keep

    def train_epoch(self) -> None:
        """Train to the end of the epoch; log its means and the layers' health; save."""
        run, cfg = self.state.run, self.cfg
        with contextlib.closing(self.task.loader.epoch(run.epoch, run.batch, self.state.seed)) as steps:
            for batches in steps:
                self.train_step(batches)
                logs = run.step % cfg.log_every == 0
                waits = logs or self.device.type == "cpu"  # only then does the host wait for a GPU
                if waits:
                    self.check_finite()
                if logs:
                    self.log_steps()
                self.bar.update()
                if (self.env.world == 1 or waits) and self.stop_requested():
                    self.check_finite()
                    self.save()
                    self.leave()
        self.check_finite()
        run.epoch, run.batch = run.epoch + 1, 0
        health, self.layer_warnings = self.task.health(run.step)
        self.record(self.env.mean(self.state.epoch_metrics.pop()) | health)
        self.handle_collapse(health, "evaluation")
        if self.checkpoint_due():
            self.save(scheduled=True)
        self.report(
            f"epoch {run.epoch}/{cfg.epochs}, step {run.step}", [f"{n} {v:.4g}" for n, v in self.losses.items()]
        )
        self.losses = {}  # an epoch of fewer steps than log_every has no losses of its own to print
        for line in self.layer_warnings:
            self.warn(line, once_for=line.split(":")[0])

    def train_step(self, batches: list[dict[str, Batch]]) -> None:
        """Do one step."""
        state, run, cfg, steps = self.state, self.state.run, self.cfg, len(self.task.loader)
        factor = schedule_factor(cfg.schedule, run.step, steps, cfg.epochs)
        self.learning_rate = state.set_learning_rates(factor * cfg.guard.lr_factor ** len(run.rewinds))
        step = Step(state, self.guard, batches, cfg, progress(cfg.schedule, run.step, steps, cfg.epochs))
        self.guard.begin(run.step + 1)
        state.statistics = {}
        metrics = self.task.train_step(step)
        self.guard.finish()
        state.update_averages(cfg.ema_decay, self.guard.good)
        run.step += 1
        run.batch += 1
        state.step_metrics.add(metrics.step)
        state.epoch_metrics.add(metrics.epoch)

    def check_finite(self) -> None:
        """Stop, or rewind, if a loss or gradient so far was not finite (waits for the device)."""
        try:
            self.guard.check()
        except NonFiniteError as error:
            if self.cfg.guard.action != "rewind":
                raise
            raise _Collapsed(str(error).split(";")[0]) from None

    def log_steps(self) -> None:
        """Log the means of the steps since the last log line."""
        run, env = self.state.run, self.env
        means = dict(self.task.log_metrics(env.mean(self.state.step_metrics.pop())))
        images = (run.step - self.clock_step) * self.task.loader.batch_size * self.cfg.grad_accum_steps * env.world
        speed = images / self.count_seconds("training")
        costs = {"time/images_per_second": speed, "time/peak_memory_mib": peak_memory(self.device)}
        self.record(means | {"schedule/lr": self.learning_rate} | costs)
        self.losses = {name: value for name, value in means.items() if name.startswith("loss/")} | {"images/s": speed}
        self.bar.set_postfix({"epoch": run.epoch + 1, **{name: f"{value:.4g}" for name, value in self.losses.items()}})
        self.handle_collapse(means, "steps")

    def evaluate(self) -> None:
        """Evaluate the networks; log; save if this epoch is the best, or a checkpoint is scheduled."""
        run, cfg = self.state.run, self.cfg
        self.count_seconds("training")
        rewound_to = run.rewinds[-1]["to"] if run.rewinds else 0
        context = EvalContext(run.epoch, run.step, self.folder, self.log, self.stop_requested, self.warn, rewound_to)
        try:
            with self.recalibrated(context):
                values = self.task.evaluate(self.task.evaluated_networks, context)
        except Interrupted:
            if not self.checkpoint_due():  # else the checkpoint before the evaluation stands
                self.save()
            self.leave()
        seconds = self.count_seconds("evaluation")
        self.record(values)
        self.handle_collapse(values, "evaluation")
        run.last_evaluated = run.epoch
        best = self.is_best(values)
        scheduled = self.checkpoint_due() or self.finished()
        if best or scheduled:
            run.last_evaluated_checkpoint = run.step
            self.save(scheduled=scheduled, best=best and cfg.best.keep)
        if values:
            self.report(f"epoch {run.epoch}/{cfg.epochs}", [*self.task.summary_line(values), f"{seconds:.1f} s"])
        self.summarise("running", None)

    @contextlib.contextmanager
    def recalibrated(self, context: EvalContext) -> Iterator[None]:
        """Re-estimate the evaluated networks' statistics inside the block, the same on all ranks."""
        with contextlib.ExitStack() as stack:
            for name in self.task.evaluated:
                network = self.task.evaluated_networks[name]
                stack.enter_context(self.env.buffers_of_first(network))
                stack.enter_context(preserved_statistics(network))
                self.task.recalibrate(name, network, context.go_on)
                self.state.note_statistics(name)
            yield

    def is_best(self, values: Mapping[str, float]) -> bool:
        """Note the value that epochs are chosen by, and return whether it is the best so far."""
        if self.selection is None or self.selection[0] not in values:
            return False
        run, (tag, metric) = self.state.run, self.selection
        if metric.improves(values[tag], None if run.best is None else run.best["value"]):
            run.best, run.epochs_without_improvement = {"value": values[tag], "epoch": run.epoch, "tag": tag}, 0
            return True
        run.epochs_without_improvement += 1
        return False

    def handle_collapse(self, values: Mapping[str, float], reads: Literal["steps", "evaluation"]) -> None:
        """Warn, stop or rewind, as ``guard.action`` says, if a detector finds a collapse in these values."""

        def detect() -> tuple[str, str] | None:
            for detector in self.task.detectors:
                if detector.reads == reads and (cause := detector.find(values)) is not None:
                    return cause, detector.remedy
            return None

        # Layers' health differs between ranks, and all have to agree.
        found = self.env.on_rank0(detect) if reads == "evaluation" else detect()
        if found is None:
            return
        run, (cause, remedy) = self.state.run, found
        line = f"collapsed in step {run.step}: {cause}"
        if self.cfg.guard.action == "stop":
            raise NonFiniteError(f"{line}; the checkpoint before stands; try {remedy}")
        if self.cfg.guard.action == "rewind":
            raise _Collapsed(cause, evaluated=reads == "evaluation")
        if run.collapsed is None:
            run.collapsed = {"step": run.step, "cause": cause, "remedy": remedy}
        self.warn(f"{line}; try {remedy}", once_for="collapse")

    def rewind(self, cause: str, *, evaluated: bool) -> None:
        """Go back to an earlier checkpoint, with another seed for later draws, else all would repeat."""
        run, rewinds = self.state.run, list(self.state.run.rewinds)
        if len(rewinds) >= self.cfg.guard.max_rewinds:
            raise NonFiniteError(f"collapsed in step {run.step} after {len(rewinds)} rewinds: {cause}")
        to = run.last_evaluated_checkpoint if evaluated else None
        to = run.last_checkpoint if to is None else to
        rewinds.append({"step": run.step, "to": to, "cause": cause})
        self.log.close()
        self.restore(to)
        self.state.run.rewinds = rewinds
        if self.env.first:
            self.checkpoints.drop_after(self.state.run.step)
        self.guard.reset()
        self.save(scheduled=True)
        self.start_clock()
        lr = self.cfg.guard.lr_factor ** len(rewinds)
        self.warn(f"rewound to step {self.state.run.step}: {cause}; learning rates are now {lr:g} of the first")

    def save(self, *, scheduled: bool = False, best: bool = False) -> None:
        """Save a checkpoint; rewinds go back to scheduled ones, which do not depend on interruptions."""
        run = self.state.run
        if scheduled:
            run.last_checkpoint = run.step
        extra = {"log_position": self.log.sync(), "protocol": self.task.eval_protocol()}
        state = self.state.state_dict() | extra
        epoch = run.epoch if scheduled and run.epoch in self.cfg.checkpoint_keep else None
        if self.env.first:
            keep = run.last_checkpoint, run.last_evaluated_checkpoint
            self.checkpoints.save(run.step, state, best=best, keep=keep, epoch=epoch)

    def restore(self, step: int | None = None) -> None:
        """Load a step's checkpoint, or the newest whole one if there is any, and cut the log back to it."""
        state, reports = self.env.on_rank0(lambda: self.checkpoints.load_latest(step))
        for report in reports:
            self.warn(report)
        self.layer_warnings, position = [], 0
        if state is not None:
            self.task.check_protocol(state["protocol"])
            self.state.load_state_dict(state)
            position = state["log_position"]
        known, settings = self.task.selection_metrics(self.cfg), dict(flatten(to_dict(self.cfg)))
        step, first = self.state.run.step, self.env.first
        self.log = Log(self.folder, step, position, settings=settings, results=list(known), active=first)
        self.results = Results(known, self.folder if self.env.first else None)

    def record(self, values: Mapping[str, float]) -> None:
        """Log values at this step."""
        run = self.state.run
        self.log.scalars(run.step, run.epoch, values)
        self.results.note(run.epoch, values)

    def summarise(self, status: str, why: str | None) -> None:
        """Write summary.json."""
        # A disk that is full has ended the run already; it shall not hide why.
        with contextlib.suppress(*([OSError] if status == "failed" else [])):
            if self.env.first:
                write_summary(self.folder, status, why, self.task, self.state, self.results)

    def start_clock(self) -> None:
        """Count seconds, and steps, from now on."""
        self.clock, self.clock_step = time.monotonic(), self.state.run.step

    def count_seconds(self, name: str) -> float:
        """Add the seconds since the last call to those of training or evaluation, and return them."""
        seconds = time.monotonic() - self.clock
        self.state.seconds[name] += seconds
        self.start_clock()
        return seconds

    def stop_requested(self) -> bool:
        """Return whether any rank was asked to stop; every rank has to call it."""
        return self.env.largest(self.stop.signum or 0) > 0

    def leave(self) -> NoReturn:
        """Raise Stopped, after the run has been saved."""
        signum, command = self.env.largest(self.stop.signum or 0), resume_command(type(self.task), self.cfg)
        raise Stopped(signum, f"stopped after step {self.state.run.step}; go on with:\n  {command}")

    def report(self, title: str, parts: list[str]) -> None:
        """Print a line where there is no bar to look at."""
        if self.env.first and not sys.stderr.isatty():
            with _ignore_closed_terminal():
                print("  ".join([title, *parts]), flush=True)

    def warn(self, line: str, once_for: str | None = None) -> None:
        """Print a warning, only the first of each ``once_for``."""
        if once_for not in self.warned and self.env.first:
            with _ignore_closed_terminal():
                tqdm.write(f"warning: {line}", file=sys.stderr)
        if once_for is not None:
            self.warned.add(once_for)


@contextlib.contextmanager
def _ignore_closed_terminal() -> Iterator[None]:
    """Ignore errors of printing to a closed terminal or pipe."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.EIO, errno.EPIPE):
            raise
