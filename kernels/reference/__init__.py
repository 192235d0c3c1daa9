"""Backend ``torch``: the specification. Plain torch expressions, any device, differentiable to any order."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .latent import latent_backward, latent_forward
from .pairs import (
    aggregate_posterior_backward,
    aggregate_posterior_forward,
    mixture_backward,
    mixture_forward,
    mmd_backward,
    mmd_forward,
)
from .reconstruction import reconstruction_backward, reconstruction_forward, rescale_
from .rows import rows_backward, rows_forward

__all__ = [
    "aggregate_posterior_backward",
    "aggregate_posterior_forward",
    "elbo_backward",
    "elbo_forward",
    "latent_backward",
    "latent_forward",
    "mixture_backward",
    "mixture_forward",
    "mmd_backward",
    "mmd_forward",
    "reconstruction_backward",
    "reconstruction_forward",
    "rescale_",
    "rows_backward",
    "rows_forward",
]


def elbo_forward(
    recon: Tensor,
    target: Tensor,
    mu: Tensor,
    scale: Tensor,
    *,
    likelihood: str,
    parameter: float,
    log_scale: bool,
    low: float,
    high: float,
    beta: float,
    free_bits: float,
    reduction: str,
    with_gradient: bool,
) -> list[Tensor]:
    nll, *gradient = reconstruction_forward(
        recon, target, likelihood=likelihood, parameter=parameter, reduction=reduction, with_gradient=with_gradient
    )
    (kl,) = latent_forward(
        mu, scale, None, None, None, log_scale=log_scale, low=low, high=high, samples=0, free_bits=free_bits,
        reduction=reduction,
    )  # fmt: skip
    return [(nll + beta * kl).to(nll.dtype), nll, kl, *gradient]


def elbo_backward(
    gradient: Tensor, upstream: Tensor, mu: Tensor, scale: Tensor, *, beta: float, **options: Any
) -> list[Tensor]:
    rescale_(gradient, upstream)
    return latent_backward(None, beta * upstream, mu, scale, None, None, None, samples=0, **options)
