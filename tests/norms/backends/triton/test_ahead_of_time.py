"""Every kernel compiles for three GPUs as the layers launch it, and spills no registers that the list does not name.

Loops over x load what comes next meanwhile, and two programs of a channel share a multiprocessor.
"""

import itertools
import os
from collections.abc import Iterable, Iterator

import pytest
import torch
from launches import LAYERS, LAYOUTS, Launch, compiled, record, resources

from common.norms.backends.triton import tile_configs

pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="interpreted kernels do not compile")

ARCHS = (80, 90, 100)  # A100, H100, B200
LARGE, SMALL, ODD, VECTORS = (64, 64, 112, 112), (64, 256, 8, 8), (64, 255, 7, 7), (64, 512, 1, 1)
Case = tuple[str, tuple[int, ...], torch.dtype, str]
"""A layer, the shape, precision and layout of its input."""
REGISTERS = 65_536
"""Of a multiprocessor."""
MAY_SPILL = {
    (80, "scb_unknown_bwd_kernel", VECTORS),  # stores one number once, and loads it once
}


def few(arch: int) -> list[Case]:
    """Return cases that launch every kernel."""
    shape, dtype, layout = {
        80: (LARGE, torch.float32, "NCHW"),
        90: (ODD, torch.bfloat16, "NHWC"),
        100: (LARGE, torch.bfloat16, "NHWC"),
    }[arch]
    joint_then_own = "UCBNorm, groups=1", "UCBNorm, update=weight"
    return [
        *((name, shape, dtype, layout) for name in (*joint_then_own, "SCBNorm, evaluation, ids")),
        ("UCBNorm", SMALL, dtype, "NCHW"),  # a program takes a channel
        ("MixtureNorm", LARGE, dtype, layout),  # it is fitted to locations that are drawn
    ]


def launches(cases: Iterable[Case]) -> Iterator[tuple[Launch, Case]]:
    for case in cases:
        step = record(LAYERS[case[0]], *case[1:])
        yield from ((each, case) for each in (*step.forward, *step.backward) if each.kernel)


def faults(arch: int, launched: Iterable[tuple[Launch, Case]]) -> list[str]:
    """Compile the launches, each code once; return what is wrong with those that are not as they should be."""
    codes = {kernel.hash: (kernel, each, case) for each, case in launched for kernel in [compiled(each, arch)]}
    found = []
    for kernel, each, case in codes.values():
        registers, spilled = resources(kernel)
        if spilled and (arch, each.name, case[1]) not in MAY_SPILL:
            found.append(f"sm_{arch} {each.name}, {case}: spills {spilled} bytes")
        if each.name == "mixture_channel_kernel" and 2 * registers * 32 * kernel.metadata.num_warps > REGISTERS:
            found.append(f"sm_{arch} {each.name}, {case}: {registers} registers")
        sums = each.kwargs.get("DENSITY") or each.kwargs.get("DIRECT")  # registers do not suffice for loads ahead too
        ahead = each.name in tile_configs.MIXTURE and case[1] == LARGE and not sums
        if ahead and "cp.async" not in kernel.asm["ptx"]:
            found.append(f"sm_{arch} {each.name}, {case}: waits for what it loads")
    return found


@pytest.mark.parametrize("arch", ARCHS)
def test_each_kernel_compiles_as_it_should(arch):
    from common.norms.backends.triton import cluster_kernels, em_kernels, mixture_kernels, parameter_kernels  # noqa: PLC0415

    first = {each.name: (each, case) for each, case in [*launches(few(arch))][::-1]}
    modules = cluster_kernels, em_kernels, mixture_kernels, parameter_kernels
    assert first.keys() == {name for module in modules for name in vars(module) if name.endswith("_kernel")}
    assert not faults(arch, first.values())


TWO = [(torch.float32, "NCHW"), (torch.bfloat16, "NHWC")]
FULL = [
    *itertools.product([LARGE], [torch.float32, torch.bfloat16], LAYOUTS),
    *((shape, *kind) for shape, kind in itertools.product((SMALL, ODD, VECTORS), TWO)),
]


@pytest.mark.full
@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize(("shape", "dtype", "layout"), FULL, ids=str)
def test_every_layer_compiles_as_it_should(arch, shape, dtype, layout):
    assert not faults(arch, launches((name, shape, dtype, layout) for name in LAYERS))
