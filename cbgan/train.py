"""Train a DCGAN and measure it: ``python -m cbgan.train``."""

from common.cli.command import start

if __name__ == "__main__":
    start("cbgan.train")  # before torch is loaded, since it settles how threads wait; does not return

import os
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from cbgan.config import GanConfig
from cbgan.dry_run import estimate
from cbgan.evaluation import Evaluation, save_grid
from cbgan.losses import discriminator_loss, generator_loss
from cbgan.state import GanState, noise
from cbgan.summary import closing_summary
from common.cli.arguments import parse
from common.cli.command import StopRequest
from common.data.batches import Batches
from common.data.image_set import Splits, to_float
from common.data.sets.registry import load
from common.errors import Interrupted, Stopped, UsageError
from common.machine import dist
from common.machine.atomic import write_text_atomic
from common.machine.device import autocast, memory_format, resolve_device, set_determinism, set_threads
from common.runs.checkpoint import Checkpoints
from common.runs.folder import (
    RunFolder,
    environment,
    environment_json,
    find_run,
    note_session,
    refuse_existing,
    resume_config,
    stored_yaml,
)
from common.runs.log import Log
from common.training.guard import StepGuard

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
        UsageError, NonFiniteError, Stopped: as `common.cli.command.run_command` reports them.
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
    device = dist.local_device(resolve_device(cfg.device))
    with dist.group(device) as env:
        splits = env.first_then_others(lambda: load(cfg.data))
        if not cfg.dry_run:
            with StopRequest() as stop:
                Training(cfg, splits, device, stop, env).run()
        elif env.first:
            print(estimate(cfg, splits, device))


