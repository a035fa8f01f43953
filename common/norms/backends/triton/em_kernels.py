"""The Triton kernels of a fit by EM: locations of an activation, and what a step makes of their moments.

The moments are those of ``mixture_kernels``, of the locations that are drawn.
"""

# ruff: noqa: RUF005 - Triton compiles no stars in tuples

# pyright: reportArgumentType=false, reportOperatorIssue=false, reportAttributeAccessIssue=false, reportGeneralTypeIssues=false
# pyright: reportAssignmentType=false
# Triton's own annotations, which take every value for a constexpr or a tuple.

import triton
import triton.language as tl

from .cluster_kernels import TINY, table_row
from .parameter_kernels import merged
from .tiles import at_least, variance_row

WORD = tl.constexpr(2**32 - 1)
GOLDEN = tl.constexpr(0x9E3779B9)


@triton.jit
def _mixed(h):
    """As ``seeding``, in int64."""
    h = ((h ^ (h >> 16)) * 0x21F0AAAD) & WORD
    h = ((h ^ (h >> 15)) * 0x735A2D97) & WORD
    return h ^ (h >> 15)


@triton.jit(do_not_specialize=["N", "high", "low"])
def draw_kernel(
    x_ptr, step_ptr, out_ptr,
    N, C, L, x_sn, x_sc, x_sl, high, low,
    COUNT: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Copy COUNT locations of x (N, C, L), which has more, into out (COUNT, C): ``seeding.scattered``."""
    p = tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P).to(tl.int64)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    total = N.to(tl.int64) * L
    start = _mixed(_mixed((tl.load(step_ptr) & WORD) ^ high) ^ low)
    turn = _mixed((start + GOLDEN * tl.full((1,), COUNT + 1, tl.int64)) & WORD) * total >> 32
    first = p * total // COUNT
    length = (p + 1) * total // COUNT - first
    at = (first + (_mixed((start + GOLDEN * (p + 1)) & WORD) * length >> 32) + turn) % total
    n, i = at // L, at % L
    mask = (p < COUNT)[:, None] & (c < C)[None, :]
    place = (n * x_sn + i * x_sl)[:, None] + c.to(tl.int64)[None, :] * x_sc
    value = tl.load(x_ptr + place, mask=mask, other=0.0)
    tl.store(out_ptr + p[:, None] * C + c[None, :], value, mask=mask)


@triton.jit(do_not_specialize=["P", "count", "x_sc"])
def em_step_kernel(
    sums_ptr, x_ptr, mean_ptr, var_ptr, new_log_ptr, new_mean_ptr, new_var_ptr,
    P, C, D, count, x_sc, least, empty, min_weight,
    K: tl.constexpr, STORED: tl.constexpr, LAST: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """A mixture from the moments of count points that P programs left: ``mixture.em_step``, given the mixture before.

    A program is a block of channels, and the last one is the log weights. New variances are at least a share of that
    of all points; a component of less mass than empty stays. STORED: the variances before are log-variances. LAST: new
    ones are, and weights are at least min_weight and sum to one.
    """
    if tl.program_id(0) < tl.num_programs(0) - 1:
        c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
        masses, means, squares = (), (), ()
        total = tl.zeros((BLOCK_C,), tl.float32)
        centre = tl.zeros((BLOCK_C,), tl.float32)
        for k in tl.static_range(K):
            mass, mean, square = merged(sums_ptr, k, c, P, K, C, BLOCK_P)
            masses = masses + (mass,)
            means = means + (mean,)
            squares = squares + (square,)
            total += mass
            centre += mass * mean
        total = tl.maximum(total, TINY)
        centre /= total
        spread = tl.zeros((BLOCK_C,), tl.float32)
        for k in tl.static_range(K):
            distance = means[k] - centre
            spread += squares[k] + masses[k] * distance * distance
        floor = least * (spread / total)
        pilot = tl.load(x_ptr + c.to(tl.int64) * x_sc, mask=c < C, other=0.0).to(tl.float32)
        for k in tl.static_range(K):
            stays = masses[k] < empty
            before = tl.reshape(table_row(mean_ptr, k, c, C, C, 0.0), (BLOCK_C,))
            var_before = tl.reshape(variance_row(var_ptr, k, c, C, C, STORED), (BLOCK_C,))
            mean = tl.where(stays, before, pilot + means[k])
            var = at_least(squares[k] / tl.maximum(masses[k], TINY), floor)
            var = tl.where(stays, var_before, var)
            if LAST:
                var = tl.log(at_least(var, TINY))
            tl.store(new_mean_ptr + k * C + c, mean, mask=c < C)
            tl.store(new_var_ptr + k * C + c, var, mask=c < C)
    else:
        ALL: tl.constexpr = BLOCK_P * BLOCK_C
        groups = C // D
        weights, whole = (), 0.0
        for k in tl.static_range(K):
            held = tl.zeros((ALL,), tl.float32)
            for begin in range(0, P * groups, ALL):
                row = begin + tl.arange(0, ALL)
                at = ((row // groups).to(tl.int64) * K + k) * C + row % groups * D
                held += tl.load(sums_ptr + at, mask=row < P * groups, other=0.0)
            weight = at_least(tl.sum(held, axis=0) / (count.to(tl.float32) * groups), TINY)
            if LAST:
                weight = at_least(weight, min_weight)
            weights = weights + (weight,)
            whole += weight
        for k in tl.static_range(K):
            share = weights[k] / whole if LAST else weights[k]
            tl.store(new_log_ptr + k, tl.log(share))
