"""Sessions in parallel, one a tree: forked from this process, which has loaded what tests load but not the project."""

import contextlib
import ctypes
import gc
import importlib
import json
import os
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable, Generator, Iterable, Iterator
from pathlib import Path
from typing import Any

import session

WARM = (
    "torch", "torchvision.transforms.v2", "torch.utils.tensorboard", "torch._dynamo", "numpy", "scipy.linalg",
    "sklearn.metrics", "sklearn.datasets", "PIL.Image", "matplotlib.figure", "matplotlib.backends.backend_agg",
    "jsonargparse", "hypothesis", "yaml", "tqdm", "timm", "torch_fidelity", "coverage",
    "tensorboard.backend.event_processing.event_accumulator",
)  # fmt: skip
"""Modules that a fork need not load; one that is missing is left to the tests that use it."""
PR_SET_PDEATHSIG = 1
Job = dict[str, Any]
Answer = dict[str, Any]
Work = Generator[Job, Answer, Any]
"""What is done in one tree: yields jobs, is sent their answers ({"timeout": ...} or {"died": ...} where none came)."""


def warm() -> None:
    """Load what tests load."""
    for name in WARM:
        with contextlib.suppress(ImportError):
            importlib.import_module(name)
    gc.collect()
    gc.freeze()  # so that collections in a fork do not copy every page


def busy() -> float:
    """Return how much longer things take because others use the machine."""
    return max(1.0, os.getloadavg()[0] / (os.cpu_count() or 1))


class Session:
    """A running job."""

    def __init__(self, job: Job, scratch: Path):
        """Start it."""
        shutil.rmtree(scratch, ignore_errors=True)
        (scratch / "tmp").mkdir(parents=True)
        self.mark = f"{os.getpid()}-{time.monotonic_ns()}"
        self.answer = scratch / "answer.json"
        self.log = scratch / "log"
        self.limit, self.start = job["limit"], time.monotonic()
        environment = {"MUTANTS_JOB": self.mark, "TMPDIR": str(scratch / "tmp"), **job.get("environment", {})}
        job = job | {"scratch": str(scratch), "answer": str(self.answer), "environment": environment}
        path = scratch / "job.json"
        path.write_text(json.dumps(job), encoding="utf-8")
        sys.stdout.flush()
        sys.stderr.flush()
        self.pid = os.fork()
        if not self.pid:
            status = 1
            try:
                os.setsid()
                ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)  # nobody else would end an endless loop
                for number in (signal.SIGINT, signal.SIGTERM):
                    signal.signal(number, signal.SIG_DFL)
                descriptor = os.open(self.log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
                null = os.open(os.devnull, os.O_RDONLY)
                for source, target in ((null, 0), (descriptor, 1), (descriptor, 2)):
                    os.dup2(source, target)
                if job.get("cold"):
                    os.execve(sys.executable, [sys.executable, session.__file__, str(path)], os.environ | environment)
                import tempfile  # noqa: PLC0415

                tempfile.tempdir = None
                session.main(str(path))
                status = 0
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(status)

    def poll(self) -> Answer | None:
        """Return the answer if there is one, stopping a job that is late."""
        pid, status = os.waitpid(self.pid, os.WNOHANG)
        seconds = (time.monotonic() - self.start) / busy()
        if not pid:
            if seconds < self.limit:
                return None
            self.stop()
            return {"timeout": True, "seconds": seconds}
        self._sweep()
        if self.answer.exists():
            return {"seconds": seconds, **json.loads(self.answer.read_text(encoding="utf-8"))}
        return {
            "seconds": seconds,
            "died": os.waitstatus_to_exitcode(status),
            "log": self.log.read_text(errors="replace")[-2000:],
        }

    def stop(self) -> None:
        """End it and all it started."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        self._sweep()
        with contextlib.suppress(ChildProcessError):
            os.waitpid(self.pid, 0)

    def _sweep(self) -> None:
        """End processes that the job started in sessions of their own; each has the job's mark in its environment."""
        mark = f"MUTANTS_JOB={self.mark}".encode()
        for entry in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                if mark in (entry / "environ").read_bytes().split(b"\0"):
                    os.kill(int(entry.name), signal.SIGKILL)
        with contextlib.suppress(OSError):
            os.killpg(self.pid, signal.SIGKILL)


def drive(works: Iterable[Callable[[Path], Work]], trees: list[Path], root: Path) -> Iterator[Any]:
    """Do works, one at a time in each tree, and yield what each returns."""
    waiting, free = iter(works), list(trees)
    live: dict[Path, tuple[Work, Session]] = {}

    def go_on(tree: Path, work: Work, answer: Answer | None) -> list[Any]:
        try:
            job = work.send(answer)  # type: ignore[arg-type]
        except StopIteration as end:
            free.append(tree)
            return [end.value]
        live[tree] = work, Session(job | {"tree": str(tree), "root": str(root)}, tree.with_name(f"{tree.name}-scratch"))
        return []

    try:
        while True:
            while free and (start := next(waiting, None)):
                tree = free.pop()
                yield from go_on(tree, start(tree), None)
            if not live:
                return
            time.sleep(0.02)
            for tree, (work, running) in list(live.items()):
                if (answer := running.poll()) is not None:
                    del live[tree]
                    yield from go_on(tree, work, answer)
    finally:
        for work, running in live.values():
            running.stop()
            work.close()
