"""What ``logvar_clamp`` costs: ``python -m fastvae.benchmarks.clamp``, 1 minute, on an idle machine.

Forward + backward of each latent op with the clamp and without it, in turns. The exit code is 1 where one costs more
than its bar.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .. import functional
from .hardware import Others, cpu_name
from .table import aligned, duration
from .timing import interleaved, median

SHAPE = (8192, 64)
CLAMP = (-30.0, 20.0)  # of diffusers
BAR = 1.03


def sampled(mu: Tensor, logvar: Tensor, **options: Any) -> list[Tensor]:
    return [functional.reparameterize(mu, logvar, seed=0, **options)]


def kl(mu: Tensor, logvar: Tensor, **options: Any) -> list[Tensor]:
    return [functional.gaussian_kl(mu, logvar, **options)]


def both(mu: Tensor, logvar: Tensor, **options: Any) -> list[Tensor]:
    return list(functional.sample_with_kl(mu, logvar, seed=0, **options))


OPS: dict[str, Callable[..., list[Tensor]]] = {"reparameterize": sampled, "gaussian_kl": kl, "sample_with_kl": both}


def main() -> int:
    """Print the table; an argument is the seconds an op (10)."""
    budget = float(sys.argv[1]) if len(sys.argv) > 1 else 10.0
    others, missed = Others(), False
    table: list[tuple[str, ...]] = [("forward + backward", "without", "with the clamp", "ratio", "bar")]
    mu, logvar = (torch.randn(SHAPE).requires_grad_() for _ in range(2))
    for name, op in OPS.items():

        def step(op: Callable[..., list[Tensor]], **options: Any) -> None:
            outputs = op(mu, logvar, **options)
            torch.autograd.grad(outputs, (mu, logvar), [torch.ones_like(output) for output in outputs])

        found = interleaved(
            {"without": partial(step, op), "with": partial(step, op, logvar_clamp=CLAMP)}, "cpu", budget=budget
        )
        without, clamped = median(found["without"]), median(found["with"])
        missed |= clamped > BAR * without
        verdict = f"≤ {BAR}×: {'pass' if clamped <= BAR * without else 'MISS'}"
        table.append((name, duration(without), duration(clamped), f"{clamped / without:.3f}×", verdict))
    print(*aligned(table), sep="\n")
    print(f"{cpu_name()}, {torch.get_num_threads()} threads, others kept {others.cores() or 0:.1f} cores busy")
    return int(missed)


if __name__ == "__main__":
    sys.exit(main())
