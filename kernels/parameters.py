"""Reconstruction terms whose parameter is a tensor: what to allocate and to add up, once for every backend.

A backend gives one function, ``fill(work)``, which writes into the buffers of a :class:`Work` that are not None. Rows
are examples, or blocks of elements where tensors are dense and neither loss nor parameter asks whose example one is.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .layout import (
    BLOCK,
    TOTAL_REDUCTIONS,
    Grid,
    accumulator,
    as_rows,
    loss_dtype,
    loss_shape,
    reduction_weight,
    upstream_by_row,
)

PIECES = 64  # sums over the batch: so many partial ones, however many threads there are
CHUNK = 1 << 15  # numbers torch adds up on one thread


class Parameter:
    """A tensor that broadcasts to ``like``, as kernels read it: by ``"row"``, by ``"column"`` or by ``"element"``.

    By row it is one number per example, or one for all (stride 0). By column it is one row of elements, the same for
    each example. ``value`` is in the dtype of the arithmetic.
    """

    def __init__(self, given: Tensor, like: Tensor):
        shape = (1,) * (like.dim() - given.dim()) + given.shape
        value = given.to(accumulator(like.dtype)).reshape(shape)
        across = shape[0] != 1
        if all(size == 1 for size in shape[1:]):
            self.kind, self.value, self.stride = "row", value.reshape(shape[0]).contiguous(), int(across)
        else:
            self.kind = "element" if across else "column"
            self.value, stride = as_rows(value.expand(like.shape if across else (1, *like.shape[1:])))
            self.stride = stride if across else 0
        self.given, self.shape = given, shape

    def gradient(self, parts: Tensor, data: torch.Size) -> Tensor:
        """The gradient in ``given`` from what the kernel left: by row and by column ``[parts, …]`` in float64."""
        if self.kind == "row":
            total = parts if self.stride else ordered_sum(parts)
        elif self.kind == "column":
            total = parts.sum(0).reshape(1, *data[1:]).sum_to_size(self.shape)
        else:
            total = parts if self.shape == data else parts.double().sum_to_size(self.shape)
        return total.reshape(self.given.shape).to(self.given.dtype)


def ordered_sum(values: Tensor) -> Tensor:
    """Σ of a vector, the same bits for any number of threads."""
    return torch.stack([chunk.sum() for chunk in values.split(CHUNK)]).sum() if len(values) > CHUNK else values.sum()


class Work:
    """One call: the inputs as rows, and the buffers to fill. ``piece`` rows of ``grid`` share a row of ``columns``.

    ``sums`` and ``parameter_sums`` may also be set by ``fill``, with several parts a row.
    """

    def __init__(
        self, recon: Tensor, target: Tensor, parameter: Tensor, likelihood: str, reduction: str, on_host: bool
    ):
        self.on_host = on_host
        self.likelihood, self.reduction, self.recon = likelihood, reduction, recon
        self.parameter = Parameter(parameter, recon)
        self.inputs = recon, target
        self.weight = reduction_weight(reduction, recon)
        self.upstream: Tensor | None = None
        self.upstream_stride, self.upstream_by_element = 0, False
        self.nll: Tensor | None = None
        self.sums: Tensor | None = None
        self.grad: Tensor | None = None
        self.grad_parameter: Tensor | None = None
        self.parameter_sums: Tensor | None = None
        self.columns: Tensor | None = None

    def place(self, by_example: bool) -> None:
        """Lay out the rows."""
        kind = self.parameter.kind
        elements = [self.parameter.value] if kind == "element" else []
        upstream = [self.upstream] if self.upstream is not None and self.upstream_by_element else []
        by_example = by_example or kind == "column" or (kind == "row" and self.parameter.stride == 1)
        block = BLOCK if self.on_host else self.recon.numel()
        self.grid = Grid([*self.inputs, *elements, *upstream], by_example, block)
        self.recon_rows, self.target_rows = self.grid.tensors[:2]
        self.recon_stride, self.target_stride = self.grid.strides[:2]
        if elements:
            self.parameter.value, self.parameter.stride = self.grid.tensors[2], self.grid.strides[2]
        if upstream:
            self.upstream, self.upstream_stride = self.grid.tensors[-1], self.grid.strides[-1]
        self.piece = max(1, -(-self.grid.rows // PIECES)) if kind == "column" else 1
        self.pieces = -(-self.grid.rows // self.piece)

    def want_gradients(self) -> None:
        """Buffers for both gradients; on a GPU those by column come out by element, for torch to add up."""
        like, kind = self.recon, self.parameter.kind
        dtype = accumulator(like.dtype)
        self.grad = torch.empty(like.shape, dtype=like.dtype, device=like.device)
        if kind == "row":
            self.parameter_sums = torch.empty(self.grid.rows, dtype=torch.float64, device=like.device)
        elif kind == "column" and self.on_host:
            self.columns = torch.zeros((self.pieces, self.grid.cols), dtype=torch.float64, device=like.device)
        else:
            self.grad_parameter = torch.empty(like.shape, dtype=dtype, device=like.device)

    def gradients(self) -> list[Tensor]:
        """Both, once ``fill`` has run."""
        assert self.grad is not None
        if self.parameter_sums is not None:
            parts = _by_row(self.parameter_sums)
        elif self.columns is not None:
            parts = self.columns
        else:
            assert self.grad_parameter is not None
            parts = self.grad_parameter
            if self.parameter.kind == "column":
                parts = parts.sum(0, keepdim=True, dtype=torch.float64)
        return [self.grad, self.parameter.gradient(parts, self.recon.shape)]

    def loss(self) -> Tensor:
        """The reduced loss, once ``fill`` has run."""
        assert self.sums is not None
        sums = _by_row(self.sums)
        if self.reduction in TOTAL_REDUCTIONS:
            sums = ordered_sum(sums) * self.weight
        return sums.to(loss_dtype(self.reduction, self.recon.dtype))


def _by_row(sums: Tensor) -> Tensor:
    """One sum a row, in float64."""
    return sums if sums.dim() == 1 else sums.sum(1, dtype=torch.float64)


Fill = Callable[[Work], object]


def forward(
    fill: Fill,
    recon: Tensor,
    target: Tensor,
    parameter: Tensor,
    *,
    likelihood: str,
    reduction: str,
    with_gradient: bool,
    on_host: bool = True,
) -> list[Tensor]:
    """``reconstruction_forward`` of a backend: ``[nll]``, then the gradients in recon and in the parameter if asked."""
    work = Work(recon, target, parameter, likelihood, reduction, on_host)
    if not recon.numel():
        nll = torch.zeros(loss_shape(reduction, recon), dtype=loss_dtype(reduction, recon.dtype), device=recon.device)
        return [nll * work.weight, *(_no_gradients(recon, parameter) if with_gradient else [])]
    work.place(by_example=reduction == "example")
    if reduction == "none":
        work.nll = torch.empty(recon.shape, dtype=recon.dtype, device=recon.device)
        fill(work)
        return [work.nll]
    work.sums = torch.empty(work.grid.rows, dtype=torch.float64, device=recon.device)
    if with_gradient:
        work.want_gradients()
    fill(work)
    return [work.loss(), *(work.gradients() if with_gradient else [])]


def backward(
    fill: Fill,
    grad_nll: Tensor,
    recon: Tensor,
    target: Tensor,
    parameter: Tensor,
    *,
    likelihood: str,
    reduction: str,
    on_host: bool = True,
) -> list[Tensor]:
    """``reconstruction_backward`` of a backend: the gradients in recon and in the parameter."""
    if not recon.numel():
        return _no_gradients(recon, parameter)
    work = Work(recon, target, parameter, likelihood, reduction, on_host)
    by_row = upstream_by_row(grad_nll, reduction, recon)
    if by_row is None:
        work.upstream, work.upstream_by_element = grad_nll.to(recon.dtype), True
    else:
        work.upstream, work.upstream_stride = by_row
    work.place(by_example=by_row is not None and by_row[1] != 0)
    work.want_gradients()
    fill(work)
    return work.gradients()


def _no_gradients(recon: Tensor, parameter: Tensor) -> list[Tensor]:
    return [torch.empty(recon.shape, dtype=recon.dtype, device=recon.device), torch.zeros_like(parameter)]
