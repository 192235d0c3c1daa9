"""What is put together from the ops in plain torch: weights and masks, free bits by group, noise that is given.

Each costs a pass or two over the elements more than the op alone, in memory too.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .kernels.layout import accumulator, cols
from .kernels.reference.reconstruction import prepare, reduce

INSIDE = 0.5  # the domain of every likelihood


def weighted(
    term: Callable[[Tensor, Tensor], Tensor], recon: Tensor, target: Tensor, weight: Tensor | None, reduction: str
) -> Tensor:
    """``term``, which is elementwise, times ``weight``, then reduced; where a bool weight is False nothing counts."""
    wide = recon.to(accumulator(recon.dtype))
    if weight is None:
        return reduce(term(wide, target), reduction, recon.dtype)
    weight = weight.expand(recon.shape)
    if weight.dtype != torch.bool:
        return reduce(term(wide, target) * weight.to(wide.dtype), reduction, recon.dtype)
    inside = torch.where(weight, wide, INSIDE)  # so that what is masked may be NaN
    nll = torch.where(weight, term(inside, target.masked_fill(~weight, 0)), 0.0)
    return nll.sum() / weight.sum() if reduction == "mean" else reduce(nll, reduction, recon.dtype)


def counted(data: Tensor, weight: Tensor | None, reduction: str) -> Tensor | float:
    """What the number 1 for each element comes to."""
    if weight is None:
        return {"none": 1, "mean": 1, "sum": data.numel()}.get(reduction, cols(data))
    ones = torch.ones(data.shape, dtype=accumulator(data.dtype), device=data.device)
    return weighted(lambda y, _: torch.ones_like(y), data.detach(), ones, weight, reduction)


def with_pos_weight(term: Callable[[Tensor, Tensor], Tensor], pos_weight: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
    """x·p·softplus(−l) + (1 − x)·softplus(l), where ``term`` is that for p = 1: what it is of 1, and of 0.

    One call with x·p/(x·p + 1 − x) for a target would lose 1 − x where p is large.
    """

    def both(logits: Tensor, target: Tensor) -> Tensor:
        _, x = prepare(logits, target)
        of_one, of_zero = term(logits, torch.ones_like(logits)), term(logits, torch.zeros_like(logits))
        return x * pos_weight.to(x.dtype) * of_one + (1 - x) * of_zero

    return both


def at_least(kl: Tensor, free_bits: float | Tensor, per: str, reduction: str, shape: torch.Size) -> Tensor:
    """The KL of ``shape`` with free bits ``per`` element, example or dimension, of elements, of examples, of elements.

    Source: Kingma et al. 2016, eq. 15; the groups are an element each, an example each, or a dimension over the batch.
    """
    if per == "dimension":
        kl = kl.mean(0)
    free = free_bits.to(kl.dtype) if isinstance(free_bits, Tensor) else torch.full_like(kl, free_bits)
    kl = torch.where(kl < free, free, kl)  # NaN stays NaN
    if per == "example" and reduction == "mean":
        return kl.sum() / shape.numel()
    if per == "dimension":
        if reduction == "mean":
            return kl.sum() / shape[1:].numel()
        return kl.sum() * (shape[0] if reduction == "sum" else 1)
    return reduce(kl, reduction, kl.dtype)


def moved(mu: Tensor, scale: Tensor, log_scale: bool, bounds: tuple[float, float], noise: Tensor) -> Tensor:
    """mu + σ·noise."""
    wide = accumulator(mu.dtype)
    scale = scale.to(wide)
    if log_scale:
        scale = torch.exp(0.5 * scale.clamp(*bounds))
    return (mu.to(wide) + scale * noise.to(wide)).to(mu.dtype)
