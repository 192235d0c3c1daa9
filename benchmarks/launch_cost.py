"""What a call costs before the kernel runs: ``python -m fastvae.benchmarks.launch_cost``.

Each primitive of a CPU backend is called with one element, which takes the kernel nanoseconds, the way
``fastvae/ops.py`` calls it: from Python tensors to the compiled loop and back, outputs allocated. CPU time of the
calling thread, so that other work on the machine counts little: the best and the median of many runs of many calls.
"""

from __future__ import annotations

import statistics
import sys
import time
import timeit
from collections.abc import Callable

import torch

from ..registry import load
from .overhead import ELBO, LATENT, RECONSTRUCTION

CALLS, RUNS = 2000, 15


def primitives(name: str) -> dict[str, Callable[[], object]]:
    """Calls of one backend on one element each."""
    backend = load(name)
    if isinstance(backend, str):
        raise SystemExit(f"backend {name!r} is not available: {backend}")
    y, x, mu, logvar = (torch.rand(1, 1) for _ in range(4))
    seed, one = torch.tensor([1]), torch.ones(())
    return {
        "reconstruction_forward": lambda: backend.reconstruction_forward(
            y, x, **RECONSTRUCTION | {"with_gradient": False}
        ),
        "… with its gradient": lambda: backend.reconstruction_forward(y, x, **RECONSTRUCTION),
        "rescale_ by 1": lambda: backend.rescale_(y, one),
        "latent_forward": lambda: backend.latent_forward(mu, logvar, seed, None, None, **LATENT),
        "latent_backward": lambda: backend.latent_backward(mu, one, mu, logvar, seed, None, None, **LATENT),
        "elbo_forward": lambda: backend.elbo_forward(y, x, mu, logvar, **ELBO),
        "torch.empty_like, for scale": lambda: torch.empty_like(y),
    }


def main() -> None:
    names = sys.argv[1:] or ["cpp", "numba"]
    torch.set_num_threads(1)
    print(f"torch {torch.__version__}, {torch.backends.cpu.get_cpu_capability()}")
    for name in names:
        for what, call in primitives(name).items():
            call()
            times = [
                run / CALLS * 1e6 for run in timeit.repeat(call, timer=time.thread_time, number=CALLS, repeat=RUNS)
            ]
            print(f"{name:6} {what:28} {min(times):6.2f} µs at best, {statistics.median(times):6.2f} µs median")


if __name__ == "__main__":
    main()
