"""The Triton kernels of a mixture that touch no activation: they add up what programs left, and move averages.

``tiles`` has the planes of a state; a program here is a block of channels, and of most one component.
"""

# ruff: noqa: RUF005, PLR0912, PLR0915 - Triton compiles no stars in tuples, and folds branches on constants

# pyright: reportArgumentType=false, reportOperatorIssue=false, reportAttributeAccessIssue=false, reportGeneralTypeIssues=false
# pyright: reportAssignmentType=false, reportOptionalOperand=false, reportOptionalMemberAccess=false, reportPossiblyUnboundVariable=false
# Triton's own annotations, which take every value for a constexpr or a tuple, and its constants, which it folds.

import triton
import triton.language as tl

from .cluster_kernels import LOG2_E, TINY, inverse_root
from .tiles import (
    BATCH_MEAN,
    BATCH_VAR,
    LOG_WEIGHT,
    MASS,
    OUTPUT,
    SCALE,
    at_least,
    log_weights,
    moment_gradients,
    output_rows,
    variance_gradient,
    variance_row,
)


@triton.jit
def _partial(p, k, c, P, K, C):
    """Offsets in plane 0 of (plane, P, K, C), and a mask: (BLOCK_P, BLOCK_C)."""
    at = (p.to(tl.int64)[:, None] * K + k) * C + c[None, :]
    return at, (p < P)[:, None] & (c < C)[None, :]


@triton.jit
def _plane(P, K, C, plane: tl.constexpr):
    """Offset of a plane of (plane, P, K, C)."""
    return tl.full((), plane, tl.int64) * P * K * C


@triton.jit
def _column(sums_ptr, plane: tl.constexpr, k, c, P, K, C, BLOCK_P: tl.constexpr):
    """Add up a plane of (plane, P, K, C) over P, for one component."""
    total = tl.zeros((BLOCK_P, c.shape[0]), tl.float32)
    for start in range(0, P, BLOCK_P):
        at, mask = _partial(start + tl.arange(0, BLOCK_P), k, c, P, K, C)
        total += tl.load(sums_ptr + at + _plane(P, K, C, plane), mask=mask, other=0.0)
    return tl.sum(total, axis=0)


@triton.jit
def _row(state_ptr, plane: tl.constexpr, k, c, C, default, K: tl.constexpr):
    return tl.load(state_ptr + (plane * K + k) * C + c, mask=c < C, other=default)


@triton.jit
def merged(sums_ptr, k, c, P, K, C, BLOCK_P: tl.constexpr):
    """Mass, mean and sum of squares about it of P programs' locations together, for one component."""
    total = tl.zeros((c.shape[0],), tl.float32)
    centre = tl.zeros((c.shape[0],), tl.float32)
    square = tl.zeros((c.shape[0],), tl.float32)
    for start in range(0, P, BLOCK_P):
        at, mask = _partial(start + tl.arange(0, BLOCK_P), k, c, P, K, C)
        mass = tl.load(sums_ptr + at, mask=mask, other=0.0)
        mean = tl.load(sums_ptr + at + _plane(P, K, C, 1), mask=mask, other=0.0)
        within = tl.load(sums_ptr + at + _plane(P, K, C, 2), mask=mask, other=0.0)
        here = tl.sum(mass, axis=0)
        inverse = 1.0 / tl.maximum(here, TINY)
        middle = tl.sum(mass * mean, axis=0) * inverse
        distance = mean - middle[None, :]
        rest = tl.sum(mass * distance, axis=0) * inverse  # what rounding took from the middle
        squares = tl.sum(within + mass * distance * distance, axis=0) - rest * rest * here
        # What came before, by Chan's formula.
        joined = total + here
        share = here / tl.maximum(joined, TINY)
        delta = (middle - centre) + rest
        centre += delta * share
        square += squares + delta * delta * total * share
        total = joined
    return total, centre, square


