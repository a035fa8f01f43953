"""What every Triton kernel of a mixture does with a tile: the mixture's rows, posteriors, sums and gradients.

A kernel takes what a loop needs of the mixture as rows (1, BLOCK_C), one a component, before the loop: the mean, the
scale and the constant of a log density in base 2, the weight of the output. They are found from the parameters, or
stand as planes (K, C) in a *state*. Sums are kept at each place of a tile and added up across threads after the loop.

STORED: parameters are logits, mean and log-variance; otherwise log weights, mean and variance. JOINT: a tile holds one
group of channels, which share a posterior.
"""

# ruff: noqa: RUF005, SIM108 - Triton compiles no stars in tuples, and folds branches on constants

# pyright: reportArgumentType=false, reportOperatorIssue=false, reportAttributeAccessIssue=false, reportGeneralTypeIssues=false
# pyright: reportAssignmentType=false, reportOptionalSubscript=false, reportOptionalMemberAccess=false, reportPossiblyUnboundVariable=false
# Triton's own annotations, which take every value for a constexpr or a tuple, and its constants, which it folds.

import triton
import triton.language as tl

from .cluster_kernels import LOG2_E, TINY, inverse_root, table_row

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
def read_tile(ptr, mask):
    """A tile in float32, 0 outside."""
    return tl.load(ptr, mask=mask, other=0.0).to(tl.float32)


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
def plane_rows(ptr, plane: tl.constexpr, c, C, end, K: tl.constexpr):
    """Tuple over k of rows of a plane (K, C)."""
    rows = ()
    for k in tl.static_range(K):
        rows = rows + (table_row(ptr, plane * K + k, c, C, end, 0.0),)
    return rows


@triton.jit
def mean_rows(mean_ptr, state_ptr, c, C, end, K: tl.constexpr):
    """Tuple over k of the means, from a state if there is one."""
    if state_ptr is None:
        rows = plane_rows(mean_ptr, 0, c, C, end, K)
    else:
        rows = plane_rows(state_ptr, MEAN, c, C, end, K)
    return rows


@triton.jit
def scale_rows(var_ptr, state_ptr, c, C, end, eps, K: tl.constexpr, STORED: tl.constexpr):
    """Tuple over k of -log2(e) / (2 s), where s is the variance with eps."""
    if state_ptr is None:
        rows = ()
        for k in tl.static_range(K):
            s = variance_row(var_ptr, k, c, C, end, STORED) + eps
            rows = rows + (tl.div_rn(-0.5 * LOG2_E, s),)
    else:
        rows = plane_rows(state_ptr, SCALE, c, C, end, K)
    return rows


