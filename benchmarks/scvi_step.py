"""SCVI's training step, its own and patched: ``python -m fastvae.benchmarks.scvi_step`` (needs scvi-tools), 2 minutes.

The module of ``scvi.model.SCVI`` with its defaults, one minibatch, and the Adam of its training plan: forward, loss,
backward, step. Two modules of the same weights take turns. Counts are synthetic, 9 of 10 are 0. Both losses are
compared before they are timed. The exit code is 1 where the bar is missed.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..errors import UserError
from ..integrations.scvi import patch
from .hardware import Others, cpu_name, installed
from .table import aligned, duration, times
from .timing import interleaved, median

CELLS = 128
WORKS = (("zinb", 10_000), ("nb", 10_000), ("zinb", 2_000), ("nb", 2_000))
BARS = {("zinb", 10_000): 2.2}
CLOSE = 1e-4  # relative, of the losses of two modules with the same noise


class Step(NamedTuple):
    """Seconds a step."""

    own: float
    patched: float

    @property
    def ratio(self) -> float:
        """How many times longer scvi-tools' own takes."""
        return self.own / self.patched


def counts(cells: int, genes: int) -> Tensor:
    """Counts of cells of different depth and genes of different means: about 9 of 10 are 0."""
    torch.manual_seed(0)
    gene = torch.distributions.Gamma(0.3, 1.2).sample((genes,))
    depth = torch.distributions.Gamma(2.0, 2.0).sample((cells, 1))
    return torch.poisson(torch.distributions.Gamma(1.0, 1.0).sample((cells, genes)) * gene * depth)


def step(module: Any, x: Tensor) -> Callable[[], Tensor]:
    """A call that trains ``module`` on one minibatch and gives the loss."""
    nothing = torch.zeros(len(x), 1, dtype=torch.int64)
    tensors = {"X": x, "batch": nothing, "labels": nothing}
    optimizer = torch.optim.Adam(module.parameters(), lr=1e-3, eps=0.01, weight_decay=1e-6)  # of scvi-tools' plan

    def call() -> Tensor:
        optimizer.zero_grad()
        loss: Tensor = module(tensors, loss_kwargs={"kl_weight": 1.0})[2].loss
        loss.backward()
        optimizer.step()
        return loss.detach()

    return call


def measure(likelihood: str, genes: int, budget: float) -> Step:
    """Median of the steps, which take turns for about ``budget`` seconds."""
    from scvi.module import VAE

    x = counts(CELLS, genes)
    own, patched = (VAE(genes, n_batch=1, gene_likelihood=likelihood) for _ in range(2))
    patched.load_state_dict(own.state_dict())
    patch(patched)
    calls = {"own": step(own, x), "patched": step(patched, x)}
    losses = []
    for call in calls.values():
        torch.manual_seed(0)
        losses.append(call())
    torch.testing.assert_close(losses[1], losses[0], rtol=CLOSE, atol=0.0)
    found = interleaved(calls, "cpu", budget=budget)
    return Step(median(found["own"]), median(found["patched"]))


def main() -> int:
    """Print the table; an argument is the seconds a work (25)."""
    if installed("scvi-tools") is None:
        raise UserError("scvi-tools is not installed: pip install scvi-tools")
    budget = float(sys.argv[1]) if len(sys.argv) > 1 else 25.0
    others, missed = Others(), False
    table: list[tuple[str, ...]] = [("training step", "scvi-tools", "patched", "ratio", "bar")]
    for likelihood, genes in WORKS:
        found = measure(likelihood, genes, budget)
        bar = BARS.get((likelihood, genes))
        missed |= bar is not None and found.ratio < bar
        verdict = "–" if bar is None else f"≥ {times(bar)}: {'pass' if found.ratio >= bar else 'MISS'}"
        sizes = f"{likelihood}, {CELLS}×{genes:,}"
        table.append((sizes, duration(found.own), duration(found.patched), f"{found.ratio:.2f}×", verdict))
    print(*aligned(table), sep="\n")
    print(
        f"{cpu_name()}, {torch.get_num_threads()} threads, others kept {others.cores() or 0:.1f} cores busy; "
        f"torch {torch.__version__}, scvi-tools {installed('scvi-tools')}"
    )
    return int(missed)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except UserError as error:
        sys.exit(f"fastvae.benchmarks.scvi_step: error: {error}")
