"""Where the microseconds of a small ``elbo_loss``, forward + backward, go: timed layer by layer, from the inside out.

The whole call, then the same operators without checks and autograd, then the backend's functions without the
dispatcher, then those on one element: what remains of them is host code, and what size adds is the kernel.
"""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch

from fastvae import functional, ops
from fastvae.backends import backend_for
from fastvae.bench.ops import OPS
from fastvae.bench.timing import interleaved, median
from fastvae.bench.works import Work

LATENT = {"log_scale": True, "samples": 0, "free_bits": 0.0, "reduction": "batchmean"}
RECONSTRUCTION = {"likelihood": "bernoulli_logits", "parameter": 0.0, "reduction": "batchmean", "with_gradient": True}


def measure(work: Work, device: str, budget: float = 4.0) -> dict[str, float]:
    """Seconds in each part; they add up to the first."""
    kind = torch.device(device).type
    layers = {
        "call": _call(work, device),
        "operators": _primitives(ops, work, device),
        "backend": _primitives(backend_for(kind), work, device),
        "one element": _primitives(backend_for(kind), work._replace(shape=(1, 1), latent=1), device),
    }
    times = {name: median(t) for name, t in interleaved(layers, kind, budget=budget).items()}
    return {
        "whole call": times["call"],
        "of which Python: checks and autograd": times["call"] - times["operators"],
        "of which dispatch: torch.library": times["operators"] - times["backend"],
        "of which the backend's host code": times["one element"],
        "of which kernels: what size adds": times["backend"] - times["one element"],
    }


def _inputs(work: Work, device: str) -> list[torch.Tensor]:
    return OPS[work.op].inputs(work, torch.Generator(device).manual_seed(0))


def _call(work: Work, device: str) -> Callable[[], Any]:
    recon, target, mu, logvar = _inputs(work, device)
    leaves = [t.requires_grad_() for t in (recon, mu, logvar)]
    return lambda: torch.autograd.grad(functional.elbo_loss(recon, target, mu, logvar).loss, leaves)


def _primitives(layer: Any, work: Work, device: str) -> Callable[[], Any]:
    """What ``autograd.ELBO`` calls, in order, of ``layer``: the operators or a backend."""
    recon, target, mu, logvar = _inputs(work, device)
    run = SimpleNamespace(elbo=layer.elbo_forward, rescale=layer.rescale_, latent=layer.latent_backward)
    one = torch.ones((), device=device)

    def call() -> None:
        with torch.no_grad():
            _, _, _, gradient = run.elbo(
                recon, target, mu, logvar, **RECONSTRUCTION, log_scale=True, beta=1.0, free_bits=0.0
            )
            run.rescale(gradient, one)
            run.latent(None, one, mu, logvar, None, None, None, **LATENT)

    return call
