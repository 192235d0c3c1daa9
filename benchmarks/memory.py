"""What the memory of this machine delivers, measured in the run that it judges, and the most a call takes of it."""

from __future__ import annotations

import contextlib
import itertools
import os
import sys
from collections.abc import Iterator

import torch
from torch.profiler import ProfilerActivity, profile

from .timing import Call, interleaved, median

BYTES = {"cpu": 256 << 20, "cuda": 2 << 30}  # well past any cache


def three_stream(total: int, device: str) -> Call:
    """A loop that moves ``total`` bytes and does next to nothing: c = a − b in float32, into memory that is there."""
    a, b, c = torch.rand(3, max(1, total // 12), device=device)
    return lambda: torch.sub(a, b, out=c)


def copy(total: int, device: str) -> Call:
    """A copy that moves ``total`` bytes, reads and writes together."""
    a, b = torch.rand(2, max(1, total // 8), device=device)
    return lambda: b.copy_(a)


def bandwidth(device: str) -> dict[str, float]:
    """Bytes a second of both, on arrays that no cache holds."""
    kind = torch.device(device).type
    total = BYTES[kind]
    calls = {"copy": copy(total, device), "three_stream": three_stream(total, device)}
    return {name: total / median(times) for name, times in interleaved(calls, kind, budget=1.0).items()}


def peak_extra_bytes(call: Call, kind: str) -> int:
    """The most bytes alive during a call beyond those before it, results included.

    Torch's allocators are watched: the CPU's through its profiler.
    """
    call()
    if kind == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with _quiet(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        result = call()
    del result
    # every allocation and release with its sign, but not in order
    changes = (event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]")
    in_order = sorted(changes, key=lambda event: event.start_ns())
    return max(itertools.accumulate((event.nbytes() for event in in_order), initial=0))


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """The profiler's C++ half reports its start and stop on stderr, past Python, and offers no switch for it."""
    sys.stderr.flush()
    saved, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)
        os.close(nowhere)
