"""Compile the kernels for GPUs that need not be there, and see that none spills: ``python -m common.norms.aot``."""

import itertools
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from common.cli.arguments import parse
from common.errors import UsageError
from common.norms.kernels import launch

ADJACENT = {"positions": "_sl", "channels": "_sc"}
"""Strides that are 1 where neighbours in memory are positions (contiguous) or channels (channels_last)."""
NUMBERS = ("eps", "floor", "kappa", "momentum", "min_weight")
"""Arguments that are no integers."""
USAGE = re.compile(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)")


@dataclass(frozen=True, kw_only=True)
class Case:
    """One kernel as a launch would specialise it."""

    kernel: str
    num_warps: int
    constants: dict[str, Any] = field(default_factory=dict)
    adjacent: str = "positions"
    dtype: str = "fp32"
    odd: bool = False
    """Whether no size or stride is a multiple of 16, as with 7 x 7 positions of 255 channels."""
    hardest: bool = True
    """Whether the quick check takes it."""

    def __str__(self) -> str:
        constants = " ".join(
            f"no {name[:-4]}" if value is None else f"{name}={int(value)}" for name, value in self.constants.items()
        )
        sizes = ", odd sizes" if self.odd else ""
        return f"{self.kernel} {self.dtype} {self.adjacent} adjacent{sizes}, {self.num_warps} warps, {constants}"


