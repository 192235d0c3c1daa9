"""The launch plan of the terms of ``reference/rows.py``: what their kernels read and fill, once for every backend.

A backend that has a kernel for a term names it in ``row_kernels``. The others run the reference's composition.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from . import reference
from .layout import ALL, BLOCK, TOTAL_REDUCTIONS, accumulator, empty_like, loss_dtype, reduction_weight
from .reference.mixture import parameters_of
from .reference.rows import TERMS, check_target, differentiable
from .work import Work


def value_shape(term: str, first: Tensor, channels_last: bool) -> torch.Size:
    """What ``"none"`` gives: elements, pixels, or all axes but the last."""
    if term == "logistic":
        return first.shape
    if term == "logistic_mixture" and not channels_last:
        return torch.Size((first.shape[0], *first.shape[2:]))
    return first.shape[:-1]


def value_dtype(term: str, reduction: str, dtype: torch.dtype) -> torch.dtype:
    """Of the loss: a density of many latents is a sum already."""
    return accumulator(dtype) if TERMS[term].summed else loss_dtype(reduction, dtype)


def as_read(term: str, tensors: tuple[Tensor | None, ...], check: bool) -> tuple[Tensor | None, ...]:
    """The target as kernels read it: uint8, the dtype of the arithmetic, int64 for a class. Others are as they were.

    Where a conversion would lose what is beyond the range, it is looked for first.
    """
    at = {"logistic": 2, "logistic_mixture": 1, "categorical_nll": 1}.get(term)
    first, target = tensors[0], None if at is None else tensors[at]
    if at is None or first is None or target is None:
        return tensors
    if target.is_floating_point():
        dtype = accumulator(first.dtype)
    else:
        dtype = torch.int64 if term == "categorical_nll" else torch.uint8
        if check and dtype == torch.uint8 != target.dtype and first.device.type == "cpu":
            check_target(term, *tensors)  # type: ignore[arg-type]
    return (*tensors[:at], target.to(dtype), *tensors[at + 1 :])


class RowWork:
    """Dense ``tensors`` of a term, and what is to be filled: ``values``, one a row in float64, and ``gradients``.

    Either may be None. Gradients are times ``weight`` and, unless that is None, ``upstream``, one number a row.
    """

    __slots__ = ("gradients", "options", "rows", "tensors", "term", "upstream", "values", "weight")

    def __init__(
        self, term: str, tensors: tuple[Tensor | None, ...], shape: torch.Size, reduction: str, options: dict[str, Any]
    ):
        self.term, self.rows, self.options = term, shape.numel(), options
        self.tensors = [tensor if tensor is None else tensor.contiguous() for tensor in tensors]
        self.weight = reduction_weight(reduction, self.first.new_empty(()).expand(shape))
        self.values: Tensor | None = None
        self.upstream: Tensor | None = None
        self.gradients: list[Tensor] | None = None

    @property
    def first(self) -> Tensor:
        first = self.tensors[0]
        assert first is not None
        return first

    @property
    def channels(self) -> int:
        channels: int = self.options["channels"]
        return channels

    @property
    def components(self) -> int:
        axis = -1 if self.options["channels_last"] else 1
        return self.first.shape[axis] // parameters_of(self.channels)

    def want_gradients(self) -> list[Tensor]:
        places = differentiable(self.term, tuple(self.tensors))
        self.gradients = [torch.empty_like(self.tensors[place]) for place in places]  # type: ignore[arg-type]
        return self.gradients


class RowTerms:
    """``rows_forward`` and ``rows_backward`` of ``kernels/__init__.py``."""

    #: by term, what fills a :class:`RowWork` and returns whether a target was seen beyond its range
    row_kernels: ClassVar[Mapping[str, Callable[[Any, RowWork], int | None]]] = {}

    logistic_kernel = False
    on_host: bool  # of ``Primitives``; nor may ``block`` be set here, by which the compiled kernels merge rows

    def fill_logistic(self, work: Work, nll: Tensor | None, sums: Tensor | None, gradients: list[Tensor]) -> int:
        """The elementwise nll or the sum of each row, and the gradients in mean and log scale, if there are any.

        The tensors are mean, target, log scale. Returns as ``row_kernels``.
        """
        raise NotImplementedError

    def _logistic(
        self, grad: Tensor | None, mean: Tensor, log_scale: Tensor, target: Tensor, reduction: str, with_gradient: bool
    ) -> list[Tensor]:
        work = Work([mean, target, log_scale], reduction, BLOCK if self.on_host else ALL, grad)
        gradients = [empty_like(mean), empty_like(log_scale)] if with_gradient else []
        nll = empty_like(mean) if grad is None and reduction == "none" else None
        sums = None
        if grad is None and nll is None:
            sums = torch.empty(work.rows, dtype=torch.float64, device=mean.device)
        if self.fill_logistic(work, nll, sums, gradients) and grad is None:
            check_target("logistic", mean, log_scale, target)
        if sums is None:
            return gradients if nll is None else [nll, *gradients]
        if reduction in TOTAL_REDUCTIONS:
            sums = self.sum_rows(sums, 1).reshape(()) * work.weight
        return [sums.to(loss_dtype(reduction, mean.dtype)), *gradients]

    def sum_rows(self, values: Tensor, rows: int) -> Tensor:
        """Σ of each of so many rows, in float64, in one order."""
        return values.view(rows, -1).sum(1)

    def rows_forward(
        self, *tensors: Tensor | None, term: str, reduction: str, with_gradient: bool, **options: Any
    ) -> list[Tensor]:
        first = tensors[0]
        assert first is not None
        shape = value_shape(term, first, options["channels_last"])
        if first.numel():
            tensors = as_read(term, tensors, check=True)
        if term == "logistic" and self.logistic_kernel and first.numel():
            return self._logistic(None, *tensors[:3], reduction, with_gradient)  # type: ignore[arg-type, call-arg]
        if term not in self.row_kernels or not first.numel() or not shape.numel():
            return reference.rows_forward(
                *tensors, term=term, reduction=reduction, with_gradient=with_gradient, **options
            )
        work = RowWork(term, tensors, shape, reduction, options)
        work.values = torch.empty(shape, dtype=torch.float64, device=first.device)
        gradients = work.want_gradients() if with_gradient else []
        if self.row_kernels[term](self, work):
            check_target(term, *tensors)  # type: ignore[arg-type]
        loss = work.values
        if reduction == "example":
            loss = self.sum_rows(loss, shape[0])
        elif reduction in TOTAL_REDUCTIONS:
            loss = self.sum_rows(loss, 1).reshape(()) * work.weight
        return [loss.to(value_dtype(term, reduction, first.dtype)), *gradients]

    def rows_backward(
        self, grad: Tensor, *tensors: Tensor | None, term: str, reduction: str, **options: Any
    ) -> list[Tensor]:
        first = tensors[0]
        assert first is not None
        shape = value_shape(term, first, options["channels_last"])
        tensors = as_read(term, tensors, check=False)
        if term == "logistic" and self.logistic_kernel and first.numel():
            return self._logistic(grad, *tensors[:3], reduction, True)  # type: ignore[arg-type, call-arg]
        if term not in self.row_kernels or not first.numel() or not shape.numel():
            return reference.rows_backward(grad, *tensors, term=term, reduction=reduction, **options)
        work = RowWork(term, tensors, shape, reduction, options)
        upstream = grad.to(accumulator(first.dtype))
        if reduction == "example":
            upstream = upstream.reshape(-1, *(1,) * (len(shape) - 1))
        work.upstream = upstream.expand(shape).contiguous()
        gradients = work.want_gradients()
        self.row_kernels[term](self, work)
        return gradients


__all__ = ["TERMS", "RowTerms", "RowWork", "value_dtype", "value_shape"]
