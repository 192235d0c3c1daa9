"""The noise contract (kernels/reference/noise.py): four normals from each Philox4x32-10 call.

Instructions a normal: a Philox round is two widening multiplications and two three-way exclusive ors for four words,
so 10 in all; Box–Muller takes 7.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .approx import LN_2, PTX, cos_32, log2_32, sin_32, sqrt_32

UNIT, HALF_UNIT = tl.constexpr(2.0**-32), tl.constexpr(2.0**-33)
TURN, HALF_TURN = tl.constexpr(6.283185307179586 * 2.0**-32), tl.constexpr(6.283185307179586 * 2.0**-33)
NEAR_ONE = tl.constexpr(1 - 2.0**-8)
M0, M1 = tl.constexpr(0xD2511F53), tl.constexpr(0xCD9E8D57)
W0, W1 = tl.constexpr(0x9E3779B9), tl.constexpr(0xBB67AE85)


@triton.jit
def multiply(word, constant: tl.constexpr):
    """``(high, low)`` words of a product: one instruction, where a high and a low multiplication are two."""
    if PTX:
        factor = tl.full(word.shape, constant, tl.uint32)
        wide: tl.constexpr = "{ .reg .b64 product; mul.wide.u32 product, $2, $3; mov.b64 {$1, $0}, product; }"
        return tl.inline_asm_elementwise(wide, "=r,=r,r,r", [word, factor], (tl.uint32, tl.uint32), True, 1)
    else:
        product = word.to(tl.uint64) * tl.full((1, 1), constant, tl.uint64)
        return (product >> 32).to(tl.uint32), product.to(tl.uint32)


@triton.jit
def words(seed, q):
    """The four words of Philox4x32-10 for group ``q`` (int64): key ``seed``, counter (q low, q high, 0, 0)."""
    k0, k1 = tl.full((1, 1), seed.to(tl.uint32), tl.uint32), tl.full((1, 1), (seed >> 32).to(tl.uint32), tl.uint32)
    high, low = multiply(q.to(tl.uint32), M0)
    zero = tl.zeros_like(low)
    c0, c1, c2, c3 = (q >> 32).to(tl.uint32) ^ k0, zero, high ^ k1, low  # the first round: 0 times M1 is 0
    for _ in tl.static_range(9):
        k0 = tl.add(k0, W0, sanitize_overflow=False)
        k1 = tl.add(k1, W1, sanitize_overflow=False)
        high0, low0 = multiply(c0, M0)
        high1, low1 = multiply(c2, M1)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
    return c0, c1, c2, c3


@triton.jit
def radius(word):
    """√(−2·ln u), u = (r + ½)·2⁻³².

    The approximate logarithm is off by up to 2⁻²² near u = 1, where the radius is √(2(1 − u)) and would feel it; from
    1 − 2⁻⁸ on, two terms of its series stand for −ln u. Error of the radius: 2e-6 before, 3e-7 after.
    """
    u = tl.fma(word.to(tl.float32), UNIT, HALF_UNIT)
    return sqrt_32(tl.where(u > NEAR_ONE, (1.0 - u) * (3.0 - u), log2_32(u) * (-2.0 * LN_2)))


@triton.jit
def angle(word):
    """2π·(word + ½)·2⁻³² of the word read as signed."""
    return tl.fma(word.to(tl.int32, bitcast=True).to(tl.float32), TURN, HALF_TURN)


@triton.jit
def four_normals(seed, q):
    """ε of the elements 4q, 4q + 1, 4q + 2, 4q + 3."""
    r0, r1, r2, r3 = words(seed, q)
    radius0, angle0, radius1, angle1 = radius(r0), angle(r1), radius(r2), angle(r3)
    return radius0 * cos_32(angle0), radius0 * sin_32(angle0), radius1 * cos_32(angle1), radius1 * sin_32(angle1)


@triton.jit
def normals(seed, first, COUNT: tl.constexpr, TOGETHER: tl.constexpr):
    """ε of 4·COUNT elements from 4·``first`` on, in order: a column of firsts gives a row of noise for each.

    A thread gets 4 consecutive elements, or 8 if ``TOGETHER`` is 2: as many as its 16-byte access holds, so that noise
    is born in the registers that need it.
    """
    if TOGETHER == 1:
        a0, a1, a2, a3 = four_normals(seed, first + tl.arange(0, COUNT)[None, :])
        return tl.reshape(tl.join(tl.join(a0, a2), tl.join(a1, a3)), (first.shape[0], 4 * COUNT))
    else:
        q = first + 2 * tl.arange(0, COUNT // 2)[None, :]
        a0, a1, a2, a3 = four_normals(seed, q)
        b0, b1, b2, b3 = four_normals(seed, q + 1)
        cosines = tl.join(tl.join(a0, b0), tl.join(a2, b2))
        sines = tl.join(tl.join(a1, b1), tl.join(a3, b3))
        return tl.reshape(tl.join(cosines, sines), (first.shape[0], 4 * COUNT))


@triton.jit
def normals_at(seed, i):
    """ε of the elements ``i``, in any order: four times the work, for rows that do not start at a multiple of four."""
    r0, r1, r2, r3 = words(seed, i >> 2)
    second = (i & 2) != 0
    turn = angle(tl.where(second, r3, r1))
    return radius(tl.where(second, r2, r0)) * tl.where((i & 1) != 0, sin_32(turn), cos_32(turn))
