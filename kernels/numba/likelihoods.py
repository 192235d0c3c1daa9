"""Each reconstruction term for one element: ``(y, x, parameter) → (additive, factor, derivative)``.

nll = additive + log(factor), so that a loop can multiply factors in [1, 2] and take one logarithm for many; a term
without such a factor returns 1. Formulas and sources: kernels/likelihoods.py.
"""

from __future__ import annotations

import math

from ..likelihoods import LIKELIHOODS, bound
from .intrinsics import constant, inlined, select
from .math import exact, exp, exp_negative, log, log_normal


@exact
def bernoulli_logits(y, x, _):
    one, zero = constant(1.0, y), constant(0.0, y)
    a = exp_negative(-abs(y))
    factor = one + a
    inverse = one / factor
    sigmoid = select(y >= zero, inverse, a * inverse)
    return select(y > zero, y, zero) - y * x, factor, sigmoid - x


@exact
def bernoulli_logits_exact(y, x, _):
    """For elementwise output: what 1 + a rounds away of a small a is put back."""
    one, zero = constant(1.0, y), constant(0.0, y)
    a = exp_negative(-abs(y))
    factor = one + a
    inverse = one / factor
    sigmoid = select(y >= zero, inverse, a * inverse)
    return select(y > zero, y, zero) - y * x + (a - (factor - one)) * inverse, factor, sigmoid - x


@exact
def bernoulli_probs(y, x, eps):
    one, zero = constant(1.0, y), constant(0.0, y)
    z = one - y
    high = one - eps
    p = select(y < eps, eps, y)
    p = select(p > high, high, p)
    q = select(z < eps, eps, z)
    q = select(q > high, high, q)
    derivative = (y - x) / (p * q)  # (1−x)/q − x/p with one division
    derivative = select(y < eps, zero, select(z < eps, zero, derivative))
    return -x * log(p) - (one - x) * log(q), one, derivative


@exact
def bernoulli_probs_log_clamped(y, x, _):
    one, low, tiny = constant(1.0, y), constant(-100.0, y), constant(1e-12, y)
    z = one - y
    log_y = log(y)
    # log1p(−y): what 1 − y rounds away of a small y is put back
    log_z = log(z) + select(z > tiny, ((one - z) - y) / z, constant(0.0, y))
    log_y = select(log_y < low, low, log_y)
    log_z = select(log_z < low, low, log_z)
    spread = z * y
    return (x - one) * log_z - x * log_y, one, (y - x) / select(spread < tiny, tiny, spread)


@exact
def continuous_bernoulli_logits(y, x, _):
    one, half, zero = constant(1.0, y), constant(0.5, y), constant(0.0, y)
    magnitude = abs(y)
    small = magnitude < half
    s = select(small, y, zero)
    s2 = s * s
    log_series = half * s + s2 * (
        constant(1 / 24, y)
        + s2
        * (
            constant(-1 / 2880, y)
            + s2 * (constant(1 / 181440, y) + s2 * (constant(-1 / 9676800, y) + s2 * constant(1 / 479001600, y)))
        )
    )
    mean_series = half + s * (
        constant(1 / 12, y)
        + s2
        * (
            constant(-1 / 720, y)
            + s2 * (constant(1 / 30240, y) + s2 * (constant(-1 / 1209600, y) + s2 * constant(1 / 47900160, y)))
        )
    )
    v = select(small, one, magnitude)
    a = exp_negative(-v)
    inverse = one / (one - a)
    log_normalizer = select(y > zero, y, zero) + log_normal((one - a) / v)
    mean = select(y >= zero, inverse, -a * inverse) - one / select(y >= zero, v, -v)
    nll = select(small, log_series, log_normalizer) - x * y
    return nll, one, select(small, mean_series, mean) - x


@exact
def gaussian(y, x, var):
    d = y - x
    half = constant(0.5, y)
    return half * d * d / var + half * log_normal(constant(2 * math.pi, y) * var), constant(1.0, y), d / var


@exact
def gaussian_by_var(y, x, var):
    d = y - x
    return constant(0.5, y) / var * (constant(1.0, y) - d * d / var)


