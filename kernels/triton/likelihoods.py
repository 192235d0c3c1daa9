"""Each reconstruction term for a tile: ``(y, x, parameter) → (additive, factor, derivative)``.

nll = additive + log(factor), or − log(factor) where that is in [½, 1]: a loop multiplies factors and takes one
logarithm for up to 64 of them (`log_of_factors`). A term without a factor has 1, which the compiler removes. Formulas
and sources: kernels/likelihoods.py.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..likelihoods import bound
from .approx import exp, log, log_accurate, reciprocal, reciprocal_accurate, reciprocal_of_normal

TWO_PI = tl.constexpr(6.283185307179586)
HALF_LOG_TWO_PI = tl.constexpr(0.9189385332046727)
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
    return (y - x) * reciprocal(tl.where(spread < 1e-12, 1e-12, spread))


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
