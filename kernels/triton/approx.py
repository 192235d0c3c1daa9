"""exp, log, 1/x, √x, sin and cos as the GPU's own approximate instructions, and their portable twins.

Where a kernel is bound by the instructions it issues, these matter: `lg2.approx.ftz` is one instruction, libm's
logarithm about twenty. Errors, from NVIDIA's PTX manual: ex2 2⁻²² relative; lg2 2⁻²² absolute between ½ and 2,
relative elsewhere; rcp 1 ulp; sqrt 2⁻²³ relative; sin and cos 2⁻²⁰·⁵ absolute in [-2π, 2π]. Subnormals count as 0.
They are used for float32 (and halves, which are computed in float32), where twice eager's own error leaves room for
them; float64 takes libm's.

The interpreter and AMD have no PTX: there Triton's own functions stand in.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .launch import INTERPRETED

PTX = tl.constexpr(not INTERPRETED and torch.version.hip is None)
TRUNCATES = tl.constexpr(INTERPRETED)
LOG2_E = tl.constexpr(1.4426950408889634)
LOG2_E_LOW = tl.constexpr(1.92596298909109e-08)  # what LOG2_E lacks as a float32
LN_2 = tl.constexpr(0.6931471805599453)
MAGIC = tl.constexpr(12582912.0)  # 1.5·2²³: adding it rounds to an integer, which then sits in the low bits
MAGIC_BITS = tl.constexpr(0x4B400000)


@triton.jit
def exp2_32(x):
    if PTX:
        return tl.inline_asm_elementwise("ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], tl.float32, is_pure=True, pack=1)
    else:
        return tl.exp2(x)


@triton.jit
def log2_32(x):
    if PTX:
        return tl.inline_asm_elementwise("lg2.approx.ftz.f32 $0, $1;", "=f,f", [x], tl.float32, is_pure=True, pack=1)
    else:
        return tl.log2(x)


@triton.jit
def reciprocal_32(x):
    if PTX:
        return tl.inline_asm_elementwise("rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], tl.float32, is_pure=True, pack=1)
    else:
        return 1.0 / x


@triton.jit
def sqrt_32(x):
    if PTX:
        return tl.inline_asm_elementwise("sqrt.approx.ftz.f32 $0, $1;", "=f,f", [x], tl.float32, is_pure=True, pack=1)
    else:
        return tl.sqrt(x)


@triton.jit
def cos_32(x):
    if PTX:
        return tl.inline_asm_elementwise("cos.approx.ftz.f32 $0, $1;", "=f,f", [x], tl.float32, is_pure=True, pack=1)
    else:
        return tl.cos(x)


@triton.jit
def sin_32(x):
    if PTX:
        return tl.inline_asm_elementwise("sin.approx.ftz.f32 $0, $1;", "=f,f", [x], tl.float32, is_pure=True, pack=1)
    else:
        return tl.sin(x)


@triton.jit
def exp(x):
    """e^x."""
    if x.dtype == tl.float64:
        return tl.exp(x)
    else:
        return exp2_32(x * LOG2_E)


@triton.jit
def power_of_two(n):
    """2ⁿ of an int32 n in [-126, 127]."""
    return ((n + 127) << 23).to(tl.float32, bitcast=True)


@triton.jit
def exp_accurate(x, NARROW: tl.constexpr):
    """e^x for x of any size, within 2 ulp: Cephes' polynomial (Moshier), as in csrc/math.h.

    NARROW, for inputs in half precision: `exp`, with the roundings of x·log₂e put back.
    """
    if x.dtype == tl.float64:
        return tl.exp(x)
    elif NARROW:
        power = x * LOG2_E
        lost = tl.fma(x, tl.full(x.shape, LOG2_E, tl.float32), -power) + x * LOG2_E_LOW
        value = exp2_32(power)
        corrected = value + value * lost * LN_2
        return tl.where(corrected == corrected, corrected, value)  # inf − inf where x or e^x is infinite
    else:
        # at these ends the product with 2ⁿ has overflowed, or rounded to 0, by itself
        x = tl.minimum(
            tl.maximum(x, -104.0, propagate_nan=tl.PropagateNan.ALL), 89.0, propagate_nan=tl.PropagateNan.ALL
        )
        shifted = x * LOG2_E + MAGIC
        n = shifted - MAGIC
        r = x - n * 0.693359375 + n * 2.12194440e-4  # ln 2 in two parts
        square = r * r
        high = 1.9875691500e-4 * r + 1.3981999507e-3
        middle = 8.3334519073e-3 * r + 4.1665795894e-2
        low = 1.6666665459e-1 * r + 5.0000001201e-1
        mantissa = (((high * square + middle) * square + low) * square + r) + 1.0
        exponent = shifted.to(tl.int32, bitcast=True) - MAGIC_BITS
        half = exponent >> 1  # 2ⁿ in two factors: n is from -150 to 128
        return mantissa * power_of_two(half) * power_of_two(exponent - half)


@triton.jit
def log(x):
    """Log of x ≥ 0."""
    if x.dtype == tl.float64:
        return tl.log(x)
    else:
        return log2_32(x) * LN_2


@triton.jit
def log_accurate(x):
    """Log of a positive normal x (of a NaN, anything), within 2 ulp: Cephes' polynomial, as in csrc/math.h.

    For what is added up over an image: where `log` is off by 2⁻²² near 1, it is off the same way for every pixel.
    """
    if x.dtype == tl.float64:
        return tl.log(x)
    else:
        word = x.to(tl.int32, bitcast=True)
        above = word - 0x3F3504F3  # √½: what is left of x is within [√½, √2]
        r = (word - (above & -0x800000)).to(tl.float32, bitcast=True) - 1.0
        p = 7.0376836292e-2 * r - 1.1514610310e-1
        p = p * r + 1.1676998740e-1
        p = p * r - 1.2420140846e-1
        p = p * r + 1.4249322787e-1
        p = p * r - 1.6668057665e-1
        p = p * r + 2.0000714765e-1
        p = p * r - 2.4999993993e-1
        p = p * r + 3.3333331174e-1
        return (above >> 23).to(tl.float32) * LN_2 + (r * r * (r * p - 0.5) + r)


@triton.jit
def reciprocal(x):
    """1/x."""
    if x.dtype == tl.float64:
        return 1.0 / x
    else:
        return reciprocal_32(x)


@triton.jit
def reciprocal_accurate(x):
    """1/x to nearest, of any x."""
    if x.dtype == tl.float64:
        return 1.0 / x
    else:
        return tl.div_rn(1.0, x)


@triton.jit
def reciprocal_of_normal(x):
    """1/x to nearest, or next to it, where both are normal numbers: two instructions more than `reciprocal`."""
    inverse = reciprocal(x)
    return tl.fma(inverse, tl.fma(-x, inverse, tl.full((1, 1), 1.0, x.dtype)), inverse)


@triton.jit
def rounded(x, dtype: tl.constexpr):
    """``x`` to nearest even in ``dtype``, which the interpreter's own float32 to bfloat16 is not."""
    if TRUNCATES and dtype == tl.bfloat16 and x.dtype == tl.float32:
        word = x.to(tl.int32, bitcast=True)
        nearest = word + 0x7FFF + ((word >> 16) & 1)
        kept = tl.where(x == x, nearest, word | 0x400000)
        return (kept >> 16).to(tl.int16).to(tl.bfloat16, bitcast=True)
    else:
        return x.to(dtype)
