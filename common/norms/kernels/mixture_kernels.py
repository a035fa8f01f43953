"""The Triton kernels of the mixture's passes, nothing else; ``kernels`` says what they share with others."""

# ruff: noqa: RUF005, PLR0915 - Triton compiles neither stars in tuples nor methods that share locals

# pyright: reportArgumentType=false, reportOperatorIssue=false, reportAttributeAccessIssue=false, reportGeneralTypeIssues=false
# Triton's own annotations, which take every value for a constexpr or a tuple.

import triton
import triton.language as tl

from .cluster_kernels import TINY, inverse_root, offsets, table_row


@triton.jit
def _log_constants(log_lambda_ptr, var_ptr, c, C, end, eps, K: tl.constexpr, JOINT: tl.constexpr):
    """Tuple over k of log lambda - 1/2 sum log s, the part of a log density without x; 2 pi cancels."""
    constants = ()
    for k in tl.static_range(K):
        log_s = tl.where((c < end)[None, :], tl.log(table_row(var_ptr, k, c, C, end, 1.0) + eps), 0.0)
        if JOINT:
            log_s = tl.sum(log_s, axis=1, keep_dims=True)
        constants = constants + (tl.load(log_lambda_ptr + k) - 0.5 * log_s,)
    return constants


@triton.jit
def _posteriors(x, constants, mean_ptr, var_ptr, c, C, end, eps, K: tl.constexpr, JOINT: tl.constexpr):
    """Eq. 6 for a tile: a tuple over k of tau, (BLOCK_L, 1) if JOINT, else (BLOCK_L, BLOCK_C)."""
    log_p = ()
    for k in tl.static_range(K):
        u = x - table_row(mean_ptr, k, c, C, end, 0.0)
        q = u * u * (-0.5 / (table_row(var_ptr, k, c, C, end, 1.0) + eps))
        if JOINT:
            q = tl.sum(q, axis=1, keep_dims=True)
        log_p = log_p + (q + constants[k],)
    top = log_p[0]
    for k in tl.static_range(1, K):
        top = tl.maximum(top, log_p[k])
    weights = ()
    total = tl.zeros_like(top)
    for k in tl.static_range(K):
        weight = tl.exp(log_p[k] - top)
        weights = weights + (weight,)
        total += weight
    tau = ()
    for k in tl.static_range(K):
        tau = tau + (weights[k] / total,)
    return tau


@triton.jit
def _zero_sums(K: tl.constexpr, BLOCK_C: tl.constexpr):
    sums = ()
    for _ in tl.static_range(K):
        sums = sums + (tl.zeros((1, BLOCK_C), tl.float32),)
    return sums


@triton.jit
def _store_sums(ptr, plane: tl.constexpr, sums, c, C, end, K: tl.constexpr, BLOCK_C: tl.constexpr):
    """Write a tuple over k of (1, BLOCK_C) or (1, 1) into plane (K, C) of this program, of (plane, program, K, C)."""
    at = ptr + (tl.num_programs(0).to(tl.int64) * plane + tl.program_id(0)) * K * C + c[None, :]
    for k in tl.static_range(K):
        value = tl.broadcast_to(sums[k], (1, BLOCK_C))
        tl.store(at + k * C, value, mask=(c < end)[None, :])


@triton.jit
def _channels(C, D, JOINT: tl.constexpr, BLOCK_C: tl.constexpr):
    """A program's channels, and the number that ends them: its group, or its block of channels."""
    if JOINT:
        first = tl.program_id(1) * D
        return first + tl.arange(0, BLOCK_C), first + D
    return tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C), C


