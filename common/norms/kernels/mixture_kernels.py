"""The Triton kernels that walk over an activation for a mixture: moments, output, and the two passes backward.

Each takes what a loop needs of the mixture as rows (1, BLOCK_C), one a component, before the loop: the mean, the
scale and the constant of a log density in base 2, the weight of the output. ``moments`` finds them from the
parameters and leaves them, as planes (K, C) of a *state*, to the kernels after it, since moving averages change the
parameters meanwhile. Sums are kept at each place of a tile and added up across threads after the loop.

``cluster_kernels`` says what is common to all kernels, ``parameter_kernels`` has those that touch no activation.
STORED: parameters are logits, mean and log-variance; otherwise log weights, mean and variance. FLAT: all locations of
the batch are one step apart.
"""

# ruff: noqa: RUF005, PLR0912, PLR0915, SIM108 - Triton compiles no stars in tuples, and folds branches on constants

# pyright: reportArgumentType=false, reportOperatorIssue=false, reportAttributeAccessIssue=false, reportGeneralTypeIssues=false
# pyright: reportAssignmentType=false, reportOptionalSubscript=false, reportOptionalMemberAccess=false, reportPossiblyUnboundVariable=false
# Triton's own annotations, which take every value for a constexpr or a tuple, and its constants, which it folds.

import triton
import triton.language as tl

from .cluster_kernels import LOG2_E, TINY, inverse_root, offsets, table_row

# Planes of a state (PLANES, K, C): the mixture as the loops use it, and the batch's moments.
MEAN = tl.constexpr(0)
SCALE = tl.constexpr(1)  # -log2(e) / (2 s)
CONSTANT = tl.constexpr(2)  # of a log density in base 2, a group's at each of its channels
LOG_WEIGHT = tl.constexpr(3)  # log lambda before its floor
MASS = tl.constexpr(4)  # a group's at each of its channels
BATCH_MEAN = tl.constexpr(5)
BATCH_VAR = tl.constexpr(6)
OUTPUT = tl.constexpr(7)  # lambda^(-1/2) over the batch's deviation


@triton.jit
def at_least(value, floor):
    """The greater of two, NaN where value is."""
    return tl.where(value < floor, floor, value)


@triton.jit
def log_weights(log_ptr, floor, K: tl.constexpr, STORED: tl.constexpr):
    """Tuple over k of log lambda, before its floor; without log_ptr it is the floor for all."""
    logs = ()
    for k in tl.static_range(K):
        if log_ptr is None:
            logs = logs + (floor,)
        else:
            logs = logs + (tl.load(log_ptr + k).to(tl.float32),)
    if STORED and log_ptr is not None:
        top = logs[0]
        for k in tl.static_range(1, K):
            top = tl.maximum(top, logs[k])
        total = 0.0
        for k in tl.static_range(K):
            total += tl.exp(logs[k] - top)
        given, logs = logs, ()
        for k in tl.static_range(K):
            logs = logs + (given[k] - (top + tl.log(total)),)
    return logs


@triton.jit
def variance_row(var_ptr, k, c, C, end, STORED: tl.constexpr):
    """A row of variances, (1, BLOCK_C)."""
    var = table_row(var_ptr, k, c, C, end, 0.0)
    return tl.exp(var) if STORED else var


@triton.jit
def _rows(ptr, plane: tl.constexpr, c, C, end, K: tl.constexpr):
    """Tuple over k of rows of a plane (K, C)."""
    rows = ()
    for k in tl.static_range(K):
        rows = rows + (table_row(ptr, plane * K + k, c, C, end, 0.0),)
    return rows


@triton.jit
def _means(mean_ptr, state_ptr, c, C, end, K: tl.constexpr):
    if state_ptr is None:
        rows = _rows(mean_ptr, 0, c, C, end, K)
    else:
        rows = _rows(state_ptr, MEAN, c, C, end, K)
    return rows