@exact
def gaussian_logvar(y, x, logvar):
    d, half, precision = y - x, constant(0.5, y), exp(-logvar)
    nll = half * d * d * precision + half * logvar + constant(0.5 * math.log(2 * math.pi), y)
    return nll, constant(1.0, y), d * precision


@exact
def gaussian_by_logvar(y, x, logvar):
    d, half = y - x, constant(0.5, y)
    return half - half * d * d * exp(-logvar)


@exact
def mse(y, x, _):
    d = y - x
    return d * d, constant(1.0, y), d + d


@exact
def l1(y, x, _):
    d = y - x
    one, zero = constant(1.0, y), constant(0.0, y)
    # d·0 keeps a NaN
    return abs(d), one, select(d > zero, one, select(d < zero, -one, d * zero))


@exact
def laplace(y, x, scale):
    distance, one, sign = l1(y, x, scale)
    return distance / scale + log_normal(constant(2.0, y) * scale), one, sign / scale


@exact
def laplace_by_scale(y, x, scale):
    one = constant(1.0, y)
    return one / scale * (one - abs(y - x) / scale)


@exact
def laplace_log_scale(y, x, log_scale):
    distance, one, sign = l1(y, x, log_scale)
    precision = exp(-log_scale)
    return distance * precision + log_scale + constant(math.log(2), y), one, sign * precision


@exact
def laplace_by_log_scale(y, x, log_scale):
    return constant(1.0, y) - abs(y - x) * exp(-log_scale)


TERMS = {
    "bernoulli_logits": bernoulli_logits,
    "bernoulli_probs": bernoulli_probs,
    "bernoulli_probs_log_clamped": bernoulli_probs_log_clamped,
    "continuous_bernoulli_logits": continuous_bernoulli_logits,
    "gaussian": gaussian,
    "gaussian_logvar": gaussian_logvar,
    "mse": mse,
    "l1": l1,
    "laplace": laplace,
    "laplace_log_scale": laplace_log_scale,
}
#: ∂nll/∂parameter
SLOPES = {
    "gaussian": gaussian_by_var,
    "gaussian_logvar": gaussian_by_logvar,
    "laplace": laplace_by_scale,
    "laplace_log_scale": laplace_by_log_scale,
}
IDS = bound("numba", TERMS, SLOPES)
BOUNDED_TARGET = frozenset(IDS[name] for name, row in LIKELIHOODS.items() if row.unit_target)
BOUNDED_RECON = frozenset(IDS[name] for name, row in LIKELIHOODS.items() if row.unit_recon)
_BY_ID = dict(enumerate(TERMS.values()))
_SLOPE_BY_ID = {IDS[name]: slope for name, slope in SLOPES.items()}


def terms(likelihood, y, x, parameter):
    """``(additive, factor, derivative)`` of the likelihood with that number; where many factors are multiplied."""
    raise NotImplementedError("only inside compiled code")


def element_terms(likelihood, y, x, parameter):
    """``(nll, derivative)``, for elementwise output."""
    raise NotImplementedError("only inside compiled code")


def parameter_slope(likelihood, y, x, parameter):
    """∂nll/∂parameter."""
    raise NotImplementedError("only inside compiled code")


@inlined(parameter_slope)
def _parameter_slope(likelihood, y, x, parameter):
    slope = _SLOPE_BY_ID[likelihood.literal_value]
    return lambda likelihood, y, x, parameter: slope(y, x, parameter)


@inlined(terms)
def _terms(likelihood, y, x, parameter):
    term = _BY_ID[likelihood.literal_value]
    return lambda likelihood, y, x, parameter: term(y, x, parameter)


@inlined(element_terms)
def _element_terms(likelihood, y, x, parameter):
    if likelihood.literal_value == IDS["bernoulli_logits"]:

        def logits_terms(likelihood, y, x, parameter):
            additive, factor, derivative = bernoulli_logits_exact(y, x, parameter)
            return additive + log_normal(factor), derivative

        return logits_terms
    term = _BY_ID[likelihood.literal_value]

    def other_terms(likelihood, y, x, parameter):
        additive, _, derivative = term(y, x, parameter)
        return additive, derivative

    return other_terms
