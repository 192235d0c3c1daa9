"""Each reconstruction term for a tile: ``(y, x, parameter) → (additive, factor, derivative)``.

nll = additive + log(factor), or − log(factor) where that is in [½, 1]: a loop multiplies factors and takes one
logarithm for up to 64 of them (`log_of_factors`). A term without a factor has 1, which the compiler removes. Formulas
and sources: kernels/likelihoods.py.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .. import likelihoods as table
from ..likelihoods import bound
from .approx import exp, exp_accurate, log, log_accurate, reciprocal, reciprocal_accurate, reciprocal_of_normal

TWO_PI = tl.constexpr(6.283185307179586)
HALF_LOG_TWO_PI = tl.constexpr(0.9189385332046727)
COUNT_EPS = tl.constexpr(table.COUNT_EPS)
LOG_TWO = tl.constexpr(0.6931471805599453)


@triton.jit
def bernoulli_logits(y, x):
    a = exp(-tl.abs(y))
    factor = 1.0 + a
    inverse = reciprocal(factor)
    return tl.maximum(y, 0.0) - y * x, factor, tl.where(y >= 0, inverse, a * inverse) - x


@triton.jit
def bernoulli_logits_exact(y, x):
    """``(nll, derivative)``: log1p proper, for elementwise output."""
    a = tl.exp(-tl.abs(y))
    factor = 1.0 + a
    inverse = 1.0 / factor
    log1p = tl.log(factor) + (a - (factor - 1.0)) * inverse  # what 1 + a rounds away of a small a is put back
    return tl.maximum(y, 0.0) - y * x + log1p, tl.where(y >= 0, inverse, a * inverse) - x


@triton.jit
def bernoulli_probs(y, x, eps, NARROW: tl.constexpr):
    """With l the larger of p and q, s the smaller and w the weight of log s: −log l − w·log(s/l). Nothing cancels.

    NARROW: y came in half precision, whose own error leaves room for the GPU's logarithm.
    """
    z = 1.0 - y
    smaller = tl.minimum(y, z)
    s = tl.maximum(smaller, eps, propagate_nan=tl.PropagateNan.ALL)
    larger = tl.minimum(tl.maximum(y, z), 1.0 - eps, propagate_nan=tl.PropagateNan.ALL)
    inverse = reciprocal_of_normal(larger)
    ratio = s * inverse
    derivative = tl.where(smaller < eps, 0.0, (y - x) * (inverse * reciprocal(s)))  # (1−x)/q − x/p
    log_ratio = log(ratio) if NARROW else log_accurate(ratio)
    return -tl.where(y < z, x, 1.0 - x) * log_ratio, larger, derivative


@triton.jit
def bernoulli_probs_exact(y, x, eps):
    """``(nll, derivative)`` with libm's logarithm, for elementwise output."""
    z = 1.0 - y
    high = 1.0 - eps
    p = tl.where(y < eps, eps, tl.where(y > high, high, y))
    q = tl.where(z < eps, eps, tl.where(z > high, high, z))
    return -x * tl.log(p) - (1.0 - x) * tl.log(q), y


@triton.jit
def log_clamped_derivative(y, z, x):
    spread = z * y
    least = tl.full(spread.shape, 1e-12, spread.dtype)  # compared with a number, a float64 meets it rounded to float32
    return (y - x) * reciprocal(tl.where(spread < least, least, spread))


@triton.jit
def at_least(value, low: tl.constexpr):
    """``value``, or ``low`` where it is below; NaN stays."""
    return tl.where(value < low, low, value)


@triton.jit
def bernoulli_probs_log_clamped(y, x):
    z = 1.0 - y
    nll = (x - 1.0) * at_least(log(z), -100.0) - x * at_least(log(y), -100.0)
    return nll, 1.0, log_clamped_derivative(y, z, x)


@triton.jit
def bernoulli_probs_log_clamped_exact(y, x):
    """``(nll, derivative)`` with log1p proper, for elementwise output."""
    z = 1.0 - y
    log1p = tl.log(z) + tl.where(z > 1e-12, ((1.0 - z) - y) / z, 0.0)  # what 1 − y rounds away is put back
    nll = (x - 1.0) * at_least(log1p, -100.0) - x * at_least(tl.log(y), -100.0)
    return nll, log_clamped_derivative(y, z, x)


