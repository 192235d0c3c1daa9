"""Where the microseconds of a small ``elbo_loss``, forward + backward, go: timed layer by layer, from the inside out.

The whole call, then the same primitives without checks and autograd, then without choosing who runs them, then those on
one element: what remains of them is host code, and what size adds is the kernel.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .. import functional, ops
from ..registry import backend_for
from .ops import OPS
from .timing import interleaved, median
from .works import Work

LATENT = {"log_scale": True, "samples": 0, "free_bits": 0.0, "reduction": "batchmean"}
RECONSTRUCTION = {"likelihood": "bernoulli_logits", "parameter": 0.0, "reduction": "batchmean", "with_gradient": True}
ELBO = {**RECONSTRUCTION, "log_scale": True, "beta": 1.0, "free_bits": 0.0}


def measure(work: Work, device: str, budget: float = 4.0) -> dict[str, float]:
    """Seconds in each part; they add up to the first."""
    kind = torch.device(device).type
    backend = backend_for(kind)

    def chosen(*_: Tensor) -> Any:
        return backend

    layers = {
        "call": _call(work, device),
        "dispatch": _primitives(ops.primitives, work, device),
        "backend": _primitives(chosen, work, device),
        "one element": _primitives(chosen, work._replace(shape=(1, 1), latent=1), device),
    }
    times = {name: median(t) for name, t in interleaved(layers, kind, budget=budget).items()}
    return {
        "whole call": times["call"],
        "of which Python: checks and autograd": times["call"] - times["dispatch"],
        "of which dispatch: who runs it": times["dispatch"] - times["backend"],
        "of which the backend's host code": times["one element"],
        "of which kernels: what size adds": times["backend"] - times["one element"],
    }


def _inputs(work: Work, device: str) -> list[Tensor]:
    return OPS[work.op].inputs(work, torch.Generator(device).manual_seed(0))


def _call(work: Work, device: str) -> Callable[[], Any]:
    recon, target, mu, logvar = _inputs(work, device)
    leaves = [t.requires_grad_() for t in (recon, mu, logvar)]
    return lambda: torch.autograd.grad(functional.elbo_loss(recon, target, mu, logvar).loss, leaves)


def _primitives(choose: Callable[..., Any], work: Work, device: str) -> Callable[[], Any]:
    """What ``autograd.ELBO`` calls, in order, of the backend that was chosen."""
    recon, target, mu, logvar = _inputs(work, device)
    one = torch.ones((), device=device)

    def call() -> None:
        with torch.no_grad():
            run = choose(recon, target, mu, logvar)
            _, _, _, gradient = run.elbo_forward(recon, target, mu, logvar, **ELBO)
            run.rescale_(gradient, one)
            run.latent_backward(None, one, mu, logvar, None, None, None, **LATENT)

    return call