class Training:
    """One run from its folder's creation, or from its newest checkpoint, to the last epoch.

    With several processes each runs this on its share of every step's images; rank 0 alone writes and prints.
    """

    def __init__(self, cfg: GanConfig, splits: Splits, device: torch.device, stop: StopRequest, env: dist.Env) -> None:
        self.device, self.stop, self.env = device, stop, env
        try:
            self.batches = Batches(
                splits.train,
                cfg.batch_size,
                cfg.seed,
                flip=cfg.data.flip,
                workers=cfg.data.workers,
                rank=env.rank,
                world=env.world,
            )
        except ValueError as error:
            raise UsageError(str(error)) from None
        self.state = GanState(cfg, device, env)
        if cfg.init_from is not None and not cfg.resume:
            self.state.load_weights(cfg.init_from)
        self.folder: RunFolder | None = None  # rank 0's, which holds the lock
        if cfg.resume:
            env.lead(lambda: self._hold(_reopen(cfg, device)))
        try:
            self.evaluation = Evaluation(cfg, splits, device, self._asked_to_stop, env)
        except Interrupted:
            raise Stopped(env.largest(stop.signum or 0), "stopped before the run began") from None
        if not cfg.resume:
            env.lead(lambda: self._hold(_create(cfg, device)))
        self.path = env.lead(lambda: self.folder.path if self.folder else Path())
        self.cfg = replace(cfg, name=self.path.name)
        self.checkpoints = Checkpoints(self.path / "checkpoints")
        self.log = self._restore()
        self.evaluation.chart(self.log)
        if env.first:
            save_grid(splits.train.images[:64], self.path / "samples" / "real.png")
        self.guard = StepGuard([self.state.g, self.state.d], ["loss/d", "loss/g"], device)
        self.bar = tqdm(
            total=cfg.epochs * len(self.batches),
            initial=self.state.at["step"],
            unit="step",
            disable=not (env.first and sys.stderr.isatty()),
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
        at = self.state.at
        try:
            if self.env.lead(lambda: not self.checkpoints.paths()):
                self._save()  # so that a run can be resumed from its first moment on
            while True:
                if self.evaluation.due(at["epoch"]) and at["evaluated"] < at["epoch"]:
                    self._evaluate()
                if at["epoch"] >= self.cfg.epochs:
                    break
                self._epoch()
            self.bar.close()
            if self.env.first:
                print(closing_summary(self.cfg, self.path, self.evaluation))
        finally:
            self.bar.close()
            self.log.close()
            if self.folder is not None:
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
            logs = at["step"] % self.cfg.log_every == 0
            if logs or self.device.type == "cpu":  # only then does the host wait for a GPU
                self.guard.check()
            if logs:
                self._log()
            self.bar.update()
            if (self.env.world == 1 or logs or self.device.type == "cpu") and self._asked_to_stop():
                self.guard.check()
                self._save()
                raise self._stopped()
        self.guard.check()
        at["epoch"], at["batch"] = at["epoch"] + 1, 0
        self.evaluation.health(state.g, at["epoch"], at["step"], self.log)
        last = at["epoch"] == self.cfg.epochs
        if last or at["epoch"] % self.cfg.checkpoint_every == 0 or self.evaluation.due(at["epoch"]):
            self._save()
            if self.evaluation.fid is None and self.env.first:  # else pictures come with each measurement
                self.evaluation.draw(state.g, at["epoch"], at["step"], self.log, self.path / "samples")
        self._report(f"epoch {at['epoch']}/{self.cfg.epochs}, step {at['step']}", self.shown)

    def _evaluate(self) -> None:
        at = self.state.at
        try:
            fid = self.evaluation.run(self.state.g, at["epoch"], at["step"], self.log, self.path / "samples")
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
        means = self.env.mean(self.state.means.pop())
        speed = (at["step"] - began_at) * self.cfg.batch_size * self.env.world / (time.monotonic() - began)
        self.log.scalars(at["step"], at["epoch"], means | {"time/images_per_second": speed})
        self.shown = means | {"images/s": speed}
        shown = {name: f"{value:.4g}" for name, value in self.shown.items()}
        self.bar.set_postfix({"epoch": at["epoch"] + 1, **shown})
        self.clock = (time.monotonic(), at["step"])

    def _save(self, *, best: bool = False) -> None:
        extra = {"log_position": self.log.sync(), "passport": self.evaluation.passport()}
        state = self.state.state_dict() | extra
        if self.env.first:
            self.checkpoints.save(self.state.at["step"], state, best=best)

    def _restore(self) -> Log:
        """Go on from the newest whole checkpoint, if there is one, and cut the log back to it."""
        state, reports = self.env.lead(self.checkpoints.load_latest)
        for report in reports if self.env.first else []:
            print(f"warning: {report}", file=sys.stderr)
        if state is None:
            return Log(self.path, active=self.env.first)
        if state["passport"] != self.evaluation.passport():
            differ = ", ".join(k for k, v in self.evaluation.passport().items() if state["passport"].get(k) != v)
            raise UsageError(f"fid: the run's FID was measured otherwise ({differ} differ); start a new run")
        self.state.load_state_dict(state)
        return Log(self.path, self.state.at["step"], state["log_position"], active=self.env.first)

    def _hold(self, folder: RunFolder) -> None:
        self.folder = folder

    def _asked_to_stop(self) -> bool:
        """Say whether any rank was asked to stop; every rank has to call it."""
        return self.env.any(bool(self.stop))

    def _stopped(self) -> Stopped:
        signum, command = self.env.largest(self.stop.signum or 0), resume_command(self.cfg)
        return Stopped(signum, f"stopped after step {self.state.at['step']}; go on with:\n  {command}")

    def _report(self, title: str, values: dict[str, float]) -> None:
        """Print a line where there is no bar to look at, and what is newly wrong with a layer in any case."""
        if not self.env.first:
            return
        if not sys.stderr.isatty():
            print("  ".join([title, *(f"{name} {value:.4g}" for name, value in values.items())]), flush=True)
        for line in self.evaluation.new_warnings():
            tqdm.write(f"warning: {line}", file=sys.stderr)


def step(cfg: GanConfig, state: GanState, guard: StepGuard, real: Tensor) -> dict[str, Tensor]:
    """Update the discriminator, then the generator, on one batch of images in [-1, 1]; return the losses."""
    z_d, z_g = noise(cfg, state.at["step"], 2 * len(real), real.device, state.env.rank).chunk(2)
    with autocast(real.device, cfg.precision):
        with torch.no_grad():  # this half does not train the generator
            fake = state.g(z_d)
        loss_d = discriminator_loss(state.d_ddp(real), state.d_ddp(fake))
    guard.descend("loss/d", loss_d, state.opt_d, state.scaler_d)

    state.d.requires_grad_(False)  # frozen and unwrapped: none of its gradients are computed, or averaged over ranks
    with autocast(real.device, cfg.precision):
        loss_g = generator_loss(state.d(state.g_ddp(z_g)))
    guard.descend("loss/g", loss_g, state.opt_g, state.scaler_g)
    state.d.requires_grad_(True)
    return {"loss/d": loss_d, "loss/g": loss_g}


def resume_command(cfg: GanConfig) -> str:
    """Return the command line that goes on with a run."""
    out = "" if cfg.out == GanConfig().out else f" --out {cfg.out}"
    world = int(os.environ.get("WORLD_SIZE", "1"))
    start = "python" if world == 1 else f"torchrun --nproc-per-node {os.environ.get('LOCAL_WORLD_SIZE', world)}"
    return f"{start} -m cbgan.train --name {cfg.name} --resume{out}"


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
