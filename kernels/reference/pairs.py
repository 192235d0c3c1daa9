"""Sums over pairs in pure torch: every row of one tensor against every row of another, some rows at a time.

The expressions are the dense ones, ``[rows, N, D]`` for so few rows that ``PAIR_ELEMENTS`` numbers are held at once. So
memory stays bounded, unless autograd keeps the parts: then it is the dense expression's.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from ..layout import accumulator

PAIR_ELEMENTS = 1 << 20  # of one tensor over pairs: 4 MB in float32
LOG_2PI = math.log(2 * math.pi)


def _parts(count: int, pairs: int) -> Iterator[slice]:
    """``count`` rows in parts; one row makes ``pairs`` elements."""
    size = max(1, PAIR_ELEMENTS // max(1, pairs))
    for start in range(0, count, size):
        yield slice(start, min(count, start + size))


def log_densities(z: Tensor, mu: Tensor, logvar: Tensor) -> Tensor:
    """log N(z_d; mu_d, σ_d²) of ``[n, D]`` at ``[N, D]``: ``[n, N, D]`` nats."""
    return -0.5 * (LOG_2PI + logvar + (z[:, None] - mu) ** 2 * torch.exp(-logvar))


def _offsets(at: slice, count: int, own: float, beside: float, like: Tensor) -> Tensor:
    """What is added to the log weight of the pairs (i, j): ``own`` at j = i, ``beside`` at j = i + 1, cyclic."""
    rows = torch.arange(at.start, at.stop, device=like.device)[:, None]
    columns = torch.arange(count, device=like.device)
    offsets = torch.zeros(at.stop - at.start, count, dtype=like.dtype, device=like.device)
    offsets = torch.where(columns == (rows + 1) % count, beside, offsets)
    return torch.where(columns == rows, own, offsets)


def _cast(*tensors: Tensor) -> list[Tensor]:
    return [tensor.to(accumulator(tensor.dtype)) for tensor in tensors]


def _rounded(gradients: Sequence[Tensor], like: Sequence[Tensor]) -> list[Tensor]:
    return [g.to(tensor.dtype).contiguous() for g, tensor in zip(gradients, like, strict=True)]


def aggregate_posterior_forward(
    z: Tensor, mu: Tensor, logvar: Tensor, *, own: float, beside: float, keep: bool
) -> list[Tensor]:
    zs, m, s = _cast(z, mu, logvar)
    joint, each = [], []
    for at in _parts(len(z), mu.numel()):
        densities, offsets = log_densities(zs[at], m, s), _offsets(at, len(mu), own, beside, m)
        joint.append(torch.logsumexp(densities.sum(2) + offsets, 1))
        each.append(torch.logsumexp(densities + offsets[:, :, None], 1))
    log_qz, log_each = torch.cat(joint), torch.cat(each)
    return [log_qz, log_each.sum(1), *([log_qz.to(torch.float64, copy=True), log_each] if keep else [])]


def aggregate_posterior_backward(
    grad_qz: Tensor | None,
    grad_prod: Tensor | None,
    z: Tensor,
    mu: Tensor,
    logvar: Tensor,
    log_qz: Tensor | None,
    log_each: Tensor | None,
    *,
    own: float,
    beside: float,
) -> list[Tensor]:
    zs, m, s = _cast(z, mu, logvar)
    precision, of_z = torch.exp(-s), []
    of_mu, of_logvar = torch.zeros_like(m), torch.zeros_like(s)
    for at in _parts(len(z), mu.numel()):
        densities, offsets = log_densities(zs[at], m, s), _offsets(at, len(mu), own, beside, m)
        share = torch.zeros_like(densities)
        if grad_qz is not None:
            share = share + (torch.softmax(densities.sum(2) + offsets, 1) * grad_qz[at, None])[:, :, None]
        if grad_prod is not None:
            share = share + torch.softmax(densities + offsets[:, :, None], 1) * grad_prod[at, None, None]
        by_z, by_mu, by_logvar = _of_densities(share, zs[at], m, precision)
        of_z.append(by_z)
        of_mu, of_logvar = of_mu + by_mu, of_logvar + by_logvar
    return _rounded([torch.cat(of_z), of_mu, of_logvar], [z, mu, logvar])


def _of_densities(share: Tensor, z: Tensor, mu: Tensor, precision: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of Σ share · log N(z; mu, 1/precision); ``share`` is ``[n, N, D]`` or ``[n, N, 1]``."""
    distance = z[:, None] - mu
    pull = share * (distance * precision)
    return -pull.sum(1), pull.sum(0), 0.5 * (pull * distance - share).sum(0)