@triton.jit
def constant_rows(
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
        rows = plane_rows(state_ptr, CONSTANT, c, C, end, K)
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
        rows = plane_rows(state_ptr, OUTPUT, c, C, end, K)
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
def relative_densities(x, mean, scale, constant, K: tl.constexpr, JOINT: tl.constexpr):
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
def posteriors(x, inside, mean, scale, constant, K: tl.constexpr, JOINT: tl.constexpr):
    """Eq. 6 for a tile: a tuple over k of tau, 0 outside if that is given."""
    densities, inverse = relative_densities(x, mean, scale, constant, K, JOINT)
    if inside is not None:
        inverse = tl.where(inside, inverse, 0.0)
    tau = ()
    for k in tl.static_range(K):
        tau = tau + (densities[k] * inverse,)
    return tau


@triton.jit
def zero_tiles(K: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_C: tl.constexpr):
    """Tuple over k of what sums begin with."""
    sums = ()
    for _ in tl.static_range(K):
        sums = sums + (tl.zeros((BLOCK_L, BLOCK_C), tl.float32),)
    return sums


@triton.jit
def totals(sums, K: tl.constexpr):
    """Add a tuple of tiles up over their locations, (1, BLOCK_C) or (1, 1) each."""
    totals = ()
    for k in tl.static_range(K):
        totals = totals + (tl.sum(sums[k], axis=0, keep_dims=True),)
    return totals


@triton.jit
def store_rows(ptr, plane: tl.constexpr, rows, c, C, end, K: tl.constexpr, BLOCK_C: tl.constexpr):
    """Write a tuple over k of (1, BLOCK_C) or (1, 1) into a plane (K, C)."""
    for k in tl.static_range(K):
        value = tl.broadcast_to(rows[k], (1, BLOCK_C))
        tl.store(ptr + (plane * K + k) * C + c[None, :], value, mask=(c < end)[None, :])


@triton.jit
def precisions(scale, K: tl.constexpr):
    """Tuple over k of one over the variance, from the scale of a log density."""
    rows = ()
    for k in tl.static_range(K):
        rows = rows + (scale[k] * (-2.0 / LOG2_E),)
    return rows


@triton.jit
def first_moments(x, inside, tau, pilot, K: tl.constexpr):
    """Pivots, and a program's first tile's mass and first two moments about them, a tuple over k each.

    A pivot is a component's mean in that tile, which is no further from its mean over all tiles than its deviation
    allows, outliers included. The pilot is any location, so that a common offset costs no digits.
    """
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
    return pivot, mass, first, second


@triton.jit
def more_moments(mass, first, second, x, tau, pivot, K: tl.constexpr):
    """The same of one tile more."""
    new_mass, new_first, new_second = (), (), ()
    for k in tl.static_range(K):
        u = x - pivot[k]
        tu = tau[k] * u
        new_mass = new_mass + (mass[k] + tau[k],)
        new_first = new_first + (first[k] + tu,)
        new_second = new_second + (second[k] + tu * u,)
    return new_mass, new_first, new_second


@triton.jit
def total_moments(mass, first, second, pivot, pilot, K: tl.constexpr):
    """Mass, mean relative to the pilot and sum of squares about the mean of all of a program's tiles."""
    mass, first, second = totals(mass, K), totals(first, K), totals(second, K)
    means, squares = (), ()
    for k in tl.static_range(K):
        distance = first[k] / tl.maximum(mass[k], TINY)
        means = means + ((pivot[k] - pilot) + distance,)
        squares = squares + (at_least(second[k] - first[k] * distance, 0.0),)
    return mass, means, squares


@triton.jit
def normalised(x, mean, scale, constant, middle, weight, shift, K: tl.constexpr, JOINT: tl.constexpr):
    """Eq. 7 and an affine map for a tile; middle and weight are of the output."""
    densities, inverse = relative_densities(x, mean, scale, constant, K, JOINT)
    y = densities[0] * ((x - middle[0]) * weight[0])
    for k in tl.static_range(1, K):
        y += densities[k] * ((x - middle[k]) * weight[k])
    return y * inverse + shift


@triton.jit
def more_gradients(sum_g, sum_gu, x, g, mean, scale, constant, middle, K: tl.constexpr, JOINT: tl.constexpr):
    """Sums of tau g and tau g (x - middle) with one tile more."""
    densities, inverse = relative_densities(x, mean, scale, constant, K, JOINT)
    g *= inverse
    new_g, new_gu = (), ()
    for k in tl.static_range(K):
        h = densities[k] * g
        new_g = new_g + (sum_g[k] + h,)
        new_gu = new_gu + (sum_gu[k] + h * (x - middle[k]),)
    return new_g, new_gu


@triton.jit
def moment_gradients(part, sum_g, sum_gu, mass, v, eps):
    """Gradients of the batch's mean and variance for a unit of mass, the second times the variance, and the direct one.

    That is the sum of g times a component's part of y.
    """
    mass = tl.maximum(mass, TINY)
    dv = -0.5 * (part * sum_gu / mass) / (v + eps)  # a sum over no mass is 0: it comes before what may be infinite
    return -(part * sum_g / mass), dv, dv * v, part * sum_gu


@triton.jit
def through_components(
    x, g, tau, middle, weight, dm, dv, dvv, K: tl.constexpr, JOINT: tl.constexpr, BATCH: tl.constexpr
):
    """Gradient dx under given posteriors, and those of the posteriors, a tuple over k.

    BATCH: the batch's moments carry a gradient, of which dm, dv and dvv are ``moment_gradients``.
    """
    dx = tl.zeros_like(x)
    dtau = ()
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
        if JOINT:
            product = tl.sum(product, axis=1, keep_dims=True)
        dtau = dtau + (product,)
    return dx, dtau


@triton.jit
def through_posteriors(
    dx, sum_z, sum_zu, sum_zuu, x, tau, dtau, mean, precision, K: tl.constexpr, DENSITY: tl.constexpr
):
    """Gradient dx with the path through the posteriors; if DENSITY, sums of z, z u and z u^2 with one tile more.

    Here z is the gradient of a log density, and u = (x - mean) / s.
    """
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
    return dx, new_z, new_zu, new_zuu


@triton.jit
def variance_gradient(z, zuu, s, eps, STORED: tl.constexpr):
    """Gradient of a variance, s with eps, or of its logarithm."""
    dvar = 0.5 * (zuu - z / s)
    if STORED:
        dvar *= s - eps
    return dvar
