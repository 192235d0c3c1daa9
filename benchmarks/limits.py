"""What limits each CPU kernel, forward + backward: ``python -m benchmarks.limits``.

The same work an element on one thread with its data in cache (arithmetic alone), on one thread and on all with its data
in memory, beside the floor, a 3-stream loop over the same bytes, and beside the page faults of one call, which fresh
outputs cost. Where all threads in memory are no slower than their share of the arithmetic, arithmetic is the limit.
"""

from __future__ import annotations

import resource
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from fastvae.bench import bandwidth
from fastvae.bench.ops import OPS, bytes_moved
from fastvae.bench.timing import interleaved, median
from fastvae.bench.works import Work

from .bars import HALF, LATENT, LOGITS, PROBS

IN_CACHE = 192 << 10  # bytes: half of a small second-level cache
CALLS = 20
EXPLAINED = 0.8  # of the time with all threads, by arithmetic


class Limits(NamedTuple):
    """Nanoseconds an element, and page faults a call."""

    in_cache: float
    in_memory: float
    all_threads: float
    floor: float
    faults: float

    def limit(self, threads: int) -> str:
        """What the time with all threads is made of."""
        return "arithmetic" if self.in_cache / threads >= EXPLAINED * self.all_threads else "memory"


def _call(work: Work, threads: int) -> Callable[[], Any]:
    op = OPS[work.op]
    inputs = op.inputs(work, torch.Generator().manual_seed(0))
    leaves = [inputs[k].requires_grad_() for k in op.leaves]
    upstream = torch.randn(work.shape).to(work.dtype) if op.returns_z else None

    def call() -> None:
        if torch.get_num_threads() != threads:
            torch.set_num_threads(threads)
        out = op.ours(*inputs)
        if upstream is None:
            torch.autograd.grad(out, leaves)
        else:
            torch.autograd.grad(out, leaves, (upstream, torch.ones_like(out[1])))

    return call


def _faults(call: Callable[[], Any]) -> float:
    call()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(CALLS):
        call()
    return (resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) / CALLS


def measure(work: Work, budget: float = 4.0) -> Limits:
    """All of one work."""
    threads, (rows, cols) = torch.get_num_threads(), work.shape
    some = max(2, IN_CACHE * rows // bytes_moved(work))
    calls = {
        "some": _call(work._replace(shape=(some, cols)), 1),
        "few": _call(work._replace(shape=(1, cols)), 1),
        "one": _call(work, 1),
        "all": _call(work, threads),
    }
    try:
        times = {name: median(t) for name, t in interleaved(calls, "cpu", budget=budget).items()}
        floor = median(
            interleaved({"floor": bandwidth.three_stream(bytes_moved(work), "cpu")}, "cpu", budget=1)["floor"]
        )
        faults = _faults(calls["all"])
    finally:
        torch.set_num_threads(threads)
    elements = rows * cols
    in_cache = (times["some"] - times["few"]) / ((some - 1) * cols)
    return Limits(in_cache * 1e9, *(t / elements * 1e9 for t in (times["one"], times["all"], floor)), faults)


def main() -> None:
    """Print the table."""
    threads = torch.get_num_threads()
    print(f"ns an element, forward + backward; {threads} threads\n")
    heads = (
        "in cache, 1 thread",
        "in memory, 1 thread",
        f"in memory, {threads}",
        f"floor, {threads}",
        "page faults",
        "limit",
    )
    print(" ".join([" " * 48, *(h.rjust(20) for h in heads)]))
    for work in (LOGITS, PROBS, HALF, LATENT):
        found = measure(work)
        cells = [f"{value:.3f}" for value in found[:4]] + [f"{found.faults:.0f}", found.limit(threads)]
        title = f"{work.op} · {work.size} · {work.types}"
        print(" ".join([title.ljust(48), *(c.rjust(20) for c in cells)]))


if __name__ == "__main__":
    main()
