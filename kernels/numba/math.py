"""exp, log and sincos that LLVM vectorises: polynomials in pure 32-bit arithmetic. float64 takes libm's.

Reassociation is off in this file: it would destroy the rounding by magic number. So are the no-NaN flags: NaN in
gives NaN out. Polynomials from the Cephes library (Moshier).
"""

from __future__ import annotations

import math

import numpy as np
from numba import njit, types

from .intrinsics import (
    add,
    as_signed,
    bit_and,
    bits,
    from_bits,
    inlined,
    select,
    select_nonzero,
    shift_left,
    shift_right,
    subtract,
    to_float,
)

exact = njit(fastmath={"contract", "nsz"}, error_model="numpy", nogil=True, forceinline=True)

f = np.float32
i = np.int32

LOG2_E = f(1.4426950408889634)
LN2_HIGH, LN2_LOW = f(0.693359375), f(-2.12194440e-4)
MAGIC = f(12582912.0)  # 1.5·2²³: adding it rounds to an integer, which then sits in the low bits
MAGIC_BITS = i(0x4B400000)
SQRT_HALF_BITS = i(0x3F3504F3)
MIN_NORMAL, TWO_23, LOG_TWO_23 = f(1.17549435e-38), f(8388608.0), f(15.942385)
ZERO, ONE, HALF = f(0), f(1), f(0.5)
EXP_LOW, EXP_HIGH, EXP_NEGATIVE_LOW = f(-104.0), f(89.0), f(-87.0)
MANTISSA, BIAS, C1, C2 = i(23), i(127), i(1), i(2)
E0, E1, E2 = f(1.9875691500e-4), f(1.3981999507e-3), f(8.3334519073e-3)
E3, E4, E5 = f(4.1665795894e-2), f(1.6666665459e-1), f(5.0000001201e-1)
L0, L1, L2 = f(7.0376836292e-2), f(-1.1514610310e-1), f(1.1676998740e-1)
L3, L4, L5 = f(-1.2420140846e-1), f(1.4249322787e-1), f(-1.6668057665e-1)
L6, L7, L8 = f(2.0000714765e-1), f(-2.4999993993e-1), f(3.3333331174e-1)
S0, S1, S2 = f(-1.9515295891e-4), f(8.3321608736e-3), f(-1.6666654611e-1)
K0, K1, K2 = f(2.443315711809948e-5), f(-1.388731625493765e-3), f(4.166664568298827e-2)
TURN = f(2 * math.pi * 2.0**-32)
QUADRANT_ROUND, QUADRANT_SHIFT = i(0x20000000), i(30)


@exact
def exp32(x):
    """e^x for any x, within 2 ulp where that is a normal number: infinite above 88.72, 0 below -104."""
    # at these ends the product with 2^n has overflowed, or rounded to 0, by itself
    x = select(x < EXP_LOW, EXP_LOW, x)
    x = select(x > EXP_HIGH, EXP_HIGH, x)
    shifted = x * LOG2_E + MAGIC
    n = shifted - MAGIC
    r = x - n * LN2_HIGH - n * LN2_LOW
    p = ((((E0 * r + E1) * r + E2) * r + E3) * r + E4) * r + E5
    # 2^n in two factors: n is from -150 to 128
    exponent = subtract(bits(shifted), MAGIC_BITS)
    half = shift_right(exponent, C1)
    scale0 = from_bits(shift_left(add(half, BIAS), MANTISSA))
    scale1 = from_bits(shift_left(add(subtract(exponent, half), BIAS), MANTISSA))
    return (p * r * r + r + ONE) * scale0 * scale1


@exact
def exp_negative32(x):
    """e^x for x ≤ 0, e^-87 below -87; within 2 ulp."""
    return exp_of_bounded32(select(x < EXP_NEGATIVE_LOW, EXP_NEGATIVE_LOW, x))


@exact
def exp_of_bounded32(x):
    """e^x for x from -87 to 88; within 2 ulp."""
    shifted = x * LOG2_E + MAGIC
    n = shifted - MAGIC
    r = x - n * LN2_HIGH - n * LN2_LOW
    p = ((((E0 * r + E1) * r + E2) * r + E3) * r + E4) * r + E5
    scale = from_bits(shift_left(add(subtract(bits(shifted), MAGIC_BITS), BIAS), MANTISSA))
    return (p * r * r + r + ONE) * scale


