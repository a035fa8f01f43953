"""The tiles of the kernels, and how many programs share an activation: every size that a kernel is launched with."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class TileConfig:
    """The tile of a kernel's program."""

    elements: int
    """Of the activation in a tile, at most."""
    num_warps: int


SCB_FORWARD = TileConfig(2048, 4)
SCB_BACKWARD = TileConfig(2048, 4)
UNKNOWN = 2048
"""Elements in a tile of all channels of a sample whose cluster is unknown."""
UNKNOWN_WARPS = {"scb_unknown_fwd_kernel": 4, "scb_unknown_bwd_kernel": 16}
"""Of the kernels that take such samples: of so many threads the registers suffice."""
MAX_UNKNOWN_CHANNELS = 2048
"""Channels of such a sample: a tile holds them all, and must not spill."""
READ = 16
"""Bytes that a thread reads at once at most."""
WARP = 32
"""Threads."""
SECTOR = 32
"""Bytes that memory is read in at least."""
SUMS = TileConfig(2048, 4)
"""Of the kernels that add up what programs left."""
MOST_PLANES = 5
"""Sums that a pass leaves at most, of each component and channel."""


@dataclass(frozen=True)
class MixtureTiles:
    """The tiles of a mixture kernel, whose threads hold the posteriors of all components at once.

    Where threads read several neighbours in memory at once, these share an address, which leaves registers.
    """

    few: TileConfig
    """Of up to 4 components."""
    many: TileConfig
    """Of up to 8."""
    many_vectors: TileConfig
    """Of up to 8 where threads read several neighbours, but of a backward pass that leaves as many sums as it can."""
    joint_vectors: tuple[int, TileConfig]
    """Up to how many components where channels share a posterior and threads read several positions, in float32; a
    tile of a 2-byte type is twice as large where registers suffice. A thread reads 16 bytes of a channel at once, and
    finds the posteriors of all its locations itself: of two channels, so that both share them. A tile has at least
    MIN_JOINT_POSITIONS, and more warps if it is larger for that."""
    vectors: tuple[int, TileConfig] | None = None
    """The same where each channel has its own posterior."""


FEW, MANY = 4, 8
_FORWARD = MixtureTiles(TileConfig(1024, 4), TileConfig(512, 8), TileConfig(512, 4), (4, TileConfig(1024, 4)))
MIXTURE = {
    "mixture_moments_kernel": _FORWARD,
    "mixture_apply_kernel": _FORWARD,
    "mixture_sums_kernel": _FORWARD,
    "mixture_bwd_kernel": MixtureTiles(
        TileConfig(1024, 8), TileConfig(256, 8), TileConfig(512, 8), (3, TileConfig(1024, 4)), (4, TileConfig(1024, 4))
    ),
}
VECTOR_COMPONENTS = {0: (3, 2), 2: (3, 3)}
"""The most components for which a thread of the backward pass has registers for eight channels that lie side by side,
16 bytes of a 2-byte type: by planes of sums, of channels with posteriors of their own and of those that share one. Of
each component and channel it holds eight numbers, or four where the batch's moments carry no gradient."""
MIN_JOINT_POSITIONS = 8
"""Positions that fill a sector of memory in float32: with fewer, most of each read is thrown away."""
MIN_JOINT_CHANNELS = 8
"""Channels of a tile of a 2-byte type whose backward pass does not spill when it is twice as large."""
MAX_JOINT_CHANNELS = 256
"""Channels of such a tile: with more it would spill."""
DIVISOR = 16
"""Of a size, at least, if Triton is to know that neighbours can be read at once."""
RESIDENT_LOCATIONS = 16_384
"""Locations of a batch, at most, where a program takes a channel that has its own posterior."""
RESIDENT_BYTES = 65_536
"""Of what such a program reads, at most: it reads that again from its multiprocessor's cache, which holds twice as
much."""
CHANNEL = TileConfig(2048, 8)
"""Of such programs."""
FEWEST_CHANNELS = 100
"""For which such programs keep most of an H100's multiprocessors busy."""
MAX_CHANNEL_COMPONENTS = 4
"""With more, registers do not suffice."""
SUMS_SHARE = 0.06
"""Of an activation's bytes: the sums that a pass may leave and read again."""
LEAST_PROGRAMS = 132
"""A multiprocessor each of an H100, whatever sums that leaves: of a small batch they are small."""
NOMINAL_SAMPLES = 64
"""Samples of the batch, the benchmark's smallest, for which columns of channels are narrow enough to fill the device.

They are as wide for every other batch, so that each kernel is compiled once. That costs: of a smaller batch the sums
that are left may be more than ``SUMS_SHARE``, though no more than of this one; in a larger one columns may be narrower
than they need be, down to 32 bytes of a location, or 16 in a 2-byte type where a pass leaves sums."""
PROGRAMS = 1024
"""Enough for every multiprocessor of today's devices; not asked of the device, so that sums keep their order."""
CHANNEL_BLOCK = 64
"""Channels in a tile where they lie side by side: 128 bytes of a 2-byte type."""
SUMS_CHANNELS = 8
"""Channels of a program that adds up sums: 32 bytes, so that there are many such programs."""
PARAMETER_CHANNELS = 64
"""Channels of a program that moves averages."""
ALL_CHANNELS = 512
"""Of all channels, how many a program looks at at once that has to see each."""


