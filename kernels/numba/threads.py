"""Runs a compiled span kernel on as many threads as torch uses, over rows split into contiguous spans.

Numba's own threading is not used: its pools abort in a forked ``DataLoader`` worker or when two Python threads call at
once. Compiled kernels release the GIL, so Python's threads do; they are made again after a fork. What a kernel writes
for a row does not depend on the split, so results are the same bits for any number of threads.

A span is an entry of a queue. ``concurrent.futures`` would do too, through 23 more Python frames a call.
"""

from __future__ import annotations

import os
import threading
from queue import SimpleQueue
from typing import Any

import torch

MIN_ELEMENTS = 1 << 15  # a thread's share below which waking it (20 to 50 µs) costs more than it saves

_compiling = threading.Lock()
_growing = threading.Lock()
_queue: SimpleQueue[Span] = SimpleQueue()
_workers = 0


def _forget_workers() -> None:
    global _growing, _queue, _workers
    _growing, _queue, _workers = threading.Lock(), SimpleQueue(), 0  # threads did not survive the fork


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_workers)


class Span:
    """``kernel(first, last, *args)``, for one thread: a worker, or none where the caller has left before."""

    __slots__ = ("call", "done", "error", "finished", "owner", "result")

    def __init__(self, call: tuple[Any, ...]):
        self.call = call
        self.owner: dict[str, bool] = {}
        self.error: BaseException | None = None
        self.result = 0
        self.finished = False
        self.done = threading.Lock()
        self.done.acquire()

    def taken_by(self, worker: bool) -> bool:
        """Whether it is the worker's, or the caller's to drop: the first to ask has it, however often he asks."""
        return self.owner.setdefault("worker", worker) is worker

    def run(self) -> None:
        if not self.taken_by(worker=True):
            return
        try:
            kernel, *args = self.call
            self.result = kernel(*args)
        except BaseException as error:  # for the thread that waits
            self.error = error
        finally:
            self.finished = True
            self.done.release()


def _serve(queue: SimpleQueue[Span]) -> None:
    while True:
        queue.get().run()


def _grow(threads: int) -> None:
    global _workers
    with _growing:
        while _workers < threads:
            threading.Thread(target=_serve, args=(_queue,), name="fastvae", daemon=True).start()
            _workers += 1


def run(kernel: Any, rows: int, cost: int, *args: int | float) -> int:
    """``kernel(first, last, *args)``, of Numba, over spans of ``rows`` rows; the bitwise or of what the spans return.

    ``cost`` is the number of elements of one row, for the decision how many threads are worth waking.
    """
    if not kernel.overloads:
        with _compiling:  # here, once: 16 threads that all asked Numba to compile have crashed a process
            kernel(0, 0, *args)
    threads = min(torch.get_num_threads(), rows, max(1, rows * cost // MIN_ELEMENTS))
    if threads <= 1:
        return kernel(0, rows, *args)
    if _workers < threads - 1:
        _grow(threads - 1)
    # made before the first is queued: an interrupt may come when a thread works already
    spans: list[Span] = []
    for t in range(1, threads):
        spans.append(Span((kernel, rows * t // threads, rows * (t + 1) // threads, *args)))
    try:
        for span in spans:
            _queue.put(span)
        flags = kernel(0, rows // threads, *args)
        for span in spans:
            span.done.acquire()
            if span.error is not None:
                raise span.error
            flags |= span.result
    except BaseException:
        _wait_for(spans)
        raise
    return flags


def _wait_for(spans: list[Span]) -> None:
    """Returns when none runs or will, however often it is interrupted: their outputs are freed after that."""
    for span in spans:
        while True:
            try:
                if not span.taken_by(worker=False):
                    while not span.finished:
                        span.done.acquire(timeout=0.01)
            except KeyboardInterrupt:
                continue
            break