@exact
def log_normal32(x):
    """log x for a positive normal x; within 1 ulp. Anything else gives something finite or NaN."""
    word = bits(x)
    e = shift_right(subtract(word, SQRT_HALF_BITS), MANTISSA)
    r = from_bits(subtract(word, shift_left(e, MANTISSA))) - ONE
    p = (((((((L0 * r + L1) * r + L2) * r + L3) * r + L4) * r + L5) * r + L6) * r + L7) * r + L8
    n = to_float(e)
    square = r * r
    # x − x carries a NaN through the bit pattern
    return (r + (r * square * p + n * LN2_LOW - HALF * square)) + n * LN2_HIGH + (x - x)


@exact
def log32(x):
    """log x for x ≥ 0, subnormals included; about -104 at 0, be it positive or negative."""
    small = x < MIN_NORMAL
    return log_normal32(abs(select(small, x * TWO_23, x))) - select(small, LOG_TWO_23, ZERO)


@exact
def cos_sin_turn32(word):
    """cos and sin of 2π·(word + ½)/2³², for a 32-bit word; within 2e-7. The quadrant is taken off in integers."""
    signed = as_signed(word)
    quadrant = shift_right(add(signed, QUADRANT_ROUND), QUADRANT_SHIFT)
    angle = (to_float(subtract(signed, shift_left(quadrant, QUADRANT_SHIFT))) + HALF) * TURN
    z = angle * angle
    s = ((S0 * z + S1) * z + S2) * z * angle + angle
    c = ((K0 * z + K1) * z + K2) * z * z - HALF * z + ONE
    swap = bit_and(quadrant, C1)
    cos, sin = select_nonzero(swap, s, c), select_nonzero(swap, c, s)
    cos = select_nonzero(bit_and(add(quadrant, C1), C2), -cos, cos)
    sin = select_nonzero(bit_and(quadrant, C2), -sin, sin)
    return cos, sin


def exp(x):
    """e^x."""
    return math.exp(x)


def exp_negative(x):
    """e^x for x ≤ 0."""
    return math.exp(x)


def exp_of_bounded(x):
    """e^x for x from -87 to 88."""
    return math.exp(x)


def log_normal(x):
    """log x for normal x > 0."""
    return math.log(x)


def log(x):
    """log x for x ≥ 0; below -100 at 0."""
    return math.log(x)


def _by_type(function, single, double):
    @inlined(function)
    def choose(x):
        if x == types.float32:
            return lambda x: single(x)
        return lambda x: double(x)


@exact
def _exp64(x):
    return math.exp(x)


@exact
def _log64(x):
    return math.log(x)


def stirling(r):
    """What Stirling's (z − ½)·log z − z + ½·log 2π lacks of log Γ(z), for z ≥ 8 and r = 1/z."""
    raise NotImplementedError("only inside compiled code")


def stirling_slope(r):
    """Its derivative in z."""
    raise NotImplementedError("only inside compiled code")


SERIES = (1 / 12, -1 / 360, 1 / 1260, -1 / 1680, 1 / 1188, -691 / 360360, 1 / 156, -3617 / 122400, 43867 / 244188)
G0, G1, G2 = map(f, SERIES[:3])
D0, D1, D2 = (f(-(2 * k + 1) * SERIES[k]) for k in range(3))


@exact
def stirling32(r):
    square = r * r
    return r * ((G2 * square + G1) * square + G0)


@exact
def stirling_slope32(r):
    square = r * r
    return square * ((D2 * square + D1) * square + D0)


@exact
def _stirling64(r):
    square, total = r * r, 0.0
    for k in range(len(SERIES) - 1, -1, -1):
        total = total * square + SERIES[k]
    return r * total


@exact
def _stirling_slope64(r):
    square, total = r * r, 0.0
    for k in range(len(SERIES) - 1, -1, -1):
        total = total * square - (2 * k + 1) * SERIES[k]
    return square * total


_by_type(stirling, stirling32, _stirling64)
_by_type(stirling_slope, stirling_slope32, _stirling_slope64)
_by_type(exp, exp32, _exp64)
_by_type(exp_negative, exp_negative32, _exp64)
_by_type(exp_of_bounded, exp_of_bounded32, _exp64)
_by_type(log_normal, log_normal32, _log64)
_by_type(log, log32, _log64)
