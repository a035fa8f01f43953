"""What all Triton kernels share, and those of ``cluster_norm``; imported only where one is to run or be compiled.

Every activation is (N, C, L) with three strides, or (1, C, N * L) where samples and positions can be walked as
one, and every kernel takes it in tiles of BLOCK_L locations by BLOCK_C channels. JOINT says that a tile holds
one whole group of channels, which share a posterior (BLOCK_L, 1); otherwise each channel has its own (BLOCK_L,
BLOCK_C). Arithmetic is in float32. A program walks over several tiles of one block of channels and leaves its sums to
a second, small kernel: no atomics, so results repeat bit for bit.

Offsets are int64, since an activation may hold more than 2^31 elements.

Where each sample has a cluster, a tile is (BLOCK_S, BLOCK_L, BLOCK_C), of several samples where maps are small.
Tables of means and variances (K, C) have strides, and a row (C,) to add to each where they are made by linear layers.
STORED: variances are log-variances. UNKNOWN: an id of -1 is an unknown cluster, whose samples are left to kernels of
their own, which take far more registers, in tiles of UNKNOWN_L locations by all channels, UNKNOWN_C of at least C.
"""

# ruff: noqa: PLR0912, PLR0915 - Triton folds branches on constants, which must stand alone

# pyright: reportArgumentType=false, reportOperatorIssue=false, reportAttributeAccessIssue=false, reportGeneralTypeIssues=false
# Triton's own annotations, which take every value for a constexpr or a tuple.

import triton
import triton.language as tl

TINY = tl.constexpr(1.1754944e-38)  # the least normal float32
LEAST = tl.constexpr(-3.4e38)  # below every log density, and finite
LOG2_E = tl.constexpr(1.4426950408889634)
IDS = tl.constexpr(32)  # that a program looks at at once


@triton.jit
def nothing():
    """Compile and run, where Triton can."""


@triton.jit
def offsets(n, c, i, stride_n, stride_c, stride_l):
    """Offsets of a tile, (BLOCK_L, BLOCK_C)."""
    sample = n.to(tl.int64) * stride_n
    return sample + i.to(tl.int64)[:, None] * stride_l + c.to(tl.int64)[None, :] * stride_c


@triton.jit
def table_row(ptr, k, c, C, end, default):
    """Row k of a (K, C) table at the channels c before end, (1, BLOCK_C)."""
    return tl.load(ptr + k * C + c, mask=c < end, other=default).to(tl.float32)[None, :]


@triton.jit
def inverse_root(var, eps):
    """(var + eps)^(-1/2), rounded correctly: there are few of them."""
    return tl.div_rn(1.0, tl.sqrt_rn(var + eps))


@triton.jit
def _table(ptr, row_ptr, k, c, C, stride_k, stride_c):
    """Rows k (S,) of a table (K, C), and what is added to each, at channels c: (S, BLOCK_C)."""
    at = k[:, None] * stride_k + c[None, :] * stride_c
    value = tl.load(ptr + at, mask=(c < C)[None, :], other=0.0).to(tl.float32)
    if row_ptr is not None:
        value += table_row(row_ptr, 0, c, C, C, 0.0)
    return value


@triton.jit
def _rows(
    mean_ptr, var_ptr, mean_row_ptr, var_row_ptr, k, c, K, C, stride_k, stride_c, eps, lowest, STORED: tl.constexpr
):  # fmt: skip
    """Mean and rstd (S, BLOCK_C) of ids k (S,): row 0 for -1 where that is allowed, NaN for an id no table has."""
    wrong = ((k >= K) | (k < lowest))[:, None]
    k = tl.minimum(tl.maximum(k, 0), K - 1)
    mean = _table(mean_ptr, mean_row_ptr, k, c, C, stride_k, stride_c)
    var = _table(var_ptr, var_row_ptr, k, c, C, stride_k, stride_c)
    rstd = inverse_root(tl.exp(var) if STORED else var, eps)
    return tl.where(wrong, float("nan"), mean), tl.where(wrong, float("nan"), rstd)


@triton.jit
def _samples(cluster_ptr, N, UNKNOWN: tl.constexpr, BLOCK_S: tl.constexpr):
    """A program's samples, their ids, and which of them are there and have a cluster, (BLOCK_S,)."""
    s = tl.program_id(0) * BLOCK_S + tl.arange(0, BLOCK_S)
    there = s < N
    k = tl.load(cluster_ptr + s, mask=there, other=0)
    if UNKNOWN:
        there = there & (k != -1)
    return s, k, there


