"""The clocks. Contenders take turns, so that a machine that is busy for a second is so for all of them; medians.

On a CPU: ``timeit`` of a burst of calls, without garbage collection. On a GPU: CUDA events around it, inputs rotated
by the caller.
"""

from __future__ import annotations

import contextlib
import math
import statistics
import time
import timeit
from collections.abc import Callable, Mapping
from typing import Any

import torch

MIN_BURST = 2e-3  # seconds: long enough for the clock, and for threads of the contender before to go to sleep
LONG = 20e-3  # seconds
MIN_ROUNDS, MAX_ROUNDS = 7, 400
BACKLOG = 40_000_000  # clocks a GPU is kept asleep while work is queued: about 20 ms

Call = Callable[[], Any]
median = statistics.median


def quartiles(times: list[float]) -> tuple[float, float]:
    """First and third: how far to trust the median."""
    low, _, high = statistics.quantiles(times, n=4)
    return low, high


def burst(call: Call, count: int, kind: str) -> float:
    """Seconds a call, of ``count`` in a row."""
    if kind == "cuda":
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        timeit.timeit(call, number=count)
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3 / count
    return timeit.timeit(call, number=count) / count


def device_seconds(call: Call) -> float | None:
    """Seconds a call keeps the GPU, without what the host takes: it waits for a burst that is queued whole.

    None where the host takes so long that the GPU began before all was queued.
    """
    for _ in range(2):
        call()
    torch.cuda.synchronize()
    count = max(1, min(20, math.ceil(MIN_BURST / burst(call, 3, "cuda"))))
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    times = []
    for _ in range(MIN_ROUNDS):
        torch.cuda._sleep(BACKLOG)
        start.record()
        for _ in range(count):
            call()
        end.record()
        waited = not start.query()
        end.synchronize()
        if waited:
            times.append(start.elapsed_time(end) / 1e3 / count)
        elif count > 1:  # fewer fit into the time the GPU was kept asleep
            count = max(1, count // 2)
    return median(times) if len(times) >= 3 else None


def burst_sizes(call: Call, kind: str) -> tuple[int, int]:
    """Calls that take about ``MIN_BURST``, and how many to make untimed before: the caches are another contender's.

    A call of ``LONG`` or more sweeps through the caches itself, so it needs none before.
    """
    call()
    seconds = burst(call, 1, kind)
    if seconds >= LONG:
        return 1, 0
    count = max(1, math.ceil(MIN_BURST / min(burst(call, 2, kind) for _ in range(3))))
    return count, 1 + count // 4


def interleaved(
    calls: Mapping[str, Call],
    kind: str,
    *,
    budget: float,
    context: Callable[[str], contextlib.AbstractContextManager[Any]] = lambda _: contextlib.nullcontext(),
) -> dict[str, list[float]]:
    """Seconds a call, in many rounds of every contender in turn, for about ``budget`` seconds.

    ``context(name)`` is entered around each burst of that contender.
    """
    sizes: dict[str, tuple[int, int]] = {}
    for name, call in calls.items():
        with context(name):
            sizes[name] = burst_sizes(call, kind)
    times: dict[str, list[float]] = {name: [] for name in calls}
    end = time.perf_counter() + budget
    for done in range(MAX_ROUNDS):
        if done >= MIN_ROUNDS and time.perf_counter() > end:
            break
        for name, call in calls.items():
            with context(name):
                timed, untimed = sizes[name]
                for _ in range(untimed):
                    call()
                times[name].append(burst(call, timed, kind))
    return times
