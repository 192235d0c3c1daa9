"""Errors of our losses and gradients and of eager PyTorch's, each against float64 on the same rounded inputs.

The rule is that of ``tests/test_ops.py``: at most twice eager's error, plus what rounding alone may cost.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

import fastvae

from . import eager
from .ops import OPS
from .works import Work

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
WORKS = (
    Work("bce_with_logits", (512, 784)),
    Work("bce", (512, 784)),
    Work("gaussian_kl", (512, 64)),
    Work("elbo_loss", (512, 784), latent=20),
)

Value = Callable[..., Any]


def measure(device: str) -> Iterator[tuple[str, torch.dtype, float, float, bool]]:
    """``(op, dtype, our error, eager's error, within the rule)`` where we come closest to breaking it."""
    for dtype in DTYPES:
        for work in WORKS:
            op, inputs = OPS[work.op], _inputs(work._replace(dtype=dtype), device)
            exact = eager.bce_clipped if work.op == "bce" else op.eager["eager"]
            yield work.op, dtype, *_compare(inputs, op.leaves, op.ours, op.eager["eager"], exact)
        yield "reparameterize", dtype, *_sampler(dtype, device)


def _inputs(work: Work, device: str) -> list[Tensor]:
    tensors = OPS[work.op].inputs(work, torch.Generator(device).manual_seed(0))
    if work.op == "bce":
        tensors[0].clamp_(0.01, 0.99)  # nearer to 0 and 1 the forms people write differ by definition
    return tensors


def _sampler(dtype: torch.dtype, device: str) -> tuple[float, float, bool]:
    """z and its gradients for one ε, which zero means and unit variances show."""
    mu, logvar = _inputs(Work("reparameterize", (512, 64), dtype), device)
    zeros = torch.zeros(mu.shape, device=device)
    noise = fastvae.reparameterize(zeros, zeros, seed=1)

    def ours(mu: Tensor, logvar: Tensor) -> Tensor:
        return fastvae.reparameterize(mu, logvar, seed=1)

    def written(mu: Tensor, logvar: Tensor) -> Tensor:
        return mu + noise.to(mu.dtype) * torch.exp(0.5 * logvar)

    return _compare([mu, logvar], (0, 1), ours, written, written)


def _compare(
    inputs: list[Tensor], leaves: tuple[int, ...], ours: Value, written: Value, exact: Value
) -> tuple[float, float, bool]:
    wants = _results(exact, [t.double() for t in inputs], leaves)
    found = []
    for want, own, theirs in zip(wants, _results(ours, inputs, leaves), _results(written, inputs, leaves), strict=True):
        # 2⁻²² (2⁻⁵⁰) for each element that was added; a sum over a batch of 512 adds 784 of mean size
        eps = 2.0**-50 if inputs[0].dtype == torch.float64 else 2.0**-22
        slack = eps * (1 + want.abs().max().item())
        error, bound = _error(own, want), _error(theirs, want)
        found.append((error / (2 * bound + slack), error, bound))
    share, error, bound = max(found)
    return error, bound, share <= 1


def _error(value: Tensor, want: Tensor) -> float:
    return (value.double() - want).abs().max().item()


def _results(function: Value, inputs: list[Tensor], leaves: tuple[int, ...]) -> list[Tensor]:
    """The value and the gradients of its sum."""
    tensors = [t.detach().clone() for t in inputs]
    wanted = [tensors[k].requires_grad_() for k in leaves]
    value = function(*tensors)
    return [value.detach(), *torch.autograd.grad(value.sum(), wanted)]