def mixture_forward(
    z: Tensor, means: Tensor, logvars: Tensor, log_weights: Tensor | None, *, keep: bool
) -> list[Tensor]:
    zs, m, s = _cast(z, means, logvars)
    weights = 0.0 if log_weights is None else log_weights.to(m.dtype)
    parts = [torch.logsumexp(log_densities(zs[at], m, s).sum(2) + weights, 1) for at in _parts(len(z), means.numel())]
    log_prob = torch.cat(parts)
    return [log_prob, *([log_prob.to(torch.float64, copy=True)] if keep else [])]


def mixture_backward(
    grad: Tensor, z: Tensor, means: Tensor, logvars: Tensor, log_weights: Tensor | None, log_prob: Tensor | None
) -> list[Tensor]:
    zs, m, s = _cast(z, means, logvars)
    weights = m.new_zeros(len(m)) if log_weights is None else log_weights.to(m.dtype)
    precision, of_z = torch.exp(-s), []
    of_means, of_logvars, of_weights = torch.zeros_like(m), torch.zeros_like(s), torch.zeros_like(weights)
    for at in _parts(len(z), means.numel()):
        share = torch.softmax(log_densities(zs[at], m, s).sum(2) + weights, 1) * grad[at, None]
        by_z, by_means, by_logvars = _of_densities(share[:, :, None], zs[at], m, precision)
        of_z.append(by_z)
        of_means, of_logvars = of_means + by_means, of_logvars + by_logvars
        of_weights = of_weights + share.sum(0)
    gradients = _rounded([torch.cat(of_z), of_means, of_logvars], [z, means, logvars])
    return gradients if log_weights is None else [*gradients, of_weights.to(log_weights.dtype)]


def kernel_values(squared: Tensor, family: str, scales: Sequence[float]) -> Tensor:
    """Σ over scales C of e^(−q/C) (``"rbf"``) or C/(C + q) (``"imq"``), of squared distances q."""
    if family == "rbf":
        return sum((torch.exp(-squared / c) for c in scales), torch.zeros_like(squared))
    return sum((c / (c + squared) for c in scales), torch.zeros_like(squared))


def kernel_slopes(squared: Tensor, family: str, scales: Sequence[float]) -> Tensor:
    """The derivative of :func:`kernel_values` in q."""
    if family == "rbf":
        return sum((torch.exp(-squared / c) / -c for c in scales), torch.zeros_like(squared))
    return sum((-c / (c + squared) ** 2 for c in scales), torch.zeros_like(squared))


def mmd_weights(n: int, m: int, unbiased: bool) -> tuple[float, float, float]:
    """Of Σ k(x, x'), Σ k(y, y') and Σ k(x, y): Gretton et al. 2012, eq. 5, or eq. 3 where unbiased."""
    if unbiased:
        return 1 / (n * (n - 1)), 1 / (m * (m - 1)), -2 / (n * m)
    return 1 / (n * n), 1 / (m * m), -2 / (n * m)


def mmd_total(
    within_x: Tensor, within_y: Tensor, between: Tensor, n: int, m: int, scales: Sequence[float], unbiased: bool
) -> Tensor:
    """MMD² of the three sums over all pairs; an element beside itself counts 1 a scale, and nothing where unbiased."""
    of_x, of_y, of_both = mmd_weights(n, m, unbiased)
    itself = float(len(scales)) * unbiased
    return of_x * (within_x - n * itself) + of_y * (within_y - m * itself) + of_both * between


def mmd_forward(x: Tensor, y: Tensor, *, family: str, scales: Sequence[float], unbiased: bool) -> list[Tensor]:
    xs, ys = _cast(x, y)

    def total(a: Tensor, b: Tensor) -> Tensor:
        parts = [
            kernel_values(((a[at, None] - b) ** 2).sum(2), family, scales).sum(dtype=torch.float64)
            for at in _parts(len(a), b.numel())
        ]
        return torch.stack(parts).sum()

    value = mmd_total(total(xs, xs), total(ys, ys), total(xs, ys), len(x), len(y), scales, unbiased)
    return [value.to(xs.dtype)]


def mmd_backward(
    grad: Tensor, x: Tensor, y: Tensor, *, family: str, scales: Sequence[float], unbiased: bool, of_y: bool
) -> list[Tensor]:
    xs, ys = _cast(x, y)
    of_xx, of_yy, of_xy = mmd_weights(len(x), len(y), unbiased)

    def pull(a: Tensor, b: Tensor) -> Tensor:
        """Σ over b of the derivative of k(a, b) in a."""
        parts = []
        for at in _parts(len(a), b.numel()):
            distance = a[at, None] - b
            slope = kernel_slopes((distance**2).sum(2), family, scales)
            parts.append((2 * slope[:, :, None] * distance).sum(1))
        return torch.cat(parts)

    gradients = [2 * of_xx * pull(xs, xs) + of_xy * pull(xs, ys)]
    if of_y:
        gradients.append(2 * of_yy * pull(ys, ys) + of_xy * pull(ys, xs))
    return [(grad.to(xs.dtype) * g).to(x.dtype).contiguous() for g in gradients]
