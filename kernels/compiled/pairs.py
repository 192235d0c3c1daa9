"""What the loops on a CPU fill for sums over pairs: dense tensors of the type of the arithmetic, and scratch memory."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..layout import accumulator, address
from ..parameters import ordered_sum
from ..reference.pairs import mmd_total, mmd_weights
from . import native
from .primitives import TYPES

FAMILIES = {"rbf": 0, "imq": 1}  # csrc/pairs.h


def _dense(*tensors: Tensor) -> list[Tensor]:
    """Each in the type of the arithmetic; half precision is converted, which beside the pairs is nothing."""
    return [tensor.to(accumulator(tensor.dtype)).contiguous() for tensor in tensors]


def _scratch(x: Tensor, y: Tensor, fields: int, backward: bool) -> Tensor:
    count = native.pairs_scratch(TYPES[x.dtype], len(x), *y.shape, fields, backward)
    return torch.empty(count + 64, dtype=torch.uint8)


def _gaussian_pairs(
    x: Tensor,
    mu: Tensor,
    logvar: Tensor,
    log_weights: Tensor | None,
    own: float,
    beside: float,
    written: Sequence[Tensor | None],
    grads: Sequence[Tensor | None],
    gradients: Sequence[Tensor | None],
) -> None:
    """``written``: log_joint, log_product and what is kept of each; ``grads``: upstream ones of the first two."""
    fields = 2 if written[3] is None and written[1] is None else 3
    scratch = _scratch(x, mu, fields, gradients[0] is not None)
    native.gaussian_pairs(
        TYPES[x.dtype], len(x), *mu.shape, x.data_ptr(), mu.data_ptr(), logvar.data_ptr(), address(log_weights), own,
        beside, *map(address, (*written, *grads, *gradients)), scratch.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip


def _rounded(gradients: Sequence[Tensor], like: Sequence[Tensor]) -> list[Tensor]:
    return [gradient.to(tensor.dtype) for gradient, tensor in zip(gradients, like, strict=True)]


def aggregate_posterior_forward(
    z: Tensor, mu: Tensor, logvar: Tensor, *, own: float, beside: float, keep: bool
) -> list[Tensor]:
    x, m, s = _dense(z, mu, logvar)
    outputs = [x.new_empty(len(x)), x.new_empty(len(x))]
    kept = [x.new_empty(len(x), dtype=torch.float64), torch.empty_like(x)] if keep else []
    _gaussian_pairs(x, m, s, None, own, beside, (*outputs, *(kept or (None, None))), (None, None), (None,) * 4)
    return outputs + kept


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
    x, m, s = _dense(z, mu, logvar)
    if log_qz is None or log_each is None:
        log_qz, log_each = aggregate_posterior_forward(x, m, s, own=own, beside=beside, keep=True)[2:]
    grads = [None if g is None else g.contiguous() for g in (grad_qz, grad_prod)]
    gradients = [torch.empty_like(t) for t in (x, m, s)]
    kept = (None, None, log_qz, None if grad_prod is None else log_each)
    _gaussian_pairs(x, m, s, None, own, beside, kept, grads, (*gradients, None))
    return _rounded(gradients, (z, mu, logvar))


def mixture_forward(
    z: Tensor, means: Tensor, logvars: Tensor, log_weights: Tensor | None, *, keep: bool
) -> list[Tensor]:
    x, m, s = _dense(z, means, logvars)
    (weights,) = (None,) if log_weights is None else _dense(log_weights.to(x.dtype))
    outputs = [x.new_empty(len(x)), *([x.new_empty(len(x), dtype=torch.float64)] if keep else [])]
    written = (outputs[0], None, outputs[1] if keep else None, None)
    _gaussian_pairs(x, m, s, weights, 0.0, 0.0, written, (None, None), (None,) * 4)
    return outputs


def mixture_backward(
    grad: Tensor, z: Tensor, means: Tensor, logvars: Tensor, log_weights: Tensor | None, log_prob: Tensor | None
) -> list[Tensor]:
    x, m, s = _dense(z, means, logvars)
    (weights,) = (None,) if log_weights is None else _dense(log_weights.to(x.dtype))
    if log_prob is None:
        log_prob = mixture_forward(x, m, s, weights, keep=True)[1]
    gradients = [torch.empty_like(t) for t in (x, m, s, *(() if weights is None else (weights,)))]
    kept, of_all = (None, None, log_prob, None), (*gradients, *((None,) if weights is None else ()))
    _gaussian_pairs(x, m, s, weights, 0.0, 0.0, kept, (grad.contiguous(), None), of_all)
    return _rounded(gradients, (z, means, logvars, *(() if log_weights is None else (log_weights,))))


def _kernel_pairs(
    x: Tensor, y: Tensor, family: str, scales: Sequence[float], sums: Tensor | None, *gradients: Tensor | None
) -> None:
    scratch = _scratch(x, y, 1, sums is None)
    native.kernel_pairs(
        TYPES[x.dtype], len(x), *y.shape, x.data_ptr(), y.data_ptr(), FAMILIES[family], list(scales), address(sums),
        *map(address, gradients or (None, None)), scratch.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip


def mmd_forward(x: Tensor, y: Tensor, *, family: str, scales: Sequence[float], unbiased: bool) -> list[Tensor]:
    a, b = _dense(x, y)

    def total(left: Tensor, right: Tensor) -> Tensor:
        sums = torch.empty(len(left), dtype=torch.float64)
        _kernel_pairs(left, right, family, scales, sums)
        return ordered_sum(sums)

    value = mmd_total(total(a, a), total(b, b), total(a, b), len(a), len(b), scales, unbiased)
    return [value.to(a.dtype)]


def mmd_backward(
    grad: Tensor, x: Tensor, y: Tensor, *, family: str, scales: Sequence[float], unbiased: bool, of_y: bool
) -> list[Tensor]:
    a, b = _dense(x, y)
    of_aa, of_bb, of_ab = mmd_weights(len(a), len(b), unbiased)
    factor = grad.double()

    def combined(within: Tensor, weight: float, between: Tensor) -> Tensor:
        """A pair within a sample has two ends."""
        _kernel_pairs(within, within, family, scales, None, pull := torch.empty_like(within), None)
        return (factor * (2 * weight)).to(pull.dtype) * pull + (factor * of_ab).to(pull.dtype) * between

    of_a, of_b = torch.empty_like(a), torch.empty_like(b) if of_y else None
    _kernel_pairs(a, b, family, scales, None, of_a, of_b)
    gradients = [combined(a, of_aa, of_a), *([] if of_b is None else [combined(b, of_bb, of_b)])]
    return [gradient.to(x.dtype) for gradient in gradients]
