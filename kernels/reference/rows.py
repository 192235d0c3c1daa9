"""Terms of a few tensors in pure torch, each one number for a row of them; their gradients are those of torch.

A row is a pixel, or what a softmax or a sum goes over. ``kernels/rows.py`` says which backends have kernels for them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..checks import ROUNDING, outside
from ..layout import accumulator
from ..likelihoods import Domain
from .mixture import log_probability, mixture_nll, scaled
from .reconstruction import reduce

LEVELS = "levels from 0 to 255 in an integer dtype, or those over 255, in [0, 1], in floating point"


class RowTerm(NamedTuple):
    """``value(*tensors, **options)`` is differentiable in the first ``differentiable`` tensors that there are."""

    value: Callable[..., Tensor]
    differentiable: int
    summed: bool = False  # a sum already, so that half precision leaves it as float32


def logistic_nll(mean: Tensor, log_scale: Tensor, target: Tensor, *_: None, **options: Any) -> Tensor:
    return -log_probability(scaled(target, mean.dtype), mean, log_scale)


def logistic_mixture_nll(
    params: Tensor, target: Tensor, *_: None, channels: int, channels_last: bool, **options: Any
) -> Tensor:
    return mixture_nll(params, target, channels, channels_last)


def categorical_nll(logits: Tensor, target: Tensor, *_: None, **options: Any) -> Tensor:
    """−log softmax(logits)[target], over the last axis."""
    return -logits.log_softmax(-1).gather(-1, target.long().unsqueeze(-1)).squeeze(-1)


def log_probs(logits: Tensor, unimix: float) -> Tensor:
    """Of (1 − u)·softmax(logits) + u/n (Hafner et al. 2023, "unimix")."""
    if not unimix:
        return logits.log_softmax(-1)
    return torch.log((1 - unimix) * logits.softmax(-1) + unimix / logits.shape[-1])


def weighted(tensor: Tensor, weight: float) -> Tensor:
    """The tensor, with ``weight`` times its gradient."""
    return tensor if weight == 1 else tensor.detach() + (tensor - tensor.detach()) * weight


def categorical_kl(
    logits_q: Tensor, logits_p: Tensor, *_: None, unimix: float, balance: float, **options: Any
) -> Tensor:
    """Σ q·(log q − log p) over the last axis; of its gradient, q gets 1 − balance and p balance, if that is given."""
    if balance >= 0:
        logits_q, logits_p = weighted(logits_q, 1 - balance), weighted(logits_p, balance)
    log_q, log_p = log_probs(logits_q, unimix), log_probs(logits_p, unimix)
    q = log_q.exp()
    return (q * torch.where(q > 0, log_q - log_p, 0.0)).sum(-1)


def log_prob(z: Tensor, mu: Tensor, logvar: Tensor, *_: None, **options: Any) -> Tensor:
    """log N(z; mu, σ²) over the last axis, without its constant."""
    return (-0.5 * ((z - mu) ** 2 * torch.exp(-logvar) + logvar)).sum(-1)


def log_ratio(
    z: Tensor,
    mu: Tensor,
    logvar: Tensor,
    prior_mu: Tensor | None = None,
    prior_logvar: Tensor | None = None,
    **options: Any,
) -> Tensor:
    """log q(z) − log p(z) over the last axis, p = N(0, I) unless given: the two constants ½·log 2π are gone."""
    log_q = -0.5 * ((z - mu) ** 2 * torch.exp(-logvar) + logvar)
    if prior_mu is None or prior_logvar is None:
        return (log_q + 0.5 * z * z).sum(-1)
    return (log_q + 0.5 * ((z - prior_mu) ** 2 * torch.exp(-prior_logvar) + prior_logvar)).sum(-1)


TERMS = {
    "logistic": RowTerm(logistic_nll, 2),
    "logistic_mixture": RowTerm(logistic_mixture_nll, 1),
    "categorical_nll": RowTerm(categorical_nll, 1),
    "categorical_kl": RowTerm(categorical_kl, 2),
    "log_prob": RowTerm(log_prob, 3, summed=True),
    "log_ratio": RowTerm(log_ratio, 5, summed=True),
}


def differentiable(term: str, tensors: tuple[Tensor | None, ...]) -> list[int]:
    """Which of the tensors get a gradient."""
    return [k for k, tensor in enumerate(tensors[: TERMS[term].differentiable]) if tensor is not None]


def check_target(term: str, first: Tensor, *others: Tensor | None) -> None:
    """Raise the ``ValueError`` of a target beyond its range, which only the data show; NaN is not."""
    target = others[1 if term == "logistic" else 0]
    if not term.startswith(("logistic", "categorical_nll")) or target is None or not target.numel():
        return
    if type(target) is not Tensor:  # of a tracer: it has no data
        return
    if target.is_floating_point():
        wrong = bool(outside(target, Domain.UNIT, ROUNDING).any())
        wanted = LEVELS
    else:
        classes = first.shape[-1] if term == "categorical_nll" else 256
        wrong = (
            bool(((target < 0) | (target >= classes)).any()) if target.dtype != torch.uint8 or classes < 256 else False
        )
        wanted = (
            LEVELS
            if term != "categorical_nll"
            else f"classes from 0 to {classes - 1}, of which logits end with {classes}"
        )
    if wrong:
        low, high = target.min().item(), target.max().item()
        raise ValueError(f"target must be {wanted}, got values from {low:g} to {high:g}")


def rows_value(*tensors: Tensor | None, term: str, reduction: str, **options: Any) -> Tensor:
    """The loss alone, differentiable."""
    first = tensors[0]
    assert first is not None
    dtype = accumulator(first.dtype)
    wide = [t if t is None or not t.is_floating_point() else t.to(dtype) for t in tensors]
    row = TERMS[term]
    return reduce(row.value(*wide, **options), reduction, dtype if row.summed else first.dtype)


def rows_forward(
    *tensors: Tensor | None, term: str, reduction: str, with_gradient: bool, **options: Any
) -> list[Tensor]:
    first, *others = tensors
    assert first is not None
    if first.device.type == "cpu":
        check_target(term, first, *others)
    value = rows_value(*tensors, term=term, reduction=reduction, **options).contiguous()
    if not with_gradient:
        return [value]
    return [value, *rows_backward(torch.ones_like(value), *tensors, term=term, reduction=reduction, **options)]


def rows_backward(grad: Tensor, *tensors: Tensor | None, term: str, reduction: str, **options: Any) -> list[Tensor]:
    places = differentiable(term, tensors)

    def value(*moving: Tensor) -> Tensor:
        given = list(tensors)
        for place, tensor in zip(places, moving, strict=True):
            given[place] = tensor
        return rows_value(*given, term=term, reduction=reduction, **options)

    moving = [tensor for tensor in (tensors[place] for place in places) if tensor is not None]
    pull = torch.func.vjp(value, *moving)[1]
    return [gradient.contiguous() for gradient in pull(grad)]


__all__ = ["TERMS", "check_target", "differentiable", "rows_backward", "rows_forward", "rows_value"]
