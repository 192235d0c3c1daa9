"""The noise contract (kernels/reference/noise.py) in Numba: a tile of normals at a time, eight Philox lanes wide."""

from __future__ import annotations

import math

import numpy as np
from numba import njit

from .intrinsics import FLOAT32 as F32
from .intrinsics import (
    add_unsigned,
    exclusive_or,
    multiply_high,
    multiply_low,
    store,
    to_float_unsigned,
    truncate,
)
from .math import cos_sin_turn32, exact, log_normal32

u = np.uint32
M0, M1, W0, W1 = u(0xD2511F53), u(0xCD9E8D57), u(0x9E3779B9), u(0xBB67AE85)
UNIT, MINUS_TWO, HALF = np.float32(2.0**-32), np.float32(-2.0), np.float32(0.5)

TILE = 256  # normals at a time: what a thread keeps in its first-level cache beside its operands
PADDED = TILE + 8  # a tile that starts within a group of four


@exact
def one_round(k0, k1, c0, c1, c2, c3):
    h0, l0 = multiply_high(M0, c0), multiply_low(M0, c0)
    h1, l1 = multiply_high(M1, c2), multiply_low(M1, c2)
    return exclusive_or(exclusive_or(h1, c1), k0), l1, exclusive_or(exclusive_or(h0, c3), k1), l0


@exact
def two_rounds(k0, k1, c0, c1, c2, c3):
    c0, c1, c2, c3 = one_round(k0, k1, c0, c1, c2, c3)
    return one_round(add_unsigned(k0, W0), add_unsigned(k1, W1), c0, c1, c2, c3)


@exact
def philox(k0, k1, c0, c1):
    """Philox4x32-10 of the counter (c0, c1, 0, 0); unrolled, or the loop around it would not be vectorised."""
    s0, s1 = add_unsigned(W0, W0), add_unsigned(W1, W1)
    c0, c1, c2, c3 = two_rounds(k0, k1, c0, c1, u(0), u(0))
    k0, k1 = add_unsigned(k0, s0), add_unsigned(k1, s1)
    c0, c1, c2, c3 = two_rounds(k0, k1, c0, c1, c2, c3)
    k0, k1 = add_unsigned(k0, s0), add_unsigned(k1, s1)
    c0, c1, c2, c3 = two_rounds(k0, k1, c0, c1, c2, c3)
    k0, k1 = add_unsigned(k0, s0), add_unsigned(k1, s1)
    c0, c1, c2, c3 = two_rounds(k0, k1, c0, c1, c2, c3)
    k0, k1 = add_unsigned(k0, s0), add_unsigned(k1, s1)
    return two_rounds(k0, k1, c0, c1, c2, c3)


@exact
def box_muller(radius_word, angle_word):
    """Two normals; u = (r + ½)·2⁻³² is in (0, 1], so its logarithm is finite and at most 0."""
    radius = math.sqrt(MINUS_TWO * log_normal32((to_float_unsigned(radius_word) + HALF) * UNIT))
    cos, sin = cos_sin_turn32(angle_word)
    return radius * cos, radius * sin


@njit(nogil=True, error_model="numpy")
def fill(seed, first, count, tile_ptr):
    """Write ε for elements 4·(first // 4) … first + count into ``tile_ptr``; returns where ``first`` is in it."""
    k0, k1 = truncate(seed), truncate(seed >> 32)
    q0 = first >> 2
    groups = ((first + count + 3) >> 2) - q0
    for j in range(groups):
        q = q0 + j
        r0, r1, r2, r3 = philox(k0, k1, truncate(q), truncate(q >> 32))
        n0, n1 = box_muller(r0, r1)
        n2, n3 = box_muller(r2, r3)
        store(F32, tile_ptr, 4 * j, n0)
        store(F32, tile_ptr, 4 * j + 1, n1)
        store(F32, tile_ptr, 4 * j + 2, n2)
        store(F32, tile_ptr, 4 * j + 3, n3)
    return first - 4 * q0