@dataclass(frozen=True)
class Layout:
    """Sizes (N, C, L) of activations, and the strides of each."""

    samples: int
    channels: int
    positions: int
    strides: tuple[tuple[int, int, int], ...]
    flat: bool = False
    """Whether all locations are one step apart, the last of a tensor's strides: the first then counts for nothing."""

    @property
    def channels_adjacent(self) -> bool:
        """Whether neighbours in the first activation's memory are channels."""
        _, channel, position = self.strides[0]
        return self.positions == 1 or channel < position


def layout_of(tensors: Sequence[Tensor], *, merge: bool) -> Layout:
    """Describe tensors (N, C, L) as ``strided_layout``."""
    return strided_layout(tensors[0].shape, tuple(t.stride() for t in tensors), merge=merge)


def strided_layout(shape: Sequence[int], strides: tuple[tuple[int, ...], ...], *, merge: bool) -> Layout:
    """Describe tensors (N, C, L); merge joins samples and positions where all their strides allow.

    Whether they do is the same for all batch sizes, so that each kernel is compiled once: a single sample, whose stride
    says nothing, is taken for one of many.
    """
    n, c, length = shape
    if merge and all(
        length == 1 or sample == length * position or (n == 1 and channel < position)
        for sample, channel, position in strides
    ):
        merged = tuple((0, channel, sample if length == 1 else position) for sample, channel, position in strides)
        return Layout(n, c, length, merged, flat=True)
    return Layout(n, c, length, tuple((sample, channel, position) for sample, channel, position in strides))


def power_of_two(n: int) -> int:
    """Return the least power of two that is at least n."""
    return 1 << max(0, n - 1).bit_length()


