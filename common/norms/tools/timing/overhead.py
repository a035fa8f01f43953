"""Time the host in a step of each layer, where the device does nothing: ``python -m common.norms.overhead``."""

import contextlib
import ctypes
import re
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from common.cli.arguments import parse
from common.errors import UsageError
from common.machine.device import set_threads
from common.norms import bench
from common.norms.tools import counts
from common.norms.tools.recording import on_any_device, replaced_kernels

SHAPE = (2, 16, 2, 2)
"""On the CPU, and so small that what the CPU computes for the device takes no time."""
REPEATS = 50
LAYERS = ("UCBNorm", "UCBNorm, groups=1", "UCBNorm, update=weight", "SCBNorm", "SCBNormBase")
STUBBED, LAUNCHED = "kernels stubbed", "driver launches nothing"
GOALS = {STUBBED: 3.0, LAUNCHED: 5.0}
"""Of a training forward and backward, in BatchNorm's."""
ARCH = 90
FUNCTION = re.compile(r"\bcu[A-Z]\w+")
STUB = """
#define API __attribute__((visibility("default")))
API int cuDeviceGetAttribute(int *value, int attribute, int device) { *value = 227 << 10; return 0; }
API int cuFuncGetAttribute(int *value, int attribute, void *function) { *value = 1024; return 0; }
API int cuCtxGetCurrent(void **context) { *context = (void *)1; return 0; }
"""
"""A driver of which all else does nothing, and says that it did."""


class Nothing:
    """A compiled kernel that launches nothing."""

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return self._launch

    @staticmethod
    def _launch(*arguments: Any) -> None:
        pass


def build_driver(folder: Path, source: str) -> Path:
    """Compile a CUDA driver that does nothing, with every function that Triton's source names; return its file."""
    names = sorted(set(FUNCTION.findall(source)) - set(FUNCTION.findall(STUB)))
    code = STUB + "".join(f"API int {name}(void) {{ return 0; }}\n" for name in names)
    written, library = folder / "driver.c", folder / "libcuda.so.1"
    written.write_text(code, encoding="utf-8")
    command = ["cc", "-shared", "-fPIC", "-O1", "-w", "-Wl,-soname,libcuda.so.1", "-o", library, written]
    subprocess.run(command, check=True, capture_output=True)
    return library


@contextlib.contextmanager
def nothing_launched() -> Iterator[None]:
    """Let Triton compile and launch as on a GPU, into a driver that launches nothing; for the rest of the process."""
    from triton import knobs  # noqa: PLC0415 - an optional dependency
    from triton.backends.compiler import GPUTarget  # noqa: PLC0415
    from triton.backends.nvidia import driver as nvidia  # noqa: PLC0415
    from triton.runtime.driver import driver  # noqa: PLC0415

    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        source = Path(nvidia.__file__).with_name("driver.c").read_text(encoding="utf-8")
        ctypes.CDLL(str(build_driver(folder, source)), mode=ctypes.RTLD_GLOBAL)
        knobs.nvidia.libcuda_path = place
        knobs.cache.dir = str(folder / "cache")  # what is linked with this driver serves no other

        class Driver(nvidia.CudaDriver):
            def __init__(self) -> None:
                self.utils: Any = nvidia.CudaUtils()
                self.launcher_cls = nvidia.CudaLauncher
                self.get_current_device: Any = lambda: 0
                self.get_current_stream: Any = lambda device: 0

            def get_current_target(self) -> Any:
                return GPUTarget("cuda", ARCH, 32)

        driver.set_active(Driver())
        with on_any_device():
            yield


def microseconds(rounds: int) -> dict[str, list[float]]:
    """Return the times of a training forward and backward of BatchNorm and every layer, in turn."""
    subjects = {subject.name: subject for subject in counts.SUBJECTS}
    runs, times = {}, {}
    for name in ("BatchNorm2d", *LAYERS):
        layer: nn.Module = subjects[name].build(SHAPE[1], counts.COMPONENTS, "cpu").train()
        runs[name] = bench.step(layer, torch.randn(SHAPE).requires_grad_(), torch.randn(SHAPE), backward=True)
        runs[name]()  # compiles
    for _ in range(rounds):
        for name, run in runs.items():
            start = time.process_time()  # of this process alone, however busy the machine is
            for _ in range(REPEATS):
                run()
            times.setdefault(name, []).append((time.process_time() - start) * 1e6 / REPEATS)
    return times


@dataclass(frozen=True, kw_only=True)
class OverheadConfig:
    """Print how long the host takes for a training forward and backward of each layer, and in BatchNorm's.

    No GPU is needed: activations of 32 locations are on the CPU, where an operator takes about the host's time to
    launch one, and Triton's kernels do nothing, first in place of a launch, then behind Triton's own launcher. Times
    are medians of processor time, the layers in turn, on one thread. The exit status is 1 if a goal is missed.
    """

    rounds: int = 11
    """Times that every layer is measured, in turn."""
    driver: bool = True
    """Run Triton's launcher, too, which takes a C compiler and compiles the kernels."""

    def __post_init__(self) -> None:
        if self.rounds < 1:
            raise ValueError(f"rounds: expected at least 1, got {self.rounds}")


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command.

    Raises:
        UsageError: kernels would be interpreted, Triton is not installed, or there is no C compiler.
        SystemExit: with status 1 if a goal is missed.
    """
    cfg = parse(OverheadConfig, argv, prog="python -m common.norms.overhead")
    bench.check_triton("are not launched", "its kernels are what is launched")
    if cfg.driver and shutil.which("cc") is None:
        raise UsageError("driver: True needs a C compiler, cc, and there is none")
    set_threads(1)
    wrong: list[str] = []
    titles = ["layer", "the device", "host, us", "in BatchNorm2d's", "goal"]
    print(bench.head(titles))
    ways: dict[str, Any] = {STUBBED: lambda: replaced_kernels(lambda *_: Nothing())}
    if cfg.driver:
        ways[LAUNCHED] = nothing_launched
    for way, enter in ways.items():
        with enter():
            times = microseconds(cfg.rounds)
        base = times["BatchNorm2d"]
        for name, measured in times.items():
            ratio = bench.quantiles([a / b for a, b in zip(measured, base, strict=True)])[1]
            goal = GOALS[way] if name != "BatchNorm2d" else None
            cells = [
                name,
                way,
                f"{bench.quantiles(measured)[1]:.0f}",
                f"{ratio:.1f}",
                "-" if goal is None else str(goal),
            ]
            print(bench.line(cells), flush=True)
            if goal is not None and ratio > goal:
                wrong.append(f"{name}, {way}: {ratio:.1f} times BatchNorm2d's time, goal {goal}")
    bench.end(wrong, f"{len(wrong)} goals missed")