@triton.jit
def _scales(var_ptr, state_ptr, c, C, end, eps, K: tl.constexpr, STORED: tl.constexpr):
    if state_ptr is None:
        rows = ()
        for k in tl.static_range(K):
            s = variance_row(var_ptr, k, c, C, end, STORED) + eps
            rows = rows + (tl.div_rn(-0.5 * LOG2_E, s),)
    else:
        rows = _rows(state_ptr, SCALE, c, C, end, K)
    return rows


@triton.jit
def _constants(
    log_ptr, var_ptr, state_ptr, c, C, D, end, eps, floor, K: tl.constexpr, JOINT: tl.constexpr, STORED: tl.constexpr
):
    """Log lambda - 1/2 sum log s in base 2, the part of a log density without x; 2 pi cancels."""
    rows = ()
    if state_ptr is None:
        logs = log_weights(log_ptr, floor, K, STORED)
        for k in tl.static_range(K):
            log_s = tl.log2(variance_row(var_ptr, k, c, C, end, STORED) + eps)
            log_s = tl.where((c < end)[None, :], log_s, 0.0)
            if JOINT:
                log_s = tl.sum(log_s, axis=1, keep_dims=True)
            rows = rows + (at_least(logs[k], floor) * LOG2_E - 0.5 * log_s,)
    elif JOINT:
        first = state_ptr + CONSTANT * K * C + (end - D)
        for k in tl.static_range(K):
            rows = rows + (tl.full((1, 1), 1.0, tl.float32) * tl.load(first + k * C),)
    else:
        rows = _rows(state_ptr, CONSTANT, c, C, end, K)
    return rows


@triton.jit
def output_rows(log_ptr, var_ptr, state_ptr, c, C, end, eps, floor, kappa, K: tl.constexpr, STORED: tl.constexpr):
    """Tuple over k of lambda^(-1/2) over the deviation, times kappa."""
    if state_ptr is None:
        rows = ()
        logs = log_weights(log_ptr, floor, K, STORED)
        for k in tl.static_range(K):
            rstd = inverse_root(variance_row(var_ptr, k, c, C, end, STORED), eps)
            rows = rows + (tl.exp(-0.5 * at_least(logs[k], floor)) * kappa * rstd,)
    else:
        rows = _rows(state_ptr, OUTPUT, c, C, end, K)
    return rows


@triton.jit
def scaled(rows, weight_ptr, c, C, end, K: tl.constexpr):
    """Rows times the affine map's weight, if there is one."""
    result = rows
    if weight_ptr is not None:
        weight = table_row(weight_ptr, 0, c, C, end, 0.0)
        result = ()
        for k in tl.static_range(K):
            result = result + (rows[k] * weight,)
    return result


@triton.jit
def _densities(x, mean, scale, constant, K: tl.constexpr, JOINT: tl.constexpr):
    """Densities of a tile over the greatest of them, a tuple over k, and one over their sum.

    Each is (BLOCK_L, 1) if JOINT, else (BLOCK_L, BLOCK_C). One over the sum is the square of its inverse root, which
    is one instruction: off by 3e-7 at most.
    """
    log_p = ()
    for k in tl.static_range(K):
        u = x - mean[k]
        q = u * u * scale[k]
        if JOINT:
            q = tl.sum(q, axis=1, keep_dims=True)
        log_p = log_p + (q + constant[k],)
    top = log_p[0]
    for k in tl.static_range(1, K):
        top = tl.maximum(top, log_p[k])
    densities = (tl.exp2(log_p[0] - top),)
    total = densities[0]
    for k in tl.static_range(1, K):
        density = tl.exp2(log_p[k] - top)
        densities = densities + (density,)
        total += density
    root = tl.rsqrt(total)
    return densities, root * root