def tile(launch: TileConfig, layout: Layout) -> tuple[int, int]:
    """Return BLOCK_L, BLOCK_C for channels that need not stay together."""
    most = launch.elements if layout.flat else power_of_two(layout.positions)
    if layout.channels_adjacent:
        block_c = min(power_of_two(layout.channels), CHANNEL_BLOCK)
        return min(most, launch.elements // block_c), block_c
    block_l = min(most, launch.elements)
    return block_l, min(power_of_two(layout.channels), launch.elements // block_l)


def divide(a: int, b: int) -> int:
    """Return a / b, rounded up."""
    return -(-a // b)


@dataclass(frozen=True)
class ClusterTiling:
    """How the programs of a kernel whose samples have clusters share an activation."""

    layout: Layout
    block_s: int
    """Samples."""
    block_l: int
    block_c: int
    shares: int
    """Programs of a block of samples and one of channels."""
    by_sample: bool
    """Whether sums are left of each sample, or of each cluster in a block of samples."""
    num_warps: int

    @property
    def grid(self) -> tuple[int, int, int]:
        """Return programs over (blocks of samples, blocks of channels, shares of the positions)."""
        return divide(self.layout.samples, self.block_s), divide(self.layout.channels, self.block_c), self.shares

    @property
    def rows(self) -> int:
        """Of sums, were there a single cluster if they are left of each."""
        return self.shares * (self.layout.samples if self.by_sample else self.grid[0])

    @property
    def blocks(self) -> dict[str, int]:
        """Return the sizes of a tile."""
        return {"BLOCK_S": self.block_s, "BLOCK_L": self.block_l, "BLOCK_C": self.block_c}


def cluster_tiling(entry: TileConfig, layout: Layout, num_clusters: int, itemsize: int, *, sums: bool) -> ClusterTiling:
    """Return the tiles of a kernel, and few enough programs that the sums which a pass leaves stay small.

    Where maps are so small that a row of sums a sample is too much, a tile takes several samples, and leaves a row a
    cluster.

    Args:
        entry: of the kernel.
        layout: over activations.
        num_clusters: K.
        itemsize: bytes of an activation's element.
        sums: whether each program leaves two rows in float32.
    """
    block_l, block_c = tile(entry, layout)
    block_s, by_sample, most = entry.elements // (block_l * block_c), True, PROGRAMS
    if sums:
        rows = SUMS_SHARE * itemsize * layout.positions / (2 * 4 * 2)  # that a sample may leave, and are read again
        most = max(1, int(rows))
        if rows < 1:
            contiguous = block_c if layout.channels_adjacent else block_l
            wanted = min(power_of_two(math.ceil(num_clusters / rows)), entry.elements // contiguous)
            if wanted > num_clusters:
                block_s, by_sample = max(wanted, block_s), False
                block_l, block_c = _with_samples(entry, layout, block_s, block_l, block_c)
                most = max(1, int(block_s * rows / num_clusters))

    def blocks(samples: int) -> int:
        return divide(samples, block_s) * divide(layout.channels, block_c)

    def shares(blocks: int, most: int) -> int:
        return max(1, min(divide(layout.positions, block_l), PROGRAMS // blocks, most))

    least = max(SUMS_CHANNELS, SECTOR // itemsize) if layout.channels_adjacent else block_c
    while block_c > least and blocks(NOMINAL_SAMPLES) * shares(blocks(NOMINAL_SAMPLES), most) < LEAST_PROGRAMS:
        narrow = block_c // 2  # narrower columns are more of them, which leave no more sums
        longer = min(power_of_two(layout.positions), entry.elements // (block_s * narrow))
        if block_s * longer * narrow < READ // itemsize * WARP * entry.num_warps:
            break  # where there are few positions, a tile would have less than threads read at once
        block_l, block_c = longer, narrow
    count = blocks(layout.samples)
    num_warps = entry.num_warps
    if block_s > 1 and layout.channels_adjacent and layout.channels % DIVISOR:
        num_warps *= 2  # each element has an address of its own, for which registers would not suffice
    most = max(most, LEAST_PROGRAMS // count)
    return ClusterTiling(layout, block_s, block_l, block_c, shares(count, most), by_sample, num_warps)


def _with_samples(entry: TileConfig, layout: Layout, block_s: int, block_l: int, block_c: int) -> tuple[int, int]:
    """Return BLOCK_L, BLOCK_C of a tile of so many samples: the dimension that is not contiguous gives way."""
    if layout.channels_adjacent:
        return min(block_l, entry.elements // (block_s * block_c)), block_c
    return block_l, min(block_c, entry.elements // (block_s * block_l))


def unknown_tile(layout: Layout) -> tuple[int, int]:
    """Return UNKNOWN_L, UNKNOWN_C."""
    channels = power_of_two(layout.channels)
    return max(1, min(power_of_two(layout.positions), UNKNOWN // channels)), channels


def unknown_shares(layout: Layout) -> int:
    """Return programs of a sample, which share its positions if it is unknown."""
    return max(1, min(divide(layout.positions, unknown_tile(layout)[0]), PROGRAMS // layout.samples))


def unknown_programs(layout: Layout, num_clusters: int) -> tuple[int, int]:
    """Return programs over (samples, shares of their positions), for what leaves sums if a sample is unknown.

    There is room for sums of each program, whether or not it leaves any: all of it is no larger than x in float32.
    """
    most = max(1, min(LEAST_PROGRAMS, layout.samples * layout.positions // (2 * (num_clusters + 1))))
    programs = divide(layout.samples, divide(layout.samples, most))  # all of them with as many samples, but the last
    return programs, max(1, min(divide(layout.positions, unknown_tile(layout)[0]), most // programs))


def channel_tile(layout: Layout, num_components: int, itemsize: int) -> dict[str, int] | None:
    """Return BLOCK_S and BLOCK_L of a program that takes a channel; None where it does not.

    The last of the activations is written, the others are read. With adjacent channels a
    program would throw most of its reads away.
    """
    held = (len(layout.strides) - 1) * itemsize * layout.samples * layout.positions
    sizes = layout.samples, layout.positions
    reach = max(sum((size - 1) * s for size, s in zip(sizes, (sn, sl), strict=True)) for sn, _, sl in layout.strides)
    if layout.channels_adjacent or held > RESIDENT_BYTES or reach >= 2**31 or num_components > MAX_CHANNEL_COMPONENTS:
        return None
    block_l = min(power_of_two(layout.positions), CHANNEL.elements)
    return {"BLOCK_S": CHANNEL.elements // block_l, "BLOCK_L": block_l}


def channel_limits(num_components: int) -> dict[str, int]:
    """Return the most registers of a thread of mixture_channel_kernel, if there is to be a limit.

    The compiler takes 160, with which a multiprocessor has room for one program. Of 128 it has for two, and 256
    channels run in one wave; more than 3 components would spill. AMD's compiler does not know the option.
    """
    return {"maxnreg": 128} if num_components <= 3 and not torch.version.hip else {}


def sums_tile() -> tuple[int, int]:
    """Return BLOCK_P, BLOCK_C of the kernels that add up what programs left: the same for all sizes."""
    return SUMS.elements // SUMS_CHANNELS, SUMS_CHANNELS


def draw_tile(channels: int) -> tuple[int, int]:
    """Return BLOCK_P, BLOCK_C of the kernel that copies locations: neighbours of what it writes are channels."""
    block_c = min(power_of_two(channels), CHANNEL_BLOCK)
    return SUMS.elements // block_c, block_c


@dataclass(frozen=True)
class Tiling:
    """How a mixture kernel's programs share an activation."""

    layout: Layout
    joint: bool
    block_l: int
    block_c: int
    columns: int
    """Blocks of channels; a group is one."""
    programs: int
    """Of a column."""
    num_warps: int


def _vectors(entry: tuple[int, TileConfig] | None, layout: Layout, num_components: int) -> TileConfig | None:
    """Return the tile for threads that read several positions at once, if there is one and they can."""
    if entry is None or num_components > entry[0] or layout.channels_adjacent or layout.positions % DIVISOR:
        return None
    return entry[1]


def _neighbours(layout: Layout, channels: int) -> bool:
    """Return whether threads read several neighbours in memory at once, of so many channels or of the positions."""
    return (channels if layout.channels_adjacent else layout.positions) % DIVISOR == 0


def mixture_tiling(
    kernel: str, layout: Layout, groups: int, num_components: int, *, planes: int = 0, itemsize: int = 4
) -> Tiling:
    """Return the tiles of a kernel, and few enough programs that the sums which a pass leaves stay small.

    Args:
        kernel: its name.
        layout: over activations.
        groups: of channels.
        num_components: K.
        planes: of (K, C) in float32 that each program of the pass leaves; 0 for a kernel without sums.
        itemsize: bytes of an activation's element.
    """
    tiles = MIXTURE[kernel]
    entry = tiles.few if num_components <= FEW else tiles.many
    width, locations = layout.channels // groups, layout.samples * layout.positions
    backward = kernel == "mixture_bwd_kernel"
    runs = _neighbours(layout, layout.channels if width == 1 else width)
    if num_components > FEW and runs and not (backward and planes == MOST_PLANES):
        entry = tiles.many_vectors
    eight = backward and itemsize == 2 and layout.channels_adjacent and runs
    if eight and num_components <= VECTOR_COMPONENTS.get(planes, (0, 0))[width > 1]:
        entry = TileConfig(entry.elements, max(1, entry.num_warps // 2))

    def that_may_leave_sums(samples: int) -> int:
        if not planes:
            return PROGRAMS
        share = SUMS_SHARE * itemsize * samples * layout.positions
        return max(1, int(share / (2 * 4 * planes * num_components)))

    most = that_may_leave_sums(layout.samples)
    if width > 1:
        block_c, columns = power_of_two(width), groups
        longest = entry.elements if layout.flat else power_of_two(layout.positions)
        block_l = max(1, min(longest, entry.elements // block_c))
        tall, num_warps = _vectors(tiles.joint_vectors, layout, num_components), entry.num_warps
        if tall is not None and block_c <= MAX_JOINT_CHANNELS:
            # Sums are two to five an element.
            registers_suffice = not backward or (not planes and block_c >= MIN_JOINT_CHANNELS)
            elements = tall.elements * 4 // itemsize if registers_suffice else tall.elements
            block_l = min(longest, max(MIN_JOINT_POSITIONS, elements // block_c))
            num_warps = tall.num_warps * max(1, block_l * block_c // elements)
    else:
        entry = _vectors(tiles.vectors, layout, num_components) or entry
        block_l, block_c = tile(entry, layout)
        usual = that_may_leave_sums(NOMINAL_SAMPLES)
        while block_c > SUMS_CHANNELS and usual * divide(layout.channels, block_c) < LEAST_PROGRAMS:
            block_c //= 2  # narrower columns are more of them, which leave no more sums
            block_l *= 2 if layout.flat else 1
        num_warps = max(1, entry.num_warps * block_l * block_c // entry.elements)  # as many elements a thread
        columns = divide(layout.channels, block_c)
    most = max(most, LEAST_PROGRAMS // columns)
    count = divide(locations, block_l) if layout.flat else layout.samples * divide(layout.positions, block_l)
    most = min(most, max(1, PROGRAMS // columns))
    programs = divide(count, divide(count, most))  # all of them with as many tiles, but the last
    return Tiling(layout, width > 1, block_l, block_c, columns, programs, num_warps)
