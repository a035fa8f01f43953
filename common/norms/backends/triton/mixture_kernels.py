"""The Triton kernels that walk over an activation for a mixture: moments, output, and the two passes backward.

``tiles`` has what they do with a tile. A program walks over several tiles of a block of channels; the first
kernel leaves the mixture as a state to those after it, since moving averages change the parameters meanwhile.

Where channels have posteriors of their own and hold few locations, a program is a channel. It walks over all its
locations twice, the second time where its multiprocessor's cache still holds them: an activation is read from memory
once. A tile is BLOCK_S samples by BLOCK_L positions; offsets in a channel fit in 32 bits.

``cluster_kernels`` says what is common to all kernels, ``parameter_kernels`` has those that touch no activation. FLAT:
all locations of the batch are one step apart.
"""

# ruff: noqa: RUF005, PLR0915, SIM108 - Triton compiles no stars in tuples, and folds branches on constants

# pyright: reportArgumentType=false, reportOperatorIssue=false, reportAttributeAccessIssue=false, reportGeneralTypeIssues=false
# pyright: reportAssignmentType=false, reportOptionalSubscript=false, reportOptionalMemberAccess=false, reportPossiblyUnboundVariable=false
# Triton's own annotations, which take every value for a constexpr or a tuple, and its constants, which it folds.

import triton
import triton.language as tl

from .cluster_kernels import LOG2_E, TINY, inverse_root, offsets, table_row
from .tiles import (
    BATCH_MEAN,
    BATCH_VAR,
    CONSTANT,
    LOG_WEIGHT,
    MASS,
    MEAN,
    OUTPUT,
    SCALE,
    at_least,
    constant_rows,
    first_moments,
    log_weights,
    mean_rows,
    moment_gradients,
    more_gradients,
    more_moments,
    normalised,
    output_rows,
    plane_rows,
    posteriors,
    precisions,
    read_tile,
    scale_rows,
    scaled,
    store_rows,
    through_components,
    through_posteriors,
    total_moments,
    totals,
    variance_gradient,
    zero_tiles,
)

STAGES = tl.constexpr(3)  # of a loop over x: what two tiles on need is on its way from memory


@triton.jit
def _program_plane(ptr, plane: tl.constexpr, C, K: tl.constexpr):
    """Where this program's (K, C) is, of (plane, program, K, C)."""
    return ptr + (tl.num_programs(0).to(tl.int64) * plane + tl.program_id(0)) * K * C


@triton.jit
def _channels(C, D, JOINT: tl.constexpr, BLOCK_C: tl.constexpr):
    """A program's channels, and the number that ends them: its group, or its block of channels."""
    if JOINT:
        first = tl.program_id(1) * D
        return first + tl.arange(0, BLOCK_C), first + D
    return tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C), C


@triton.jit
def _tiles(N, L, FLAT: tl.constexpr, BLOCK_L: tl.constexpr):
    """How many tiles there are, and how many a sample has."""
    if FLAT:
        tiles, blocks = tl.cdiv(N * L, BLOCK_L), 1
    else:
        blocks = tl.cdiv(L, BLOCK_L)
        tiles = N * blocks
    return tiles, blocks


@triton.jit
def _split(tile, blocks, FLAT: tl.constexpr):
    """A tile's sample, and its number in the sample."""
    n = 0 if FLAT else tile // blocks
    return n, tile - n * blocks


@triton.jit
def _next(n, block, samples, rest, blocks, FLAT: tl.constexpr):
    """A program's next tile, samples and rest of a sample's tiles further: no division stands in a loop."""
    block += rest
    if not FLAT:
        over = block >= blocks
        n += samples + over.to(tl.int32)
        block -= tl.where(over, blocks, 0)
    return n, block


@triton.jit
def _locations(block, N, L, FLAT: tl.constexpr, BLOCK_L: tl.constexpr):
    """A tile's locations, and which of them are there, (BLOCK_L, 1)."""
    i = block * BLOCK_L + tl.arange(0, BLOCK_L)
    if FLAT:
        inside = i < N * L
    else:
        inside = i < L
    return i, inside[:, None]


