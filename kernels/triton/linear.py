"""A linear layer whose outputs are scored where they are made: a matrix product with a likelihood for an epilogue.

A program makes one tile of outputs on the tensor cores, adds the bias, and leaves the gradient and a sum for each of
its rows: the outputs themselves are never written. The epilogue takes the tile in two halves, so that its registers are
those of one. float32 goes by TF32 where PyTorch's own setting allows it, else the library's product serves.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..layout import TOTAL_REDUCTIONS
from ..likelihoods import OF_COUNTS
from . import reduce
from .approx import rounded
from .launch import run
from .likelihoods import log_of_factors, terms
from .reconstruction import load_target

ROWS, COLUMNS = 128, 128  # of a tile: 64 sums a thread of 8 warps
DEPTH = {torch.bfloat16: 64, torch.float16: 64, torch.float32: 32}  # of the products added at once: 96 KB in flight
GROUP = 8  # tiles of rows that share their weights in the cache


@triton.jit
def score(
    outputs, column, row, rows, columns, bias_ptr, target_ptr, grad_ptr, parameter, target_stride,
    LIKELIHOOD: tl.constexpr, BIAS: tl.constexpr, WITH_GRADIENT: tl.constexpr, NARROW: tl.constexpr,
):  # fmt: skip
    """Σ nll of each row over these columns; the gradient is written."""
    mask = (row < rows) & (column < columns)
    y = outputs
    if BIAS:
        y += tl.load(bias_ptr + column, column < columns, other=0).to(tl.float32)
    x = load_target(target_ptr + row * target_stride + column, mask, tl.float32, True)
    additive, factor, derivative = terms(y, x, parameter, LIKELIHOOD, NARROW)
    if WITH_GRADIENT:
        tl.store(grad_ptr + row * columns + column, rounded(derivative, grad_ptr.dtype.element_ty), mask)
    nll = additive + log_of_factors(tl.zeros_like(y) + factor, LIKELIHOOD)
    return tl.sum(tl.where(mask, nll, 0.0), axis=1)


@triton.jit(do_not_specialize=["row_tiles", "column_tiles"])
def forward(
    hidden_ptr, weight_ptr, bias_ptr, target_ptr, grad_ptr, sums_ptr, parameter: tl.float64, rows: tl.int64,
    columns: tl.int64, depth: tl.int64, hidden_stride: tl.int64, weight_stride: tl.int64, target_stride: tl.int64,
    row_tiles, column_tiles,
    LIKELIHOOD: tl.constexpr, BIAS: tl.constexpr, WITH_GRADIENT: tl.constexpr, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr, DEPTH: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """``sums[row, tile of columns]``. Programs of GROUP tiles of rows walk the columns together."""
    program = tl.program_id(0)
    group = program // (GROUP * column_tiles)
    members = tl.minimum(row_tiles - group * GROUP, GROUP)
    within = program % (GROUP * column_tiles)
    row_tile, column_tile = group * GROUP + within % members, within // members
    row = row_tile.to(tl.int64) * ROWS + tl.arange(0, ROWS)
    first = column_tile.to(tl.int64) * COLUMNS
    column, k = first + tl.arange(0, COLUMNS), tl.arange(0, DEPTH)
    hidden = hidden_ptr + row[:, None] * hidden_stride + k[None, :]
    weight = weight_ptr + column[None, :] * weight_stride + k[:, None]
    outputs = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in range(0, depth, DEPTH):
        left = k < depth - start
        a = tl.load(hidden, (row < rows)[:, None] & left[None, :], other=0)
        b = tl.load(weight, (column < columns)[None, :] & left[:, None], other=0)
        outputs = tl.dot(a, b, outputs, input_precision="tf32")
        hidden += DEPTH
        weight += DEPTH
    parameter = tl.full((1, 1), parameter, tl.float32)
    narrow: tl.constexpr = hidden_ptr.dtype.element_ty != tl.float32
    halves = tl.permute(tl.reshape(outputs, (ROWS, 2, COLUMNS // 2)), (0, 2, 1))
    left_half, right_half = tl.split(halves)
    column = first + tl.arange(0, COLUMNS // 2)[None, :]
    at = row[:, None]
    sums = score(
        left_half, column, at, rows, columns, bias_ptr, target_ptr, grad_ptr, parameter, target_stride, LIKELIHOOD,
        BIAS, WITH_GRADIENT, narrow,
    )  # fmt: skip
    sums += score(
        right_half, column + COLUMNS // 2, at, rows, columns, bias_ptr, target_ptr, grad_ptr, parameter, target_stride,
        LIKELIHOOD, BIAS, WITH_GRADIENT, narrow,
    )  # fmt: skip
    tl.store(sums_ptr + row * column_tiles + column_tile, sums, row < rows)


def serves(hidden: Tensor, likelihood: str) -> bool:
    """Whether the tensor cores take this dtype, or may take it. What counts need besides would spill."""
    if torch.version.hip is not None or likelihood in OF_COUNTS:
        return False
    if hidden.dtype == torch.float32:
        return hidden.is_cuda and torch.backends.cuda.matmul.allow_tf32
    return hidden.dtype in (torch.bfloat16, torch.float16)


def linear_forward(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, *, likelihood: str, parameter: float,
    reduction: str, with_gradient: bool,
) -> list[Tensor] | None:  # fmt: skip
    """``[nll]``, by example or as a sum, and the gradient of that in the outputs if ``with_gradient``.

    None where the library's product and :func:`reconstruction_forward` are to serve.
    """
    if not serves(hidden, likelihood):
        return None
    shape = target.shape
    flat, data = hidden.reshape(-1, hidden.shape[-1]).contiguous(), target.reshape(-1, shape[-1]).contiguous()
    weight = weight.contiguous()
    rows, columns = data.shape
    row_tiles, column_tiles = -(-rows // ROWS), -(-columns // COLUMNS)
    sums = flat.new_empty((rows, column_tiles), dtype=torch.float32)
    gradient = flat.new_empty(shape) if with_gradient else None
    run(
        forward, row_tiles * column_tiles, flat, flat, weight, flat if bias is None else bias, data,
        flat if gradient is None else gradient, sums, parameter, rows, columns, flat.shape[1], flat.stride(0),
        weight.stride(0), data.stride(0), row_tiles, column_tiles, LIKELIHOOD=likelihood, BIAS=bias is not None,
        WITH_GRADIENT=with_gradient, ROWS=ROWS, COLUMNS=COLUMNS, DEPTH=DEPTH[flat.dtype], GROUP=GROUP, num_warps=8,
    )  # fmt: skip
    nll = flat.new_empty(() if reduction in TOTAL_REDUCTIONS else shape[:1], dtype=torch.float32)
    run(reduce.finish, nll.numel(), nll, sums, nll, 1.0, sums.numel() // nll.numel())
    return [nll] if gradient is None else [nll, gradient]