@triton.jit
def _places(s, i, c, stride_n, stride_c, stride_l):
    """Offsets of a tile, (BLOCK_S, BLOCK_L, BLOCK_C)."""
    sample, position = s.to(tl.int64)[:, None, None] * stride_n, i.to(tl.int64)[None, :, None] * stride_l
    return sample + position + c.to(tl.int64)[None, None, :] * stride_c


@triton.jit
def _density(
    x, mean_ptr, var_ptr, mean_row_ptr, var_row_ptr, k, c, C, stride_k, stride_c, eps, STORED: tl.constexpr
):  # fmt: skip
    """Cluster k's part of an unknown sample: z = (x - mean) rstd, rstd, the variance, and a log density in base 2.

    The first is (UNKNOWN_L, UNKNOWN_C), the last (UNKNOWN_L, 1), and without the logarithm of 2 pi, which cancels.
    """
    row = tl.full((1,), 0, tl.int64) + k
    mean = _table(mean_ptr, mean_row_ptr, row, c, C, stride_k, stride_c)
    var = _table(var_ptr, var_row_ptr, row, c, C, stride_k, stride_c)
    if STORED:
        var = tl.exp(var)
    rstd = inverse_root(var, eps)
    z = (x - mean) * rstd
    log_p = (-0.5 * LOG2_E) * z * z - 0.5 * tl.log2(var + eps)
    return z, rstd, var, tl.sum(tl.where((c < C)[None, :], log_p, 0.0), axis=1, keep_dims=True)


