"""The noise contract (kernels/reference/noise.py): four normals from each Philox4x32-10 call.

Instructions a normal: a Philox round is two widening multiplications and two three-way exclusive ors for four words, so
10 in all; Box–Muller takes 7 to 8.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .approx import LN_2, cos_32, log2_32, sin_32, sqrt_32

UNIT = tl.constexpr(2.0**-32)
TURN = tl.constexpr(6.283185307179586 * 2.0**-32)
NEAR_ONE = tl.constexpr(1 - 2.0**-11)


@triton.jit
def words(seed, q):
    """The four words of group ``q`` (int64)."""
    zero = tl.zeros_like(q).to(tl.uint32)
    return tl.philox(seed, q.to(tl.uint32), (q >> 32).to(tl.uint32), zero, zero)


@triton.jit
def radius(word):
    """√(−2·ln u), u = (r + 1)·2⁻³².

    The approximate logarithm is off by up to 2⁻²² near u = 1, where the radius is √(2(1 − u)) and would feel it; from
    1 − 2⁻¹¹ on, 1 − u stands for −ln u. Error of the radius: 5e-6 on either side.
    """
    u = tl.fma(word.to(tl.float32), UNIT, UNIT)
    return sqrt_32(tl.where(u > NEAR_ONE, 2.0 - 2.0 * u, log2_32(u) * (-2.0 * LN_2)))


@triton.jit
def normals(seed, q):
    """ε of the elements 4q … 4q + 3, in order: the last dimension grows by four."""
    r0, r1, r2, r3 = words(seed, q)
    radius0, angle0 = radius(r0), r1.to(tl.int32, bitcast=True).to(tl.float32) * TURN
    radius1, angle1 = radius(r2), r3.to(tl.int32, bitcast=True).to(tl.float32) * TURN
    cosines = tl.join(radius0 * cos_32(angle0), radius1 * cos_32(angle1))
    sines = tl.join(radius0 * sin_32(angle0), radius1 * sin_32(angle1))
    return tl.reshape(tl.join(cosines, sines), (q.shape[0], q.shape[1] * 4))


@triton.jit
def normals_at(seed, i):
    """ε of the elements ``i``, in any order: four times the work, for rows that do not start at a multiple of four."""
    r0, r1, r2, r3 = words(seed, i >> 2)
    second = (i & 2) != 0
    angle = tl.where(second, r3, r1).to(tl.int32, bitcast=True).to(tl.float32) * TURN
    return radius(tl.where(second, r2, r0)) * tl.where((i & 1) != 0, sin_32(angle), cos_32(angle))
