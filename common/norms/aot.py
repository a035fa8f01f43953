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

from jsonargparse import auto_cli

from common.norms import launch

ADJACENT = {"positions": "_sl", "channels": "_sc"}
"""Strides that are 1 where neighbours in memory are positions (contiguous) or channels (channels_last)."""
USAGE = re.compile(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)")


@dataclass(frozen=True, kw_only=True)
class Case:
    """One kernel as a launch would specialise it."""

    kernel: str
    num_warps: int
    constants: dict[str, Any] = field(default_factory=dict)
    adjacent: str = "positions"
    dtype: str = "fp32"
    hardest: bool = True
    """Whether the quick check takes it."""

    def __str__(self) -> str:
        constants = " ".join(f"{name}={int(value)}" for name, value in self.constants.items())
        return f"{self.kernel} {self.dtype} {self.adjacent} adjacent, {self.num_warps} warps, {constants}"


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
    rows = launch.SCB_ROWS.elements // launch.CHANNEL_BLOCK
    constants = {"BLOCK_N": rows, "BLOCK_C": launch.CHANNEL_BLOCK}
    yield Case(kernel="scb_rows_kernel", num_warps=launch.SCB_ROWS.num_warps, constants=constants)


def cases() -> list[Case]:
    """Return every entry of the launch table at its largest tile, for every layout and type."""
    return [*_cluster_cases()]


def compile_case(case: Case, arch: int) -> bytes:
    """Compile for compute capability ``arch`` (90 is sm_90) and return the cubin."""
    import triton  # noqa: PLC0415 - an optional dependency
    from triton.backends.compiler import GPUTarget  # noqa: PLC0415
    from triton.compiler import ASTSource  # noqa: PLC0415

    from common.norms import kernels  # noqa: PLC0415

    function = getattr(kernels, case.kernel)
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
            signature[name] = "fp32" if name in ("eps", "kappa") else "i32"
        if name.endswith("_ptr") or "_s" in name or name in ("C", "L"):
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


def main(archs: Sequence[int] = (80, 90, 100), quick: bool = False, kernel: str = "") -> None:
    """Print what every kernel takes of a GPU; the exit status is 1 if one spills.

    Args:
        archs: compute capabilities to compile for.
        quick: take each kernel's hardest cases only.
        kernel: take the kernels with this in their name only.
    """
    if os.environ.get("TRITON_INTERPRET") == "1":
        sys.exit("TRITON_INTERPRET: expected it unset, since interpreted kernels cannot be compiled, got 1")
    chosen = [case for case in cases() if (case.hardest or not quick) and kernel in case.kernel]
    spills = 0
    print("| arch | registers | stack | shared | local | kernel |\n|---|---|---|---|---|---|")
    for arch, case in itertools.product(archs, chosen):
        registers, stack, shared, local = resources(compile_case(case, arch))
        spills += stack + local > 0
        print(f"| sm_{arch} | {registers} | {stack} | {shared} | {local} | {case} |", flush=True)
    print(f"\n{len(archs) * len(chosen)} compiled, {spills} spill")
    sys.exit(spills > 0)


if __name__ == "__main__":
    auto_cli(main)