@triton.jit
def continuous_bernoulli_logits(y, x):
    magnitude = tl.abs(y)
    small = magnitude < 0.5
    s = tl.where(small, y, 0.0)
    s2 = s * s
    log_series = s2 * (1 / 479001600) - 1 / 9676800
    log_series = s2 * (s2 * (s2 * (s2 * log_series + 1 / 181440) - 1 / 2880) + 1 / 24) + 0.5 * s
    mean_series = s2 * (1 / 47900160) - 1 / 1209600
    mean_series = s * (s2 * (s2 * (s2 * mean_series + 1 / 30240) - 1 / 720) + 1 / 12) + 0.5
    v = tl.where(small, 1.0, magnitude)
    a = exp(-v)
    inverse = reciprocal(1.0 - a)
    reach = reciprocal(v)
    log_normalizer = tl.maximum(y, 0.0) + log((1.0 - a) * reach)
    mean = tl.where(y >= 0, inverse - reach, reach - a * inverse)
    nll = tl.where(small, log_series, log_normalizer) - x * y
    return nll, 1.0, tl.where(small, mean_series, mean) - x


@triton.jit
def minus_product(c: tl.constexpr, a, b):
    """c − a·b in one rounding, said so: else a kernel that needs a·b besides rounds twice, and another does not."""
    return tl.fma(-a, b, tl.full((1, 1), c, a.dtype))


@triton.jit
def gaussian(y, x, var):
    d, precision = y - x, reciprocal_accurate(var)
    return 0.5 * d * d * precision + 0.5 * log(var * TWO_PI), 1.0, d * precision


@triton.jit
def gaussian_by_var(y, x, var):
    d, precision = y - x, reciprocal_accurate(var)
    return 0.5 * precision * minus_product(1.0, d * d, precision)


@triton.jit
def gaussian_logvar(y, x, logvar):
    d, precision = y - x, exp(-logvar)
    return 0.5 * d * d * precision + 0.5 * logvar + HALF_LOG_TWO_PI, 1.0, d * precision


@triton.jit
def gaussian_by_logvar(y, x, logvar):
    d = y - x
    return minus_product(0.5, 0.5 * d * d, exp(-logvar))


@triton.jit
def mse(y, x):
    d = y - x
    return d * d, 1.0, d + d


@triton.jit
def l1(y, x):
    d = y - x
    return tl.abs(d), 1.0, tl.where(d > 0, 1.0, tl.where(d < 0, -1.0, d * 0.0))  # d·0 keeps a NaN


@triton.jit
def laplace(y, x, scale):
    distance, one, sign = l1(y, x)
    precision = reciprocal_accurate(scale)
    return distance * precision + log(2.0 * scale), one, sign * precision


@triton.jit
def laplace_by_scale(y, x, scale):
    precision = reciprocal_accurate(scale)
    return precision * minus_product(1.0, tl.abs(y - x), precision)


@triton.jit
def laplace_log_scale(y, x, log_scale):
    distance, one, sign = l1(y, x)
    precision = exp(-log_scale)
    return distance * precision + log_scale + LOG_TWO, one, sign * precision


@triton.jit
def laplace_by_log_scale(y, x, log_scale):
    return minus_product(1.0, tl.abs(y - x), exp(-log_scale))


@triton.jit
def stirling(r):
    """What Stirling's (z − ½)·log z − z + ½·log 2π lacks of log Γ(z), for z ≥ 8 and r = 1/z."""
    square = r * r
    if r.dtype == tl.float64:
        s = square * (43867 / 244188) - 3617 / 122400
        s = square * (square * (square * s + 1 / 156) - 691 / 360360) + 1 / 1188
        s = square * (square * s - 1 / 1680) + 1 / 1260
    else:
        s = 1 / 1260
    return r * (square * (square * s - 1 / 360) + 1 / 12)


@triton.jit
def stirling_slope(r):
    """Its derivative in z."""
    square = r * r
    if r.dtype == tl.float64:
        s = square * (43867 / 14364) - 3617 / 8160
        s = square * (square * (square * s + 1 / 12) - 691 / 32760) + 1 / 132
        s = square * (square * s - 1 / 240) + 1 / 252
    else:
        s = 1 / 252
    return -square * (square * (square * s - 1 / 120) + 1 / 12)


@triton.jit
def log_small_factorial(x):
    """log x! of a count below 8; NaN if it is none."""
    result = tl.where(x == 7, tl.full((1, 1), 8.525161361065415, x.dtype), float("nan"))
    result = tl.where(x == 6, tl.full((1, 1), 6.579251212010101, x.dtype), result)
    result = tl.where(x == 5, tl.full((1, 1), 4.787491742782046, x.dtype), result)
    result = tl.where(x == 4, tl.full((1, 1), 3.1780538303479458, x.dtype), result)
    result = tl.where(x == 3, tl.full((1, 1), 1.791759469228055, x.dtype), result)
    result = tl.where(x == 2, tl.full((1, 1), 0.6931471805599453, x.dtype), result)
    return tl.where((x == 1) | (x == 0), 0.0, result)


