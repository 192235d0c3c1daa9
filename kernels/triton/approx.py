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
LN_2 = tl.constexpr(0.6931471805599453)


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
def exp_compensated(x):
    """e^x with the rounding of x·log₂e put back, for x of any size: 2⁻²² relative where `exp` loses |x|·2⁻²⁴ more."""
    if x.dtype == tl.float64:
        return tl.exp(x)
    else:
        power = x * LOG2_E
        lost = tl.fma(x, tl.full(x.shape, LOG2_E, tl.float32), -power)
        value = exp2_32(power)
        corrected = value + value * lost * LN_2
        return tl.where(corrected == corrected, corrected, value)  # inf − inf where x or e^x is infinite


@triton.jit
def log(x):
    """Log of x ≥ 0."""
    if x.dtype == tl.float64:
        return tl.log(x)
    else:
        return log2_32(x) * LN_2


@triton.jit
def reciprocal(x):
    """1/x."""
    if x.dtype == tl.float64:
        return 1.0 / x
    else:
        return reciprocal_32(x)


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