@triton.jit
def _posteriors(x, inside, mean, scale, constant, K: tl.constexpr, JOINT: tl.constexpr):
    """Eq. 6 for a tile: a tuple over k of tau, 0 outside if that is given."""
    densities, inverse = _densities(x, mean, scale, constant, K, JOINT)
    if inside is not None:
        inverse = tl.where(inside, inverse, 0.0)
    tau = ()
    for k in tl.static_range(K):
        tau = tau + (densities[k] * inverse,)
    return tau


@triton.jit
def _zeros(K: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_C: tl.constexpr):
    sums = ()
    for _ in tl.static_range(K):
        sums = sums + (tl.zeros((BLOCK_L, BLOCK_C), tl.float32),)
    return sums


@triton.jit
def _totals(sums, K: tl.constexpr):
    """Add a tuple of tiles up over their locations, (1, BLOCK_C) or (1, 1) each."""
    totals = ()
    for k in tl.static_range(K):
        totals = totals + (tl.sum(sums[k], axis=0, keep_dims=True),)
    return totals


@triton.jit
def _store_rows(ptr, plane: tl.constexpr, rows, c, C, end, K: tl.constexpr, BLOCK_C: tl.constexpr):
    """Write a tuple over k of (1, BLOCK_C) or (1, 1) into a plane (K, C)."""
    for k in tl.static_range(K):
        value = tl.broadcast_to(rows[k], (1, BLOCK_C))
        tl.store(ptr + (plane * K + k) * C + c[None, :], value, mask=(c < end)[None, :])


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


@triton.jit
def _read(ptr, mask):
    return tl.load(ptr, mask=mask, other=0.0).to(tl.float32)