@triton.jit(do_not_specialize=["N", "lowest"])
def scb_fwd_kernel(
    x_ptr, cluster_ptr, mean_ptr, var_ptr, mean_row_ptr, var_row_ptr, weight_ptr, bias_ptr, y_ptr,
    N, K, C, L, stride_k, stride_c, x_sn, x_sc, x_sl, y_sn, y_sc, y_sl, eps, lowest,
    STORED: tl.constexpr, UNKNOWN: tl.constexpr,
    BLOCK_S: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Eq. 10 and an affine map; a program is (block of samples, block of channels, share of the positions)."""
    s, k, there = _samples(cluster_ptr, N, UNKNOWN, BLOCK_S)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    mean, scale = _rows(
        mean_ptr, var_ptr, mean_row_ptr, var_row_ptr, k, c, K, C, stride_k, stride_c, eps, lowest, STORED
    )
    shift = tl.zeros((1, BLOCK_C), tl.float32)
    if weight_ptr is not None:
        scale *= table_row(weight_ptr, 0, c, C, C, 0.0)
        shift = table_row(bias_ptr, 0, c, C, C, 0.0)
    mean, scale, shift = mean[:, None, :], scale[:, None, :], shift[:, None, :]
    inside = there[:, None, None] & (c < C)[None, None, :]
    for start in range(tl.program_id(2) * BLOCK_L, L, tl.num_programs(2) * BLOCK_L):
        i = start + tl.arange(0, BLOCK_L)
        mask = inside & (i < L)[None, :, None]
        x = tl.load(x_ptr + _places(s, i, c, x_sn, x_sc, x_sl), mask=mask, other=0.0).to(tl.float32)
        tl.store(y_ptr + _places(s, i, c, y_sn, y_sc, y_sl), (x - mean) * scale + shift, mask=mask)


@triton.jit
def scb_unknown_fwd_kernel(
    x_ptr, cluster_ptr, mean_ptr, var_ptr, mean_row_ptr, var_row_ptr, weight_ptr, bias_ptr, y_ptr,
    K, C, L, stride_k, stride_c, x_sn, x_sc, x_sl, y_sn, y_sc, y_sl, eps, kappa,
    STORED: tl.constexpr, UNKNOWN_L: tl.constexpr, UNKNOWN_C: tl.constexpr,
):  # fmt: skip
    """Eq. 12 and an affine map, where a sample is unknown; a program is (sample, share of the positions).

    Clusters come one after the other, under the greatest density so far.
    """
    n = tl.program_id(0)
    if tl.load(cluster_ptr + n) == -1:
        c = tl.arange(0, UNKNOWN_C)
        for start in range(tl.program_id(1) * UNKNOWN_L, L, tl.num_programs(1) * UNKNOWN_L):
            i = start + tl.arange(0, UNKNOWN_L)
            mask = (i < L)[:, None] & (c < C)[None, :]
            x = tl.load(x_ptr + offsets(n, c, i, x_sn, x_sc, x_sl), mask=mask, other=0.0).to(tl.float32)
            top = tl.full((UNKNOWN_L, 1), LEAST, tl.float32)
            total = tl.zeros((UNKNOWN_L, 1), tl.float32)
            y = tl.zeros((UNKNOWN_L, UNKNOWN_C), tl.float32)
            for k in range(K):
                z, _, _, log_p = _density(
                    x, mean_ptr, var_ptr, mean_row_ptr, var_row_ptr, k, c, C, stride_k, stride_c, eps, STORED
                )
                new = tl.maximum(top, log_p)
                before, p = tl.exp2(top - new), tl.exp2(log_p - new)
                total = total * before + p
                y = y * before + p * z
                top = new
            y *= kappa / total
            if weight_ptr is not None:
                y = y * table_row(weight_ptr, 0, c, C, C, 0.0) + table_row(bias_ptr, 0, c, C, C, 0.0)
            tl.store(y_ptr + offsets(n, c, i, y_sn, y_sc, y_sl), y, mask=mask)


@triton.jit
def _add(ptr, values, mask):
    """Add to what the program has left in memory."""
    tl.store(ptr, tl.load(ptr, mask=mask, other=0.0) + values, mask=mask)


@triton.jit(do_not_specialize=["N", "lowest"])
def scb_bwd_kernel(
    x_ptr, g_ptr, cluster_ptr, mean_ptr, var_ptr, mean_row_ptr, var_row_ptr, weight_ptr,
    dx_ptr, sums_ptr,
    N, K, C, L, stride_k, stride_c, x_sn, x_sc, x_sl, g_sn, g_sc, g_sl, dx_sn, dx_sc, dx_sl, eps, lowest,
    STORED: tl.constexpr, UNKNOWN: tl.constexpr, BY_SAMPLE: tl.constexpr,
    BLOCK_S: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Gradient dx, and the sums of g and g * (x - mean) over a program's positions.

    BY_SAMPLE: sums are (2, shares, N, C), otherwise (2, shares, blocks of samples, K, C), each cluster's.
    """
    s, k, there = _samples(cluster_ptr, N, UNKNOWN, BLOCK_S)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    mean, rstd = _rows(
        mean_ptr, var_ptr, mean_row_ptr, var_row_ptr, k, c, K, C, stride_k, stride_c, eps, lowest, STORED
    )
    if weight_ptr is not None:
        rstd *= table_row(weight_ptr, 0, c, C, C, 0.0)
    mean, rstd = mean[:, None, :], rstd[:, None, :]
    sum_g = tl.zeros((BLOCK_S, BLOCK_L, BLOCK_C), tl.float32)
    sum_gu = tl.zeros((BLOCK_S, BLOCK_L, BLOCK_C), tl.float32)
    inside = there[:, None, None] & (c < C)[None, None, :]
    for start in range(tl.program_id(2) * BLOCK_L, L, tl.num_programs(2) * BLOCK_L):
        i = start + tl.arange(0, BLOCK_L)
        mask = inside & (i < L)[None, :, None]
        g = tl.load(g_ptr + _places(s, i, c, g_sn, g_sc, g_sl), mask=mask, other=0.0).to(tl.float32)
        x = tl.load(x_ptr + _places(s, i, c, x_sn, x_sc, x_sl), mask=mask, other=0.0).to(tl.float32)
        sum_g += g
        sum_gu += tl.where(mask, g * (x - mean), 0.0)  # a mean may be NaN or infinite
        tl.store(dx_ptr + _places(s, i, c, dx_sn, dx_sc, dx_sl), g * rstd, mask=mask)
    row_g, row_gu = tl.sum(sum_g, axis=1), tl.sum(sum_gu, axis=1)
    program = tl.program_id(2).to(tl.int64) * tl.num_programs(0) + tl.program_id(0)
    programs = tl.num_programs(2).to(tl.int64) * tl.num_programs(0)
    if BY_SAMPLE:
        at = sums_ptr + (tl.program_id(2).to(tl.int64) * N + s)[:, None] * C + c[None, :]
        mask = (s < N)[:, None] & (c < C)[None, :]
        tl.store(at, row_g, mask=mask)
        tl.store(at + tl.num_programs(2).to(tl.int64) * N * C, row_gu, mask=mask)
    else:
        for cluster in range(K):
            member = (there & (k == cluster))[:, None]
            at = sums_ptr + (program * K + cluster) * C + c
            tl.store(at, tl.sum(tl.where(member, row_g, 0.0), axis=0), mask=c < C)
            tl.store(at + programs * K * C, tl.sum(tl.where(member, row_gu, 0.0), axis=0), mask=c < C)


@triton.jit
def _unknown_gradients(
    x_ptr, g_ptr, mean_ptr, var_ptr, mean_row_ptr, var_row_ptr, weight_ptr, dx_ptr, left_ptr, plane, n,
    K, C, L, stride_k, stride_c, x_sn, x_sc, x_sl, g_sn, g_sc, g_sl, dx_sn, dx_sc, dx_sl, eps, kappa,
    STORED: tl.constexpr, UNKNOWN_L: tl.constexpr, UNKNOWN_C: tl.constexpr,
):  # fmt: skip
    """Gradients of Eq. 12 for a program's share of the positions of sample n.

    Those of means and variances are added to rows k of the two planes at left_ptr, those of the affine map to row K.
    """
    c = tl.arange(0, UNKNOWN_C)
    for start in range(tl.program_id(1) * UNKNOWN_L, L, tl.num_programs(1) * UNKNOWN_L):
        i = start + tl.arange(0, UNKNOWN_L)
        mask = (i < L)[:, None] & (c < C)[None, :]
        x = tl.load(x_ptr + offsets(n, c, i, x_sn, x_sc, x_sl), mask=mask, other=0.0).to(tl.float32)
        g = tl.load(g_ptr + offsets(n, c, i, g_sn, g_sc, g_sl), mask=mask, other=0.0).to(tl.float32) * kappa
        h = g
        if weight_ptr is not None:
            h *= table_row(weight_ptr, 0, c, C, C, 0.0)
        top = tl.full((UNKNOWN_L, 1), LEAST, tl.float32)
        total = tl.zeros((UNKNOWN_L, 1), tl.float32)
        centre = tl.zeros((UNKNOWN_L, 1), tl.float32)
        for k in range(K):
            z, _, _, log_p = _density(
                x, mean_ptr, var_ptr, mean_row_ptr, var_row_ptr, k, c, C, stride_k, stride_c, eps, STORED
            )
            new = tl.maximum(top, log_p)
            before, p = tl.exp2(top - new), tl.exp2(log_p - new)
            total = total * before + p
            centre = centre * before + p * tl.sum(h * z, axis=1, keep_dims=True)
            top = new
        inverse = 1.0 / total
        centre *= inverse
        dx = tl.zeros((UNKNOWN_L, UNKNOWN_C), tl.float32)
        dweight = tl.zeros((UNKNOWN_L, UNKNOWN_C), tl.float32)
        tl.debug_barrier()  # what is added to may be read by another thread than has written it
        for k in range(K):
            z, rstd, var, log_p = _density(
                x, mean_ptr, var_ptr, mean_row_ptr, var_row_ptr, k, c, C, stride_k, stride_c, eps, STORED
            )
            tau = tl.exp2(log_p - top) * inverse
            pull = tau * (tl.sum(h * z, axis=1, keep_dims=True) - centre)  # gradient of the log density
            direct, force = tau * h * rstd, pull * z * rstd
            dx += direct - force
            dweight += tau * z * g
            dvar = 0.5 * rstd * (rstd * pull * (z * z - 1.0) - direct * z)
            if STORED:
                dvar *= var
            at = left_ptr + k * C + c
            _add(at, tl.sum(tl.where(mask, force - direct, 0.0), axis=0), c < C)
            _add(at + plane, tl.sum(tl.where(mask, dvar, 0.0), axis=0), c < C)
        at = left_ptr + K * C + c
        _add(at, tl.sum(tl.where(mask, dweight, 0.0), axis=0), c < C)
        _add(at + plane, tl.sum(g, axis=0) / kappa, c < C)
        tl.store(dx_ptr + offsets(n, c, i, dx_sn, dx_sc, dx_sl), dx, mask=mask)


@triton.jit(do_not_specialize=["N"])
def scb_unknown_bwd_kernel(
    x_ptr, g_ptr, cluster_ptr, mean_ptr, var_ptr, mean_row_ptr, var_row_ptr, weight_ptr, dx_ptr, left_ptr, found_ptr,
    N, K, C, L, stride_k, stride_c, x_sn, x_sc, x_sl, g_sn, g_sc, g_sl, dx_sn, dx_sc, dx_sl, eps, kappa,
    STORED: tl.constexpr, UNKNOWN_L: tl.constexpr, UNKNOWN_C: tl.constexpr,
):  # fmt: skip
    """Gradients of Eq. 12; a program (p of P, share of the positions) takes samples p, p + P and so on.

    What it leaves is (2, shares, P, K + 1, C), written where found (shares, P) says so.
    """
    program = tl.program_id(1).to(tl.int64) * tl.num_programs(0) + tl.program_id(0)
    unknown = tl.zeros((IDS,), tl.int32)
    for start in range(tl.program_id(0), N, tl.num_programs(0) * IDS):
        s = start + tl.num_programs(0) * tl.arange(0, IDS)
        unknown += (tl.load(cluster_ptr + s, mask=s < N, other=0) == -1).to(tl.int32)
    found = tl.sum(unknown, axis=0)
    tl.store(found_ptr + program, found)
    if found > 0:
        left = left_ptr + program * (K + 1) * C
        plane = tl.num_programs(1).to(tl.int64) * tl.num_programs(0) * (K + 1) * C
        wide = tl.arange(0, UNKNOWN_C)
        for row in range(K + 1):
            tl.store(left + row * C + wide, tl.zeros((UNKNOWN_C,), tl.float32), mask=wide < C)
            tl.store(left + plane + row * C + wide, tl.zeros((UNKNOWN_C,), tl.float32), mask=wide < C)
        for sample in range(tl.program_id(0), N, tl.num_programs(0)):
            n = tl.cast(sample, tl.int32)
            if tl.load(cluster_ptr + n) == -1:
                _unknown_gradients(
                    x_ptr, g_ptr, mean_ptr, var_ptr, mean_row_ptr, var_row_ptr, weight_ptr, dx_ptr, left,
                    plane, n, K, C, L, stride_k, stride_c, x_sn, x_sc, x_sl, g_sn, g_sc, g_sl,
                    dx_sn, dx_sc, dx_sl, eps, kappa, STORED, UNKNOWN_L, UNKNOWN_C,
                )  # fmt: skip


@triton.jit
def _cluster_sums(ptr, rows, c, C, mask):
    return tl.load(ptr + rows.to(tl.int64)[:, None] * C + c[None, :], mask=mask, other=0.0)


@triton.jit
def _weight_row(weight_ptr, c, C):
    weight = tl.full((c.shape[0],), 1.0, tl.float32)
    if weight_ptr is not None:
        weight = tl.load(weight_ptr + c, mask=c < C, other=0.0).to(tl.float32)
    return weight


@triton.jit(do_not_specialize=["N", "R", "P"])
def scb_rows_kernel(
    sums_ptr, left_ptr, found_ptr, cluster_ptr, var_ptr, var_row_ptr, weight_ptr,
    dmean_ptr, dvar_ptr, added_ptr, affine_ptr,
    N, R, P, K, C, stride_k, stride_c, out_sk, out_sc, eps,
    STORED: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Gradients of means and variances (K, C) from R rows of sums and what P programs have left of unknown samples.

    A program is (cluster, block of channels), or, beyond the last cluster, those of all clusters together: of the rows
    that are added to tables, (2, C), and of the affine map, (2, C). Rows of sums are of samples, with cluster_ptr, or
    of clusters in turn.
    """
    own = tl.program_id(0)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    weight = _weight_row(weight_ptr, c, C)
    plane = R.to(tl.int64) * C
    first = tl.zeros((BLOCK_N, BLOCK_C), tl.float32)
    second = tl.zeros((BLOCK_N, BLOCK_C), tl.float32)
    if own < K:
        for start in range(0, R, BLOCK_N):
            row = start + tl.arange(0, BLOCK_N)
            k = row % K if cluster_ptr is None else tl.load(cluster_ptr + row % N, mask=row < R, other=-1)
            mask = ((row < R) & (k == own))[:, None] & (c < C)[None, :]
            first += _cluster_sums(sums_ptr, row, c, C, mask)
            second += _cluster_sums(sums_ptr + plane, row, c, C, mask)
        index = tl.full((1,), 0, tl.int64) + own
        var = _table(var_ptr, var_row_ptr, index, c, C, stride_k, stride_c)
        if STORED:
            var = tl.exp(var)
        var = tl.reshape(var, (BLOCK_C,))
        rstd = inverse_root(var, eps)
        dmean = -weight * rstd * tl.sum(first, axis=0)
        dvar = -0.5 * weight * rstd * rstd * rstd * tl.sum(second, axis=0)
        if STORED:
            dvar *= var
        if left_ptr is not None:
            first = tl.zeros((BLOCK_N, BLOCK_C), tl.float32)
            second = tl.zeros((BLOCK_N, BLOCK_C), tl.float32)
            for start in range(0, P, BLOCK_N):
                p = start + tl.arange(0, BLOCK_N)
                mask = (tl.load(found_ptr + p, mask=p < P, other=0) > 0)[:, None] & (c < C)[None, :]
                first += _cluster_sums(left_ptr, p * (K + 1) + own, c, C, mask)
                second += _cluster_sums(left_ptr, (P + p) * (K + 1) + own, c, C, mask)
            dmean += tl.sum(first, axis=0)
            dvar += tl.sum(second, axis=0)
        at = own * out_sk + c * out_sc
        tl.store(dmean_ptr + at, dmean, mask=c < C)
        tl.store(dvar_ptr + at, dvar, mask=c < C)
    else:
        dweight = tl.zeros((BLOCK_N, BLOCK_C), tl.float32)
        dbias = tl.zeros((BLOCK_N, BLOCK_C), tl.float32)
        for start in range(0, R, BLOCK_N):
            row = start + tl.arange(0, BLOCK_N)
            k = row % K if cluster_ptr is None else tl.load(cluster_ptr + row % N, mask=row < R, other=-1)
            mask = ((row < R) & (k >= 0) & (k < K))[:, None] & (c < C)[None, :]
            k = tl.minimum(tl.maximum(k, 0), K - 1).to(tl.int64)
            var = _table(var_ptr, var_row_ptr, k, c, C, stride_k, stride_c)
            if STORED:
                var = tl.exp(var)
            sum_g = _cluster_sums(sums_ptr, row, c, C, mask)
            rstd = tl.where(mask, inverse_root(var, eps), 0.0)
            part = rstd * _cluster_sums(sums_ptr + plane, row, c, C, mask)
            dweight += part
            dbias += sum_g
            first -= weight[None, :] * rstd * sum_g
            dvar = -0.5 * weight[None, :] * rstd * rstd * part
            second += dvar * var if STORED else dvar
        if left_ptr is not None:
            shares = P * (K + 1)
            for start in range(0, shares, BLOCK_N):
                row = start + tl.arange(0, BLOCK_N)
                found = tl.load(found_ptr + row // (K + 1), mask=row < shares, other=0) > 0
                mask = found[:, None] & (c < C)[None, :]
                of_affine = (row % (K + 1) == K)[:, None]
                mean_part = _cluster_sums(left_ptr, row, c, C, mask)
                var_part = _cluster_sums(left_ptr, row + shares, c, C, mask)
                dweight += tl.where(of_affine, mean_part, 0.0)
                dbias += tl.where(of_affine, var_part, 0.0)
                first += tl.where(of_affine, 0.0, mean_part)
                second += tl.where(of_affine, 0.0, var_part)
        if added_ptr is not None:
            tl.store(added_ptr + c, tl.sum(first, axis=0), mask=c < C)
            tl.store(added_ptr + C + c, tl.sum(second, axis=0), mask=c < C)
        if affine_ptr is not None:
            tl.store(affine_ptr + c, tl.sum(dweight, axis=0), mask=c < C)
            tl.store(affine_ptr + C + c, tl.sum(dbias, axis=0), mask=c < C)
