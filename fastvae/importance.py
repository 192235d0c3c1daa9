"""Densities of Gaussian latents at their samples, and the importance-weighted bound they are for. All in nats."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from . import checks
from .discrete import _rows


def _place(z: object, mu: object, logvar: object, samples: int | None) -> tuple[Tensor, Tensor, Tensor, torch.Size]:
    """z as ``[S, B, D]``, mean and logvar as ``[B, D]``, in one dtype; and the shape of a number for each sample."""
    z, mu = checks.tensor("z", z), checks.tensor("mu", mu)
    if isinstance(logvar, Tensor):
        scale, _ = checks.scale(mu, logvar, None)
    else:
        scale = checks.tensor("logvar", logvar)  # raises
    count = checks.sample_count(samples)
    wanted = (count, *mu.shape) if count else tuple(mu.shape)
    if tuple(z.shape) != wanted:
        which = f"[samples, B, *latent], {list(wanted)}," if count else f"the shape of mu, {list(wanted)},"
        raise ValueError(f"z must have {which} got {list(z.shape)}")
    if z.device != mu.device:
        raise ValueError(f"z must be on the device of mu, {mu.device}, got {z.device}")
    dtype = torch.promote_types(z.dtype, torch.promote_types(mu.dtype, scale.dtype))
    flat = mu.shape[0], mu.shape[1:].numel()
    shape = torch.Size((count, mu.shape[0]) if count else mu.shape[:1])
    return (
        z.to(dtype).reshape(count or 1, *flat), mu.to(dtype).reshape(flat), scale.to(dtype).reshape(flat), shape
    )  # fmt: skip


def gaussian_log_prob(z: Tensor, mu: Tensor, logvar: Tensor, *, samples: int | None = None) -> Tensor:
    """log N(z; mu, σ²), summed over the latents: −½ Σ ((z − mu)²/σ² + log σ² + log 2π).

    Differentiable in all three. Source: Kingma & Welling 2014, appendix C.2.

    Args:
        z: ``[B, *latent]``, or ``[samples, B, *latent]``.
        mu: mean, ``[B, *latent]``.
        logvar: log σ², as ``mu`` or of a shape that broadcasts to it.
        samples: how many z there are of each example, or None for one.

    Returns:
        nats: ``[B]``, or ``[samples, B]``.

    Raises:
        TypeError: an argument is not a floating-point tensor.
        ValueError: shapes or devices do not fit.

    >>> gaussian_log_prob(torch.zeros(2, 3), torch.zeros(2, 3), torch.zeros(2, 3))
    tensor([-2.7568, -2.7568])
    """
    z, mu, logvar, shape = _place(z, mu, logvar, samples)
    flat = -0.5 * math.log(2 * math.pi) * z.shape[-1]
    return (_rows("log_prob", (z, mu, logvar), "none") + flat).reshape(shape)


def log_q_minus_log_p(
    z: Tensor,
    mu: Tensor,
    logvar: Tensor,
    *,
    samples: int | None = None,
    prior_mu: Tensor | None = None,
    prior_logvar: Tensor | None = None,
) -> Tensor:
    """log q(z|x) − log p(z) of Gaussians, summed over the latents: the KL's one-sample estimate, in one pass over z.

    ½ Σ (z² − (z − mu)²/σ² − log σ²) for p = N(0, I); differentiable in all arguments. An importance weight is
    log p(x|z) minus this. Source: Burda et al. 2016, eq. 8.

    Args:
        z: samples of q, ``[B, *latent]``, or ``[samples, B, *latent]`` as ``reparameterize(…, samples=…)`` draws them.
        mu: mean of q, ``[B, *latent]``.
        logvar: log σ² of q, as ``mu`` or of a shape that broadcasts to it.
        samples: how many z there are of each example, or None for one.
        prior_mu: mean of p, of a shape that broadcasts to ``mu``; it comes with ``prior_logvar``.
        prior_logvar: log variance of p, likewise.

    Returns:
        nats: ``[B]``, or ``[samples, B]``.

    Raises:
        TypeError: an argument is not a floating-point tensor.
        ValueError: shapes or devices do not fit, or one of the prior's parameters comes alone.

    >>> log_q_minus_log_p(torch.zeros(5, 2, 3), torch.ones(2, 3), torch.zeros(2, 3), samples=5).shape
    torch.Size([5, 2])
    """
    given = checks.tensor("mu", mu)
    prior = checks.prior(given, prior_mu, prior_logvar)
    z, mu, logvar, shape = _place(z, given, logvar, samples)
    p_mu, p_logvar = (
        None if value is None else value.to(z.dtype).expand(given.shape).reshape(mu.shape) for value in prior
    )
    return _rows("log_ratio", (z, mu, logvar, p_mu, p_logvar), "none").reshape(shape)


def importance_weighted_bound(log_w: Tensor, z: Tensor | None = None) -> Tensor:
    """The importance-weighted bound of log p(x), log (1/K) Σ_k w_k: ``logsumexp(log_w, 0) − log K`` (IWAE).

    Source: Burda et al. 2016, eq. 8. With ``z``, the gradient that reaches z through ``log_w`` is the doubly
    reparameterised one: Σ_k w̃_k²·∂log w_k/∂z_k in place of Σ_k w̃_k·∂log w_k/∂z_k, w̃ the normalised weights, whose
    signal-to-noise ratio does not fall with K (Tucker et al. 2019, eq. 8). It is unbiased where q's parameters are
    detached in log q, so that they get no gradient but through z. The gradient in a decoder or a prior is the usual
    one.

    z then has a hook: nothing else may be computed of that very tensor, and z must come from a differentiable
    expression. ``torch.compile`` does not trace hooks; leave this one call outside.

    Args:
        log_w: log p(x|z) + log p(z) − log q(z|x) of K samples, ``[K, B]``.
        z: the samples that ``log_w`` was computed of, ``[K, B, *latent]``, for the doubly reparameterised gradient.

    Returns:
        nats: ``[B]``; maximise its mean.

    Raises:
        TypeError: an argument is not a floating-point tensor.
        ValueError: there are no samples, or shapes do not fit, or z has no gradient.

    >>> mu, logvar = torch.zeros(8, 4, requires_grad=True), torch.zeros(8, 4, requires_grad=True)
    >>> import fastvae
    >>> z = fastvae.reparameterize(mu, logvar, samples=16)
    >>> log_p_x = -(z**2).sum(-1)  # a decoder's log-likelihood, [16, 8]
    >>> log_w = log_p_x - log_q_minus_log_p(z, mu.detach(), logvar.detach(), samples=16)
    >>> (-importance_weighted_bound(log_w, z).mean()).backward()
    >>> mu.grad.shape
    torch.Size([8, 4])
    """
    log_w = checks.tensor("log_w", log_w)
    if log_w.dim() != 2 or not log_w.shape[0]:
        raise ValueError(f"log_w must be [K, B] with at least one sample, got {list(log_w.shape)}")
    if z is not None:
        z = checks.tensor("z", z)
        if z.shape[:2] != log_w.shape:
            raise ValueError(
                f"z must be [K, B, *latent] with the K and B of log_w, {list(log_w.shape)}, got {list(z.shape)}"
            )
        if log_w.requires_grad and z.is_leaf:
            raise ValueError("z must come from a differentiable expression, such as reparameterize, got a leaf")
        if log_w.requires_grad:
            weights = log_w.detach().softmax(0).to(z.dtype).reshape(*log_w.shape, *(1,) * (z.dim() - 2))
            z.register_hook(lambda grad: grad * weights)
    return log_w.logsumexp(0) - math.log(log_w.shape[0])
