"""Each reconstruction term for one element: ``(y, x, parameter) → (additive, factor, derivative)``.

nll = additive + log(factor), so that a loop can multiply factors in [1, 2] and take one logarithm for many; a term
without such a factor returns 1. Formulas and sources: kernels/likelihoods.py.
"""

from __future__ import annotations

import math

from ..likelihoods import COUNT_EPS, LIKELIHOODS, Domain, bound
from .intrinsics import constant, everything, inlined, negative, no_count, outside_unit, select
from .math import exact, exp, exp_negative, log, log_normal, stirling, stirling_slope


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
def clipped(y, x, eps):
    """p and q = 1 − p within [eps, 1 − eps], and the derivative, which is 0 where either was below."""
    one, zero = constant(1.0, y), constant(0.0, y)
    z = one - y
    high = one - eps
    p = select(y < eps, eps, y)
    p = select(p > high, high, p)
    q = select(z < eps, eps, z)
    q = select(q > high, high, q)
    derivative = (y - x) / (p * q)  # (1−x)/q − x/p with one division
    return p, q, select(y < eps, zero, select(z < eps, zero, derivative))


@exact
def bernoulli_probs(y, x, eps):
    """One logarithm: with l the larger of p and q, s the smaller and w the weight of log s, −log l − w·log(s/l)."""
    one = constant(1.0, y)
    p, q, derivative = clipped(y, x, eps)
    factor = one / select(p < q, q, p)
    return -select(p < q, x, one - x) * log(select(p < q, p, q) * factor), factor, derivative


@exact
def bernoulli_probs_exact(y, x, eps):
    """For elementwise output."""
    one = constant(1.0, y)
    p, q, derivative = clipped(y, x, eps)
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


@exact
def log_small_factorial(x):
    """log x! of a count below 8; NaN if it is none."""
    zero = constant(0.0, x)
    result = select(x == constant(7.0, x), constant(math.log(5040), x), constant(math.nan, x))
    result = select(x == constant(6.0, x), constant(math.log(720), x), result)
    result = select(x == constant(5.0, x), constant(math.log(120), x), result)
    result = select(x == constant(4.0, x), constant(math.log(24), x), result)
    result = select(x == constant(3.0, x), constant(math.log(6), x), result)
    result = select(x == constant(2.0, x), constant(math.log(2), x), result)
    result = select(x == constant(1.0, x), zero, result)
    return select(x == zero, zero, result)


@exact
def factorial(x):
    """(c, start, rest): log x! = x·log c − start + ½·log c + rest, see csrc/counts.h."""
    one, zero = constant(1.0, x), constant(0.0, x)
    small = x < constant(8.0, x)
    c = select(small, one, x)
    by_series = constant(0.5 * math.log(2 * math.pi), x) + stirling(one / c)
    return c, select(small, zero, x), select(small, log_small_factorial(x), by_series)


@exact
def poisson(y, x, _):
    one, rate = constant(1.0, y), y + constant(COUNT_EPS, y)
    inverse = one / rate
    c, start, rest = factorial(x)
    ratio = c * inverse
    lost = c - ratio * rate  # what the quotient was rounded by is put back
    log_ratio = log_normal(ratio) + lost * inverse / ratio
    nll = (y - start) + (x * log_ratio + (constant(0.5, y) * log_normal(c) + rest))
    return nll, one, (rate - x) * inverse


@exact
def poisson_log_rate(y, x, _):
    rate = exp(y)
    c, start, rest = factorial(x)
    log_c = log_normal(c)
    nll = (rate - start) + (x * (log_c - y) + (constant(0.5, y) * log_c + rest))
    return nll, constant(1.0, y), rate - x


@exact
def shifted(z):
    """z, or z + 8 where it is below; by how much; there Γ(z + 8)/Γ(z) and ψ(z + 8) − ψ(z), else 1 and 0."""
    zero, one, eight = constant(0.0, z), constant(1.0, z), constant(8.0, z)
    small = z < eight
    by, low = select(small, eight, zero), select(small, z, one)
    q = low * (low + constant(7.0, z))
    product = q * (q + constant(6.0, z)) * ((q + constant(10.0, z)) * (q + constant(12.0, z)))
    slope = ((constant(4.0, z) * q + constant(84.0, z)) * q + constant(504.0, z)) * q + constant(720.0, z)
    slope = slope * (low + low + constant(7.0, z)) / product
    return z + by, by, select(small, product, one), select(small, slope, zero)


