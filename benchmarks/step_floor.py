"""A training step against the same without a sample and a loss, its floor: ``python -m fastvae.benchmarks.step_floor``.

On a CPU, 784–400–20, Adam. In turns; medians. The exit code is 1 where a bar is missed: 1.10 times the floor at batch
8192, and nowhere slower than ``torch.compile`` of the eager loss.
"""

from __future__ import annotations

import sys

import torch

from .hardware import Others, cpu_name
from .table import aligned, duration
from .timing import interleaved, median
from .training import eager_loss, no_loss, own_loss, step
from .works import TRAINING, Work

BATCHES = (128, 1024, 8192)
BAR, AT = 1.10, 8192


def main() -> int:
    """Print the table; an argument is the seconds a batch size (20)."""
    budget = float(sys.argv[1]) if len(sys.argv) > 1 else 20.0
    others, missed = Others(), False
    table: list[tuple[str, ...]] = [("batch", "floor", "eager", "torch.compile", "fastvae", "of floor", "of compile")]
    for batch in BATCHES:
        torch._dynamo.reset()
        work = Work(TRAINING, (batch, 784), latent=20)
        losses = {"floor": no_loss, "eager": eager_loss, "compile": torch.compile(eager_loss), "fastvae": own_loss}
        calls = {name: step(work, "cpu", loss) for name, loss in losses.items()}
        for call in calls.values():
            call()
        took = {name: median(times) for name, times in interleaved(calls, "cpu", budget=budget).items()}
        of_floor, of_compile = took["fastvae"] / took["floor"], took["fastvae"] / took["compile"]
        missed |= of_compile > 1 or (batch == AT and of_floor > BAR)
        table.append((str(batch), *map(duration, took.values()), f"{of_floor:.2f}×", f"{of_compile:.2f}×"))
    print(*aligned(table), sep="\n")
    print(f"{cpu_name()}, {torch.get_num_threads()} threads, others kept {others.cores() or 0:.1f} cores busy")
    return int(missed)


if __name__ == "__main__":
    sys.exit(main())