@triton.jit
def factorial(x):
    """(c, start, rest): log x! = x·log c − start + ½·log c + rest, see csrc/counts.h."""
    small = x < 8
    c = tl.where(small, 1.0, x)
    by_series = HALF_LOG_TWO_PI + stirling(reciprocal_accurate(c))
    return c, tl.where(small, 0.0, x), tl.where(small, log_small_factorial(x), by_series)


@triton.jit
def poisson(y, x):
    rate = y + COUNT_EPS
    inverse = reciprocal_accurate(rate)
    c, start, rest = factorial(x)
    ratio = c * inverse
    lost = tl.fma(-ratio, rate, c)  # what the quotient was rounded by is put back
    log_ratio = log_accurate(ratio) + lost * inverse * reciprocal(ratio)
    return (y - start) + (x * log_ratio + (0.5 * log_accurate(c) + rest)), 1.0, (rate - x) * inverse


@triton.jit
def poisson_log_rate(y, x, NARROW: tl.constexpr):
    rate = exp_accurate(y, NARROW)
    c, start, rest = factorial(x)
    log_c = log_accurate(c)
    return (rate - start) + (x * (log_c - y) + (0.5 * log_c + rest)), 1.0, rate - x


@triton.jit
def shifted(z):
    """z, or z + 8 where it is below; by how much; there Γ(z + 8)/Γ(z) and ψ(z + 8) − ψ(z), else 1 and 0."""
    small = z < 8
    by, low = tl.where(small, 8.0, 0.0), tl.where(small, z, 1.0)
    q = low * (low + 7.0)
    product = q * (q + 6.0) * ((q + 10.0) * (q + 12.0))
    slope = (((4.0 * q + 84.0) * q + 504.0) * q + 720.0) * (low + low + 7.0) * reciprocal_accurate(product)
    return z + by, by, tl.where(small, product, 1.0), tl.where(small, slope, 0.0)


@triton.jit
def log_growth(y, theta):
    """log((θ + y + ε)/(θ + ε)), 1/(θ + ε), 1/(θ + y + ε)."""
    lifted = theta + COUNT_EPS
    by_theta, by_total = reciprocal_accurate(lifted), reciprocal_accurate(lifted + y)
    growth = y * by_theta
    total = 1.0 + growth
    return log_accurate(total) + (growth - (total - 1.0)) * lifted * by_total, by_theta, by_total


@triton.jit
def log_quotient(difference, a, by_a, by_b):
    """log(b/a) from b − a: log1p, with what the sum was rounded by put back."""
    step = difference * by_a
    ratio = 1.0 + step
    return log_accurate(ratio) + (step - (ratio - 1.0)) * a * by_b


@triton.jit
def negative_binomial(y, x, theta):
    mean = y + COUNT_EPS
    grown, _, by_total = log_growth(y, theta)
    a, by_8_of_a, product_of_a, _ = shifted(theta)
    b, by_8_of_b, product_of_b, _ = shifted(theta + x)
    moved, by_a, by_b = by_8_of_b - by_8_of_a, reciprocal_accurate(a), reciprocal_accurate(b)
    c, start, rest = factorial(x)
    odds = log_accurate((b * by_total) * (mean * reciprocal_accurate(c)))
    log_gamma = moved * log_accurate(b) + (a - 0.5) * log_quotient(x + moved, a, by_a, by_b)
    log_gamma = (log_gamma - (moved + (x - start))) + (stirling(by_b) - stirling(by_a))
    log_gamma += log_accurate(product_of_a * reciprocal_accurate(product_of_b)) - 0.5 * log_accurate(c)
    nll = theta * grown - x * odds - (log_gamma - rest)
    return nll, 1.0, (theta * by_total) * ((mean - x) * reciprocal_accurate(mean))


@triton.jit
def negative_binomial_by_dispersion(y, x, theta):
    grown, by_theta, by_total = log_growth(y, theta)
    a, by_8_of_a, _, slope_of_a = shifted(theta)
    b, by_8_of_b, _, slope_of_b = shifted(theta + x)
    by_a, by_b = reciprocal_accurate(a), reciprocal_accurate(b)
    log_ratio = log_quotient(x + (by_8_of_b - by_8_of_a), a, by_a, by_b)
    direct = ((x - y) * (theta * by_theta) + x * COUNT_EPS * by_theta) * by_total
    digamma = (0.5 * (by_b - by_a) + (stirling_slope(by_a) - stirling_slope(by_b))) - (slope_of_a - slope_of_b)
    return (grown - log_ratio) + (direct + digamma)


