"""The noise contract in pure torch: ε is a function of (seed, element index).

Philox4x32-10 (Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011) with the 64-bit
seed as key and the counter (q low, q high, 0, 0), q = index // 4, gives four words; Box–Muller turns each pair of
words into a cosine and a sine normal. The noise is that of torch's stateless ``torch.func._random.normal``.
"""

from __future__ import annotations

import math

import torch

MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
WORD = 0xFFFFFFFF


def philox4x32(key: tuple, counter: tuple, rounds: int = 10) -> tuple:
    """Four 32-bit words for a two-word key and a four-word counter, lowest word first.

    Works on Python integers and on int64 tensors alike: only ``*``, ``+``, ``^``, ``>>`` and ``&`` are used, and a
    product that overflows int64 keeps the right bits.
    """
    k0, k1 = key
    c0, c1, c2, c3 = counter
    for _ in range(rounds):
        p0, p1 = MULTIPLIERS[0] * c0, MULTIPLIERS[1] * c2
        c0, c1, c2, c3 = (p1 >> 32) & WORD ^ c1 ^ k0, p1 & WORD, (p0 >> 32) & WORD ^ c3 ^ k1, p0 & WORD
        k0, k1 = k0 + KEY_STEPS[0] & WORD, k1 + KEY_STEPS[1] & WORD
    return c0, c1, c2, c3


def box_muller(radius_word: torch.Tensor, angle_word: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Two independent float32 standard normals from two words in int64 tensors: the cosine one, the sine one.

    √(−2·ln u)·(cos 2πv, sin 2πv), where a word r is u or v = (r + ½)·2⁻³², never 0. The angle word is read as signed,
    which is the same angle modulo 2π and keeps the argument within [-π, π], where every implementation of sine and
    cosine is at its best.
    """
    unit = 2.0**-32
    radius = torch.sqrt(-2.0 * torch.log((radius_word.to(torch.float32) + 0.5) * unit))
    signed = torch.where(angle_word > 0x7FFFFFFF, angle_word - (1 << 32), angle_word)
    angle = (signed.to(torch.float32) + 0.5) * (2.0 * math.pi * unit)
    return radius * torch.cos(angle), radius * torch.sin(angle)


def noise(seed: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    """ε in float32 for every element of ``shape`` in row-major order; ``seed`` is one int64."""
    count = math.prod(shape)  # Size.numel would be a constant of what torch.jit.trace records
    q = torch.arange((count + 3) // 4, device=seed.device)
    zero = torch.zeros_like(q)
    key = (seed & WORD, (seed >> 32) & WORD)
    r0, r1, r2, r3 = philox4x32(key, (q & WORD, q >> 32, zero, zero))
    normals = torch.stack((*box_muller(r0, r1), *box_muller(r2, r3)), dim=1)
    return normals.reshape(-1)[:count].reshape(shape)
