"""The floor: what the memory of this machine delivers, measured in the run that it judges."""

from __future__ import annotations

from collections.abc import Callable

import torch

BYTES = {"cpu": 256 << 20, "cuda": 2 << 30}  # well past any cache


def three_stream(total: int, device: str) -> Callable[[], object]:
    """A loop that moves ``total`` bytes and does next to nothing: c = a − b in float32, into memory that is there."""
    a, b, c = torch.rand(3, max(1, total // 12), device=device)
    return lambda: torch.sub(a, b, out=c)


def copy(total: int, device: str) -> Callable[[], object]:
    """A copy that moves ``total`` bytes, reads and writes together."""
    a, b = torch.rand(2, max(1, total // 8), device=device)
    return lambda: b.copy_(a)


def measure(device: str) -> dict[str, float]:
    """Bytes a second of both, on arrays that no cache holds."""
    from .timing import interleaved, median

    kind = torch.device(device).type
    total = BYTES[kind]
    calls = {"copy": copy(total, device), "three_stream": three_stream(total, device)}
    return {name: total / median(times) for name, times in interleaved(calls, kind, budget=1.0).items()}
