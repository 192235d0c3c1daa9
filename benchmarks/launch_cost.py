"""What a call costs beside its kernel: ``python -m fastvae.benchmarks.launch_cost`` and, in the bars, ``parts``.

Each primitive of a CPU backend is called with one element, which takes the kernel nanoseconds, the way
``fastvae/ops.py`` calls it: from Python tensors to the compiled loop and back, outputs allocated. CPU time of the
calling thread, so that other work on the machine counts little: the best and the median of many runs of many calls.
"""

from __future__ import annotations

import math
import statistics
import sys
import time
import timeit
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .. import functional
from ..registry import backend_for, load
from .ops import OPS
from .timing import interleaved, median
from .works import Work

CALLS, RUNS = 2000, 15
BOUNDS = {"low": -math.inf, "high": math.inf}
LATENT = {"log_scale": True, **BOUNDS, "samples": 0, "free_bits": 0.0, "reduction": "batchmean"}
RECONSTRUCTION = {"likelihood": "bernoulli_logits", "parameter": 0.0, "reduction": "batchmean", "with_gradient": True}
BACKWARD = {"log_scale": True, **BOUNDS, "beta": 1.0, "free_bits": 0.0, "reduction": "batchmean"}
ELBO = {**RECONSTRUCTION, **BACKWARD}


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
        "elbo_forward, with gradients": lambda: backend.elbo_forward(y, x, mu, logvar, **ELBO),
        "torch.empty_like, for scale": lambda: torch.empty_like(y),
    }


def parts(work: Work, device: str, budget: float = 4.0) -> dict[str, float]:
    """Seconds in each part of a small ``elbo_loss``, forward + backward; they add up to the first.

    What torch's own engine takes is the time of a graph of one multiplication of one number, backward included. What
    size adds to the primitives, called on one element and on all, is the kernels'. The rest is this library's.
    """
    kind = torch.device(device).type
    number = torch.zeros((), device=device, requires_grad=True)
    layers = {
        "call": _call(work, device),
        "engine": lambda: torch.autograd.grad(number * 2, number),
        "primitives": _primitives(work, device),
        "one element": _primitives(work._replace(shape=(1, 1), latent=1), device),
    }
    times = {name: median(t) for name, t in interleaved(layers, kind, budget=budget).items()}
    kernels = times["primitives"] - times["one element"]
    return {
        "whole call": times["call"],
        "of which torch's autograd: a graph of one number": times["engine"],
        "of which kernels: what size adds": kernels,
        "of which checks, outputs and node": times["call"] - times["engine"] - kernels,
    }


def _inputs(work: Work, device: str) -> list[Tensor]:
    return OPS[work.op].inputs(work, torch.Generator(device).manual_seed(0))


def _call(work: Work, device: str) -> Callable[[], Any]:
    recon, target, mu, logvar = _inputs(work, device)
    leaves = [t.requires_grad_() for t in (recon, mu, logvar)]
    return lambda: torch.autograd.grad(functional.elbo_loss(recon, target, mu, logvar).loss, leaves)


def _primitives(work: Work, device: str) -> Callable[[], Any]:
    """What a call of ``elbo_loss`` asks of the backend, in order."""
    recon, target, mu, logvar = _inputs(work, device)
    one, backend = torch.ones((), device=device), backend_for(torch.device(device).type)

    def call() -> None:
        with torch.no_grad():
            _, _, _, gradient, *of_kl = backend.elbo_forward(recon, target, mu, logvar, **ELBO)
            if not of_kl:
                backend.elbo_backward(gradient, one, mu, logvar, **BACKWARD)

    return call


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