@exact
def log_growth(y, theta):
    """log((θ + y + ε)/(θ + ε)), 1/(θ + ε), 1/(θ + y + ε)."""
    one = constant(1.0, y)
    lifted = theta + constant(COUNT_EPS, y)
    by_theta, by_total = one / lifted, one / (lifted + y)
    growth = y * by_theta
    total = one + growth
    return log_normal(total) + (growth - (total - one)) * lifted * by_total, by_theta, by_total


@exact
def negative_binomial(y, x, theta):
    one, half = constant(1.0, y), constant(0.5, y)
    mean = y + constant(COUNT_EPS, y)
    grown, _, by_total = log_growth(y, theta)
    a, by_8_of_a, product_of_a, _ = shifted(theta)
    b, by_8_of_b, product_of_b, _ = shifted(theta + x)
    moved, by_a, by_b = by_8_of_b - by_8_of_a, one / a, one / b
    step = (x + moved) * by_a
    ratio = one + step
    log_ratio = log_normal(ratio) + (step - (ratio - one)) * a * by_b
    c, start, rest = factorial(x)
    odds = log_normal((b * by_total) * (mean / c))
    log_gamma = moved * log_normal(b) + (a - half) * log_ratio - (moved + (x - start))
    log_gamma = log_gamma + (stirling(by_b) - stirling(by_a))
    log_gamma = log_gamma + (log_normal(product_of_a / product_of_b) - half * log_normal(c))
    nll = theta * grown - x * odds - (log_gamma - rest)
    return nll, one, (theta * by_total) * ((mean - x) / mean)


@exact
def negative_binomial_by_dispersion(y, x, theta):
    one, half = constant(1.0, y), constant(0.5, y)
    grown, by_theta, by_total = log_growth(y, theta)
    a, by_8_of_a, _, slope_of_a = shifted(theta)
    b, by_8_of_b, _, slope_of_b = shifted(theta + x)
    by_a, by_b = one / a, one / b
    step = (x + (by_8_of_b - by_8_of_a)) * by_a
    ratio = one + step
    log_ratio = log_normal(ratio) + (step - (ratio - one)) * a * by_b
    direct = ((x - y) * (theta * by_theta) + x * constant(COUNT_EPS, y) * by_theta) * by_total
    digamma = (half * (by_b - by_a) + (stirling_slope(by_a) - stirling_slope(by_b))) - (slope_of_a - slope_of_b)
    return (grown - log_ratio) + (direct + digamma)


@exact
def zero_inflated(nll, x, logit):
    """−log of what e^(−nll) is where a count is 0 with probability σ(logit) besides; its derivatives in both."""
    one, zero = constant(1.0, x), constant(0.0, x)
    total = logit + nll
    a = exp_negative(-abs(logit))
    b = select(x == zero, exp_negative(-abs(total)), zero)
    by_a, by_b = one / (one + a), one / (one + b)
    below, above = select(logit < zero, -logit, zero), select(logit < zero, zero, logit)
    whole = select(x == zero, select(below < nll, below, nll), nll + above)
    by_nll = select(x == zero, select(total < zero, by_b, b * by_b), one)
    of_zero, of_count = select(logit < zero, a * by_a, by_a), select(logit < zero, by_a, a * by_a)
    return whole + log_normal((one + a) * by_b), by_nll, select(x == zero, by_nll - of_count, of_zero)


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
    "poisson": poisson,
    "poisson_log_rate": poisson_log_rate,
    "negative_binomial": negative_binomial,
}
#: ∂nll/∂parameter
SLOPES = {
    "gaussian": gaussian_by_var,
    "gaussian_logvar": gaussian_by_logvar,
    "laplace": laplace_by_scale,
    "laplace_log_scale": laplace_by_log_scale,
    "negative_binomial": negative_binomial_by_dispersion,
}
IDS = bound("numba", TERMS, SLOPES)
#: a function of :mod:`.intrinsics` by likelihood, that sees whether a target (a recon) is outside its domain
WATCH = {Domain.REAL: everything, Domain.UNIT: outside_unit, Domain.NOT_NEGATIVE: negative, Domain.COUNT: no_count}
WATCH_TARGET = {IDS[name]: WATCH[row.target_domain] for name, row in LIKELIHOODS.items()}
WATCH_RECON = {IDS[name]: WATCH[row.recon_domain] for name, row in LIKELIHOODS.items()}
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
    probs = likelihood.literal_value == IDS["bernoulli_probs"]
    term = bernoulli_probs_exact if probs else _BY_ID[likelihood.literal_value]

    def other_terms(likelihood, y, x, parameter):
        additive, _, derivative = term(y, x, parameter)
        return additive, derivative

    return other_terms
