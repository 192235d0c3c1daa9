"""Each reconstruction term for one element: ``(y, x, parameter) → (additive, factor, derivative)``.

nll = additive + log(factor), so that a loop can multiply factors in [1, 2] and take one logarithm for many; a term
without such a factor returns 1. Formulas and sources: kernels/reference/likelihoods.py.
"""

from __future__ import annotations

import math

from numba.extending import overload

from ..reference.likelihoods import LIKELIHOODS
from .intrinsics import constant
from .math import exact, exp_negative, log, log_normal

IDS = {name: index for index, name in enumerate(LIKELIHOODS)}


@exact
def bernoulli_logits(y, x, _):
    one, zero = constant(1.0, y), constant(0.0, y)
    a = exp_negative(-abs(y))
    factor = one + a
    inverse = one / factor
    sigmoid = inverse if y >= zero else a * inverse
    return (y if y > zero else zero) - y * x, factor, sigmoid - x


@exact
def bernoulli_logits_exact(y, x, _):
    """For elementwise output: what 1 + a rounds away of a small a is put back."""
    one, zero = constant(1.0, y), constant(0.0, y)
    a = exp_negative(-abs(y))
    factor = one + a
    inverse = one / factor
    sigmoid = inverse if y >= zero else a * inverse
    return (y if y > zero else zero) - y * x + (a - (factor - one)) * inverse, factor, sigmoid - x


@exact
def bernoulli_probs(y, x, eps):
    one, zero = constant(1.0, y), constant(0.0, y)
    z = one - y
    high = one - eps
    p = eps if y < eps else y
    p = high if p > high else p
    q = eps if z < eps else z
    q = high if q > high else q
    derivative = (one - x) / q - x / p
    clipped = (y < eps) | (z < eps)
    return -x * log(p) - (one - x) * log(q), one, zero if clipped else derivative


@exact
def bernoulli_probs_log_clamped(y, x, _):
    one, low, tiny = constant(1.0, y), constant(-100.0, y), constant(1e-12, y)
    z = one - y
    log_y = log(y)
    # log1p(−y): what 1 − y rounds away of a small y is put back
    log_z = log(z) + (((one - z) - y) / z if z > tiny else constant(0.0, y))
    log_y = low if log_y < low else log_y
    log_z = low if log_z < low else log_z
    spread = z * y
    return (x - one) * log_z - x * log_y, one, (y - x) / (tiny if spread < tiny else spread)


@exact
def continuous_bernoulli_logits(y, x, _):
    one, half, zero = constant(1.0, y), constant(0.5, y), constant(0.0, y)
    magnitude = abs(y)
    small = magnitude < half
    s = y if small else zero
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
    v = one if small else magnitude
    a = exp_negative(-v)
    inverse = one / (one - a)
    log_normalizer = (y if y > zero else zero) + log_normal((one - a) / v)
    mean = (inverse if y >= zero else -a * inverse) - one / (v if y >= zero else -v)
    nll = (log_series if small else log_normalizer) - x * y
    return nll, one, (mean_series if small else mean) - x


@exact
def gaussian(y, x, var):
    d = y - x
    half = constant(0.5, y)
    return half * d * d / var + half * log_normal(constant(2 * math.pi, y) * var), constant(1.0, y), d / var


@exact
def mse(y, x, _):
    d = y - x
    return d * d, constant(1.0, y), d + d


@exact
def l1(y, x, _):
    d = y - x
    one, zero = constant(1.0, y), constant(0.0, y)
    # d·0 keeps a NaN
    return abs(d), one, one if d > zero else -one if d < zero else d * zero


TERMS = {
    IDS["bernoulli_logits"]: bernoulli_logits,
    IDS["bernoulli_probs"]: bernoulli_probs,
    IDS["bernoulli_probs_log_clamped"]: bernoulli_probs_log_clamped,
    IDS["continuous_bernoulli_logits"]: continuous_bernoulli_logits,
    IDS["gaussian"]: gaussian,
    IDS["mse"]: mse,
    IDS["l1"]: l1,
}


def terms(likelihood, y, x, parameter):
    """``(additive, factor, derivative)`` of the likelihood with that number; where many factors are multiplied."""
    raise NotImplementedError("only inside compiled code")


def element_terms(likelihood, y, x, parameter):
    """``(nll, derivative)``, for elementwise output."""
    raise NotImplementedError("only inside compiled code")


@overload(terms, prefer_literal=True)
def _terms(likelihood, y, x, parameter):
    term = TERMS[likelihood.literal_value]
    return lambda likelihood, y, x, parameter: term(y, x, parameter)


@overload(element_terms, prefer_literal=True)
def _element_terms(likelihood, y, x, parameter):
    if likelihood.literal_value == IDS["bernoulli_logits"]:

        def logits_terms(likelihood, y, x, parameter):
            additive, factor, derivative = bernoulli_logits_exact(y, x, parameter)
            return additive + log_normal(factor), derivative

        return logits_terms
    term = TERMS[likelihood.literal_value]

    def other_terms(likelihood, y, x, parameter):
        additive, _, derivative = term(y, x, parameter)
        return additive, derivative

    return other_terms
