"""The Triton backend on a machine without a GPU: each process has the environment that it needs."""

import contextlib
import itertools
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from launches import LAYERS, record
from norm_cases import in_full, mixture_case

from common.norms import cluster_norm, functional, mixture_norm
from common.norms.backends import graphs
from common.norms.backends.triton import cluster_ops, launch, ops, tile_configs

FOLDER = Path(__file__).parent
ON_EVERY_PUSH, IN_FULL = 2, 6
"""Processes that the interpreted tests are dealt out to, so that pytest-xdist can run them side by side."""
needs_triton = pytest.mark.skipif(not launch.INSTALLED, reason="triton is not installed")


def python(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run Python from the root, without TRITON_INTERPRET unless it is given."""
    inherited = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    root = FOLDER.parents[3]
    path = os.pathsep.join([str(root), inherited.pop("PYTHONPATH", "")])
    environment = {"OMP_NUM_THREADS": "1", **inherited, "PYTHONPATH": path, **environment}
    command = [sys.executable, *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment, cwd=root, check=False)


@needs_triton
@pytest.mark.parametrize(
    ("marked", "part"),
    [
        *(("not full", f"{i}/{ON_EVERY_PUSH}") for i in range(ON_EVERY_PUSH)),
        *in_full(*(("full", f"{i}/{IN_FULL}") for i in range(IN_FULL))),
    ],
)
def test_under_the_interpreter(marked, part):
    files = sorted(map(str, FOLDER.glob("*_interpreted.py")))
    options = "-q", "-p", "no:cacheprovider", "-m", marked
    done = python("-m", "pytest", *files, *options, TRITON_INTERPRET="1", TEST_PART=part)
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    assert " passed" in done.stdout


def test_the_package_works_where_triton_is_not_installed():
    script = """
import sys
sys.modules["triton"] = None  # what import and find_spec see where it is absent
import importlib.util
find = importlib.util.find_spec
importlib.util.find_spec = lambda name, *a: None if name == "triton" else find(name, *a)
import torch
from common.norms import UCBNorm
UCBNorm(4, 2)(torch.randn(8, 4, 3)).sum()
try:
    UCBNorm(4, 2, backend="triton")(torch.randn(8, 4, 3))
except ValueError as error:
    print(error)
"""
    done = python("-c", script)
    assert done.returncode == 0, done.stderr
    assert "backend: 'triton' needs the package triton, which is not installed" in done.stdout


SHAPES = [((1, 1, 1), "positions"), ((3, 5, 7), "channels"), ((64, 1024, 1), "positions"), ((8, 512, 64), "positions"),
          ((8, 512, 64), "channels"), ((2, 3, 100_000), "positions"), ((2, 3, 100_000), "channels")]  # fmt: skip


@pytest.mark.parametrize(("shape", "adjacent"), SHAPES, ids=str)
def test_tiles_of_a_mixture_cover_the_activation_and_are_no_larger_than_the_table_says(shape, adjacent):
    n, channels, positions = shape
    x = torch.empty(shape, device="meta")
    x = x.mT.contiguous().mT if adjacent == "channels" else x
    for kernel, num, width in itertools.product(tile_configs.MIXTURE, range(1, 9), (1, channels)):
        if launch.mixture_refusal(num, width):
            continue
        layout = tile_configs.layout_of((x,), merge=False)
        table = tile_configs.MIXTURE[kernel]
        vectors = (channels if adjacent == "channels" else positions) % 16 == 0
        elements = (table.few if num <= 4 else table.many_vectors if vectors else table.many).elements
        for planes in (5, 0):
            tiling = tile_configs.mixture_tiling(kernel, layout, channels // width, num, planes=planes, itemsize=2)
            assert tiling.joint == (width > 1)
            for block in (tiling.block_l, tiling.block_c):
                assert block == 1 << (block.bit_length() - 1) >= 1
            runs = tiling.joint and adjacent == "positions" and positions % 16 == 0
            wide = (
                tile_configs.MIN_JOINT_POSITIONS * tile_configs.MAX_JOINT_CHANNELS
                if runs and tiling.block_c <= tile_configs.MAX_JOINT_CHANNELS
                else elements
            )
            assert tiling.block_l * tiling.block_c <= max(elements, wide, tiling.block_c)
            assert tiling.block_l < 2 * positions or layout.flat
            if tiling.joint:  # a tile holds a group
                assert width <= tiling.block_c < 2 * width
                assert tiling.columns == channels // width
            else:
                assert (tiling.columns - 1) * tiling.block_c < channels <= tiling.columns * tiling.block_c
            tiles = n * -(-positions // tiling.block_l)
            assert 1 <= tiling.programs <= tiles
            most = -(-tiles // tiling.programs)
            assert -(-tiles // most) == tiling.programs  # no fewer programs would take as many tiles each
            if planes:  # what they leave, K numbers a channel and plane, is a tenth of x once it is read again
                left = 2 * 4 * planes * num * tiling.programs / (2 * n * positions)
                assert tiling.programs == 1 or left < 0.1 or tiling.programs * tiling.columns <= 132
            elif tiles * tiling.columns <= 1024:
                assert tiling.programs == tiles


@pytest.mark.parametrize(
    ("shape", "adjacent"),
    [((5, 7), "positions"), ((16, 1), "positions"), ((256, 64), "channels"), ((512, 16), "positions")],
    ids=str,
)
def test_a_tile_is_the_same_for_all_batch_sizes(shape, adjacent):
    """Whether columns are narrowed is decided for one of them."""
    mixtures, clusters = set(), set()
    for n in (1, 2, 37, 63, 64, 1000):
        x = torch.empty(n, *shape, device="meta")
        x = x.mT.contiguous().mT if adjacent == "channels" else x
        layout = tile_configs.layout_of((x,), merge=True)
        found = ()
        for planes in (0, 2, 5):
            tiling = tile_configs.mixture_tiling("mixture_bwd_kernel", layout, shape[0], 3, planes=planes)
            found += tiling.block_l, tiling.block_c, tiling.num_warps
        mixtures.add((layout.positions, layout.strides, layout.flat, found))
        layout = tile_configs.layout_of((x,), merge=False)
        tilings = [
            tile_configs.cluster_tiling(tile_configs.SCB_BACKWARD, layout, 3, 2, sums=sums) for sums in (False, True)
        ]
        clusters.add(tuple((*each.blocks.values(), each.by_sample) for each in tilings))
    assert len(mixtures) == len(clusters) == 1


def test_so_many_locations_are_refused_that_a_number_of_one_may_overflow(monkeypatch):
    """A loop's counter goes one step of all programs beyond the last location."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(launch, "INSTALLED", True)
    most = launch.MOST_LOCATIONS
    assert launch.refusal(torch.empty(1).expand(2, 5, most // 2 - 1)) is None
    assert launch.refusal(torch.empty(1).expand(2, 5, most // 2)) == f"counts fewer than {most} locations, got {most}"
    length = most - 1
    for channels, adjacent in itertools.product((1, 5, 64, 2048), ("positions", "channels")):
        strides = (0, length, 1) if adjacent == "positions" else (0, 1, channels)
        layout = tile_configs.Layout(1, channels, length, (strides,))
        for sums in (False, True):
            tiling = tile_configs.cluster_tiling(tile_configs.SCB_FORWARD, layout, 3, 2, sums=sums)
            assert length + tiling.shares * tiling.block_l < 2**31
        assert length + tile_configs.unknown_shares(layout) * tile_configs.unknown_tile(layout)[0] < 2**31


@needs_triton
def test_more_channels_than_a_grid_has_columns_are_refused(monkeypatch):
    """CUDA takes 65,535 in its second and third dimension."""
    with monkeypatch.context() as interpreted:  # Triton, which records below may load, would interpret all kernels
        interpreted.setenv("TRITON_INTERPRET", "1")
        assert launch.refusal(torch.empty(1).expand(2, 65_535, 3)) is None
        assert launch.refusal(torch.empty(1).expand(2, 65_536, 3)) == "takes up to 65535 channels, got 65536"
    for name in ("UCBNorm", "SCBNorm", "SCBNorm, affine"):
        step = record(LAYERS[name], (2, 65_535, 3), torch.float32, "NCHW")
        assert all(max(each.grid[1:], default=1) <= 65_535 for each in (*step.forward, *step.backward) if each.kernel)


def test_samples_and_positions_are_walked_as_one_where_every_layout_allows_it():
    plain, vectors = torch.empty(3, 4, 5), torch.empty(9, 4, 1)
    last = torch.empty(3, 5, 4).mT
    assert tile_configs.layout_of((vectors,), merge=True) == tile_configs.Layout(9, 4, 1, ((0, 1, 4),), flat=True)
    assert tile_configs.layout_of((last, last), merge=True) == tile_configs.Layout(
        3, 4, 5, ((0, 1, 4), (0, 1, 4)), flat=True
    )
    for pair in ((plain, plain), (last, plain), (plain, last)):
        assert tile_configs.layout_of(pair, merge=True) == tile_configs.Layout(
            3, 4, 5, tuple((t.stride(0), t.stride(1), t.stride(2)) for t in pair)
        )
    assert tile_configs.layout_of((last,), merge=False) == tile_configs.Layout(3, 4, 5, ((20, 1, 4),))


def test_what_the_kernels_refuse_of_a_mixture(monkeypatch):
    assert launch.mixture_refusal(9, 1) == "takes up to 8 components, got 9"
    for num, most in ((1, 1024), (2, 1024), (3, 512), (4, 512), (5, 256), (8, 256)):
        assert launch.mixture_refusal(num, most) is None
        line = f"takes up to {most} channels that share one of {num} posteriors, got {most + 1}"
        assert launch.mixture_refusal(num, most + 1) == line
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(launch, "INSTALLED", True)
    x, *given, _ = mixture_case((2, 600, 1), num=3, dtype=torch.float32)
    with pytest.raises(ValueError, match="'triton' takes up to 512 channels that share one of 3 posteriors, got 600"):
        mixture_norm(x, *given, groups=1, backend="triton")


@needs_triton
def test_asking_for_triton_where_it_cannot_run_says_why(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    x, _, mean, var, _ = mixture_case((2, 4, 3), num=3)
    cluster = torch.tensor([0, 1])
    with pytest.raises(ValueError, match=r"'triton' computes float32, bfloat16 and float16, got torch\.float64"):
        cluster_norm(x, cluster, mean, var, backend="triton")
    with pytest.raises(ValueError, match="backend: 'triton' needs a CUDA tensor, or TRITON_INTERPRET=1"):
        cluster_norm(x.float(), cluster, mean, var, backend="triton")


class OnGpu:
    """What the choice of a backend asks of a tensor."""

    is_cuda, device, ndim = True, torch.device("cuda"), 0

    def __init__(self, dtype):
        self.dtype = dtype


def test_the_automatic_choice_is_never_an_error(monkeypatch):
    monkeypatch.setattr(launch, "failure", lambda _: None)
    for dtype, num, width, installed, want in (
        (torch.float32, 3, 256, True, "triton"),
        (torch.bfloat16, 8, 256, True, "triton"),
        (torch.float16, 1, 1, True, "triton"),
        (torch.float64, 3, 256, True, "eager"),
        (torch.float32, 9, 256, True, "eager"),
        (torch.float32, 3, 1024, True, "eager"),
        (torch.float32, 3, 256, False, "eager"),
    ):
        monkeypatch.setattr(launch, "INSTALLED", installed)
        x: Any = OnGpu(dtype)
        assert functional.choose_backend("auto", x, num, width) == want
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert functional.choose_backend("auto", torch.randn(2, 2)) == "eager"


def test_a_capture_is_seen_where_it_is(monkeypatch):
    """On a machine without a driver, to ask is an error."""
    assert not graphs.capturing(torch.zeros(1))
    x: Any = OnGpu(torch.float32)
    for captured in (True, False):
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda captured=captured: captured)
        assert graphs.capturing(x) is captured
        graphs.refuse(torch.zeros(1), "this")
        with pytest.raises(RuntimeError, match=r"^CUDA graph: this$") if captured else contextlib.nullcontext():
            graphs.refuse(x, "this")


def test_every_launch_is_one_that_triton_takes():
    """Blocks and warps are powers of two; a warp has 32 threads, a block 1024 at most."""
    tables = []
    for tiles in tile_configs.MIXTURE.values():
        tables += [tiles.few, tiles.many, tiles.many_vectors, tiles.joint_vectors[1]]
        tables += [tiles.vectors[1]] if tiles.vectors else []
    tables += [tile_configs.SCB_FORWARD, tile_configs.SCB_BACKWARD, tile_configs.SUMS, tile_configs.CHANNEL]
    for entry in tables:
        for number in (entry.elements, entry.num_warps):
            assert number.bit_count() == 1
        assert 32 * entry.num_warps <= 1024
        assert entry.elements >= tile_configs.CHANNEL_BLOCK
    for number in (*tile_configs.sums_tile(), tile_configs.ALL_CHANNELS, tile_configs.PARAMETER_CHANNELS):
        assert number.bit_count() == 1
    assert tile_configs.CHANNEL_BLOCK.bit_count() == 1
    assert max(launch.MAX_GROUP_CHANNELS) == tile_configs.MANY


def test_sums_of_unknown_samples_take_no_more_memory_than_x():
    for n, channels, positions in (
        (64, 256, 64),
        (64, 255, 49),
        (8, 64, 12544),
        (64, 512, 1),
        (1000, 16, 4),
        (1, 3, 2),
    ):
        layout = tile_configs.layout_of((torch.empty(n, channels, positions, device="meta"),), merge=False)
        programs, shares = tile_configs.unknown_programs(layout, 3)
        most = n * positions // 8
        assert min(0.9 * 132, most) <= programs * shares <= max(1, most)


@pytest.mark.parametrize(("shape", "adjacent"), SHAPES, ids=str)
def test_tiles_of_clusters_cover_the_activation(shape, adjacent):
    n, channels, positions = shape
    x = torch.empty(shape, device="meta")
    layout = tile_configs.layout_of((x.mT.contiguous().mT if adjacent == "channels" else x,), merge=False)
    entry = tile_configs.SCB_BACKWARD
    for num, itemsize, sums in itertools.product((1, 3, 40), (2, 4), (False, True)):
        tiling = tile_configs.cluster_tiling(entry, layout, num, itemsize, sums=sums)
        for block in tiling.blocks.values():
            assert block.bit_count() == 1
        assert tiling.block_s * tiling.block_l * tiling.block_c <= entry.elements
        assert tiling.block_l < 2 * positions
        assert tiling.block_c < 2 * channels
        blocks, columns, shares = tiling.grid
        assert (blocks - 1) * tiling.block_s < n <= blocks * tiling.block_s
        assert (columns - 1) * tiling.block_c < channels <= columns * tiling.block_c
        assert 1 <= shares <= -(-positions // tiling.block_l)
        assert blocks * columns * shares <= max(tile_configs.PROGRAMS, blocks * columns)
        assert tiling.rows == shares * (n if tiling.by_sample else blocks)
        if sums:  # two rows, written and read, are a tenth of x at most where a share of it can be that small
            left = 2 * 2 * 4 * tiling.rows * (1 if tiling.by_sample else num) / (itemsize * n * positions)
            assert left < 0.1 or shares == 1 or blocks * columns * shares <= 132
            assert tiling.by_sample or tiling.block_s > num
        if not sums:
            assert tiling.by_sample


def test_a_tile_of_what_is_unknown_holds_all_channels():
    for channels, positions, want in (
        (3, 1024, (512, 4)),
        (255, 49, (8, 256)),
        (2048, 49, (1, 2048)),
        (512, 1, (1, 512)),
    ):
        layout = tile_configs.layout_of((torch.empty(2, channels, positions, device="meta"),), merge=False)
        assert tile_configs.unknown_tile(layout) == want
    assert not cluster_ops.takes_unknown(2049, "location")
    assert cluster_ops.takes_unknown(2048, "location")
    assert not cluster_ops.takes_unknown(1, "sample")


def test_a_stored_program_finds_the_operators_by_their_names():
    names = ["move_averages", *(f"{kind}_{way}" for kind in ("mixture", "learned") for way in ("forward", "backward"))]
    found: dict[str, Any] = {"fit_mixture": ops}
    found |= dict.fromkeys(names, ops) | dict.fromkeys(("scb_forward", "scb_backward"), cluster_ops)
    for name, module in found.items():
        assert getattr(torch.ops.common_norms, name).default.name() == f"common_norms::{name}"
        assert getattr(module, name)._qualname == f"common_norms::{name}"
