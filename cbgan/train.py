"""Train a DCGAN and measure it: ``python -m cbgan.train``."""

import sys
import time
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor
from tqdm import tqdm

from cbgan.config import GanConfig
from cbgan.dry_run import estimate
from cbgan.evaluation import Evaluation, save_grid
from cbgan.losses import discriminator_loss, generator_loss
from cbgan.state import GanState, noise
from cbgan.summary import closing_summary
from common.checkpoint import Checkpoints
from common.cli import Stopped, StopRequest, run_command
from common.config import parse
from common.data.batches import Batches
from common.data.image_set import Splits, to_float
from common.data.registry import load
from common.device import autocast, memory_format, resolve_device, set_determinism, set_threads
from common.errors import UsageError
from common.files import write_text_atomic
from common.guard import StepGuard
from common.log import Log
from common.metrics.fid import Interrupted
from common.runs import (
    RunFolder,
    environment,
    environment_json,
    find_run,
    note_session,
    refuse_existing,
    resume_config,
    stored_yaml,
)

APPLICATION = "cbgan"
MAY_CHANGE = (
    "epochs",
    "log_every",
    "checkpoint_every",
    "threads",
    "device",
    "cache",
    "data.root",
    "data.test_root",
    "data.workers",
    "data.download",
    "fid.weights",
)
"""Settings a resumed run may change: they alter for how long, how often or where, never what is computed."""


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command.

    Raises:
        UsageError, NonFiniteError, Stopped: as `common.cli.run_command` reports them.
    """
    cfg = parse(GanConfig, argv, prog="python -m cbgan.train")
    parent = cfg.out / APPLICATION
    if cfg.resume:
        assert cfg.name is not None  # RunConfig refuses otherwise
        if cfg.init_from is not None:
            raise UsageError(f"init_from: {cfg.init_from} starts a new run, so it cannot go with --resume")
        cfg = resume_config(GanConfig, argv, find_run(parent, cfg.name), MAY_CHANGE)
    elif cfg.name is not None and not cfg.dry_run:
        refuse_existing(parent, cfg.name)
    cfg = replace(cfg, norm=cfg.norm.resolved())
    set_threads(cfg.threads)
    set_determinism(cfg.deterministic)
    device = resolve_device(cfg.device)
    splits = load(cfg.data)
    if cfg.dry_run:
        print(estimate(cfg, splits, device))
        return
    with StopRequest() as stop:
        Training(cfg, splits, device, stop).run()


class Training:
    """One run from its folder's creation, or from its newest checkpoint, to the last epoch."""

    def __init__(self, cfg: GanConfig, splits: Splits, device: torch.device, stop: StopRequest) -> None:
        self.device, self.stop = device, stop
        try:
            self.batches = Batches(splits.train, cfg.batch_size, cfg.seed, flip=cfg.data.flip, workers=cfg.data.workers)
        except ValueError as error:
            raise UsageError(str(error)) from None
        self.state = GanState(cfg, device)
        if cfg.init_from is not None and not cfg.resume:
            self.state.load_weights(cfg.init_from)
        self.folder = _reopen(cfg, device) if cfg.resume else None
        try:
            self.evaluation = Evaluation(cfg, splits, device, stop)
        except Interrupted:
            assert stop.signum is not None
            raise Stopped(stop.signum, "stopped before the run began; nothing was written") from None
        self.folder = self.folder or _create(cfg, device)
        self.cfg = replace(cfg, name=self.folder.path.name)
        self.checkpoints = Checkpoints(self.folder.path / "checkpoints")
        self.log = self._restore()
        self.evaluation.chart(self.log)
        save_grid(splits.train.images[:64], self.folder.path / "samples" / "real.png")
        self.guard = StepGuard([self.state.g, self.state.d], ["loss/d", "loss/g"], device)
        self.bar = tqdm(
            total=cfg.epochs * len(self.batches),
            initial=self.state.at["step"],
            unit="step",
            disable=not sys.stderr.isatty(),
            dynamic_ncols=True,
        )
        self.clock = (time.monotonic(), self.state.at["step"])
        self.shown: dict[str, float] = {}

    def run(self) -> None:
        """Train, measure, log and save.

        Raises:
            Stopped: after saving, if a signal asked for it.
            NonFiniteError: if a loss or gradient was not finite.
        """
        assert self.folder is not None
        at = self.state.at
        try:
            if not self.checkpoints.paths():
                self._save()  # so that a run can be resumed from its first moment on
            while True:
                if self.evaluation.due(at["epoch"]) and at["evaluated"] < at["epoch"]:
                    self._evaluate()
                if at["epoch"] >= self.cfg.epochs:
                    break
                self._epoch()
            self.bar.close()
            print(closing_summary(self.cfg, self.folder.path, self.evaluation))
        finally:
            self.bar.close()
            self.log.close()
            self.folder.close()

    def _epoch(self) -> None:
        at, state = self.state.at, self.state
        for images, _, _ in self.batches.epoch(at["epoch"], at["batch"]):
            real = to_float(images.to(self.device, non_blocking=True))
            real = real.contiguous(memory_format=memory_format(self.cfg.channels_last))
            self.guard.begin(at["step"] + 1)
            losses = step(self.cfg, state, self.guard, real)
            self.guard.finish()
            at["step"] += 1
            at["batch"] += 1
            state.means.add(losses)
            if at["step"] % self.cfg.log_every == 0:
                self.guard.check()
                self._log()
            elif self.device.type == "cpu":
                self.guard.check()
            self.bar.update()
            if self.stop:
                self.guard.check()
                self._save()
                raise self._stopped()
        self.guard.check()
        at["epoch"], at["batch"] = at["epoch"] + 1, 0
        self.evaluation.health(state.g, at["epoch"], at["step"], self.log)
        last = at["epoch"] == self.cfg.epochs
        if last or at["epoch"] % self.cfg.checkpoint_every == 0 or self.evaluation.due(at["epoch"]):
            self._save()
        self._report(f"epoch {at['epoch']}/{self.cfg.epochs}, step {at['step']}", self.shown)

    def _evaluate(self) -> None:
        assert self.folder is not None
        at = self.state.at
        try:
            fid = self.evaluation.run(
                self.state.g, at["epoch"], at["step"], self.log, self.folder.path / "samples", self.stop
            )
        except Interrupted:  # the checkpoint before the measurement stands
            raise self._stopped() from None
        at["evaluated"] = at["epoch"]
        best = at["best_fid"] is None or fid < at["best_fid"]
        if best:
            at["best_fid"] = fid
        self._save(best=best)
        self._report(f"epoch {at['epoch']}/{self.cfg.epochs}", {"FID": fid})
        self.clock = (time.monotonic(), at["step"])

    def _log(self) -> None:
        at, (began, began_at) = self.state.at, self.clock
        means = self.state.means.pop()
        speed = (at["step"] - began_at) * self.cfg.batch_size / (time.monotonic() - began)
        self.log.scalars(at["step"], at["epoch"], means | {"time/images_per_second": speed})
        self.shown = means | {"images/s": speed}
        shown = {name: f"{value:.4g}" for name, value in self.shown.items()}
        self.bar.set_postfix({"epoch": at["epoch"] + 1, **shown})
        self.clock = (time.monotonic(), at["step"])

    def _save(self, *, best: bool = False) -> None:
        extra = {"log_position": self.log.sync(), "passport": self.evaluation.passport()}
        self.checkpoints.save(self.state.at["step"], self.state.state_dict() | extra, best=best)

    def _restore(self) -> Log:
        """Go on from the newest whole checkpoint, if there is one, and cut the log back to it."""
        assert self.folder is not None
        state, reports = self.checkpoints.load_latest(self.device)
        for report in reports:
            print(f"warning: {report}", file=sys.stderr)
        if state is None:
            return Log(self.folder.path)
        if state["passport"] != self.evaluation.passport():
            differ = ", ".join(k for k, v in self.evaluation.passport().items() if state["passport"].get(k) != v)
            raise UsageError(f"fid: the run's FID was measured otherwise ({differ} differ); start a new run")
        self.state.load_state_dict(state)
        return Log(self.folder.path, self.state.at["step"], state["log_position"])

    def _stopped(self) -> Stopped:
        assert self.stop.signum is not None
        command = resume_command(self.cfg)
        return Stopped(self.stop.signum, f"stopped after step {self.state.at['step']}; go on with:\n  {command}")

    def _report(self, title: str, values: dict[str, float]) -> None:
        """Print a line where there is no bar to look at, and what is newly wrong with a layer in any case."""
        if not sys.stderr.isatty():
            print("  ".join([title, *(f"{name} {value:.4g}" for name, value in values.items())]), flush=True)
        for line in self.evaluation.new_warnings():
            tqdm.write(f"warning: {line}", file=sys.stderr)


