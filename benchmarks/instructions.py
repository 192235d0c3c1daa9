"""What each CPU instruction set makes of the bars' works: ``python -m fastvae.benchmarks.instructions``.

The primitives of ``cpp`` are called without checks and autograd, on all threads, one instruction set after another in
turns, beside the floor: a 3-stream loop over the bytes of the work. The fastest round counts, not the median: the loops
and their data are the same in each round, so what is longer is what other processes took.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator

import torch

from .. import _C
from .bars import HALF, LATENT, LOGITS, PROBS
from .contenders import FLOOR
from .limits import primitive
from .memory import three_stream
from .ops import bytes_moved
from .table import aligned, duration
from .timing import interleaved
from .works import Work

KL = LATENT._replace(op="gaussian_kl")


@contextlib.contextmanager
def using(name: str) -> Iterator[None]:
    """The loops of one instruction set; of any, for the floor, which is torch's."""
    before = _C.instructions()
    if name != FLOOR:
        _C.instructions(name)
    try:
        yield
    finally:
        _C.instructions(before)


def measure(work: Work, budget: float) -> dict[str, float]:
    """Seconds a call of each set, and of the floor."""
    call = primitive(work, "cpp")
    calls = dict.fromkeys(_C.instruction_sets(), call) | {FLOOR: three_stream(bytes_moved(work), "cpu")}
    return {name: min(times) for name, times in interleaved(calls, "cpu", budget=budget, context=using).items()}


def main() -> None:
    """Print the table; an argument is the seconds a work (10)."""
    budget = float(sys.argv[1]) if len(sys.argv) > 1 else 10.0
    sets = _C.instruction_sets()
    table: list[tuple[str, ...]] = [(f"{torch.get_num_threads()} threads", *sets, FLOOR, f"{sets[-1]} of the floor")]
    for work in (LOGITS, PROBS, HALF, LATENT, KL):
        times = measure(work, budget)
        ratio = f"{times[sets[-1]] / times[FLOOR]:.2f}×"
        table.append((f"{work.op} · {work.size} · {work.types}", *map(duration, times.values()), ratio))
    print(*aligned(table), sep="\n")


if __name__ == "__main__":
    main()
