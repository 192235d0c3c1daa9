"""The latent pair in pure torch: z and KL(q‖p) from mu and logvar (or std), and their gradients."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..layout import accumulator
from .noise import noise
from .reconstruction import reduce, spread

STD_EPS = 1e-8  # inside the logarithm of σ², so that std = 0 is finite


def kl_elements(
    mu: Tensor, scale: Tensor, prior_mu: Tensor | None, prior_logvar: Tensor | None, log_scale: bool, free_bits: float
) -> Tensor:
    """KL of two diagonal Gaussians, nats an element (Kingma & Welling 2014, appendix B, for p = N(0, I)).

    ½(logvar_p − logvar + (σ² + (mu − mu_p)²)/σ_p² − 1), at least ``free_bits`` (Kingma et al. 2016, eq. 15, each
    element its own group) where that is positive.
    """
    var = scale.exp() if log_scale else scale * scale
    log_var = scale if log_scale else torch.log(STD_EPS + var)
    if prior_mu is None or prior_logvar is None:
        kl = 0.5 * (mu * mu + var - 1 - log_var)
    else:
        kl = 0.5 * ((var + (mu - prior_mu) ** 2) * torch.exp(-prior_logvar) - 1 + prior_logvar - log_var)
    return kl.clamp(min=free_bits) if free_bits > 0 else kl


def clamped(scale: Tensor, low: float, high: float) -> Tensor:
    """logvar within [low, high], with no gradient outside; untouched where neither bounds it."""
    return scale.clamp(low, high) if low > -math.inf or high < math.inf else scale


def sample_shape(mu: Tensor, samples: int) -> torch.Size:
    """Shape of z: that of ``mu``, with ``samples`` in front unless it is 0."""
    return torch.Size((samples, *mu.shape)) if samples else mu.shape


def _cast(tensor: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if tensor is None else tensor.to(dtype)


def gaussian_kl(
    mu: Tensor,
    scale: Tensor,
    prior_mu: Tensor | None,
    prior_logvar: Tensor | None,
    log_scale: bool,
    low: float,
    high: float,
    free_bits: float,
    reduction: str,
) -> Tensor:
    dtype = accumulator(mu.dtype)
    p_mu, p_logvar = _cast(prior_mu, dtype), _cast(prior_logvar, dtype)
    s = clamped(scale.to(dtype), low, high)
    elements = kl_elements(mu.to(dtype), s, p_mu, p_logvar, log_scale, free_bits)
    return reduce(elements, reduction, mu.dtype)


def sample(mu: Tensor, scale: Tensor, seed: Tensor, log_scale: bool, low: float, high: float, samples: int) -> Tensor:
    """Draw z = mu + σ·ε (Kingma & Welling 2014, eq. 10)."""
    dtype = accumulator(mu.dtype)
    epsilon = noise(seed, sample_shape(mu, samples)).to(dtype)
    s = clamped(scale.to(dtype), low, high)
    std = torch.exp(0.5 * s) if log_scale else s
    return (mu.to(dtype) + std * epsilon).to(mu.dtype).contiguous()


def latent_forward(
    mu: Tensor,
    scale: Tensor,
    seed: Tensor | None,
    prior_mu: Tensor | None,
    prior_logvar: Tensor | None,
    *,
    log_scale: bool,
    low: float,
    high: float,
    samples: int,
    free_bits: float,
    reduction: str,
) -> list[Tensor]:
    outputs = []
    if seed is not None:
        outputs.append(sample(mu, scale, seed, log_scale, low, high, samples))
    if reduction:
        kl = gaussian_kl(mu, scale, prior_mu, prior_logvar, log_scale, low, high, free_bits, reduction)
        outputs.append(kl.contiguous())
    return outputs


def latent_backward(
    grad_z: Tensor | None,
    grad_kl: Tensor | None,
    mu: Tensor,
    scale: Tensor,
    seed: Tensor | None,
    prior_mu: Tensor | None,
    prior_logvar: Tensor | None,
    *,
    log_scale: bool,
    low: float,
    high: float,
    samples: int,
    free_bits: float,
    reduction: str,
) -> list[Tensor]:
    dtype = accumulator(mu.dtype)
    m, given = mu.to(dtype), scale.to(dtype)
    s = clamped(given, low, high)
    grad_mu, grad_scale = torch.zeros_like(m), torch.zeros_like(s)
    grad_priors: list[Tensor] = []
    if grad_z is not None and seed is not None:
        g = grad_z.to(dtype)
        g_epsilon = g * noise(seed, sample_shape(mu, samples)).to(dtype)
        if samples:
            g, g_epsilon = g.sum(dim=0), g_epsilon.sum(dim=0)
        grad_mu = grad_mu + g
        grad_scale = grad_scale + (0.5 * g_epsilon * torch.exp(0.5 * s) if log_scale else g_epsilon)
    if grad_kl is not None:
        c = spread(grad_kl, reduction, mu)
        var = s.exp() if log_scale else s * s
        slope = 0.5 * var if log_scale else s  # ∂(½σ²)/∂scale
        log_slope = 0.5 if log_scale else s / (STD_EPS + var)  # ∂(½ log σ²)/∂scale
        p_mu, p_logvar = _cast(prior_mu, dtype), _cast(prior_logvar, dtype)
        if free_bits > 0:
            c = c * (kl_elements(m, s, p_mu, p_logvar, log_scale, 0.0) >= free_bits)
        if p_mu is None or p_logvar is None:
            grad_mu, grad_scale = grad_mu + c * m, grad_scale + c * (slope - log_slope)
        else:
            precision, d = torch.exp(-p_logvar), m - p_mu
            grad_mu = grad_mu + c * (d * precision)
            grad_scale = grad_scale + c * (slope * precision - log_slope)
            grad_priors = [-c * (d * precision), 0.5 * c * (1 - (var + d * d) * precision)]
    elif prior_mu is not None:
        grad_priors = [torch.zeros_like(m), torch.zeros_like(m)]
    if s is not given:
        grad_scale = torch.where(s == given, grad_scale, 0.0)
    return [g.to(mu.dtype).contiguous() for g in (grad_mu, grad_scale, *grad_priors)]
