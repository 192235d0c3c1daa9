"""Time and memory of sums over pairs, against eager and compiled: ``python -m fastvae.benchmarks.pairs``.

Forward + backward of each term, contenders in turns; peak extra memory of each; the bars of B = 1024 and B = 4096; and
B = ``--large`` in a limited address space, by itself. Where a dense expression takes over ``--most`` bytes, its memory
is that of one tensor over pairs and dimensions, of which it has several.
"""

from __future__ import annotations

import argparse
import math
import resource
import subprocess
import sys
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from .. import pairs
from .memory import peak_extra_bytes
from .timing import interleaved, median

Call = Callable[[], object]
DIMENSIONS = 64
LIMIT = 2 << 30  # bytes beyond what a process with torch has before


def _densities(z: Tensor, mu: Tensor, logvar: Tensor) -> Tensor:
    return -0.5 * (math.log(2 * math.pi) + logvar + (z[:, None] - mu) ** 2 * torch.exp(-logvar))


def aggregate_posterior(z: Tensor, mu: Tensor, logvar: Tensor) -> Tensor:
    """Total correlation, as β-TCVAE's authors write it."""
    densities = _densities(z, mu, logvar)
    return (torch.logsumexp(densities.sum(2), 1) - torch.logsumexp(densities, 1).sum(1)).mean()


def mixture(z: Tensor, means: Tensor, logvars: Tensor) -> Tensor:
    """As VampPrior's."""
    return torch.logsumexp(_densities(z, means, logvars).sum(2), 1).mean()


def mmd(x: Tensor, y: Tensor) -> Tensor:
    """As InfoVAE's tutorial."""

    def mean(a: Tensor, b: Tensor) -> Tensor:
        return torch.exp(-((a[:, None] - b) ** 2).sum(2) / (2 * a.shape[1])).mean()

    return mean(x, x) + mean(y, y) - 2 * mean(x, y)


def _ours_posterior(z: Tensor, mu: Tensor, logvar: Tensor) -> Tensor:
    log_qz, log_prod_qz = pairs.aggregate_posterior(z, mu, logvar)
    return (log_qz - log_prod_qz).mean()


def _ours_mixture(z: Tensor, means: Tensor, logvars: Tensor) -> Tensor:
    return pairs.gaussian_mixture_log_prob(z, means, logvars).mean()


TERMS: dict[str, tuple[Callable[..., Tensor], Callable[..., Tensor], int]] = {
    "aggregate_posterior": (_ours_posterior, aggregate_posterior, 3),
    "gaussian_mixture_log_prob": (_ours_mixture, mixture, 3),
    "mmd": (pairs.mmd, mmd, 2),
}


def inputs(batch: int, count: int) -> list[Tensor]:
    """Leaves: z drawn from posteriors, their mean and log variance."""
    generator = torch.Generator().manual_seed(0)
    mu, noise = (torch.randn(batch, DIMENSIONS, generator=generator) for _ in range(2))
    logvar = 0.3 * torch.randn(batch, DIMENSIONS, generator=generator) - 1
    z = mu + torch.exp(logvar / 2) * noise
    return [t.requires_grad_() for t in (z, mu, logvar)][:count]


def step(function: Callable[..., Tensor], leaves: list[Tensor]) -> Call:
    """Forward + backward."""
    return lambda: torch.autograd.grad(function(*leaves), leaves)


def lines(batch: int, budget: float, most: int) -> Iterator[str]:
    """One line a term: medians, ratios, bytes."""
    tensor = 4 * batch * batch * DIMENSIONS
    for name, (ours, dense, count) in TERMS.items():
        leaves = inputs(batch, count)
        mine = step(ours, leaves)
        memory = peak_extra_bytes(mine, "cpu")
        if 6 * tensor > most:
            of = f"{memory / tensor:.2%} of one tensor over pairs ({tensor / 1e9:.2f} GB)"
            yield f"{name}, B = {batch}: {memory / 1e6:.1f} MB, {of}"
            continue
        calls = {"ours": mine, "eager": step(dense, leaves), "compile": step(torch.compile(dense), leaves)}
        times = {who: median(seconds) for who, seconds in interleaved(calls, "cpu", budget=budget).items()}
        eager_memory = peak_extra_bytes(calls["eager"], "cpu")
        ratios = ", ".join(f"{who} {1e3 * t:.0f} ms ({t / times['ours']:.1f}×)" for who, t in times.items())
        yield f"{name}, B = {batch}: {ratios}; {memory / 1e6:.1f} MB, {memory / eager_memory:.2%} of eager's"


def large(batch: int) -> None:
    """One forward + backward of each term in an address space of LIMIT bytes more than the process has."""
    with open("/proc/self/statm") as file:
        have = int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (have + LIMIT, have + LIMIT))
    for ours, _, count in TERMS.values():
        leaves = inputs(batch, count)
        step(ours, leaves)()


def main() -> int:
    """Print a line for each term and size."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--batch", type=int, action="append", help="again for several; 1024 and 4096")
    parser.add_argument("--budget", type=float, default=20.0, help="seconds a term")
    parser.add_argument("--most", type=float, default=8e9, help="bytes a dense expression may take")
    parser.add_argument("--large", type=int, default=16_384, help="rows that must fit into 2 GiB; 0: not tried")
    parser.add_argument("--only-large", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.only_large:
        large(args.large)
        return 0
    print(f"{torch.get_num_threads()} threads, D = {DIMENSIONS}, float32, forward + backward")
    for batch in args.batch or [1024, 4096]:
        for line in lines(batch, args.budget, int(args.most)):
            print(line, flush=True)
    if not args.large:
        return 0
    command = [sys.executable, "-m", "fastvae.benchmarks.pairs", "--only-large", "--large", str(args.large)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    print(f"B = {args.large} in {LIMIT >> 30} GiB: {'runs' if done.returncode == 0 else done.stderr[-500:]}")
    return done.returncode


if __name__ == "__main__":
    sys.exit(main())
