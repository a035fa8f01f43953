"""The Triton kernels of a mixture for channels that have posteriors of their own and hold few locations.

A program is a channel. It walks over all its locations twice, the second time where its multiprocessor's cache still
holds them: an activation is read from memory once. Otherwise they are ``mixture_kernels`` in one: the same sums about
the same pivots, the same state. A tile is BLOCK_S samples by BLOCK_L positions; offsets in a channel fit in 32 bits.
"""

# ruff: noqa: RUF005, PLR0912, PLR0915, SIM108 - Triton compiles no stars in tuples, and folds branches on constants

# pyright: reportArgumentType=false, reportOperatorIssue=false, reportAttributeAccessIssue=false, reportGeneralTypeIssues=false
# pyright: reportAssignmentType=false, reportOptionalSubscript=false, reportOptionalMemberAccess=false, reportPossiblyUnboundVariable=false
# Triton's own annotations, which take every value for a constexpr or a tuple, and its constants, which it folds.

import triton
import triton.language as tl

from .cluster_kernels import LOG2_E, TINY, inverse_root, table_row
from .mixture_kernels import (
    BATCH_MEAN,
    BATCH_VAR,
    CONSTANT,
    LOG_WEIGHT,
    MASS,
    MEAN,
    OUTPUT,
    SCALE,
    _constants,
    _densities,
    _means,
    _posteriors,
    _read,
    _rows,
    _scales,
    _store_rows,
    _totals,
    _zeros,
    at_least,
    log_weights,
    scaled,
)


