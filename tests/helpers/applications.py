"""The applications that keep the promises of every run, each with flags of a run of 8 steps an epoch."""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import toy

import cbcls.task
import cbcls.train
import cbda.adamatch
import cbda.task
import cbgan.task
import cbgan.train
from common.data.augmentation import Augmentation
from common.train.task import Task

Augmentation("weak", 8)(
    torch.zeros(3, 8, 8, dtype=torch.uint8), 0
)  # so that no forked process has to import its library
sys.modules.setdefault("toy.train", toy)  # so that its resume command names a module


@dataclass(frozen=True)
class Application:
    """How a test runs one."""

    name: str
    kind: type[Task[Any]]
    main: Callable[[list[str]], None]
    flags: tuple[str, ...]
    """Of a run of 8 steps an epoch."""
    loss: str
    """The first loss of a step."""
    batch_size: int

    def tiny(self, out: Path, cache: Path) -> list[str]:
        """Return the flags of a tiny run in a folder of its own."""
        return [*self.flags, "--batch_size", str(self.batch_size), "--log_every", "3", "--out", str(out),
                "--cache", str(cache)]  # fmt: skip


APPLICATIONS = {
    application.name: application
    for application in (
        Application(
            "cbgan", cbgan.task.GanTask, cbgan.train.main,
            ("--steps_per_epoch", "8", "--data.size", "8", "--data.flip", "--width", "8", "--latent_dim", "16",
             "--lr", "0.1", "--schedule.kind", "constant", "--evaluate_every", "1", "--fid.samples", "60",
             "--fid.batch_size", "20"), "d", 24),
        Application(
            "cbcls", cbcls.task.ClassifierTask, cbcls.train.main,
            ("--steps_per_epoch", "8", "--data.size", "8", "--data.flip"), "train", 24),
        Application(
            "cbda", cbda.task.AdaMatchTask, cbda.adamatch.main,
            ("--steps_per_epoch", "8", "--data.size", "8", "--evaluate_every", "1",
             "--norm.kind", "ucb", "--schedule.kind", "constant", "--method.warmup", "0",
             "--source_only", "false"), "adamatch", 24),
        Application(
            "toy", toy.ToyTask, toy.main, ("--data.flip",), "net", 120),  # 8 batches of 1000 images
    )
}  # fmt: skip