@triton.jit
def zero_inflated(nll, x, logit):
    """−log of what e^(−nll) is where a count is 0 with probability σ(logit) besides; its derivatives in both."""
    total = logit + nll
    a = exp(-tl.abs(logit))
    b = tl.where(x == 0, exp(-tl.abs(total)), 0.0)
    by_a, by_b = reciprocal_of_normal(1.0 + a), reciprocal_of_normal(1.0 + b)
    below, above = tl.where(logit < 0, -logit, 0.0), tl.where(logit < 0, 0.0, logit)
    whole = tl.where(x == 0, tl.where(below < nll, below, nll), nll + above)
    by_nll = tl.where(x == 0, tl.where(total < 0, by_b, b * by_b), 1.0)
    of_zero, of_count = tl.where(logit < 0, a * by_a, by_a), tl.where(logit < 0, by_a, a * by_a)
    return whole + log_accurate((1.0 + a) * by_b), by_nll, tl.where(x == 0, by_nll - of_count, of_zero)


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
bound("triton", TERMS, SLOPES)


@triton.jit
def terms(y, x, parameter, LIKELIHOOD: tl.constexpr, NARROW: tl.constexpr = False):
    """``(additive, factor, derivative)``; ``parameter`` is eps or var, where there is one.

    NARROW: y came in half precision.
    """
    if LIKELIHOOD == "bernoulli_logits":
        return bernoulli_logits(y, x)
    elif LIKELIHOOD == "bernoulli_probs":
        return bernoulli_probs(y, x, parameter, NARROW)
    elif LIKELIHOOD == "bernoulli_probs_log_clamped":
        return bernoulli_probs_log_clamped(y, x)
    elif LIKELIHOOD == "continuous_bernoulli_logits":
        return continuous_bernoulli_logits(y, x)
    elif LIKELIHOOD == "gaussian":
        return gaussian(y, x, parameter)
    elif LIKELIHOOD == "gaussian_logvar":
        return gaussian_logvar(y, x, parameter)
    elif LIKELIHOOD == "mse":
        return mse(y, x)
    elif LIKELIHOOD == "l1":
        return l1(y, x)
    elif LIKELIHOOD == "laplace":
        return laplace(y, x, parameter)
    elif LIKELIHOOD == "laplace_log_scale":
        return laplace_log_scale(y, x, parameter)
    elif LIKELIHOOD == "poisson":
        return poisson(y, x)
    elif LIKELIHOOD == "poisson_log_rate":
        return poisson_log_rate(y, x, NARROW)
    elif LIKELIHOOD == "negative_binomial":
        return negative_binomial(y, x, parameter)
    else:
        tl.static_assert(False, "a likelihood of TERMS is not among these")


@triton.jit
def log_of_factors(product, LIKELIHOOD: tl.constexpr):
    """What the factors of many terms add to their nll."""
    log_product = log_accurate(product) + (product - product)  # a NaN stays
    return -log_product if LIKELIHOOD == "bernoulli_probs" else log_product


@triton.jit
def parameter_slope(y, x, parameter, LIKELIHOOD: tl.constexpr):
    """∂nll/∂parameter."""
    if LIKELIHOOD == "gaussian":
        return gaussian_by_var(y, x, parameter)
    elif LIKELIHOOD == "gaussian_logvar":
        return gaussian_by_logvar(y, x, parameter)
    elif LIKELIHOOD == "laplace":
        return laplace_by_scale(y, x, parameter)
    elif LIKELIHOOD == "laplace_log_scale":
        return laplace_by_log_scale(y, x, parameter)
    elif LIKELIHOOD == "negative_binomial":
        return negative_binomial_by_dispersion(y, x, parameter)
    else:
        tl.static_assert(False, "a likelihood of SLOPES is not among these")


@triton.jit
def element_terms(y, x, parameter, LIKELIHOOD: tl.constexpr):
    """``(nll, derivative)``, for elementwise output."""
    if LIKELIHOOD == "bernoulli_logits":
        return bernoulli_logits_exact(y, x)
    elif LIKELIHOOD == "bernoulli_probs":
        return bernoulli_probs_exact(y, x, parameter)
    elif LIKELIHOOD == "bernoulli_probs_log_clamped":
        return bernoulli_probs_log_clamped_exact(y, x)
    else:
        nll, _, derivative = terms(y, x, parameter, LIKELIHOOD)
        return nll, derivative