@triton.jit
def _tile(tile, blocks, N, L, BLOCK_S: tl.constexpr, BLOCK_L: tl.constexpr):
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
    mean = _means(mean_ptr, None, c, C, C, K)
    scale = _scales(var_ptr, None, c, C, C, eps, K, STORED)
    constant = _constants(log_ptr, var_ptr, None, c, C, 1, C, eps, floor, K, False, STORED)
    x_ptr += tl.program_id(0).to(tl.int64) * x_sc
    y_ptr += tl.program_id(0).to(tl.int64) * y_sc
    pilot = tl.load(x_ptr).to(tl.float32)
    blocks = tl.cdiv(L, BLOCK_L)
    tiles = tl.cdiv(N, BLOCK_S) * blocks

    n, i, inside = _tile(0, blocks, N, L, BLOCK_S, BLOCK_L)
    x = tl.where(inside, _read(x_ptr + n * x_sn + i * x_sl, inside), mean[0])
    tau = _posteriors(x, inside, mean, scale, constant, K, False)
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
    for tile in range(1, tiles):
        n, i, inside = _tile(tile, blocks, N, L, BLOCK_S, BLOCK_L)
        x = tl.where(inside, _read(x_ptr + n * x_sn + i * x_sl, inside), mean[0])
        tau = _posteriors(x, inside, mean, scale, constant, K, False)
        new_mass, new_first, new_second = (), (), ()
        for k in tl.static_range(K):
            u = x - pivot[k]
            tu = tau[k] * u
            new_mass = new_mass + (mass[k] + tau[k],)
            new_first = new_first + (first[k] + tu,)
            new_second = new_second + (second[k] + tu * u,)
        mass, first, second = new_mass, new_first, new_second

    mass, first, second = _totals(mass, K), _totals(first, K), _totals(second, K)
    logs = log_weights(log_ptr, floor, K, STORED)
    middle, spread, output, log_rows = (), (), (), ()
    for k in tl.static_range(K):
        held = tl.maximum(mass[k], TINY)
        distance = first[k] / held
        v = at_least(at_least(second[k] - first[k] * distance, 0.0) / held, 0.0)
        middle = middle + (tl.where(mass[k] == 0.0, 0.0, pilot + ((pivot[k] - pilot) + distance)),)
        spread = spread + (v,)
        output = output + (tl.exp(-0.5 * at_least(logs[k], floor)) * kappa * inverse_root(v, eps),)
        log_rows = log_rows + (tl.zeros((1, 1), tl.float32) + logs[k],)
    _store_rows(state_ptr, MEAN, mean, c, C, C, K, 1)
    _store_rows(state_ptr, SCALE, scale, c, C, C, K, 1)
    _store_rows(state_ptr, CONSTANT, constant, c, C, C, K, 1)
    _store_rows(state_ptr, LOG_WEIGHT, log_rows, c, C, C, K, 1)
    _store_rows(state_ptr, MASS, mass, c, C, C, K, 1)
    _store_rows(state_ptr, BATCH_MEAN, middle, c, C, C, K, 1)
    _store_rows(state_ptr, BATCH_VAR, spread, c, C, C, K, 1)
    _store_rows(state_ptr, OUTPUT, output, c, C, C, K, 1)

    weight = scaled(output, weight_ptr, c, C, C, K)
    shift = tl.zeros((1, 1), tl.float32)
    if bias_ptr is not None:
        shift = table_row(bias_ptr, 0, c, C, C, 0.0)
    for tile in range(tiles):
        n, i, inside = _tile(tile, blocks, N, L, BLOCK_S, BLOCK_L)
        x = _read(x_ptr + n * x_sn + i * x_sl, inside)
        densities, inverse = _densities(x, mean, scale, constant, K, False)
        y = densities[0] * ((x - middle[0]) * weight[0])
        for k in tl.static_range(1, K):
            y += densities[k] * ((x - middle[k]) * weight[k])
        tl.store(y_ptr + n * y_sn + i * y_sl, y * inverse + shift, mask=inside)


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
    mean = _means(None, state_ptr, c, C, C, K)
    scale = _scales(None, state_ptr, c, C, C, 0.0, K, False)
    constant = _constants(None, None, state_ptr, c, C, 1, C, 0.0, 0.0, K, False, False)
    middle = _rows(state_ptr, BATCH_MEAN, c, C, C, K)
    output = _rows(state_ptr, OUTPUT, c, C, C, K)
    x_ptr += tl.program_id(0).to(tl.int64) * x_sc
    g_ptr += tl.program_id(0).to(tl.int64) * g_sc
    dx_ptr += tl.program_id(0).to(tl.int64) * dx_sc
    blocks = tl.cdiv(L, BLOCK_L)
    tiles = tl.cdiv(N, BLOCK_S) * blocks

    sum_g, sum_gu = _zeros(K, BLOCK_S * BLOCK_L, 1), _zeros(K, BLOCK_S * BLOCK_L, 1)
    for tile in range(tiles):
        n, i, inside = _tile(tile, blocks, N, L, BLOCK_S, BLOCK_L)
        # Outside is where posteriors are numbers, whatever the mean: times a gradient of 0 they add nothing.
        x = tl.where(inside, _read(x_ptr + n * x_sn + i * x_sl, inside), mean[0])
        g = _read(g_ptr + n * g_sn + i * g_sl, inside)
        densities, inverse = _densities(x, mean, scale, constant, K, False)
        g *= inverse
        new_g, new_gu = (), ()
        for k in tl.static_range(K):
            h = densities[k] * g
            new_g = new_g + (sum_g[k] + h,)
            new_gu = new_gu + (sum_gu[k] + h * (x - middle[k]),)
        sum_g, sum_gu = new_g, new_gu
    sum_g, sum_gu = _totals(sum_g, K), _totals(sum_gu, K)

    weight = scaled(output, weight_ptr, c, C, C, K)
    mass = _rows(state_ptr, MASS, c, C, C, K)
    spread = _rows(state_ptr, BATCH_VAR, c, C, C, K)
    dweight, dbias = tl.zeros((1, 1), tl.float32), tl.zeros((1, 1), tl.float32)
    precision, dm, dv, dvv, direct = (), (), (), (), ()
    for k in tl.static_range(K):
        held = tl.maximum(mass[k], TINY)
        # A sum over no mass is 0: it comes before what may be infinite.
        dv_k = -0.5 * (weight[k] * sum_gu[k] / held) / (spread[k] + eps)
        precision = precision + (scale[k] * (-2.0 / LOG2_E),)
        dm = dm + (-(weight[k] * sum_g[k] / held),)
        dv = dv + (dv_k,)
        dvv = dvv + (dv_k * spread[k],)
        direct = direct + (weight[k] * sum_gu[k],)
        dweight += output[k] * sum_gu[k]
        dbias += sum_g[k]
    if affine_ptr is not None:
        tl.store(affine_ptr + c[None, :], dweight)
        tl.store(affine_ptr + C + c[None, :], dbias)

    sum_z = _zeros(K, BLOCK_S * BLOCK_L, 1)
    sum_zu, sum_zuu = _zeros(K, BLOCK_S * BLOCK_L, 1), _zeros(K, BLOCK_S * BLOCK_L, 1)
    for tile in range(tiles):
        n, i, inside = _tile(tile, blocks, N, L, BLOCK_S, BLOCK_L)
        x = tl.where(inside, _read(x_ptr + n * x_sn + i * x_sl, inside), mean[0])
        g = _read(g_ptr + n * g_sn + i * g_sl, inside)
        tau = _posteriors(x, inside, mean, scale, constant, K, False)
        dx = tl.zeros((BLOCK_S * BLOCK_L, 1), tl.float32)
        dtau = ()
        for k in tl.static_range(K):
            u = x - middle[k]
            curved = dv[k] * u
            q = g * weight[k] + dm[k] + curved
            dx += tau[k] * (q + curved)
            dtau = dtau + (q * u - dvv[k],)
        # Relative to the first, as in ``mixture_bwd_kernel``.
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
            if out_ptr is not None:
                new_z = new_z + (sum_z[k] + z,)
                new_zu = new_zu + (sum_zu[k] + zu,)
                new_zuu = new_zuu + (sum_zuu[k] + zu * u,)
        if out_ptr is not None:
            sum_z, sum_zu, sum_zuu = new_z, new_zu, new_zuu
        tl.store(dx_ptr + n * dx_sn + i * dx_sl, dx, mask=inside)
    if out_ptr is not None:
        sum_z, sum_zu, sum_zuu = _totals(sum_z, K), _totals(sum_zu, K), _totals(sum_zuu, K)
        dvar, share = (), ()
        for k in tl.static_range(K):
            s = (-0.5 * LOG2_E) / scale[k]
            dvar_k = 0.5 * (sum_zuu[k] - sum_z[k] / s)
            if STORED:
                dvar_k *= s - eps
            dvar = dvar + (dvar_k,)
            share = share + (sum_z[k] - 0.5 * direct[k],)
        _store_rows(out_ptr, 0, sum_zu, c, C, C, K, 1)
        _store_rows(out_ptr, 1, dvar, c, C, C, K, 1)
        _store_rows(out_ptr, 2, share, c, C, C, K, 1)
