"""The loop of every application: from a run's folder, or its newest checkpoint, to the last epoch."""

import contextlib
import errno
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NoReturn

import torch
from tqdm import tqdm

from common.data import ImageSet
from common.norms import preserved_statistics
from common.runtime.command import StopRequest
from common.runtime.device import resolve_device
from common.runtime.distributed import Env, group, local_device
from common.runtime.errors import Interrupted, NonFiniteError, Stopped
from common.train.checkpoint import Checkpoints
from common.train.config import RunConfig
from common.train.dry_run import estimate
from common.train.guard import StepGuard, Update
from common.train.logging import Log
from common.train.optim import progress, schedule_factor
from common.train.setup import RunPlace, configure, prepare, resume_command
from common.train.summary import Measured, closing_lines, peak_memory, write_summary
from common.train.task import Method, Moment


def train(kind: type[Method[Any]], argv: Sequence[str] | None = None) -> None:
    """Run the command of a method: ``python -m APPLICATION.train``.

    Raises:
        UsageError, NonFiniteError, Stopped: as `common.runtime.command.run_command` reports them.
    """
    cfg = configure(kind, argv)
    device = local_device(resolve_device(cfg.device))
    with group(device) as env:
        images = env.first_then_others(lambda: kind.load(cfg))
        if not cfg.dry_run:
            with StopRequest() as stop:
                Training(kind, cfg, images, device, stop, env).run()
        elif env.first:
            print(estimate(cfg, *prepare(kind, cfg, images, device, Env())))


