"""From a command line to what the loop starts with: settings, and the run's folder."""

import os
import shlex
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from common.runtime.atomic import write_text_atomic
from common.runtime.cli import flatten, parse, read, to_dict
from common.runtime.device import DTYPES, keep_freed_memory, set_determinism, set_threads
from common.runtime.distributed import Env
from common.runtime.errors import UsageError
from common.runtime.paths import expanded
from common.train.config import RunConfig, resume_config, stored_yaml
from common.train.run_dir import (
    RunFolder,
    environment,
    environment_json,
    find_run,
    note_session,
    recorded_threads,
    refuse_existing,
)
from common.train.task import Task


def configure(kind: type[Task[Any]], argv: Sequence[str] | None) -> RunConfig:
    """Read the command line, and the settings of the run that it resumes, if any; set threads, memory and determinism.

    Raises:
        UsageError: for anything wrong in files or flags, or a run that is not as they say.
    """
    prog = f"python -m {kind.application}.{kind.command}"
    given = read(kind.config, argv, prog=prog)  # a resumed run's flags make sense beside its config.yaml only
    parent, threads = expanded(given["out"], "out") / kind.application, None
    resume, name = given["resume"], given["name"]
    if resume == "auto" and name is not None:
        resume = (parent / name / "config.yaml").is_file()
    if resume and name is not None:
        if given["init_from"] is not None:
            raise UsageError(f"init_from: {given['init_from']} starts a new run, so it cannot go with --resume")
        path = find_run(parent, name)
        cfg = replace(resume_config(kind.config, argv, path), resume=True)
        threads = recorded_threads(path)
    else:
        cfg = replace(parse(kind.config, argv, prog=prog), resume=False)
        if cfg.name is not None and not cfg.dry_run:
            refuse_existing(parent, cfg.name)  # before images are read
    for field, value in flatten(to_dict(cfg)):
        if str(value) != str(value).encode(errors="replace").decode():
            raise UsageError(f"{field}: expected UTF-8, which config.yaml and TensorBoard can hold, got {value!a}")
    set_threads(cfg.threads or threads or 0)
    keep_freed_memory()
    set_determinism(cfg.deterministic)
    kind.selection(cfg)
    return cfg.resolved()


class OpenRunDir:
    """A run's folder, locked by rank 0: at once if the run is resumed, and from `open` on if it is new.

    Raises:
        UsageError: if the run cannot be resumed here, or another process has it open.
    """

    def __init__(self, kind: type[Task[Any]], cfg: RunConfig, device: torch.device, env: Env) -> None:
        self.kind, self.cfg, self.env = kind, cfg, env
        self.session = environment(device) | {"backend": cfg.norm.backend_on(device, DTYPES[cfg.precision])}
        self._folder: RunFolder | None = None
        if cfg.resume:
            env.on_rank0(self._reopen)

    def open(self) -> tuple[Path, RunConfig]:
        """Return the folder, made if the run is new, and the configuration with the run's name."""
        if not self.cfg.resume:
            self.cfg = replace(self.cfg, name=self.env.on_rank0(self._create))
        return self.cfg.out / self.kind.application / str(self.cfg.name), self.cfg

    def close(self) -> None:
        """Release the lock."""
        if self._folder is not None:
            self._folder.close()

    def _create(self) -> str:
        files = {"config.yaml": stored_yaml(self.cfg), "environment.json": environment_json([self.session])}
        parent, default = self.cfg.out / self.kind.application, self.kind.default_name(self.cfg)
        self._folder = RunFolder.create(parent, self.cfg.name, default, files)
        return self._folder.path.name

    def _reopen(self) -> None:
        self._folder = RunFolder.reopen(self.cfg.out / self.kind.application / str(self.cfg.name))
        for line in note_session(self._folder.path, self.session):
            print(f"warning: {line}", file=sys.stderr)
        write_text_atomic(self._folder.path / "config.yaml", stored_yaml(self.cfg))


def resume_command(kind: type[Task[Any]], cfg: RunConfig) -> str:
    """Return the command line that resumes a run."""
    out = [] if cfg.out == RunConfig().out else ["--out", str(cfg.out)]
    world = int(os.environ.get("WORLD_SIZE", "1"))
    start = "python" if world == 1 else f"torchrun --nproc-per-node {os.environ.get('LOCAL_WORLD_SIZE', world)}"
    return f"{start} -m {kind.application}.{kind.command} {shlex.join(['--name', str(cfg.name), '--resume', *out])}"