def _sizes(entry: launch.Launch, adjacent: str) -> dict[str, int]:
    """The largest tile of an entry."""
    channels = launch.CHANNEL_BLOCK if adjacent == "channels" else 1
    return {"BLOCK_L": entry.elements // channels, "BLOCK_C": channels}


def _cluster_cases() -> Iterator[Case]:
    kernels = (("scb_fwd_kernel", launch.SCB_FORWARD), ("scb_bwd_kernel", launch.SCB_BACKWARD))
    for (kernel, entry), adjacent, dtype in itertools.product(kernels, ADJACENT, ("fp32", "bf16", "fp16")):
        yield Case(
            kernel=kernel, num_warps=entry.num_warps, constants=_sizes(entry, adjacent), adjacent=adjacent,
            dtype=dtype, hardest=dtype == "fp32",
        )  # fmt: skip
    rows = launch.SUMS.elements // launch.CHANNEL_BLOCK
    constants = {"BLOCK_N": rows, "BLOCK_C": launch.CHANNEL_BLOCK}
    yield Case(kernel="scb_rows_kernel", num_warps=launch.SUMS.num_warps, constants=constants)


def _mixture_sizes(entry: launch.Launch, num: int) -> Iterator[tuple[bool, str, dict[str, int]]]:
    """Whether joint, what is adjacent, and tiles: of single channels, and of groups of various widths."""
    for adjacent in ADJACENT:
        yield False, adjacent, _sizes(entry, adjacent)
        for width in (8, 64, launch.MAX_GROUP_CHANNELS[num]):
            yield True, adjacent, {"BLOCK_L": max(1, entry.elements // width), "BLOCK_C": width}
    yield False, "positions", {"BLOCK_L": 64, "BLOCK_C": entry.elements // 64}  # 8 x 8 positions


def _without(*pointers: str) -> dict[str, Any]:
    return {f"{name}_ptr": None for name in pointers}


_BATCH = {**_without("log", "mean", "var"), "STORED": False}
_LEARNED = {**_without("state"), "STORED": True}
_NO_SUMS = {**_without("sums"), "DENSITY": False, "DIRECT": False}
MODES: dict[str, list[dict[str, Any]]] = {
    "mixture_moments_kernel": [{"STORED": True}],
    "mixture_apply_kernel": [_BATCH, _LEARNED],
    "mixture_sums_kernel": [{}],
    "mixture_bwd_kernel": [
        {**_BATCH, **_NO_SUMS},
        {**_BATCH, "DENSITY": True, "DIRECT": False},
        {**_LEARNED, **_without("coefficients"), **_NO_SUMS},
        {**_LEARNED, **_without("coefficients"), "DENSITY": True, "DIRECT": True},
    ],
}
"""What a kernel may be launched for, by the pointers that there are none of and the constants."""


def _mixture_cases() -> Iterator[Case]:
    for (kernel, table), dtype in itertools.product(launch.MIXTURE.items(), ("fp32", "bf16")):
        for mode in MODES[kernel]:
            for num, entry in table.items():
                for joint, adjacent, sizes in _mixture_sizes(entry, num):
                    widest = sizes["BLOCK_C"] == launch.MAX_GROUP_CHANNELS[num]
                    hardest = dtype == "fp32" and num == max(table) and widest
                    constants = {"K": num, "JOINT": joint, "FLAT": adjacent == "channels", **mode, **sizes}
                    for odd in (False, True):
                        yield Case(
                            kernel=kernel, num_warps=entry.num_warps, adjacent=adjacent, dtype=dtype,
                            constants=constants, odd=odd, hardest=hardest and adjacent == "positions" and odd,
                        )  # fmt: skip


def _gather_cases() -> Iterator[Case]:
    """The kernels that touch no activation."""
    block_p, block_c = launch.sums_tile()
    num, sizes = max(launch.MAX_GROUP_CHANNELS), {"BLOCK_P": block_p, "BLOCK_C": block_c}
    every = {"BLOCK_ALL": launch.ALL_CHANNELS, "BLOCK_C": launch.PARAMETER_CHANNELS}
    learned = {**_without("state", "coefficients"), "STORED": True}
    for kernel, constants in (
        ("mixture_merge_kernel", sizes),
        ("mixture_coefficients_kernel", sizes),
        (
            "mixture_gradients_kernel",
            {**_without("log", "var", "affine"), "JOINT": True, "STORED": True, "DENSITY": True} | sizes,
        ),
        ("mixture_gradients_kernel", {**learned, "JOINT": True, "DENSITY": True} | sizes),
        ("mixture_averages_kernel", {**_without("before"), "PAPER": False, "SHARED": False} | every),
        ("mixture_averages_kernel", {"PAPER": False, "SHARED": True} | every),
        ("mixture_logits_kernel", {**_without("state"), "STORED": True, "BLOCK_C": launch.ALL_CHANNELS}),
    ):
        yield Case(kernel=kernel, num_warps=launch.SUMS.num_warps, constants={"K": num} | constants)


def cases() -> list[Case]:
    """Return every entry of the launch table at its largest tiles and numbers of components, in every layout."""
    return [*_cluster_cases(), *_mixture_cases(), *_gather_cases()]


def compile_case(case: Case, arch: int) -> bytes:
    """Compile for compute capability ``arch`` (90 is sm_90) and return the cubin."""
    import triton  # noqa: PLC0415 - an optional dependency
    from triton.backends.compiler import GPUTarget  # noqa: PLC0415
    from triton.compiler import ASTSource  # noqa: PLC0415

    from common.norms.kernels import cluster_kernels, mixture_kernels, parameter_kernels  # noqa: PLC0415

    modules = (cluster_kernels, mixture_kernels, parameter_kernels)
    function = next(found for module in modules if (found := vars(module).get(case.kernel)) is not None)
    signature, constants, attributes = {}, dict(case.constants), {}
    for index, name in enumerate(function.arg_names):
        if name.endswith(ADJACENT[case.adjacent]):
            constants[name] = 1
        if name in constants:
            signature[name] = "constexpr"
        elif name.endswith("_ptr"):
            pointed = {"cluster_ptr": "i64"}.get(name, case.dtype if name[:-4] in ("x", "g", "y", "dx") else "fp32")
            signature[name] = f"*{pointed}"
        else:
            signature[name] = "fp32" if name in NUMBERS else "i32"
        if name.endswith("_ptr") or (not case.odd and ("_s" in name or name in ("C", "L"))):
            attributes[(index,)] = [["tt.divisibility", 16]]
    attributes = {at: value for at, value in attributes.items() if function.arg_names[at[0]] not in constants}
    source = ASTSource(function, signature, constexprs=constants, attrs=attributes)
    compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options={"num_warps": case.num_warps})
    return compiled.asm["cubin"]


def resources(cubin: bytes) -> tuple[int, int, int, int]:
    """Return registers, and bytes of stack, shared and local memory, a thread or a block, as cuobjdump says."""
    import triton.backends.nvidia  # noqa: PLC0415 - an optional dependency

    tool = Path(triton.backends.nvidia.__file__).parent / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        done = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True)
    found = USAGE.search(done.stdout)
    if found is None:
        raise RuntimeError(f"cuobjdump: expected REG, STACK, SHARED and LOCAL, got {done.stdout!r}")
    registers, stack, shared, local = (int(value) for value in found.groups())
    return registers, stack, shared, local


@dataclass(frozen=True, kw_only=True)
class AotConfig:
    """Compile every kernel ahead of time and print what it takes of a GPU; the exit status is 1 if one spills."""

    archs: list[int] = field(default_factory=lambda: [80, 90, 100])
    """Compute capabilities to compile for."""
    quick: bool = False
    """Take each kernel's hardest cases only."""
    kernel: str = ""
    """Take the kernels with this in their name only."""


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command.

    Raises:
        UsageError: if kernels would be interpreted.
        SystemExit: with status 1 if a kernel spills.
    """
    cfg = parse(AotConfig, argv, prog="python -m common.norms.aot")
    if os.environ.get("TRITON_INTERPRET") == "1":
        raise UsageError("TRITON_INTERPRET: expected it unset, since interpreted kernels cannot be compiled, got 1")
    chosen = [case for case in cases() if (case.hardest or not cfg.quick) and cfg.kernel in case.kernel]
    spills = 0
    print("| arch | registers | stack | shared | local | kernel |\n|---|---|---|---|---|---|")
    for arch, case in itertools.product(cfg.archs, chosen):
        registers, stack, shared, local = resources(compile_case(case, arch))
        spills += stack + local > 0
        print(f"| sm_{arch} | {registers} | {stack} | {shared} | {local} | {case} |", flush=True)
    print(f"\n{len(cfg.archs) * len(chosen)} compiled, {spills} spill")
    sys.exit(spills > 0)