@triton.jit
def mixture_moments_kernel(
    x_ptr, log_lambda_ptr, mean_ptr, var_ptr, sums_ptr,
    N, C, D, L, x_sn, x_sc, x_sl, eps,
    K: tl.constexpr, JOINT: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Mass, mean and sum of squares about it (Eqs. 6, 8 and 9) of each program's locations: (3, programs, K, C).

    Means are relative to the batch's first location, so that a common offset costs no digits. That may be an
    outlier: each tile takes squares about its own mean, and joins what came before by Chan's formula.
    """
    c, end = _channels(C, D, JOINT, BLOCK_C)
    pilot = tl.load(x_ptr + c.to(tl.int64) * x_sc, mask=c < end, other=0.0).to(tl.float32)[None, :]
    constants = _log_constants(log_lambda_ptr, var_ptr, c, C, end, eps, K, JOINT)
    blocks = tl.cdiv(L, BLOCK_L)
    mass, mean, square = _zero_sums(K, BLOCK_C), _zero_sums(K, BLOCK_C), _zero_sums(K, BLOCK_C)
    for block in range(tl.program_id(0), N * blocks, tl.num_programs(0)):
        n = block // blocks
        i = (block % blocks) * BLOCK_L + tl.arange(0, BLOCK_L)
        inside = (i < L)[:, None]
        x_at = x_ptr + offsets(n, c, i, x_sn, x_sc, x_sl)
        x = tl.load(x_at, mask=inside & (c < end)[None, :], other=0.0).to(tl.float32)
        tau = _posteriors(x, constants, mean_ptr, var_ptr, c, C, end, eps, K, JOINT)
        new_mass, new_mean, new_square = (), (), ()
        for k in tl.static_range(K):
            weight = tl.where(inside, tau[k], 0.0)
            here = tl.sum(weight, axis=0, keep_dims=True)
            inverse = 1.0 / tl.maximum(here, TINY)
            centre = tl.sum(weight * (x - pilot), axis=0, keep_dims=True) * inverse
            middle = pilot + centre
            u = x - middle
            rest = tl.sum(weight * u, axis=0, keep_dims=True) * inverse  # what rounding took from middle
            squares = tl.sum(weight * u * u, axis=0, keep_dims=True) - rest * rest * here
            total = mass[k] + here
            share = here / tl.maximum(total, TINY)
            delta = (middle - pilot) - mean[k] + rest
            new_mass = new_mass + (total,)
            new_mean = new_mean + (mean[k] + delta * share,)
            new_square = new_square + (square[k] + tl.maximum(squares, 0.0) + delta * delta * mass[k] * share,)
        mass, mean, square = new_mass, new_mean, new_square
    _store_sums(sums_ptr, 0, mass, c, C, end, K, BLOCK_C)
    _store_sums(sums_ptr, 1, mean, c, C, end, K, BLOCK_C)
    _store_sums(sums_ptr, 2, square, c, C, end, K, BLOCK_C)


@triton.jit
def mixture_merge_kernel(
    sums_ptr, x_ptr, mass_ptr, m_ptr, v_ptr,
    P, K, C, x_sc,
    BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Mass, mean and variance (K, C) of P programs' locations together; a program is (component, channels)."""
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    mass = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    first = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    for start in range(0, P, BLOCK_P):
        p = start + tl.arange(0, BLOCK_P)
        at, mask = _partial(p, c, P, K, C)
        here = tl.load(sums_ptr + at, mask=mask, other=0.0)
        mass += here
        first += here * tl.load(sums_ptr + at + _plane(P, K, C, 1), mask=mask, other=0.0)
    total = tl.sum(mass, axis=0)
    inverse = 1.0 / tl.maximum(total, TINY)
    centre = tl.sum(first, axis=0) * inverse
    rest = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    square = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    for start in range(0, P, BLOCK_P):
        p = start + tl.arange(0, BLOCK_P)
        at, mask = _partial(p, c, P, K, C)
        here = tl.load(sums_ptr + at, mask=mask, other=0.0)
        d = tl.load(sums_ptr + at + _plane(P, K, C, 1), mask=mask, other=0.0) - centre[None, :]
        rest += here * d
        square += tl.load(sums_ptr + at + _plane(P, K, C, 2), mask=mask, other=0.0) + here * d * d
    shift = tl.sum(rest, axis=0) * inverse
    out = tl.program_id(0) * C + c
    tl.store(mass_ptr + out, total, mask=c < C)
    pilot = tl.load(x_ptr + c.to(tl.int64) * x_sc, mask=c < C, other=0.0).to(tl.float32)
    tl.store(m_ptr + out, tl.where(total == 0.0, 0.0, pilot + (centre + shift)), mask=c < C)
    # Written so that NaN passes, which a maximum would not let through.
    v = tl.sum(square, axis=0) * inverse - shift * shift
    tl.store(v_ptr + out, tl.where(v < 0.0, 0.0, v), mask=c < C)


@triton.jit
def _partial(p, c, P, K, C):
    """Offsets in plane 0 of (plane, P, K, C), and a mask, for this program's component: (BLOCK_P, BLOCK_C)."""
    at = (p.to(tl.int64)[:, None] * K + tl.program_id(0)) * C + c[None, :]
    return at, (p < P)[:, None] & (c < C)[None, :]


@triton.jit
def _plane(P, K, C, plane: tl.constexpr):
    """Offset of a plane of (plane, P, K, C)."""
    return tl.full((), plane, tl.int64) * P * K * C


@triton.jit
def _output_weight(log_lambda_ptr, kappa, k):
    """Return kappa lambda_k^(-1/2)."""
    return tl.exp(-0.5 * tl.load(log_lambda_ptr + k)) * kappa


@triton.jit
def mixture_apply_kernel(
    x_ptr, log_lambda_ptr, mean_ptr, var_ptr, m_ptr, v_ptr, y_ptr,
    N, C, D, L, x_sn, x_sc, x_sl, y_sn, y_sc, y_sl, eps, kappa,
    K: tl.constexpr, JOINT: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Eq. 7 with moments m and v, and Eq. 15 where these are mean and var."""
    c, end = _channels(C, D, JOINT, BLOCK_C)
    constants = _log_constants(log_lambda_ptr, var_ptr, c, C, end, eps, K, JOINT)
    blocks = tl.cdiv(L, BLOCK_L)
    for block in range(tl.program_id(0), N * blocks, tl.num_programs(0)):
        n = block // blocks
        i = (block % blocks) * BLOCK_L + tl.arange(0, BLOCK_L)
        mask = (i < L)[:, None] & (c < end)[None, :]
        x = tl.load(x_ptr + offsets(n, c, i, x_sn, x_sc, x_sl), mask=mask, other=0.0).to(tl.float32)
        tau = _posteriors(x, constants, mean_ptr, var_ptr, c, C, end, eps, K, JOINT)
        y = tl.zeros((BLOCK_L, BLOCK_C), tl.float32)
        for k in tl.static_range(K):
            weight = _output_weight(log_lambda_ptr, kappa, k) * inverse_root(table_row(v_ptr, k, c, C, end, 1.0), eps)
            y += tau[k] * ((x - table_row(m_ptr, k, c, C, end, 0.0)) * weight)
        tl.store(y_ptr + offsets(n, c, i, y_sn, y_sc, y_sl), y, mask=mask)


@triton.jit
def mixture_sums_kernel(
    x_ptr, g_ptr, log_lambda_ptr, mean_ptr, var_ptr, m_ptr, sums_ptr,
    N, C, D, L, x_sn, x_sc, x_sl, g_sn, g_sc, g_sl, eps,
    K: tl.constexpr, JOINT: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Sums of tau g and tau g (x - m) over each program's locations: (2, programs, K, C)."""
    c, end = _channels(C, D, JOINT, BLOCK_C)
    constants = _log_constants(log_lambda_ptr, var_ptr, c, C, end, eps, K, JOINT)
    blocks = tl.cdiv(L, BLOCK_L)
    sum_g, sum_gu = _zero_sums(K, BLOCK_C), _zero_sums(K, BLOCK_C)
    for block in range(tl.program_id(0), N * blocks, tl.num_programs(0)):
        n = block // blocks
        i = (block % blocks) * BLOCK_L + tl.arange(0, BLOCK_L)
        mask = (i < L)[:, None] & (c < end)[None, :]
        x = tl.load(x_ptr + offsets(n, c, i, x_sn, x_sc, x_sl), mask=mask, other=0.0).to(tl.float32)
        g = tl.load(g_ptr + offsets(n, c, i, g_sn, g_sc, g_sl), mask=mask, other=0.0).to(tl.float32)
        tau = _posteriors(x, constants, mean_ptr, var_ptr, c, C, end, eps, K, JOINT)
        new_g, new_gu = (), ()
        for k in tl.static_range(K):
            h = tl.where(mask, tau[k] * g, 0.0)  # tau of a location outside may be NaN
            u = x - table_row(m_ptr, k, c, C, end, 0.0)
            new_g = new_g + (sum_g[k] + tl.sum(h, axis=0, keep_dims=True),)
            new_gu = new_gu + (sum_gu[k] + tl.sum(h * u, axis=0, keep_dims=True),)
        sum_g, sum_gu = new_g, new_gu
    _store_sums(sums_ptr, 0, sum_g, c, C, end, K, BLOCK_C)
    _store_sums(sums_ptr, 1, sum_gu, c, C, end, K, BLOCK_C)


@triton.jit
def mixture_coefficients_kernel(
    sums_ptr, log_lambda_ptr, mass_ptr, v_ptr, out_ptr,
    P, K, C, eps, kappa,
    BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Gradients of the batch's mean and variance for a unit of mass, and sum a r g (x - m): out (3, K, C)."""
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    sum_g, sum_gu = _column(sums_ptr, 0, c, P, K, C, BLOCK_P), _column(sums_ptr, 1, c, P, K, C, BLOCK_P)
    at = tl.program_id(0) * C + c
    r = inverse_root(tl.load(v_ptr + at, mask=c < C, other=1.0), eps)
    weight = _output_weight(log_lambda_ptr, kappa, tl.program_id(0))
    per_mass = weight / tl.maximum(tl.load(mass_ptr + at, mask=c < C, other=1.0), TINY)
    tl.store(out_ptr + at, -r * sum_g * per_mass, mask=c < C)
    tl.store(out_ptr + K * C + at, -0.5 * r * r * r * sum_gu * per_mass, mask=c < C)
    tl.store(out_ptr + 2 * K * C + at, r * sum_gu * weight, mask=c < C)


@triton.jit
def _column(sums_ptr, plane: tl.constexpr, c, P, K, C, BLOCK_P: tl.constexpr):
    """Add up a plane of (plane, P, K, C) over P, for this program's component."""
    total = tl.zeros((BLOCK_P, c.shape[0]), tl.float32)
    for start in range(0, P, BLOCK_P):
        at, mask = _partial(start + tl.arange(0, BLOCK_P), c, P, K, C)
        total += tl.load(sums_ptr + at + _plane(P, K, C, plane), mask=mask, other=0.0)
    return tl.sum(total, axis=0)


@triton.jit
def mixture_bwd_kernel(
    x_ptr, g_ptr, log_lambda_ptr, mean_ptr, var_ptr, m_ptr, v_ptr, coefficients_ptr, dx_ptr, sums_ptr,
    N, C, D, L, x_sn, x_sc, x_sl, g_sn, g_sc, g_sl, dx_sn, dx_sc, dx_sl, eps, kappa,
    K: tl.constexpr, JOINT: tl.constexpr, BATCH: tl.constexpr, PARAMETERS: tl.constexpr,
    BLOCK_L: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Gradient dx, and if PARAMETERS the sums (3 or 5, programs, K, C) that those of the mixture are made of.

    BATCH: m and v are the batch's moments, through which a gradient flows; coefficients are of
    mixture_coefficients_kernel. Otherwise m and v are mean and var. Sums are of z, z (x - mean) / s, z ((x -
    mean) / s)^2, and without BATCH of a r g and a r g (x - mean), where z is the gradient of a log density.
    """
    c, end = _channels(C, D, JOINT, BLOCK_C)
    constants = _log_constants(log_lambda_ptr, var_ptr, c, C, end, eps, K, JOINT)
    blocks = tl.cdiv(L, BLOCK_L)
    sum_z, sum_zu, sum_zuu = _zero_sums(K, BLOCK_C), _zero_sums(K, BLOCK_C), _zero_sums(K, BLOCK_C)
    sum_h, sum_hu = _zero_sums(K, BLOCK_C), _zero_sums(K, BLOCK_C)
    for block in range(tl.program_id(0), N * blocks, tl.num_programs(0)):
        n = block // blocks
        i = (block % blocks) * BLOCK_L + tl.arange(0, BLOCK_L)
        mask = (i < L)[:, None] & (c < end)[None, :]
        x = tl.load(x_ptr + offsets(n, c, i, x_sn, x_sc, x_sl), mask=mask, other=0.0).to(tl.float32)
        g = tl.load(g_ptr + offsets(n, c, i, g_sn, g_sc, g_sl), mask=mask, other=0.0).to(tl.float32)
        tau = _posteriors(x, constants, mean_ptr, var_ptr, c, C, end, eps, K, JOINT)
        dx = tl.zeros((BLOCK_L, BLOCK_C), tl.float32)
        dtau, centre = (), tl.zeros_like(tau[0])
        new_h, new_hu = (), ()
        for k in tl.static_range(K):
            weight = _output_weight(log_lambda_ptr, kappa, k) * inverse_root(table_row(v_ptr, k, c, C, end, 1.0), eps)
            u = x - table_row(m_ptr, k, c, C, end, 0.0)
            h = g * weight
            if BATCH:
                dm = table_row(coefficients_ptr, k, c, C, end, 0.0)
                dv = table_row(coefficients_ptr + K * C, k, c, C, end, 0.0)
                q = h + dm + dv * u
                product = q * u - dv * table_row(v_ptr, k, c, C, end, 0.0)
                dx += tau[k] * (q + dv * u)
            else:
                product = h * u
                dx += tau[k] * h
                if PARAMETERS:
                    new_h = new_h + (sum_h[k] + _total(tau[k] * h, mask),)
                    new_hu = new_hu + (sum_hu[k] + _total(tau[k] * product, mask),)
            if JOINT:
                product = tl.sum(product, axis=1, keep_dims=True)
            dtau = dtau + (product,)
            centre += tau[k] * product
        new_z, new_zu, new_zuu = (), (), ()
        for k in tl.static_range(K):
            z = tau[k] * (dtau[k] - centre)
            u = (x - table_row(mean_ptr, k, c, C, end, 0.0)) / (table_row(var_ptr, k, c, C, end, 1.0) + eps)
            dx -= z * u
            if PARAMETERS:
                new_z = new_z + (sum_z[k] + _total(z, (i < L)[:, None]),)
                new_zu = new_zu + (sum_zu[k] + _total(z * u, mask),)
                new_zuu = new_zuu + (sum_zuu[k] + _total(z * u * u, mask),)
        if PARAMETERS:
            sum_z, sum_zu, sum_zuu = new_z, new_zu, new_zuu
            if not BATCH:
                sum_h, sum_hu = new_h, new_hu
        tl.store(dx_ptr + offsets(n, c, i, dx_sn, dx_sc, dx_sl), dx, mask=mask)
    if PARAMETERS:
        _store_sums(sums_ptr, 0, sum_z, c, C, end, K, BLOCK_C)
        _store_sums(sums_ptr, 1, sum_zu, c, C, end, K, BLOCK_C)
        _store_sums(sums_ptr, 2, sum_zuu, c, C, end, K, BLOCK_C)
        if not BATCH:
            _store_sums(sums_ptr, 3, sum_h, c, C, end, K, BLOCK_C)
            _store_sums(sums_ptr, 4, sum_hu, c, C, end, K, BLOCK_C)


@triton.jit
def _total(value, mask):
    """Sum over a tile's locations, (1, BLOCK_C) or (1, 1)."""
    return tl.sum(tl.where(mask, value, 0.0), axis=0, keep_dims=True)


@triton.jit
def mixture_gradients_kernel(
    sums_ptr, var_ptr, coefficients_ptr, out_ptr,
    P, K, C, D, eps,
    JOINT: tl.constexpr, BATCH: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Gradients of mean and var, and each channel's share in that of log lambda: out (3, K, C)."""
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    at = tl.program_id(0) * C + c
    s = tl.load(var_ptr + at, mask=c < C, other=1.0) + eps
    z = _column(sums_ptr, 0, c, P, K, C, BLOCK_P)
    dmean = _column(sums_ptr, 1, c, P, K, C, BLOCK_P)
    zuu = _column(sums_ptr, 2, c, P, K, C, BLOCK_P)
    if BATCH:
        direct_u = tl.load(coefficients_ptr + 2 * K * C + at, mask=c < C, other=0.0)
        dvar = 0.5 * (zuu - z / s)
    else:
        dmean -= _column(sums_ptr, 3, c, P, K, C, BLOCK_P)
        direct_u = _column(sums_ptr, 4, c, P, K, C, BLOCK_P)
        dvar = 0.5 * (zuu - (z + direct_u) / s)
    tl.store(out_ptr + at, dmean, mask=c < C)
    tl.store(out_ptr + K * C + at, dvar, mask=c < C)
    if JOINT:
        z = tl.where(c % D == 0, z, 0.0)  # a group's channels share it: count it once
    tl.store(out_ptr + 2 * K * C + at, z - 0.5 * direct_u, mask=c < C)