@contextlib.contextmanager
def _whoever_reads() -> Iterator[None]:
    """Go on where the terminal was closed, or the program that reads what is printed has ended."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.EIO, errno.EPIPE):
            raise


class _Collapsed(Exception):
    """The run is to go back to its last good checkpoint; the message is why.

    Args:
        cause: what is wrong.
        measured: the last checkpoint may hold it already; go back to the last one that was measured.
    """

    def __init__(self, cause: str, *, measured: bool = False) -> None:
        super().__init__(cause)
        self.measured = measured


class Training:
    """One run. With several processes each has one on its share of every step's images; rank 0 alone writes."""

    def __init__(
        self,
        kind: type[Method[Any]],
        cfg: RunConfig,
        images: Mapping[str, ImageSet],
        device: torch.device,
        stop: StopRequest,
        env: Env,
    ) -> None:
        self.cfg, self.device, self.stop, self.env = cfg, device, stop, env
        self.shown: dict[str, float] = {}
        self.told: set[str] = set()
        self.method, self.feed, self.parts = prepare(kind, cfg, images, device, env)
        self.choice = kind.choice(cfg)
        if cfg.init_from is not None and not cfg.resume:
            self.parts.load_weights(cfg.init_from)
        self.place = RunPlace(self.method, cfg, device, env)
        try:
            self.method.prepare(self._asked_to_stop)
            self.folder, self.cfg = self.place.open()
            self.checkpoints = Checkpoints(self.folder / "checkpoints")
            env.lead(self.checkpoints.remove_leftovers)
            self.log = self._restore()
        except BaseException as error:
            self.place.close()
            if not isinstance(error, Interrupted):
                raise
            raise Stopped(env.largest(stop.signum or 0), "stopped before the run began") from None
        self.guard = StepGuard(self.parts.networks.values(), [f"loss/{name}" for name in self.parts.optimizers], device)
        self.bar = tqdm(
            total=cfg.epochs * len(self.feed),
            initial=self.parts.at["step"],
            unit="step",
            disable=not (env.first and sys.stderr.isatty()),
            dynamic_ncols=True,
        )
        self._start_clock()

    def run(self) -> None:
        """Train, measure, log and save.

        Raises:
            Stopped: after saving, if a signal asked for it.
            NonFiniteError: if a loss or gradient was not finite, or a collapsed run was to stop.
        """
        state, why = "failed", None
        try:
            if self.env.lead(lambda: not self.checkpoints.paths()):
                self.parts.at["sound"] = self.parts.at["step"]
                self._save(scheduled=True)  # so that a run can be resumed from its first moment on
            self._summarise("running", None)
            while not self._done():
                try:
                    self._epoch() if self._measured() else self._evaluate()
                except _Collapsed as collapsed:
                    self._rewind(str(collapsed), measured=collapsed.measured)
            self.bar.close()
            state = "finished"
        except Stopped as stopped:
            state, why = "stopped", str(stopped).split("; go on")[0]
            raise
        except BaseException as error:
            why = f"{type(error).__name__}: {error}"
            raise
        finally:
            self.bar.close()
            try:
                self.log.close()
            finally:
                self._summarise(state, why)
                self.place.close()
        if self.env.first:
            print(closing_lines(self.cfg, self.method, self.folder, self.parts, self.warnings))

    def _done(self) -> bool:
        at, patience = self.parts.at, self.cfg.best.patience
        enough = bool(patience) and at["waited"] >= patience
        return self._measured() and (at["epoch"] >= self.cfg.epochs or enough)

    def _measured(self) -> bool:
        at = self.parts.at
        return at["evaluated"] >= at["epoch"] or not self.method.due(at["epoch"])

    def _epoch(self) -> None:
        at, cfg = self.parts.at, self.cfg
        with contextlib.closing(self.feed.epoch(at["epoch"], at["batch"], self.parts.seed)) as steps:
            for batches in steps:
                self._step(batches)
                logs = at["step"] % cfg.log_every == 0
                if logs or self.device.type == "cpu":  # only then does the host wait for a GPU
                    self._check()
                if logs:
                    self._log()
                self.bar.update()
                if (self.env.world == 1 or logs or self.device.type == "cpu") and self._asked_to_stop():
                    self._check()
                    self._save()
                    self._stop()
        self._check()
        at["epoch"], at["batch"] = at["epoch"] + 1, 0
        values, self.warnings = self.method.health(at["step"])
        self._record(at["step"], at["epoch"], self.env.mean(self.parts.epoch_means.pop()) | values)
        self._heed_measured(values)
        if self._scheduled():
            self._save(scheduled=True)
        shown = [f"{name} {value:.4g}" for name, value in self.shown.items()]
        self.shown = {}  # an epoch of fewer steps than log_every has no losses of its own to print
        self._report(f"epoch {at['epoch']}/{cfg.epochs}, step {at['step']}", shown)
        for line in self.warnings:
            self._warn(line, once_for=line.split(":")[0])

    def _step(self, batches: list[Any]) -> None:
        at, cfg = self.parts.at, self.cfg
        share = progress(cfg.schedule, at["step"], len(self.feed), cfg.epochs)
        factor = schedule_factor(cfg.schedule, at["step"], len(self.feed), cfg.epochs)
        rate = self.parts.set_learning_rates(factor * cfg.guard.lr_factor ** len(at["rewinds"]))
        update = Update(self.parts, self.guard, batches, self.device, cfg.precision, cfg.clip, share)
        self.guard.begin(at["step"] + 1)
        self.parts.statistics = {}
        self.method.step(update)
        self.guard.finish()
        self.parts.average(cfg.ema, self.guard.good)
        at["step"] += 1
        at["batch"] += 1
        self.parts.means.add(update.values)
        self.parts.epoch_means.add(update.of_epoch)
        self.rate = rate

    def _evaluate(self) -> None:
        at = self.parts.at
        self._count_seconds("training")
        begun = at["rewinds"][-1]["to"] if at["rewinds"] else 0
        moment = Moment(at["epoch"], at["step"], self.folder, self.log, self._asked_to_stop, self._warn, begun)
        try:
            with self._recalibrated(moment):
                values = self.method.evaluate(self.parts.measured, moment)
        except Interrupted:
            if not self._scheduled():  # else the checkpoint before the measurement stands
                self._save()
            self._stop()
        seconds = self._count_seconds("evaluation")
        self._record(at["step"], at["epoch"], values)
        self._heed_measured(values)
        at["evaluated"] = at["epoch"]
        best = self._is_best(values)
        scheduled = self._scheduled() or self._done()
        if best or scheduled:
            at["sound"] = at["step"]
            self._save(scheduled=scheduled, best=best and self.cfg.best.keep)
        if values:
            self._report(f"epoch {at['epoch']}/{self.cfg.epochs}", [*self.method.told(values), f"{seconds:.1f} s"])
        self._summarise("running", None)

    @contextlib.contextmanager
    def _recalibrated(self, moment: Moment) -> Iterator[None]:
        """Estimate anew what the measured networks store, on all ranks alike, and undo that after the block."""
        with contextlib.ExitStack() as stack:
            for name in self.method.averaged:
                network = self.parts.measured[name]
                stack.enter_context(self.env.buffers_of_first(network))
                stack.enter_context(preserved_statistics(network))
                self.method.recalibrate(name, network, moment.go_on)
                self.parts.note_statistics(name)
            yield

    def _is_best(self, values: Mapping[str, float]) -> bool:
        """Note the value that epochs are chosen by, and say whether it is the best so far."""
        if self.choice is None or self.choice[0] not in values:
            return False
        at, (tag, tracked) = self.parts.at, self.choice
        if tracked.improves(values[tag], None if at["best"] is None else at["best"]["value"]):
            at["best"], at["waited"] = {"value": values[tag], "epoch": at["epoch"], "tag": tag}, 0
            return True
        at["waited"] += 1
        return False

    def _check(self) -> None:
        """Stop, or rewind, if a loss or gradient so far was not finite."""
        try:
            self.guard.check()
        except NonFiniteError as error:
            if self.cfg.guard.action != "rewind":
                raise
            raise _Collapsed(str(error).split(";")[0]) from None

    def _log(self) -> None:
        at = self.parts.at
        means = dict(self.method.shown(self.env.mean(self.parts.means.pop())))
        steps = at["step"] - self.clock_step
        speed = steps * self.feed.batch_size * self.cfg.accumulate * self.env.world / self._count_seconds("training")
        costs = {"time/images_per_second": speed, "time/peak_memory_mib": peak_memory(self.device)}
        self._record(at["step"], at["epoch"], means | {"schedule/lr": self.rate} | costs)
        self.shown = {name: value for name, value in means.items() if name.startswith("loss/")} | {"images/s": speed}
        shown = {name: f"{value:.4g}" for name, value in self.shown.items()}
        self.bar.set_postfix({"epoch": at["epoch"] + 1, **shown})
        self._heed(self.method.collapse(means))

    def _heed_measured(self, values: Mapping[str, float]) -> None:
        """Heed what was measured, as rank 0 sees it: layers' health differs between ranks, and all have to agree."""
        self._heed(self.env.lead(lambda: self.method.collapse_measured(values)), measured=True)

    def _heed(self, cause: str | None, *, measured: bool = False) -> None:
        """Do with a collapsed run what its guard says."""
        at = self.parts.at
        if cause is None:
            return
        found, remedy = f"collapsed in step {at['step']}: {cause}", f"try {self.method.remedy(cause)}"
        if self.cfg.guard.action == "stop":
            raise NonFiniteError(f"{found}; the checkpoint before stands; {remedy}")
        if self.cfg.guard.action == "rewind":
            raise _Collapsed(cause, measured=measured)
        if at["collapsed"] is None:
            at["collapsed"] = {"step": at["step"], "cause": cause}
        self._warn(f"{found}; {remedy}", once_for="collapse")

    def _rewind(self, cause: str, *, measured: bool) -> None:
        """Go back to the last good checkpoint; what is drawn from there on has another seed, else all would repeat."""
        at, rewinds = self.parts.at, list(self.parts.at["rewinds"])
        if len(rewinds) >= self.cfg.guard.max_rewinds:
            raise NonFiniteError(f"collapsed in step {at['step']} after {len(rewinds)} rewinds: {cause}")
        to = at["sound"] if measured and at["sound"] is not None else at["good"]
        rewinds.append({"step": at["step"], "to": to, "cause": cause})
        self.log.close()
        self.log = self._restore(to)
        self.parts.at["rewinds"] = rewinds
        if self.env.first:
            self.checkpoints.drop_after(self.parts.at["step"])
        self.guard.reset()
        self._save(scheduled=True)
        self._start_clock()
        lr = self.cfg.guard.lr_factor ** len(rewinds)
        self._warn(f"rewound to step {self.parts.at['step']}: {cause}; learning rates are now {lr:g} of the first")

    def _scheduled(self) -> bool:
        epoch = self.parts.at["epoch"]
        return epoch >= self.cfg.epochs or epoch % self.cfg.checkpoint_every == 0 or epoch in self.cfg.checkpoint_keep

    def _save(self, *, scheduled: bool = False, best: bool = False) -> None:
        """Save; scheduled checkpoints lie where those of an undisturbed run do, so that rewinds go back to the same."""
        at = self.parts.at
        if scheduled:
            at["good"] = at["step"]
        extra = {"log_position": self.log.sync(), "passport": self.method.passport()}
        state = self.parts.state_dict() | extra
        epoch = at["epoch"] if scheduled and at["epoch"] in self.cfg.checkpoint_keep else None
        if self.env.first:
            self.checkpoints.save(at["step"], state, best=best, good=(at["good"], at["sound"]), epoch=epoch)

    def _restore(self, step: int | None = None) -> Log:
        """Go on from a step's checkpoint, or the newest whole one if there is any, and cut the log back to it."""
        state, reports = self.env.lead(lambda: self.checkpoints.load_latest(step))
        for report in reports:
            self._warn(report)
        self.warnings: list[str] = []
        opened: dict[str, Any] = {"settings": self.place.settings(), "results": list(self.method.tracked(self.cfg))}
        if state is None:
            log = Log(self.folder, active=self.env.first, **opened)
        else:
            self.method.accept(state["passport"])
            self.parts.load_state_dict(state)
            log = Log(self.folder, self.parts.at["step"], state["log_position"], active=self.env.first, **opened)
        self.results = Measured(self.method.tracked(self.cfg), self.folder if self.env.first else None)
        return log

    def _record(self, step: int, epoch: int, values: Mapping[str, float]) -> None:
        self.log.scalars(step, epoch, values)
        self.results.note(epoch, values)

    def _summarise(self, state: str, why: str | None) -> None:
        # A disk that is full has ended the run already; it shall not hide why.
        with contextlib.suppress(*([OSError] if state == "failed" else [])):
            if self.env.first:
                write_summary(self.folder, state, why, self.cfg, self.method, self.parts, self.choice, self.results)

    def _start_clock(self) -> None:
        self.clock, self.clock_step = time.monotonic(), self.parts.at["step"]

    def _count_seconds(self, name: str) -> float:
        """Add the seconds since the last call to those of training or evaluation, and return them."""
        seconds = time.monotonic() - self.clock
        self.parts.clock[name] += seconds
        self._start_clock()
        return seconds

    def _asked_to_stop(self) -> bool:
        """Say whether any rank was asked to stop; every rank has to call it."""
        return self.env.any(bool(self.stop))

    def _stop(self) -> NoReturn:
        signum, command = self.env.largest(self.stop.signum or 0), resume_command(self.method, self.cfg)
        raise Stopped(signum, f"stopped after step {self.parts.at['step']}; go on with:\n  {command}")

    def _report(self, title: str, parts: list[str]) -> None:
        """Print a line where there is no bar to look at."""
        if self.env.first and not sys.stderr.isatty():
            with _whoever_reads():
                print("  ".join([title, *parts]), flush=True)

    def _warn(self, line: str, once_for: str | None = None) -> None:
        """Print a warning, once a run for each subject that has one."""
        if once_for not in self.told and self.env.first:
            with _whoever_reads():
                tqdm.write(f"warning: {line}", file=sys.stderr)
        if once_for is not None:
            self.told.add(once_for)
