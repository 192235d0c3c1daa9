"""Runs a compiled span kernel on as many threads as torch uses, over rows split into contiguous spans.

Numba's own threading is not used: its pools abort in a forked ``DataLoader`` worker or when two Python threads call at
once. Compiled kernels release the GIL, so Python's thread pool does; a pool is made again after a fork. What a
kernel writes for a row does not depend on the split, so results are the same bits for any number of threads.
"""

from __future__ import annotations

import os
import threading
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Any

import torch

MIN_ELEMENTS = 1 << 15  # a thread's share below which waking it (20 to 50 µs) costs more than it saves

_compiling = threading.Lock()
_pool: ThreadPoolExecutor | None = None
_pool_size = 0


def _forget_pool() -> None:
    global _pool
    _pool = None  # its threads did not survive the fork


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_pool)


def run(kernel: Any, rows: int, cost: int, *args: int | float) -> int:
    """``kernel(first, last, *args)``, of Numba, over spans of ``rows`` rows; the bitwise or of what the spans return.

    ``cost`` is the number of elements of one row, for the decision how many threads are worth waking.
    """
    global _pool, _pool_size
    if not kernel.overloads:
        with _compiling:  # here, once: 16 threads that all asked Numba to compile have crashed a process
            kernel(0, 0, *args)
    threads = min(torch.get_num_threads(), rows, max(1, rows * cost // MIN_ELEMENTS))
    if threads <= 1:
        return kernel(0, rows, *args)
    pool = _pool
    if pool is None or _pool_size < threads:
        pool = _pool = ThreadPoolExecutor(threads, thread_name_prefix="fastvae")
        _pool_size = threads
    bounds = [rows * t // threads for t in range(threads + 1)]
    # made before they are submitted: an interrupt may come when a thread already works and submit has not returned
    others: list[Future[int]] = [Future() for _ in range(1, threads)]
    try:
        for t, other in enumerate(others, 1):
            pool.submit(_serve, other, kernel, bounds[t], bounds[t + 1], *args)
        flags = kernel(0, bounds[1], *args)
        for other in others:
            flags |= other.result()
    except BaseException:
        _pool = None  # an interrupted submit may have left the pool without the thread it counted
        _wait_for(others)
        raise
    return flags


def _serve(future: Future[int], kernel: Any, *args: int | float) -> None:
    if not future.set_running_or_notify_cancel():
        return
    try:
        future.set_result(kernel(*args))
    except BaseException as error:
        future.set_exception(error)


def _wait_for(futures: list[Future[int]]) -> None:
    """Returns when none runs or will, however often it is interrupted: their outputs are freed after that."""
    while True:
        try:
            wait([future for future in futures if not future.cancel()])
        except KeyboardInterrupt:
            continue
        return
