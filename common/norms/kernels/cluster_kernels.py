"""What all Triton kernels share, and those of ``cluster_norm``; imported only where one is to run or be compiled.

Every activation is (N, C, L) with three strides, or (1, C, N * L) where samples and positions can be walked as
one, and every kernel takes it in tiles of BLOCK_L locations by BLOCK_C channels. JOINT says that a tile holds
one whole group of channels, which share a posterior (BLOCK_L, 1); otherwise each channel has its own (BLOCK_L,
BLOCK_C). Parameters are (K, C) in float32, as is all arithmetic. A program walks over several tiles of one
block of channels and leaves its sums to a second, small kernel: no atomics, so results repeat bit for bit.

Offsets are int64, since an activation may hold more than 2^31 elements.
"""

# pyright: reportArgumentType=false, reportOperatorIssue=false, reportAttributeAccessIssue=false, reportGeneralTypeIssues=false
# Triton's own annotations, which take every value for a constexpr or a tuple.

import triton
import triton.language as tl

TINY = tl.constexpr(1.1754944e-38)  # the least normal float32


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
def _cluster_rows(cluster_ptr, mean_ptr, var_ptr, n, c, K, C, eps):
    """Mean and rstd (1, BLOCK_C) of sample n: row 0 for the id -1, NaN for an id no table has."""
    k = tl.load(cluster_ptr + n)
    wrong = (k >= K) | (k < -1)
    k = tl.minimum(tl.maximum(k, 0), K - 1)
    mean = tl.where(wrong, float("nan"), table_row(mean_ptr, k, c, C, C, 0.0))
    return mean, tl.where(wrong, float("nan"), inverse_root(table_row(var_ptr, k, c, C, C, 1.0), eps))


@triton.jit
def scb_fwd_kernel(
    x_ptr, cluster_ptr, mean_ptr, var_ptr, y_ptr,
    K, C, L, x_sn, x_sc, x_sl, y_sn, y_sc, y_sl, eps,
    BLOCK_L: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Eq. 10; a program is (sample, block of channels, share of the positions)."""
    n = tl.program_id(0)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    mean, rstd = _cluster_rows(cluster_ptr, mean_ptr, var_ptr, n, c, K, C, eps)
    for start in range(tl.program_id(2) * BLOCK_L, L, tl.num_programs(2) * BLOCK_L):
        i = start + tl.arange(0, BLOCK_L)
        mask = (i < L)[:, None] & (c < C)[None, :]
        x = tl.load(x_ptr + offsets(n, c, i, x_sn, x_sc, x_sl), mask=mask, other=0.0).to(tl.float32)
        tl.store(y_ptr + offsets(n, c, i, y_sn, y_sc, y_sl), (x - mean) * rstd, mask=mask)


@triton.jit
def scb_bwd_kernel(
    x_ptr, g_ptr, cluster_ptr, mean_ptr, var_ptr, dx_ptr, sums_ptr,
    N, K, C, L, x_sn, x_sc, x_sl, g_sn, g_sc, g_sl, dx_sn, dx_sc, dx_sl, eps,
    BLOCK_L: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Gradient dx, and the sums (2, splits, N, C) of g and g * (x - mean) over a program's positions."""
    n = tl.program_id(0)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    mean, rstd = _cluster_rows(cluster_ptr, mean_ptr, var_ptr, n, c, K, C, eps)
    sum_g = tl.zeros((BLOCK_L, BLOCK_C), tl.float32)
    sum_gu = tl.zeros((BLOCK_L, BLOCK_C), tl.float32)
    for start in range(tl.program_id(2) * BLOCK_L, L, tl.num_programs(2) * BLOCK_L):
        i = start + tl.arange(0, BLOCK_L)
        mask = (i < L)[:, None] & (c < C)[None, :]
        g = tl.load(g_ptr + offsets(n, c, i, g_sn, g_sc, g_sl), mask=mask, other=0.0).to(tl.float32)
        x = tl.load(x_ptr + offsets(n, c, i, x_sn, x_sc, x_sl), mask=mask, other=0.0).to(tl.float32)
        sum_g += g
        sum_gu += tl.where(mask, g * (x - mean), 0.0)  # a mean may be NaN or infinite
        tl.store(dx_ptr + offsets(n, c, i, dx_sn, dx_sc, dx_sl), g * rstd, mask=mask)
    plane = tl.num_programs(2).to(tl.int64) * N * C
    at = sums_ptr + (tl.program_id(2).to(tl.int64) * N + n) * C + c
    tl.store(at, tl.sum(sum_g, axis=0), mask=c < C)
    tl.store(at + plane, tl.sum(sum_gu, axis=0), mask=c < C)


@triton.jit
def scb_rows_kernel(
    sums_ptr, cluster_ptr, var_ptr, dmean_ptr, dvar_ptr,
    N, C, SPLITS, eps,
    BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Gradients of mean and var (K, C) from the sums of a cluster's samples; a program is (cluster, channels)."""
    k = tl.program_id(0)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    rows = SPLITS * N
    sum_g = tl.zeros((BLOCK_N, BLOCK_C), tl.float32)
    sum_gu = tl.zeros((BLOCK_N, BLOCK_C), tl.float32)
    for start in range(0, rows, BLOCK_N):
        row = start + tl.arange(0, BLOCK_N)
        member = (tl.load(cluster_ptr + row % N, mask=row < rows, other=-1) == k)[:, None] & (c < C)[None, :]
        at = row.to(tl.int64)[:, None] * C + c[None, :]
        sum_g += tl.load(sums_ptr + at, mask=member, other=0.0)
        at_gu = (row + rows).to(tl.int64)[:, None] * C + c[None, :]
        sum_gu += tl.load(sums_ptr + at_gu, mask=member, other=0.0)
    rstd = inverse_root(tl.load(var_ptr + k * C + c, mask=c < C, other=1.0), eps)
    tl.store(dmean_ptr + k * C + c, -rstd * tl.sum(sum_g, axis=0), mask=c < C)
    tl.store(dvar_ptr + k * C + c, -0.5 * rstd * rstd * rstd * tl.sum(sum_gu, axis=0), mask=c < C)
