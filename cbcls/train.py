"""Train a classifier and measure it: ``python -m cbcls.train``."""

from common.cli.command import start

if __name__ == "__main__":
    start("cbcls.train")  # before torch is loaded, since it settles how threads wait; does not return

import os
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import NoReturn

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from cbcls.config import ClassifierConfig
from cbcls.dry_run import estimate
from cbcls.evaluation import Evaluation, check_labels, to_input
from cbcls.state import ClassifierState
from cbcls.summary import closing_summary
from common.cli.arguments import parse
from common.cli.command import StopRequest
from common.data.batches import Batches
from common.data.image_set import Splits
from common.data.sets.registry import load
from common.errors import Stopped, UsageError
from common.machine.atomic import write_text_atomic
from common.machine.device import autocast, resolve_device, set_determinism, set_threads
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

APPLICATION = "cbcls"
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
)
"""Settings a resumed run may change: they alter for how long, how often or where, never what is computed."""


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command.

    Raises:
        UsageError, NonFiniteError, Stopped: as `common.cli.command.run_command` reports them.
    """
    cfg = parse(ClassifierConfig, argv, prog="python -m cbcls.train")
    if (world := int(os.environ.get("WORLD_SIZE", "1"))) > 1:
        raise UsageError(f"WORLD_SIZE: expected 1, got {world}; a classifier trains in one process")
    parent = cfg.out / APPLICATION
    if cfg.resume:
        assert cfg.name is not None  # RunConfig refuses otherwise
        if cfg.init_from is not None:
            raise UsageError(f"init_from: {cfg.init_from} starts a new run, so it cannot go with --resume")
        cfg = resume_config(ClassifierConfig, argv, find_run(parent, cfg.name), MAY_CHANGE)
    elif cfg.name is not None and not cfg.dry_run:
        refuse_existing(parent, cfg.name)
    cfg = replace(cfg, norm=cfg.norm.resolved())
    set_threads(cfg.threads)
    set_determinism(cfg.deterministic)
    device = resolve_device(cfg.device)
    splits = load(cfg.data)
    check_labels(splits)
    if cfg.dry_run:
        print(estimate(cfg, splits, device))
        return
    with StopRequest() as stop:
        Training(cfg, splits, device, stop).run()


class Training:
    """One run from its folder's creation, or from its newest checkpoint, to the last epoch."""

    def __init__(self, cfg: ClassifierConfig, splits: Splits, device: torch.device, stop: StopRequest) -> None:
        self.device, self.stop = device, stop
        self.evaluation = Evaluation(cfg, splits, device)
        try:
            self.batches = Batches(splits.train, cfg.batch_size, cfg.seed, flip=cfg.data.flip, workers=cfg.data.workers)
        except ValueError as error:
            raise UsageError(str(error)) from None
        self.state = ClassifierState(cfg, splits.train.num_classes, device)
        if cfg.init_from is not None and not cfg.resume:
            self.state.load_weights(cfg.init_from)
        self.folder = (_reopen if cfg.resume else _create)(cfg, device)
        self.cfg = replace(cfg, name=self.folder.path.name)
        self.checkpoints = Checkpoints(self.folder.path / "checkpoints")
        self.log = self._restore()
        self.guard = StepGuard([self.state.network], ["loss/train"], device)
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
            NonFiniteError: if a loss, gradient or logit was not finite.
        """
        at = self.state.at
        try:
            if not self.checkpoints.paths():
                self._save()  # so that a run can be resumed from its first moment on
            while True:
                if at["evaluated"] < at["epoch"]:
                    self._evaluate()
                if at["epoch"] >= self.cfg.epochs:
                    break
                self._epoch()
            self.bar.close()
            print(closing_summary(self.cfg, self.folder.path, self.device, self.evaluation.warnings))
        finally:
            self.bar.close()
            self.log.close()
            self.folder.close()

    def _epoch(self) -> None:
        at, state = self.state.at, self.state
        for images, labels, _ in self.batches.epoch(at["epoch"], at["batch"]):
            x = to_input(images, self.device, self.cfg)
            self.guard.begin(at["step"] + 1)
            loss = step(self.cfg, state, self.guard, x, labels.to(self.device, non_blocking=True))
            self.guard.finish()
            at["step"] += 1
            at["batch"] += 1
            state.means.add({"loss/train": loss})
            logs = at["step"] % self.cfg.log_every == 0
            if logs or self.device.type == "cpu":  # only then does the host wait for a GPU
                self.guard.check()
            if logs:
                self._log()
            self.bar.update()
            if self.stop:
                self._stop()
        self.guard.check()
        at["epoch"], at["batch"] = at["epoch"] + 1, 0
        self.log.scalars(at["step"], at["epoch"], self.evaluation.health(state.network))

    def _evaluate(self) -> None:
        at = self.state.at
        scores = self.evaluation.scores(self.state.network, lambda: self.stop)
        if scores is None:
            self._stop()
        at["evaluated"] = at["epoch"]
        self.log.scalars(at["step"], at["epoch"], scores)
        if at["epoch"] % self.cfg.checkpoint_every == 0 or at["epoch"] >= self.cfg.epochs:
            self._save()
        self._report(scores)
        self.clock = (time.monotonic(), at["step"])

    def _log(self) -> None:
        at, (began, began_at) = self.state.at, self.clock
        speed = (at["step"] - began_at) * self.cfg.batch_size / (time.monotonic() - began)
        self.shown = self.state.means.pop() | {"time/images_per_second": speed}
        self.log.scalars(at["step"], at["epoch"], self.shown)
        shown = {name.split("/")[-1]: f"{value:.4g}" for name, value in self.shown.items()}
        self.bar.set_postfix({"epoch": at["epoch"] + 1, **shown})
        self.clock = (time.monotonic(), at["step"])

    def _save(self) -> None:
        self.checkpoints.save(self.state.at["step"], self.state.state_dict() | {"log_position": self.log.sync()})

    def _restore(self) -> Log:
        """Go on from the newest whole checkpoint, if there is one, and cut the log back to it."""
        state, reports = self.checkpoints.load_latest()
        for report in reports:
            print(f"warning: {report}", file=sys.stderr)
        if state is None:
            return Log(self.folder.path)
        self.state.load_state_dict(state)
        return Log(self.folder.path, self.state.at["step"], state["log_position"])

    def _stop(self) -> NoReturn:
        self.guard.check()
        self._save()
        message = f"stopped after step {self.state.at['step']}; go on with:\n  {resume_command(self.cfg)}"
        raise Stopped(self.stop.signum or 0, message)

    def _report(self, scores: dict[str, float]) -> None:
        """Print a line where there is no bar to look at, and what is newly wrong with a layer in any case."""
        if not sys.stderr.isatty():
            at, values = self.state.at, self.shown | scores
            title = f"epoch {at['epoch']}/{self.cfg.epochs}, step {at['step']}"
            print("  ".join([title, *(f"{name} {value:.4g}" for name, value in values.items())]), flush=True)
        for line in self.evaluation.new_warnings():
            tqdm.write(f"warning: {line}", file=sys.stderr)


def step(cfg: ClassifierConfig, state: ClassifierState, guard: StepGuard, x: Tensor, labels: Tensor) -> Tensor:
    """Update the network on images (N, 3, S, S) in [-1, 1] and labels (N,); return the loss."""
    with autocast(x.device, cfg.precision):
        loss = F.cross_entropy(state.network(x), labels)
    guard.descend("loss/train", loss, state.optimizer, state.scaler)
    return loss


def resume_command(cfg: ClassifierConfig) -> str:
    """Return the command line that goes on with a run."""
    out = "" if cfg.out == ClassifierConfig().out else f" --out {cfg.out}"
    return f"python -m cbcls.train --name {cfg.name} --resume{out}"


def _create(cfg: ClassifierConfig, device: torch.device) -> RunFolder:
    session = environment(device, backend=cfg.norm.backend)
    files = {"config.yaml": stored_yaml(cfg), "environment.json": environment_json([session])}
    default = f"{cfg.data.name}-{cfg.norm.kind}-seed{cfg.seed}"
    return RunFolder.create(cfg.out / APPLICATION, cfg.name, default, files)


def _reopen(cfg: ClassifierConfig, device: torch.device) -> RunFolder:
    assert cfg.name is not None
    folder = RunFolder.reopen(cfg.out / APPLICATION / cfg.name)
    note_session(folder.path, environment(device, backend=cfg.norm.backend))
    write_text_atomic(folder.path / "config.yaml", stored_yaml(cfg))
    return folder