def step(cfg: GanConfig, state: GanState, guard: StepGuard, real: Tensor) -> dict[str, Tensor]:
    """Update the discriminator, then the generator, on one batch of images in [-1, 1]; return the losses."""
    z_d, z_g = noise(cfg, state.at["step"], 2 * len(real), real.device).chunk(2)
    with autocast(real.device, cfg.precision):
        with torch.no_grad():  # this half does not train the generator
            fake = state.g(z_d)
        loss_d = discriminator_loss(state.d(real), state.d(fake))
    guard.descend("loss/d", loss_d, state.opt_d, state.scaler_d)

    state.d.requires_grad_(False)  # its gradients are not wanted, only the way through it
    with autocast(real.device, cfg.precision):
        loss_g = generator_loss(state.d(state.g(z_g)))
    guard.descend("loss/g", loss_g, state.opt_g, state.scaler_g)
    state.d.requires_grad_(True)
    return {"loss/d": loss_d, "loss/g": loss_g}


def resume_command(cfg: GanConfig) -> str:
    """Return the command line that goes on with a run."""
    out = "" if cfg.out == GanConfig().out else f" --out {cfg.out}"
    return f"python -m cbgan.train --name {cfg.name} --resume{out}"


def _create(cfg: GanConfig, device: torch.device) -> RunFolder:
    session = environment(device, backend=cfg.norm.backend)
    files = {"config.yaml": stored_yaml(cfg), "environment.json": environment_json([session])}
    default = f"{cfg.data.name}-{cfg.norm.kind}-seed{cfg.seed}"
    return RunFolder.create(cfg.out / APPLICATION, cfg.name, default, files)


def _reopen(cfg: GanConfig, device: torch.device) -> RunFolder:
    assert cfg.name is not None
    folder = RunFolder.reopen(cfg.out / APPLICATION / cfg.name)
    note_session(folder.path, environment(device, backend=cfg.norm.backend))
    write_text_atomic(folder.path / "config.yaml", stored_yaml(cfg))
    return folder


if __name__ == "__main__":
    run_command(main)
