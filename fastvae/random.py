"""The random numbers behind every sample: the generator for the curious, the seed for the ops."""

from __future__ import annotations

import torch
from torch import Tensor

from . import ops
from .kernels.reference import noise as reference


def philox4x32(seed: int, counter: int) -> tuple[int, int, int, int]:
    """The four 32-bit words of Philox4x32-10.

    Args:
        seed: the 64-bit key.
        counter: the 128-bit counter. The kernels use ``element // 4`` and pick ``element % 4`` of the four normals.

    Returns:
        Four words, lowest first.

    Raises:
        ValueError: ``seed`` or ``counter`` is negative or does not fit.

    Source: Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011.

    >>> [f"{word:08x}" for word in philox4x32(0, 0)]
    ['6627e8d5', 'e169c58d', 'bc57ac4c', '9b00dbd8']
    """
    for name, value, bits in (("seed", seed, 64), ("counter", counter, 128)):
        if not 0 <= value < 1 << bits:
            raise ValueError(f"{name} must be an int in [0, 2**{bits}), got {value}")
    words = [counter >> shift & reference.WORD for shift in (0, 32, 64, 96)]
    return reference.philox4x32((seed & reference.WORD, seed >> 32), tuple(words))


def draw_seed(device: torch.device, generator: torch.Generator | None, seed: int | None) -> Tensor:
    """One int64 on ``device``: drawn from ``generator`` (or torch's own), or holding the bits of ``seed``.

    It is a tensor so that nothing synchronises and a captured CUDA graph draws a fresh one at every replay.
    """
    if seed is None:
        if generator is None and ops.leaves_python():
            return _portable_seed(device)
        low, high = -(2**63), 2**63 - 1
        if generator is None:
            return torch.randint(low, high, (1,), dtype=torch.int64, device=device)
        place = device if generator.device.type == device.type else generator.device
        return torch.randint(low, high, (1,), dtype=torch.int64, device=place, generator=generator).to(device)
    if generator is not None:
        raise ValueError("generator and seed exclude each other: pass one of them, got both")
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise TypeError(f"seed must be an int, got {type(seed).__name__}")
    if not -(2**63) <= seed < 2**64:  # torch 2.8 would compile a look into a range as one at all its numbers
        raise ValueError(f"seed must be a 64-bit int, got {seed}")
    return torch.full((1,), seed - (1 << 64) if seed >= 1 << 63 else seed, dtype=torch.int64, device=device)


def _portable_seed(device: torch.device) -> Tensor:
    """63 random bits. ONNX draws integers as float32, which hold 24 bits and no more."""
    words = torch.randint(0, 1 << 21, (3,), dtype=torch.int64, device=device)
    return (words * torch.tensor([1, 1 << 21, 1 << 42], device=device)).sum(0, keepdim=True)