@triton.jit(do_not_specialize=["N"])
def mixture_moments_kernel(
    x_ptr, log_ptr, mean_ptr, var_ptr, sums_ptr, state_ptr,
    N, C, D, L, x_sn, x_sc, x_sl, eps, floor,
    K: tl.constexpr, JOINT: tl.constexpr, STORED: tl.constexpr, FLAT: tl.constexpr,
    BLOCK_L: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Mass, mean and sum of squares about it (Eqs. 6, 8 and 9) of each program's locations: (3, programs, K, C).

    Sums are about pivots: each component's mean in the program's first tile, which is no further from its mean over
    all tiles than its deviation allows, outliers included. The means that are left are relative to the batch's first
    location, which all programs share, so that a common offset costs no digits.
    """
    c, end = _channels(C, D, JOINT, BLOCK_C)
    mean = _means(mean_ptr, None, c, C, end, K)
    scale = _scales(var_ptr, None, c, C, end, eps, K, STORED)
    constant = _constants(log_ptr, var_ptr, None, c, C, D, end, eps, floor, K, JOINT, STORED)
    if tl.program_id(0) == 0:
        _store_rows(state_ptr, MEAN, mean, c, C, end, K, BLOCK_C)
        _store_rows(state_ptr, SCALE, scale, c, C, end, K, BLOCK_C)
        _store_rows(state_ptr, CONSTANT, constant, c, C, end, K, BLOCK_C)
        logs = log_weights(log_ptr, floor, K, STORED)
        for k in tl.static_range(K):
            at = state_ptr + (LOG_WEIGHT * K + k) * C + c
            tl.store(at, tl.zeros((BLOCK_C,), tl.float32) + logs[k], mask=c < end)
    pilot = _read(x_ptr + c.to(tl.int64) * x_sc, c < end)[None, :]
    tiles, blocks = _tiles(N, L, FLAT, BLOCK_L)

    n, block = _split(tl.program_id(0), blocks, FLAT)
    samples, rest = _split(tl.num_programs(0), blocks, FLAT)
    i, inside = _locations(block, N, L, FLAT, BLOCK_L)
    mask = inside & (c < end)[None, :]
    x = tl.where(mask, _read(x_ptr + _at(n, c, i, x_sn, x_sc, x_sl, FLAT), mask), mean[0])
    tau = _posteriors(x, inside, mean, scale, constant, K, JOINT)
    count = tl.sum(inside.to(tl.float32), axis=0, keep_dims=True)
    centre = tl.sum(tl.where(inside, x - pilot, 0.0), axis=0, keep_dims=True) / count
    pivot, mass, first, second = (), (), (), ()
    for k in tl.static_range(K):
        here = tl.sum(tau[k], axis=0, keep_dims=True)
        away = tl.sum(tau[k] * (x - pilot - centre), axis=0, keep_dims=True)
        pivot_k = pilot + (centre + away / tl.maximum(here, TINY))
        u = x - pivot_k
        tu = tau[k] * u
        pivot = pivot + (pivot_k,)
        mass = mass + (tau[k],)
        first = first + (tu,)
        second = second + (tu * u,)

    for _ in range(tl.program_id(0) + tl.num_programs(0), tiles, tl.num_programs(0)):
        n, block = _next(n, block, samples, rest, blocks, FLAT)
        i, inside = _locations(block, N, L, FLAT, BLOCK_L)
        mask = inside & (c < end)[None, :]
        x = tl.where(mask, _read(x_ptr + _at(n, c, i, x_sn, x_sc, x_sl, FLAT), mask), mean[0])
        tau = _posteriors(x, inside, mean, scale, constant, K, JOINT)
        new_mass, new_first, new_second = (), (), ()
        for k in tl.static_range(K):
            u = x - pivot[k]
            tu = tau[k] * u
            new_mass = new_mass + (mass[k] + tau[k],)
            new_first = new_first + (first[k] + tu,)
            new_second = new_second + (second[k] + tu * u,)
        mass, first, second = new_mass, new_first, new_second

    mass, first, second = _totals(mass, K), _totals(first, K), _totals(second, K)
    means, squares = (), ()
    for k in tl.static_range(K):
        distance = first[k] / tl.maximum(mass[k], TINY)
        means = means + ((pivot[k] - pilot) + distance,)
        squares = squares + (at_least(second[k] - first[k] * distance, 0.0),)
    _store_rows(_program_plane(sums_ptr, 0, C, K), 0, mass, c, C, end, K, BLOCK_C)
    _store_rows(_program_plane(sums_ptr, 1, C, K), 0, means, c, C, end, K, BLOCK_C)
    _store_rows(_program_plane(sums_ptr, 2, C, K), 0, squares, c, C, end, K, BLOCK_C)


@triton.jit(do_not_specialize=["N"])
def mixture_apply_kernel(
    x_ptr, log_ptr, mean_ptr, var_ptr, state_ptr, weight_ptr, bias_ptr, y_ptr,
    N, C, D, L, x_sn, x_sc, x_sl, y_sn, y_sc, y_sl, eps, floor, kappa,
    K: tl.constexpr, JOINT: tl.constexpr, STORED: tl.constexpr, FLAT: tl.constexpr,
    BLOCK_L: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Eq. 7 and the affine map; without a state Eq. 15, where the parameters take the moments' place."""
    c, end = _channels(C, D, JOINT, BLOCK_C)
    mean = _means(mean_ptr, state_ptr, c, C, end, K)
    scale = _scales(var_ptr, state_ptr, c, C, end, eps, K, STORED)
    constant = _constants(log_ptr, var_ptr, state_ptr, c, C, D, end, eps, floor, K, JOINT, STORED)
    output = output_rows(log_ptr, var_ptr, state_ptr, c, C, end, eps, floor, kappa, K, STORED)
    weight = scaled(output, weight_ptr, c, C, end, K)
    middle = mean if state_ptr is None else _rows(state_ptr, BATCH_MEAN, c, C, end, K)
    shift = tl.zeros((1, BLOCK_C), tl.float32)
    if bias_ptr is not None:
        shift = table_row(bias_ptr, 0, c, C, end, 0.0)
    tiles, blocks = _tiles(N, L, FLAT, BLOCK_L)
    n, block = _split(tl.program_id(0), blocks, FLAT)
    samples, rest = _split(tl.num_programs(0), blocks, FLAT)
    for _ in range(tl.program_id(0), tiles, tl.num_programs(0)):
        i, inside = _locations(block, N, L, FLAT, BLOCK_L)
        mask = inside & (c < end)[None, :]
        x = _read(x_ptr + _at(n, c, i, x_sn, x_sc, x_sl, FLAT), mask)
        densities, inverse = _densities(x, mean, scale, constant, K, JOINT)
        y = densities[0] * ((x - middle[0]) * weight[0])
        for k in tl.static_range(1, K):
            y += densities[k] * ((x - middle[k]) * weight[k])
        tl.store(y_ptr + _at(n, c, i, y_sn, y_sc, y_sl, FLAT), y * inverse + shift, mask=mask)
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
    mean = _means(None, state_ptr, c, C, end, K)
    scale = _scales(None, state_ptr, c, C, end, 0.0, K, False)
    constant = _constants(None, None, state_ptr, c, C, D, end, 0.0, 0.0, K, JOINT, False)
    middle = _rows(state_ptr, BATCH_MEAN, c, C, end, K)
    tiles, blocks = _tiles(N, L, FLAT, BLOCK_L)
    sum_g, sum_gu = _zeros(K, BLOCK_L, BLOCK_C), _zeros(K, BLOCK_L, BLOCK_C)
    n, block = _split(tl.program_id(0), blocks, FLAT)
    samples, rest = _split(tl.num_programs(0), blocks, FLAT)
    for _ in range(tl.program_id(0), tiles, tl.num_programs(0)):
        i, inside = _locations(block, N, L, FLAT, BLOCK_L)
        mask = inside & (c < end)[None, :]
        # Outside is where posteriors are numbers, whatever the mean: times a gradient of 0 they add nothing.
        x = tl.where(mask, _read(x_ptr + _at(n, c, i, x_sn, x_sc, x_sl, FLAT), mask), mean[0])
        g = _read(g_ptr + _at(n, c, i, g_sn, g_sc, g_sl, FLAT), mask)
        densities, inverse = _densities(x, mean, scale, constant, K, JOINT)
        g *= inverse
        new_g, new_gu = (), ()
        for k in tl.static_range(K):
            h = densities[k] * g
            new_g = new_g + (sum_g[k] + h,)
            new_gu = new_gu + (sum_gu[k] + h * (x - middle[k]),)
        sum_g, sum_gu = new_g, new_gu
        n, block = _next(n, block, samples, rest, blocks, FLAT)
    _store_rows(_program_plane(sums_ptr, 0, C, K), 0, _totals(sum_g, K), c, C, end, K, BLOCK_C)
    _store_rows(_program_plane(sums_ptr, 1, C, K), 0, _totals(sum_gu, K), c, C, end, K, BLOCK_C)


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
    mean = _means(mean_ptr, state_ptr, c, C, end, K)
    scale = _scales(var_ptr, state_ptr, c, C, end, eps, K, STORED)
    constant = _constants(log_ptr, var_ptr, state_ptr, c, C, D, end, eps, floor, K, JOINT, STORED)
    output = output_rows(log_ptr, var_ptr, state_ptr, c, C, end, eps, floor, kappa, K, STORED)
    weight = scaled(output, weight_ptr, c, C, end, K)
    precision = ()
    for k in tl.static_range(K):
        precision = precision + (scale[k] * (-2.0 / LOG2_E),)
    if BATCH:
        middle = _rows(state_ptr, BATCH_MEAN, c, C, end, K)
        dm = _rows(coefficients_ptr, 0, c, C, end, K)
        dv = _rows(coefficients_ptr, 1, c, C, end, K)
        dvv = _rows(coefficients_ptr, 2, c, C, end, K)
    else:
        middle = mean
    sum_z = _zeros(K, BLOCK_L, 1 if JOINT else BLOCK_C)
    sum_zu, sum_zuu = _zeros(K, BLOCK_L, BLOCK_C), _zeros(K, BLOCK_L, BLOCK_C)
    sum_h, sum_hu = _zeros(K, BLOCK_L, BLOCK_C), _zeros(K, BLOCK_L, BLOCK_C)
    tiles, blocks = _tiles(N, L, FLAT, BLOCK_L)
    n, block = _split(tl.program_id(0), blocks, FLAT)
    samples, rest = _split(tl.num_programs(0), blocks, FLAT)
    for _ in range(tl.program_id(0), tiles, tl.num_programs(0)):
        i, inside = _locations(block, N, L, FLAT, BLOCK_L)
        mask = inside & (c < end)[None, :]
        x = _read(x_ptr + _at(n, c, i, x_sn, x_sc, x_sl, FLAT), mask)
        g = _read(g_ptr + _at(n, c, i, g_sn, g_sc, g_sl, FLAT), mask)
        if DENSITY or DIRECT:
            x = tl.where(mask, x, mean[0])
            tau = _posteriors(x, inside, mean, scale, constant, K, JOINT)
        else:
            tau = _posteriors(x, None, mean, scale, constant, K, JOINT)
        dx = tl.zeros((BLOCK_L, BLOCK_C), tl.float32)
        dtau = ()
        new_h, new_hu = (), ()
        for k in tl.static_range(K):
            u = x - middle[k]
            if BATCH:
                curved = dv[k] * u
                q = g * weight[k] + dm[k] + curved
                product = q * u - dvv[k]
                dx += tau[k] * (q + curved)
            else:
                h = g * weight[k]
                product = h * u
                dx += tau[k] * h
            if DIRECT:
                share = tau[k] * g
                new_h = new_h + (sum_h[k] + share,)
                new_hu = new_hu + (sum_hu[k] + share * u,)
            if JOINT:
                product = tl.sum(product, axis=1, keep_dims=True)
            dtau = dtau + (product,)
        # Relative to the first, which costs no more, and keeps what posteriors lack of a sum of 1 out of differences.
        centre = tl.zeros_like(tau[0])
        for k in tl.static_range(1, K):
            centre += tau[k] * (dtau[k] - dtau[0])
        new_z, new_zu, new_zuu = (), (), ()
        for k in tl.static_range(K):
            if k == 0:
                z = -tau[0] * centre
            else:
                z = tau[k] * ((dtau[k] - dtau[0]) - centre)
            u = (x - mean[k]) * precision[k]
            zu = z * u
            dx -= zu
            if DENSITY:
                new_z = new_z + (sum_z[k] + z,)
                new_zu = new_zu + (sum_zu[k] + zu,)
                new_zuu = new_zuu + (sum_zuu[k] + zu * u,)
        if DENSITY:
            sum_z, sum_zu, sum_zuu = new_z, new_zu, new_zuu
        if DIRECT:
            sum_h, sum_hu = new_h, new_hu
        tl.store(dx_ptr + _at(n, c, i, dx_sn, dx_sc, dx_sl, FLAT), dx, mask=mask)
        n, block = _next(n, block, samples, rest, blocks, FLAT)
    if DENSITY:
        _store_rows(_program_plane(sums_ptr, 0, C, K), 0, _totals(sum_z, K), c, C, end, K, BLOCK_C)
        _store_rows(_program_plane(sums_ptr, 1, C, K), 0, _totals(sum_zu, K), c, C, end, K, BLOCK_C)
        _store_rows(_program_plane(sums_ptr, 2, C, K), 0, _totals(sum_zuu, K), c, C, end, K, BLOCK_C)
    if DIRECT:
        before: tl.constexpr = 3 if DENSITY else 0
        _store_rows(_program_plane(sums_ptr, before, C, K), 0, _totals(sum_h, K), c, C, end, K, BLOCK_C)
        _store_rows(_program_plane(sums_ptr, before + 1, C, K), 0, _totals(sum_hu, K), c, C, end, K, BLOCK_C)