@triton.jit(do_not_specialize=["P"])
def mixture_merge_kernel(
    sums_ptr, x_ptr, state_ptr,
    P, C, x_sc, eps, floor, kappa,
    K: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Mass, mean and variance of P programs' locations together, and the output's weight, into the state."""
    k = tl.program_id(0)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    total, centre, square = merged(sums_ptr, k, c, P, K, C, BLOCK_P)
    pilot = tl.load(x_ptr + c.to(tl.int64) * x_sc, mask=c < C, other=0.0).to(tl.float32)
    v = at_least(square / tl.maximum(total, TINY), 0.0)
    out = state_ptr + k * C + c
    tl.store(out + MASS * K * C, total, mask=c < C)
    tl.store(out + BATCH_MEAN * K * C, tl.where(total == 0.0, 0.0, pilot + centre), mask=c < C)
    tl.store(out + BATCH_VAR * K * C, v, mask=c < C)
    log = at_least(_row(state_ptr, LOG_WEIGHT, k, c, C, 0.0, K), floor)
    tl.store(out + OUTPUT * K * C, tl.exp(-0.5 * log) * kappa * inverse_root(v, eps), mask=c < C)


@triton.jit
def _wrong(value):
    """1 where a value is not finite."""
    return tl.where(tl.abs(value) < float("inf"), 0.0, 1.0)


@triton.jit
def _state_logs(state_ptr, C, K: tl.constexpr):
    """Tuple over k of a state's log weights."""
    logs = ()
    for k in tl.static_range(K):
        logs = logs + (tl.load(state_ptr + (LOG_WEIGHT * K + k) * C),)
    return logs


@triton.jit
def mixture_averages_kernel(
    state_ptr, before_ptr, logits_ptr, mean_ptr, log_var_ptr,
    new_logits_ptr, new_mean_ptr, new_log_var_ptr, fit_logits_ptr, fit_mean_ptr, fit_log_var_ptr,
    C, momentum, min_weight,
    K: tl.constexpr, PAPER: tl.constexpr, SHARED: tl.constexpr, BLOCK_ALL: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Move stored parameters towards the batch's moments, as ``mixture.moved``, unless one is not finite.

    Each program looks at all channels, for that and for the weights, and moves its own. The logits that there were
    stand in before, or are those of the state's mixture: the program of the first channels writes over them meanwhile.
    A new fit, if there is one, is stored likewise, unless it is not finite.
    """
    wrong = tl.zeros((BLOCK_ALL,), tl.float32)
    shares = ()
    for _ in tl.static_range(K):
        shares = shares + (tl.zeros((BLOCK_ALL,), tl.float32),)
    for start in range(0, C, BLOCK_ALL):
        c = start + tl.arange(0, BLOCK_ALL)
        total = tl.zeros((BLOCK_ALL,), tl.float32)
        for k in tl.static_range(K):
            total += _row(state_ptr, MASS, k, c, C, 0.0, K)
        new = ()
        for k in tl.static_range(K):
            mass = _row(state_ptr, MASS, k, c, C, 0.0, K)
            new = new + (shares[k] + mass / tl.maximum(total, 1e-12),)
            wrong += _wrong(mass) + _wrong(_row(state_ptr, BATCH_MEAN, k, c, C, 0.0, K))
            wrong += _wrong(_row(state_ptr, BATCH_VAR, k, c, C, 0.0, K))
            if new_mean_ptr is not None:
                wrong += _wrong(_row(new_mean_ptr, 0, k, c, C, 0.0, K))
                wrong += _wrong(_row(new_log_var_ptr, 0, k, c, C, 0.0, K))
        shares = new

    if tl.sum(wrong, axis=0) == 0.0:
        c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
        mask = c < C
        total = tl.zeros((BLOCK_C,), tl.float32)
        for k in tl.static_range(K):
            total += _row(state_ptr, MASS, k, c, C, 1.0, K)
        pooled, weights = tl.zeros((BLOCK_C,), tl.float32), 0.0
        logs = _state_logs(state_ptr, C, K) if before_ptr is None else log_weights(before_ptr, 0.0, K, True)
        for k in tl.static_range(K):
            weight = tl.exp(logs[k])
            weight = tl.maximum(weight + momentum * (tl.sum(shares[k], axis=0) / C - weight), min_weight)
            mass = _row(state_ptr, MASS, k, c, C, 1.0, K)
            new_var = _row(state_ptr, BATCH_VAR, k, c, C, 1.0, K)
            # The variance of a sample, as in BatchNorm's buffers; less than one location has none to correct.
            new_var *= mass / tl.maximum(tl.maximum(mass - 1.0, 0.5 * mass), 1e-12)
            old = tl.load(mean_ptr + k * C + c, mask=c < C, other=0.0).to(tl.float32)
            old_log = tl.load(log_var_ptr + k * C + c, mask=c < C, other=0.0).to(tl.float32)
            distance = _row(state_ptr, BATCH_MEAN, k, c, C, 0.0, K) - old
            if PAPER or K == 1:
                step = tl.zeros((BLOCK_C,), tl.float32) + momentum
                spread = tl.zeros((BLOCK_C,), tl.float32)
            else:
                step = tl.minimum(momentum * (mass / tl.maximum(total, 1e-12)) / weight, 1.0)
                spread = step * (1.0 - step) * distance * distance
            old_var = tl.exp(old_log)
            var = old_var + step * (new_var - old_var) + spread
            tl.store(mean_ptr + k * C + c, old + step * distance, mask=mask)
            if SHARED:
                pooled += weight * var
                weights += weight
            else:
                # As a ratio, so that rounding moves no variance that stays: a plain division may be 2 ulp off, and
                # the logarithm of 1 is 0. A tiny variance has no ratio.
                ratio = old_log + tl.log(tl.maximum(tl.div_rn(var, tl.maximum(old_var, TINY)), TINY))
                log_var = tl.where(old_var > 1e-20, ratio, tl.log(tl.maximum(var, TINY)))
                tl.store(log_var_ptr + k * C + c, log_var, mask=mask)
            if tl.program_id(0) == 0:
                tl.store(logits_ptr + k, tl.log(weight))
            if new_mean_ptr is not None:
                tl.store(fit_mean_ptr + k * C + c, _row(new_mean_ptr, 0, k, c, C, 0.0, K), mask=mask)
                tl.store(fit_log_var_ptr + k * C + c, _row(new_log_var_ptr, 0, k, c, C, 0.0, K), mask=mask)
                if tl.program_id(0) == 0:
                    tl.store(fit_logits_ptr + k, tl.load(new_logits_ptr + k))
        if SHARED:
            log_var = tl.log(tl.maximum(pooled / weights, TINY))
            for k in tl.static_range(K):
                tl.store(log_var_ptr + k * C + c, log_var, mask=mask)


@triton.jit(do_not_specialize=["P"])
def mixture_coefficients_kernel(
    sums_ptr, state_ptr, weight_ptr, out_ptr, affine_ptr,
    P, C, eps,
    K: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """What the pass for dx needs: out (4, K, C), and gradients of the affine map, (2, C).

    Planes of out are ``moment_gradients``.
    """
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    weight = tl.full((BLOCK_C,), 1.0, tl.float32)
    if weight_ptr is not None:
        weight = tl.load(weight_ptr + c, mask=c < C, other=0.0).to(tl.float32)
    dweight, dbias = tl.zeros((BLOCK_C,), tl.float32), tl.zeros((BLOCK_C,), tl.float32)
    for k in tl.static_range(K):
        sum_g = _column(sums_ptr, 0, k, c, P, K, C, BLOCK_P)
        sum_gu = _column(sums_ptr, 1, k, c, P, K, C, BLOCK_P)
        v = _row(state_ptr, BATCH_VAR, k, c, C, 1.0, K)
        output = _row(state_ptr, OUTPUT, k, c, C, 0.0, K)
        mass = _row(state_ptr, MASS, k, c, C, 1.0, K)
        dm, dv, dvv, direct = moment_gradients(output * weight, sum_g, sum_gu, mass, v, eps)
        out = out_ptr + k * C + c
        tl.store(out, dm, mask=c < C)
        tl.store(out + K * C, dv, mask=c < C)
        tl.store(out + 2 * K * C, dvv, mask=c < C)
        tl.store(out + 3 * K * C, direct, mask=c < C)
        dweight += output * sum_gu
        dbias += sum_g
    if affine_ptr is not None:
        tl.store(affine_ptr + c, dweight, mask=c < C)
        tl.store(affine_ptr + C + c, dbias, mask=c < C)


@triton.jit(do_not_specialize=["P"])
def mixture_gradients_kernel(
    sums_ptr, log_ptr, var_ptr, state_ptr, coefficients_ptr, weight_ptr, out_ptr, affine_ptr,
    P, C, D, eps, floor, kappa,
    K: tl.constexpr, JOINT: tl.constexpr, STORED: tl.constexpr, DENSITY: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Gradients from the sums of mixture_bwd_kernel: of mean and variance, (2, K, C), and of the affine map, (2, C).

    The first also has, as a third plane, each channel's share in the gradients of the log weights. With a state the
    affine map's are mixture_coefficients_kernel's.
    """
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    weight = tl.full((BLOCK_C,), 1.0, tl.float32)
    if weight_ptr is not None:
        weight = tl.load(weight_ptr + c, mask=c < C, other=0.0).to(tl.float32)
    dweight, dbias = tl.zeros((BLOCK_C,), tl.float32), tl.zeros((BLOCK_C,), tl.float32)
    before: tl.constexpr = 3 if DENSITY else 0
    if state_ptr is None:
        outputs = output_rows(log_ptr, var_ptr, None, c, C, C, eps, floor, kappa, K, STORED)
    for k in tl.static_range(K):
        if state_ptr is None:
            h = _column(sums_ptr, before, k, c, P, K, C, BLOCK_P)
            hu = _column(sums_ptr, before + 1, k, c, P, K, C, BLOCK_P)
            output = tl.reshape(outputs[k], (BLOCK_C,))
            dweight += output * hu
            dbias += h
            direct, direct_u = output * weight * h, output * weight * hu
            s = tl.reshape(variance_row(var_ptr, k, c, C, C, STORED), (BLOCK_C,)) + eps
        else:
            direct, direct_u = 0.0, tl.load(coefficients_ptr + (3 * K + k) * C + c, mask=c < C, other=0.0)
            s = (-0.5 * LOG2_E) / _row(state_ptr, SCALE, k, c, C, -1.0, K)
        if DENSITY:
            z = _column(sums_ptr, 0, k, c, P, K, C, BLOCK_P)
            dmean = _column(sums_ptr, 1, k, c, P, K, C, BLOCK_P) - direct
            zuu = _column(sums_ptr, 2, k, c, P, K, C, BLOCK_P)
            dvar = variance_gradient(z + direct_u if state_ptr is None else z, zuu, s, eps, STORED)
            out = out_ptr + k * C + c
            tl.store(out, dmean, mask=c < C)
            tl.store(out + K * C, dvar, mask=c < C)
            if JOINT:
                z = tl.where(c % D == 0, z, 0.0)  # a group's channels share it: count it once
            tl.store(out + 2 * K * C, z - 0.5 * direct_u, mask=c < C)
    if state_ptr is None and affine_ptr is not None:
        tl.store(affine_ptr + c, dweight, mask=c < C)
        tl.store(affine_ptr + C + c, dbias, mask=c < C)


@triton.jit
def mixture_logits_kernel(
    shares_ptr, log_ptr, state_ptr, out_ptr,
    C, floor,
    K: tl.constexpr, STORED: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Gradient (K,) of the log weights from the channels' shares (K, C); of logits, if STORED."""
    grads = ()
    for k in tl.static_range(K):
        total = tl.zeros((BLOCK_C,), tl.float32)
        for start in range(0, C, BLOCK_C):
            c = start + tl.arange(0, BLOCK_C)
            total += tl.load(shares_ptr + k * C + c, mask=c < C, other=0.0)
        grads = grads + (tl.sum(total, axis=0),)
    if STORED:
        logs = log_weights(log_ptr, floor, K, STORED) if state_ptr is None else _state_logs(state_ptr, C, K)
        passed, total = (), 0.0
        for k in tl.static_range(K):
            passed = passed + (tl.where(logs[k] < floor, 0.0, grads[k]),)  # a floor lets nothing through
            total += passed[k]
        for k in tl.static_range(K):
            tl.store(out_ptr + k, passed[k] - tl.exp(logs[k]) * total)
    else:
        for k in tl.static_range(K):
            tl.store(out_ptr + k, grads[k])
