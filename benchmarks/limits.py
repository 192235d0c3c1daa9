"""What limits each CPU kernel, one-pass or forward + backward: ``python -m fastvae.benchmarks.limits``.

The same work an element on one thread with its data in cache (arithmetic alone), on one thread and on all with its data
in memory, beside the floor, a 3-stream loop over the same bytes. Where all threads in memory take little more than
their share of the arithmetic, arithmetic is the limit. The primitives are called without checks and autograd.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from ..functional import BCE_EPS
from ..registry import backend_for, load
from .bars import HALF, LATENT, LOGITS, PROBS
from .launch_cost import LATENT as LATENT_OPTIONS
from .launch_cost import RECONSTRUCTION
from .memory import three_stream
from .ops import OPS, bytes_moved
from .table import aligned
from .timing import interleaved, median
from .works import Work

IN_CACHE = 384 << 10  # bytes: three quarters of a small second-level cache
EXPLAINED = 0.8  # of the time with all threads, by arithmetic
LIKELIHOODS = {
    "bce_with_logits": RECONSTRUCTION,
    "bce": RECONSTRUCTION | {"likelihood": "bernoulli_probs", "parameter": BCE_EPS},
}


class Limits(NamedTuple):
    """Nanoseconds an element."""

    in_cache: float
    in_memory: float
    all_threads: float
    floor: float

    def limit(self, threads: int) -> str:
        """What the time with all threads is made of."""
        return "arithmetic" if self.in_cache / threads >= EXPLAINED * self.all_threads else "memory"


def primitive(work: Work, backend: str | None = None) -> Callable[[], Any]:
    """What a backend does of a work, forward and backward, without checks and autograd."""
    module = backend_for("cpu") if backend is None else load(backend)
    if isinstance(module, str):
        raise SystemExit(f"backend {backend!r} is not available: {module}")
    first, second = OPS[work.op].inputs(work, torch.Generator().manual_seed(0))
    seed, upstream, one = torch.zeros(1, dtype=torch.int64), torch.randn(first.shape).to(first.dtype), torch.ones(())

    def reconstruction() -> None:
        module.reconstruction_forward(first, second, **LIKELIHOODS[work.op])

    def latent() -> None:
        module.latent_forward(first, second, seed, None, None, **LATENT_OPTIONS)
        module.latent_backward(upstream, one, first, second, seed, None, None, **LATENT_OPTIONS)

    def kl() -> None:
        module.latent_forward(first, second, None, None, None, **LATENT_OPTIONS)
        module.latent_backward(None, one, first, second, None, None, None, **LATENT_OPTIONS)

    return reconstruction if work.op in LIKELIHOODS else kl if work.op == "gaussian_kl" else latent


def measure(work: Work, budget: float = 4.0) -> Limits:
    """All of one work."""
    threads, (rows, cols) = torch.get_num_threads(), work.shape
    some = IN_CACHE * rows // bytes_moved(work)
    whole = primitive(work)
    calls = {
        "some": (1, primitive(work._replace(shape=(some, cols)))),
        "few": (1, primitive(work._replace(shape=(1, cols)))),
        "one": (1, whole),
        "all": (threads, whole),
        "floor": (threads, three_stream(bytes_moved(work), "cpu")),
    }
    times = {}
    try:
        for name, (count, call) in calls.items():  # one by one: the caches are the question
            torch.set_num_threads(count)
            times[name] = median(interleaved({name: call}, "cpu", budget=budget / len(calls))[name])
    finally:
        torch.set_num_threads(threads)
    in_cache = (times["some"] - times["few"]) / ((some - 1) * cols)
    return Limits(*(t * 1e9 for t in (in_cache, *(times[name] / (rows * cols) for name in ("one", "all", "floor")))))


def main() -> None:
    """Print the table."""
    threads = torch.get_num_threads()
    heads = "in cache, 1 thread", "in memory, 1 thread", f"in memory, {threads}", f"floor, {threads}", "limit"
    table: list[tuple[str, ...]] = [("ns an element", *heads)]
    for work in (LOGITS, PROBS, HALF, LATENT):
        found = measure(work)
        table.append((f"{work.op} · {work.size} · {work.types}", *(f"{ns:.3f}" for ns in found), found.limit(threads)))
    print(*aligned(table), sep="\n")


if __name__ == "__main__":
    main()