@triton.jit
def _at(n, c, i, sn, sc, sl, FLAT: tl.constexpr):
    """Offsets of a tile."""
    if FLAT:
        at = i.to(tl.int64)[:, None] * sl + c.to(tl.int64)[None, :] * sc
    else:
        at = offsets(n, c, i, sn, sc, sl)
    return at


@triton.jit(do_not_specialize=["N"])
def mixture_moments_kernel(
    x_ptr, log_ptr, mean_ptr, var_ptr, sums_ptr, state_ptr,
    N, C, D, L, x_sn, x_sc, x_sl, eps, floor,
    K: tl.constexpr, JOINT: tl.constexpr, STORED: tl.constexpr, FLAT: tl.constexpr,
    BLOCK_L: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Mass, mean and sum of squares about it (Eqs. 6, 8 and 9) of each program's locations: (3, programs, K, C).

    The means that are left are relative to the batch's first location, which all programs share.
    """
    c, end = _channels(C, D, JOINT, BLOCK_C)
    mean = mean_rows(mean_ptr, None, c, C, end, K)
    scale = scale_rows(var_ptr, None, c, C, end, eps, K, STORED)
    constant = constant_rows(log_ptr, var_ptr, None, c, C, D, end, eps, floor, K, JOINT, STORED)
    if tl.program_id(0) == 0:
        store_rows(state_ptr, MEAN, mean, c, C, end, K, BLOCK_C)
        store_rows(state_ptr, SCALE, scale, c, C, end, K, BLOCK_C)
        store_rows(state_ptr, CONSTANT, constant, c, C, end, K, BLOCK_C)
        logs = log_weights(log_ptr, floor, K, STORED)
        for k in tl.static_range(K):
            at = state_ptr + (LOG_WEIGHT * K + k) * C + c
            tl.store(at, tl.zeros((BLOCK_C,), tl.float32) + logs[k], mask=c < end)
    pilot = read_tile(x_ptr + c.to(tl.int64) * x_sc, c < end)[None, :]
    tiles, blocks = _tiles(N, L, FLAT, BLOCK_L)

    n, block = _split(tl.program_id(0), blocks, FLAT)
    samples, rest = _split(tl.num_programs(0), blocks, FLAT)
    i, inside = _locations(block, N, L, FLAT, BLOCK_L)
    mask = inside & (c < end)[None, :]
    x = tl.where(mask, read_tile(x_ptr + _at(n, c, i, x_sn, x_sc, x_sl, FLAT), mask), mean[0])
    tau = posteriors(x, inside, mean, scale, constant, K, JOINT)
    pivot, mass, first, second = first_moments(x, inside, tau, pilot, K)

    for _ in tl.range(tl.program_id(0) + tl.num_programs(0), tiles, tl.num_programs(0), num_stages=STAGES):
        n, block = _next(n, block, samples, rest, blocks, FLAT)
        i, inside = _locations(block, N, L, FLAT, BLOCK_L)
        mask = inside & (c < end)[None, :]
        x = tl.where(mask, read_tile(x_ptr + _at(n, c, i, x_sn, x_sc, x_sl, FLAT), mask), mean[0])
        tau = posteriors(x, inside, mean, scale, constant, K, JOINT)
        mass, first, second = more_moments(mass, first, second, x, tau, pivot, K)

    mass, means, squares = total_moments(mass, first, second, pivot, pilot, K)
    store_rows(_program_plane(sums_ptr, 0, C, K), 0, mass, c, C, end, K, BLOCK_C)
    store_rows(_program_plane(sums_ptr, 1, C, K), 0, means, c, C, end, K, BLOCK_C)
    store_rows(_program_plane(sums_ptr, 2, C, K), 0, squares, c, C, end, K, BLOCK_C)


@triton.jit(do_not_specialize=["N"])
def mixture_apply_kernel(
    x_ptr, log_ptr, mean_ptr, var_ptr, state_ptr, weight_ptr, bias_ptr, y_ptr,
    N, C, D, L, x_sn, x_sc, x_sl, y_sn, y_sc, y_sl, eps, floor, kappa,
    K: tl.constexpr, JOINT: tl.constexpr, STORED: tl.constexpr, FLAT: tl.constexpr,
    BLOCK_L: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Eq. 7 and the affine map; without a state Eq. 15, where the parameters take the moments' place."""
    c, end = _channels(C, D, JOINT, BLOCK_C)
    mean = mean_rows(mean_ptr, state_ptr, c, C, end, K)
    scale = scale_rows(var_ptr, state_ptr, c, C, end, eps, K, STORED)
    constant = constant_rows(log_ptr, var_ptr, state_ptr, c, C, D, end, eps, floor, K, JOINT, STORED)
    output = output_rows(log_ptr, var_ptr, state_ptr, c, C, end, eps, floor, kappa, K, STORED)
    weight = scaled(output, weight_ptr, c, C, end, K)
    middle = mean if state_ptr is None else plane_rows(state_ptr, BATCH_MEAN, c, C, end, K)
    shift = tl.zeros((1, BLOCK_C), tl.float32)
    if bias_ptr is not None:
        shift = table_row(bias_ptr, 0, c, C, end, 0.0)
    tiles, blocks = _tiles(N, L, FLAT, BLOCK_L)
    n, block = _split(tl.program_id(0), blocks, FLAT)
    samples, rest = _split(tl.num_programs(0), blocks, FLAT)
    for _ in tl.range(tl.program_id(0), tiles, tl.num_programs(0), num_stages=STAGES):
        i, inside = _locations(block, N, L, FLAT, BLOCK_L)
        mask = inside & (c < end)[None, :]
        x = read_tile(x_ptr + _at(n, c, i, x_sn, x_sc, x_sl, FLAT), mask)
        y = normalised(x, mean, scale, constant, middle, weight, shift, K, JOINT)
        tl.store(y_ptr + _at(n, c, i, y_sn, y_sc, y_sl, FLAT), y, mask=mask)
        n, block = _next(n, block, samples, rest, blocks, FLAT)


@triton.jit(do_not_specialize=["N"])
def mixture_sums_kernel(
    x_ptr, g_ptr, state_ptr, sums_ptr,
    N, C, D, L, x_sn, x_sc, x_sl, g_sn, g_sc, g_sl,
    K: tl.constexpr, JOINT: tl.constexpr, FLAT: tl.constexpr,
    BLOCK_L: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Sums of tau g and tau g (x - m) over each program's locations: (2, programs, K, C)."""
    c, end = _channels(C, D, JOINT, BLOCK_C)
    mean = mean_rows(None, state_ptr, c, C, end, K)
    scale = scale_rows(None, state_ptr, c, C, end, 0.0, K, False)
    constant = constant_rows(None, None, state_ptr, c, C, D, end, 0.0, 0.0, K, JOINT, False)
    middle = plane_rows(state_ptr, BATCH_MEAN, c, C, end, K)
    tiles, blocks = _tiles(N, L, FLAT, BLOCK_L)
    sum_g, sum_gu = zero_tiles(K, BLOCK_L, BLOCK_C), zero_tiles(K, BLOCK_L, BLOCK_C)
    n, block = _split(tl.program_id(0), blocks, FLAT)
    samples, rest = _split(tl.num_programs(0), blocks, FLAT)
    for _ in tl.range(tl.program_id(0), tiles, tl.num_programs(0), num_stages=STAGES):
        i, inside = _locations(block, N, L, FLAT, BLOCK_L)
        mask = inside & (c < end)[None, :]
        # Outside is where posteriors are numbers, whatever the mean: times a gradient of 0 they add nothing.
        x = tl.where(mask, read_tile(x_ptr + _at(n, c, i, x_sn, x_sc, x_sl, FLAT), mask), mean[0])
        g = read_tile(g_ptr + _at(n, c, i, g_sn, g_sc, g_sl, FLAT), mask)
        sum_g, sum_gu = more_gradients(sum_g, sum_gu, x, g, mean, scale, constant, middle, K, JOINT)
        n, block = _next(n, block, samples, rest, blocks, FLAT)
    store_rows(_program_plane(sums_ptr, 0, C, K), 0, totals(sum_g, K), c, C, end, K, BLOCK_C)
    store_rows(_program_plane(sums_ptr, 1, C, K), 0, totals(sum_gu, K), c, C, end, K, BLOCK_C)


@triton.jit
def _more_shares(sum_h, sum_hu, x, g, tau, middle, K: tl.constexpr):
    """Sums of tau g and tau g (x - middle) with one tile more, of posteriors that are at hand."""
    new_h, new_hu = (), ()
    for k in tl.static_range(K):
        share = tau[k] * g
        new_h = new_h + (sum_h[k] + share,)
        new_hu = new_hu + (sum_hu[k] + share * (x - middle[k]),)
    return new_h, new_hu


@triton.jit(do_not_specialize=["N"])
def mixture_bwd_kernel(
    x_ptr, g_ptr, log_ptr, mean_ptr, var_ptr, state_ptr, coefficients_ptr, weight_ptr, dx_ptr, sums_ptr,
    N, C, D, L, x_sn, x_sc, x_sl, g_sn, g_sc, g_sl, dx_sn, dx_sc, dx_sl, eps, floor, kappa,
    K: tl.constexpr, JOINT: tl.constexpr, STORED: tl.constexpr, FLAT: tl.constexpr,
    DENSITY: tl.constexpr, DIRECT: tl.constexpr,
    BLOCK_L: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Gradient dx, and sums (programs, K, C) that those of parameters are made of.

    With a state, the batch's moments carry a gradient, and coefficients are of mixture_coefficients_kernel. Sums are,
    if DENSITY, of z, z (x - mean) / s and z ((x - mean) / s)^2, where z is the gradient of a log density, and then, if
    DIRECT, of tau g and tau g (x - mean).
    """
    BATCH: tl.constexpr = state_ptr is not None
    c, end = _channels(C, D, JOINT, BLOCK_C)
    mean = mean_rows(mean_ptr, state_ptr, c, C, end, K)
    scale = scale_rows(var_ptr, state_ptr, c, C, end, eps, K, STORED)
    constant = constant_rows(log_ptr, var_ptr, state_ptr, c, C, D, end, eps, floor, K, JOINT, STORED)
    output = output_rows(log_ptr, var_ptr, state_ptr, c, C, end, eps, floor, kappa, K, STORED)
    weight = scaled(output, weight_ptr, c, C, end, K)
    precision = precisions(scale, K)
    middle, dm, dv, dvv = mean, None, None, None
    if BATCH:
        middle = plane_rows(state_ptr, BATCH_MEAN, c, C, end, K)
        dm = plane_rows(coefficients_ptr, 0, c, C, end, K)
        dv = plane_rows(coefficients_ptr, 1, c, C, end, K)
        dvv = plane_rows(coefficients_ptr, 2, c, C, end, K)
    sum_z = zero_tiles(K, BLOCK_L, 1 if JOINT else BLOCK_C)
    sum_zu, sum_zuu = zero_tiles(K, BLOCK_L, BLOCK_C), zero_tiles(K, BLOCK_L, BLOCK_C)
    sum_h, sum_hu = zero_tiles(K, BLOCK_L, BLOCK_C), zero_tiles(K, BLOCK_L, BLOCK_C)
    tiles, blocks = _tiles(N, L, FLAT, BLOCK_L)
    n, block = _split(tl.program_id(0), blocks, FLAT)
    samples, rest = _split(tl.num_programs(0), blocks, FLAT)
    ahead: tl.constexpr = 1 if DENSITY or DIRECT else STAGES  # for sums and tiles ahead registers do not suffice
    for _ in tl.range(tl.program_id(0), tiles, tl.num_programs(0), num_stages=ahead):
        i, inside = _locations(block, N, L, FLAT, BLOCK_L)
        mask = inside & (c < end)[None, :]
        x = read_tile(x_ptr + _at(n, c, i, x_sn, x_sc, x_sl, FLAT), mask)
        g = read_tile(g_ptr + _at(n, c, i, g_sn, g_sc, g_sl, FLAT), mask)
        if DENSITY or DIRECT:
            x = tl.where(mask, x, mean[0])
            tau = posteriors(x, inside, mean, scale, constant, K, JOINT)
        else:
            tau = posteriors(x, None, mean, scale, constant, K, JOINT)
        dx, dtau = through_components(x, g, tau, middle, weight, dm, dv, dvv, K, JOINT, BATCH)
        if DIRECT:
            sum_h, sum_hu = _more_shares(sum_h, sum_hu, x, g, tau, middle, K)
        dx, new_z, new_zu, new_zuu = through_posteriors(
            dx, sum_z, sum_zu, sum_zuu, x, tau, dtau, mean, precision, K, DENSITY
        )
        if DENSITY:
            sum_z, sum_zu, sum_zuu = new_z, new_zu, new_zuu
        tl.store(dx_ptr + _at(n, c, i, dx_sn, dx_sc, dx_sl, FLAT), dx, mask=mask)
        n, block = _next(n, block, samples, rest, blocks, FLAT)
    if DENSITY:
        store_rows(_program_plane(sums_ptr, 0, C, K), 0, totals(sum_z, K), c, C, end, K, BLOCK_C)
        store_rows(_program_plane(sums_ptr, 1, C, K), 0, totals(sum_zu, K), c, C, end, K, BLOCK_C)
        store_rows(_program_plane(sums_ptr, 2, C, K), 0, totals(sum_zuu, K), c, C, end, K, BLOCK_C)
    if DIRECT:
        before: tl.constexpr = 3 if DENSITY else 0
        store_rows(_program_plane(sums_ptr, before, C, K), 0, totals(sum_h, K), c, C, end, K, BLOCK_C)
        store_rows(_program_plane(sums_ptr, before + 1, C, K), 0, totals(sum_hu, K), c, C, end, K, BLOCK_C)


@triton.jit
def _of_channel(tile, blocks, N, L, BLOCK_S: tl.constexpr, BLOCK_L: tl.constexpr):
    """A tile's samples and positions, and which of its locations are there, (BLOCK_S * BLOCK_L, 1) each."""
    at = tl.arange(0, BLOCK_S * BLOCK_L)[:, None]
    n = tile // blocks * BLOCK_S + at // BLOCK_L
    i = tile % blocks * BLOCK_L + at % BLOCK_L
    return n, i, (n < N) & (i < L)


@triton.jit(do_not_specialize=["N"])
def mixture_channel_kernel(
    x_ptr, log_ptr, mean_ptr, var_ptr, state_ptr, weight_ptr, bias_ptr, y_ptr,
    N, C, L, x_sn, x_sc, x_sl, y_sn, y_sc, y_sl, eps, floor, kappa,
    K: tl.constexpr, STORED: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_L: tl.constexpr,
):  # fmt: skip
    """Eqs. 6 to 9 and an affine map: y, and the state."""
    c = tl.program_id(0) + tl.arange(0, 1)
    mean = mean_rows(mean_ptr, None, c, C, C, K)
    scale = scale_rows(var_ptr, None, c, C, C, eps, K, STORED)
    constant = constant_rows(log_ptr, var_ptr, None, c, C, 1, C, eps, floor, K, False, STORED)
    x_ptr += tl.program_id(0).to(tl.int64) * x_sc
    y_ptr += tl.program_id(0).to(tl.int64) * y_sc
    pilot = tl.load(x_ptr).to(tl.float32)
    blocks = tl.cdiv(L, BLOCK_L)
    tiles = tl.cdiv(N, BLOCK_S) * blocks

    n, i, inside = _of_channel(0, blocks, N, L, BLOCK_S, BLOCK_L)
    x = tl.where(inside, read_tile(x_ptr + n * x_sn + i * x_sl, inside), mean[0])
    tau = posteriors(x, inside, mean, scale, constant, K, False)
    pivot, mass, first, second = first_moments(x, inside, tau, pilot, K)
    for tile in range(1, tiles):
        n, i, inside = _of_channel(tile, blocks, N, L, BLOCK_S, BLOCK_L)
        x = tl.where(inside, read_tile(x_ptr + n * x_sn + i * x_sl, inside), mean[0])
        tau = posteriors(x, inside, mean, scale, constant, K, False)
        mass, first, second = more_moments(mass, first, second, x, tau, pivot, K)

    mass, means, squares = total_moments(mass, first, second, pivot, pilot, K)
    logs = log_weights(log_ptr, floor, K, STORED)
    middle, spread, output, log_rows = (), (), (), ()
    for k in tl.static_range(K):
        v = squares[k] / tl.maximum(mass[k], TINY)
        middle = middle + (tl.where(mass[k] == 0.0, 0.0, pilot + means[k]),)
        spread = spread + (v,)
        output = output + (tl.exp(-0.5 * at_least(logs[k], floor)) * kappa * inverse_root(v, eps),)
        log_rows = log_rows + (tl.zeros((1, 1), tl.float32) + logs[k],)
    store_rows(state_ptr, MEAN, mean, c, C, C, K, 1)
    store_rows(state_ptr, SCALE, scale, c, C, C, K, 1)
    store_rows(state_ptr, CONSTANT, constant, c, C, C, K, 1)
    store_rows(state_ptr, LOG_WEIGHT, log_rows, c, C, C, K, 1)
    store_rows(state_ptr, MASS, mass, c, C, C, K, 1)
    store_rows(state_ptr, BATCH_MEAN, middle, c, C, C, K, 1)
    store_rows(state_ptr, BATCH_VAR, spread, c, C, C, K, 1)
    store_rows(state_ptr, OUTPUT, output, c, C, C, K, 1)

    weight = scaled(output, weight_ptr, c, C, C, K)
    shift = tl.zeros((1, 1), tl.float32)
    if bias_ptr is not None:
        shift = table_row(bias_ptr, 0, c, C, C, 0.0)
    for tile in range(tiles):
        n, i, inside = _of_channel(tile, blocks, N, L, BLOCK_S, BLOCK_L)
        x = read_tile(x_ptr + n * x_sn + i * x_sl, inside)
        y = normalised(x, mean, scale, constant, middle, weight, shift, K, False)
        tl.store(y_ptr + n * y_sn + i * y_sl, y, mask=inside)


@triton.jit(do_not_specialize=["N"])
def mixture_channel_bwd_kernel(
    x_ptr, g_ptr, state_ptr, weight_ptr, dx_ptr, out_ptr, affine_ptr,
    N, C, L, x_sn, x_sc, x_sl, g_sn, g_sc, g_sl, dx_sn, dx_sc, dx_sl, eps,
    K: tl.constexpr, STORED: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_L: tl.constexpr,
):  # fmt: skip
    """Gradients dx and of the affine map, (2, C), and if there is an out those of mean and variance, (3, K, C).

    The third plane is each channel's share in the gradients of the log weights.
    """
    c = tl.program_id(0) + tl.arange(0, 1)
    mean = mean_rows(None, state_ptr, c, C, C, K)
    scale = scale_rows(None, state_ptr, c, C, C, 0.0, K, False)
    constant = constant_rows(None, None, state_ptr, c, C, 1, C, 0.0, 0.0, K, False, False)
    middle = plane_rows(state_ptr, BATCH_MEAN, c, C, C, K)
    output = plane_rows(state_ptr, OUTPUT, c, C, C, K)
    x_ptr += tl.program_id(0).to(tl.int64) * x_sc
    g_ptr += tl.program_id(0).to(tl.int64) * g_sc
    dx_ptr += tl.program_id(0).to(tl.int64) * dx_sc
    blocks = tl.cdiv(L, BLOCK_L)
    tiles = tl.cdiv(N, BLOCK_S) * blocks

    sum_g, sum_gu = zero_tiles(K, BLOCK_S * BLOCK_L, 1), zero_tiles(K, BLOCK_S * BLOCK_L, 1)
    for tile in range(tiles):
        n, i, inside = _of_channel(tile, blocks, N, L, BLOCK_S, BLOCK_L)
        # Outside is where posteriors are numbers, whatever the mean: times a gradient of 0 they add nothing.
        x = tl.where(inside, read_tile(x_ptr + n * x_sn + i * x_sl, inside), mean[0])
        g = read_tile(g_ptr + n * g_sn + i * g_sl, inside)
        sum_g, sum_gu = more_gradients(sum_g, sum_gu, x, g, mean, scale, constant, middle, K, False)
    sum_g, sum_gu = totals(sum_g, K), totals(sum_gu, K)

    weight = scaled(output, weight_ptr, c, C, C, K)
    mass = plane_rows(state_ptr, MASS, c, C, C, K)
    spread = plane_rows(state_ptr, BATCH_VAR, c, C, C, K)
    dweight, dbias = tl.zeros((1, 1), tl.float32), tl.zeros((1, 1), tl.float32)
    dm, dv, dvv, direct = (), (), (), ()
    for k in tl.static_range(K):
        dm_k, dv_k, dvv_k, direct_k = moment_gradients(weight[k], sum_g[k], sum_gu[k], mass[k], spread[k], eps)
        dm = dm + (dm_k,)
        dv = dv + (dv_k,)
        dvv = dvv + (dvv_k,)
        direct = direct + (direct_k,)
        dweight += output[k] * sum_gu[k]
        dbias += sum_g[k]
    if affine_ptr is not None:
        tl.store(affine_ptr + c[None, :], dweight)
        tl.store(affine_ptr + C + c[None, :], dbias)

    precision = precisions(scale, K)
    sum_z = zero_tiles(K, BLOCK_S * BLOCK_L, 1)
    sum_zu, sum_zuu = zero_tiles(K, BLOCK_S * BLOCK_L, 1), zero_tiles(K, BLOCK_S * BLOCK_L, 1)
    for tile in range(tiles):
        n, i, inside = _of_channel(tile, blocks, N, L, BLOCK_S, BLOCK_L)
        x = tl.where(inside, read_tile(x_ptr + n * x_sn + i * x_sl, inside), mean[0])
        g = read_tile(g_ptr + n * g_sn + i * g_sl, inside)
        tau = posteriors(x, inside, mean, scale, constant, K, False)
        dx, dtau = through_components(x, g, tau, middle, weight, dm, dv, dvv, K, False, True)
        dx, new_z, new_zu, new_zuu = through_posteriors(
            dx, sum_z, sum_zu, sum_zuu, x, tau, dtau, mean, precision, K, out_ptr is not None
        )
        if out_ptr is not None:
            sum_z, sum_zu, sum_zuu = new_z, new_zu, new_zuu
        tl.store(dx_ptr + n * dx_sn + i * dx_sl, dx, mask=inside)
    if out_ptr is not None:
        sum_z, sum_zu, sum_zuu = totals(sum_z, K), totals(sum_zu, K), totals(sum_zuu, K)
        dvar, share = (), ()
        for k in tl.static_range(K):
            dvar = dvar + (variance_gradient(sum_z[k], sum_zuu[k], (-0.5 * LOG2_E) / scale[k], eps, STORED),)
            share = share + (sum_z[k] - 0.5 * direct[k],)
        store_rows(out_ptr, 0, sum_zu, c, C, C, K, 1)
        store_rows(out_ptr, 1, dvar, c, C, C, K, 1)
        store_rows(out_ptr, 2, share, c, C, C, K, 1)
