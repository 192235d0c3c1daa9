"""Sums over pairs on a GPU: log-sum-exps over a mixture, jointly and by dimension, sums of kernels, gradients.

A program holds ROWS rows of one tensor, all their dimensions, in registers, and walks the rows of the other: of a pair
of rows and a dimension it reads nothing new, since a row of the other (12 bytes a dimension) serves ROWS of them. What
bounds it is arithmetic: one exponential a pair and dimension, which takes the special-function unit as long as eight
other instructions. A running log-sum-exp needs no second one: of e^(m − m') and e^(a − m'), m' = max(m, a), one is 1.

Where there are few rows the other tensor is walked in ``chunks``, whose results torch adds up, in one order. Gradients
of x are sums over y and those of y sums over x: two kernels, so that no sum is shared between programs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import reference
from ..layout import accumulator
from ..reference.pairs import LOG_2PI, mmd_total, mmd_weights
from .approx import exp2_32, reciprocal_of_normal
from .launch import run

TILE = 2048  # elements of the rows a program holds: 16 a thread
Y_TILE = 1024  # of those whose three sums are taken: the registers of 8 a thread; float64 takes half of both
MOST_DIMENSIONS = 2048  # of a row that fits; beyond, the reference serves
PROGRAMS = 528  # four for each multiprocessor of an H200
LONGEST, SHORTEST = 2048, 64  # rows a chunk: more lose digits in one sum, fewer are not worth a program
GROUP = tl.constexpr(32)  # kernels added up by themselves
LOWEST = tl.constexpr(-3e38)  # less than any exponent, and finite: a difference of infinities would be NaN


@triton.jit
def power(x):
    """2^x; e^x in float64."""
    if x.dtype == tl.float64:
        return tl.exp(x)
    else:
        return exp2_32(x)


@triton.jit
def accumulate(largest, total, exponent):
    """A running Σ 2^exponent, as ``total`` · 2^``largest``, with one more term."""
    above = exponent - largest
    term = power(-tl.abs(above))
    total = tl.where(above > 0, total * term + 1, total + term)
    return tl.maximum(largest, exponent), total


@triton.jit
def offsets_of(rows, other, count, own, beside):
    """What the weight of the pairs (i, j) has besides: at j = i, and at j = i + 1, cyclic."""
    after = rows + 1
    return tl.where(rows == other, own, tl.where(other == tl.where(after == count, 0, after), beside, beside * 0))


@triton.jit
def forward(
    x_ptr, mu_ptr, precision_ptr, constant_ptr, weight_ptr, largest_ptr, total_ptr, largest_each_ptr, total_each_ptr,
    own: tl.float64, beside: tl.float64, rows, count, cols, span,
    PRODUCT: tl.constexpr, OFFSET: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Running log-sum-exps of ROWS rows of x over one chunk of mu: of whole rows, and if PRODUCT by dimension."""
    chunk, tiles = tl.program_id(0) // tl.cdiv(rows, ROWS), tl.cdiv(rows, ROWS)
    row = (tl.program_id(0) % tiles) * ROWS + tl.arange(0, ROWS)
    d, wide = tl.arange(0, BLOCK), tl.full((), cols, tl.int64)
    at, there = row[:, None].to(tl.int64) * cols + d[None, :], (row < rows)[:, None] & (d < cols)[None, :]
    x = tl.load(x_ptr + at, there, other=0)
    real = x.dtype
    own, beside = tl.full((), own, tl.float64).to(real), tl.full((), beside, tl.float64).to(real)
    largest, total = tl.full((ROWS,), LOWEST, real), tl.zeros((ROWS,), real)
    if PRODUCT:
        largest_each, total_each = tl.full((ROWS, BLOCK), LOWEST, real), tl.zeros((ROWS, BLOCK), real)
    for j in range(chunk * span, min(count, chunk * span + span)):
        of_j = j * wide + d
        distance = x - tl.load(mu_ptr + of_j, d < cols, other=0)[None, :]
        square = distance * distance
        precision = tl.load(precision_ptr + of_j, d < cols, other=0)[None, :]
        exponent = tl.sum(square * precision, axis=1) + tl.load(weight_ptr + j)
        if OFFSET:
            offset = offsets_of(row, j, count, own, beside)
            exponent += offset
        largest, total = accumulate(largest, total, exponent)
        if PRODUCT:
            each = square * precision + tl.load(constant_ptr + of_j, d < cols, other=0)[None, :]
            if OFFSET:
                each += offset[:, None]
            largest_each, total_each = accumulate(largest_each, total_each, each)
    of_chunk = chunk.to(tl.int64) * rows
    tl.store(largest_ptr + of_chunk + row, largest, row < rows)
    tl.store(total_ptr + of_chunk + row, total, row < rows)
    if PRODUCT:
        tl.store(largest_each_ptr + of_chunk * cols + at, largest_each, there)
        tl.store(total_each_ptr + of_chunk * cols + at, total_each, there)


@triton.jit
def backward_x(
    x_ptr, mu_ptr, precision_ptr, constant_ptr, weight_ptr, joint_ptr, rest_ptr, each_ptr, grad_joint_ptr,
    grad_product_ptr, out_ptr, own: tl.float64, beside: tl.float64, rows, count, cols, span,
    JOINT: tl.constexpr, PRODUCT: tl.constexpr, OFFSET: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Σ over one chunk of mu of u·w·(x − mu), u the share of a pair in what its row has of upstream gradients."""
    chunk, tiles = tl.program_id(0) // tl.cdiv(rows, ROWS), tl.cdiv(rows, ROWS)
    row = (tl.program_id(0) % tiles) * ROWS + tl.arange(0, ROWS)
    d, wide = tl.arange(0, BLOCK), tl.full((), cols, tl.int64)
    at, there = row[:, None].to(tl.int64) * cols + d[None, :], (row < rows)[:, None] & (d < cols)[None, :]
    x = tl.load(x_ptr + at, there, other=0)
    real = x.dtype
    own, beside = tl.full((), own, tl.float64).to(real), tl.full((), beside, tl.float64).to(real)
    sums = tl.zeros((ROWS, BLOCK), real)
    if JOINT:
        kept_joint = tl.load(joint_ptr + row, row < rows, other=0)
        rest = tl.load(rest_ptr + row, row < rows, other=0)
        grad_joint = tl.load(grad_joint_ptr + row, row < rows, other=0)
    if PRODUCT:
        kept_each = tl.load(each_ptr + at, there, other=0)
        grad_product = tl.load(grad_product_ptr + row, row < rows, other=0)[:, None]
    for j in range(chunk * span, min(count, chunk * span + span)):
        of_j = j * wide + d
        distance = x - tl.load(mu_ptr + of_j, d < cols, other=0)[None, :]
        precision = tl.load(precision_ptr + of_j, d < cols, other=0)[None, :]
        square = distance * distance
        if OFFSET:
            offset = offsets_of(row, j, count, own, beside)
        if JOINT:
            exponent = tl.sum(square * precision, axis=1) + tl.load(weight_ptr + j)
            if OFFSET:
                exponent += offset
            joint_share = (power(exponent - kept_joint - rest) * grad_joint)[:, None]
        if PRODUCT:
            each = square * precision + tl.load(constant_ptr + of_j, d < cols, other=0)[None, :]
            if OFFSET:
                each += offset[:, None]
            share = power(each - kept_each) * grad_product
            if JOINT:
                share += joint_share
        else:
            share = joint_share
        sums += share * (distance * precision)
    tl.store(out_ptr + chunk.to(tl.int64) * rows * cols + at, sums, there)


@triton.jit
def backward_y(
    x_ptr, mu_ptr, precision_ptr, constant_ptr, weight_ptr, joint_ptr, rest_ptr, each_ptr, grad_joint_ptr,
    grad_product_ptr, mass_ptr, first_ptr, second_ptr, own: tl.float64, beside: tl.float64, rows, count, cols, span,
    JOINT: tl.constexpr, PRODUCT: tl.constexpr, OFFSET: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Of ROWS rows of mu, over one chunk of x: Σ u, Σ u·(x − mu), Σ u·(x − mu)²; the first by dimension if PRODUCT."""
    chunk, tiles = tl.program_id(0) // tl.cdiv(count, ROWS), tl.cdiv(count, ROWS)
    j = (tl.program_id(0) % tiles) * ROWS + tl.arange(0, ROWS)
    d, wide = tl.arange(0, BLOCK), tl.full((), cols, tl.int64)
    at, there = j[:, None].to(tl.int64) * cols + d[None, :], (j < count)[:, None] & (d < cols)[None, :]
    mu = tl.load(mu_ptr + at, there, other=0)
    precision = tl.load(precision_ptr + at, there, other=0)
    real = mu.dtype
    own, beside = tl.full((), own, tl.float64).to(real), tl.full((), beside, tl.float64).to(real)
    first, second = tl.zeros((ROWS, BLOCK), real), tl.zeros((ROWS, BLOCK), real)
    if PRODUCT:
        mass = tl.zeros((ROWS, BLOCK), real)
        constant = tl.load(constant_ptr + at, there, other=0)
    else:
        mass = tl.zeros((ROWS,), real)
    if JOINT:
        weight = tl.load(weight_ptr + j, j < count, other=0)
    for i in range(chunk * span, min(rows, chunk * span + span)):
        of_i = i * wide + d
        distance = tl.load(x_ptr + of_i, d < cols, other=0)[None, :] - mu
        square = distance * distance
        if OFFSET:
            offset = offsets_of(i, j, count, own, beside)
        if JOINT:
            exponent = tl.sum(square * precision, axis=1) + weight
            if OFFSET:
                exponent += offset
            joint_share = power(exponent - tl.load(joint_ptr + i) - tl.load(rest_ptr + i)) * tl.load(grad_joint_ptr + i)
        if PRODUCT:
            each = square * precision + constant
            if OFFSET:
                each += offset[:, None]
            kept = tl.load(each_ptr + of_i, d < cols, other=0)[None, :]
            share = power(each - kept) * tl.load(grad_product_ptr + i)
            if JOINT:
                share += joint_share[:, None]
            mass += share
        else:
            share = joint_share[:, None]
            mass += joint_share
        pull = share * distance
        first += pull
        second += pull * distance
    of_chunk = chunk.to(tl.int64) * count
    tl.store(first_ptr + of_chunk * cols + at, first, there)
    tl.store(second_ptr + of_chunk * cols + at, second, there)
    if PRODUCT:
        tl.store(mass_ptr + of_chunk * cols + at, mass, there)
    else:
        tl.store(mass_ptr + of_chunk + j, mass, j < count)


@triton.jit
def kernel_of(squared, scale, IMQ: tl.constexpr, SLOPE: tl.constexpr):
    """``kernel_values`` of kernels/reference/pairs.py for one scale, or their derivative."""
    if IMQ:
        if squared.dtype == tl.float64:
            value = scale / (scale + squared)
        else:
            value = scale * reciprocal_of_normal((scale + squared)[:, None]).reshape(squared.shape)
        if SLOPE:
            value = -value * value
    else:
        value = power(squared * (-(1.0 if squared.dtype == tl.float64 else 1.4426950408889634) / scale))
        if SLOPE:
            value = -value
    return value / scale if SLOPE else value


@triton.jit
def kernels(
    x_ptr, y_ptr, scales_ptr, out_ptr, rows, count, cols, span,
    IMQ: tl.constexpr, SCALES: tl.constexpr, SLOPE: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Of ROWS rows of x, over one chunk of y: Σ k(‖x − y‖²); or if SLOPE Σ k'·(x − y)."""
    chunk, tiles = tl.program_id(0) // tl.cdiv(rows, ROWS), tl.cdiv(rows, ROWS)
    row = (tl.program_id(0) % tiles) * ROWS + tl.arange(0, ROWS)
    d, wide = tl.arange(0, BLOCK), tl.full((), cols, tl.int64)
    at, there = row[:, None].to(tl.int64) * cols + d[None, :], (row < rows)[:, None] & (d < cols)[None, :]
    x = tl.load(x_ptr + at, there, other=0)
    sums = tl.zeros((ROWS, BLOCK), x.dtype) if SLOPE else tl.zeros((ROWS,), x.dtype)
    end = min(count, chunk * span + span)
    for begin in range(chunk * span, end, GROUP):
        part = tl.zeros((ROWS, BLOCK), x.dtype) if SLOPE else tl.zeros((ROWS,), x.dtype)
        for j in range(begin, min(end, begin + GROUP)):
            distance = x - tl.load(y_ptr + j * wide + d, d < cols, other=0)[None, :]
            squared = tl.sum(distance * distance, axis=1)
            value = tl.zeros((ROWS,), x.dtype)
            for k in tl.static_range(SCALES):
                value += kernel_of(squared, tl.load(scales_ptr + k), IMQ, SLOPE)
            if SLOPE:
                part += value[:, None] * distance
            else:
                part += value
        sums += part
    of_chunk = chunk.to(tl.int64) * rows
    if SLOPE:
        tl.store(out_ptr + of_chunk * cols + at, sums, there)
    else:
        tl.store(out_ptr + of_chunk + row, sums, row < rows)


class Walk(NamedTuple):
    """Tiles of ``rows`` × ``block``; ``chunks`` of ``span`` rows of the other tensor; ``programs`` in all."""

    rows: int
    block: int
    span: int
    chunks: int
    programs: int


def walk(rows: int, count: int, cols: int, tile: int, dtype: torch.dtype) -> Walk:
    """How ``rows`` rows meet ``count`` others."""
    tile = tile // 2 if dtype == torch.float64 else tile
    block = max(16, 1 << (cols - 1).bit_length())
    tile_rows = max(1, min(tile // block, 1 << (rows - 1).bit_length()))
    tiles = -(-rows // tile_rows)
    wanted = max(-(-count // LONGEST), min(-(-PROGRAMS // tiles), count // SHORTEST), 1)
    span = -(-count // wanted)
    chunks = -(-count // span)
    return Walk(tile_rows, block, span, chunks, tiles * chunks)


def _nats(dtype: torch.dtype) -> float:
    """Nats in a unit of ``power``'s argument."""
    return 1.0 if dtype == torch.float64 else math.log(2)


class _Mixture:
    """What the kernels read: mu, −½/σ² and −½·log(2πσ²) in units of ``power``, and the last of a whole row."""

    def __init__(
        self, x: Tensor, mu: Tensor, logvar: Tensor, log_weights: Tensor | None, own: float = 0.0, beside: float = 0.0
    ):
        self.dtype = accumulator(x.dtype)
        self.unit = _nats(self.dtype)
        self.x, self.mu = x.to(self.dtype).contiguous(), mu.to(self.dtype).contiguous()
        log_var = logvar.double()
        constant = -0.5 / self.unit * (log_var + LOG_2PI)
        weight = constant.sum(1)
        if log_weights is not None:
            weight = weight + log_weights.double() / self.unit
        self.precision = torch.exp(-log_var)
        self.given = [t.to(self.dtype).contiguous() for t in (-0.5 / self.unit * self.precision, constant, weight)]
        self.offsets = own / self.unit, beside / self.unit

    def sizes(self, span: int) -> tuple[int, ...]:
        return len(self.x), *self.mu.shape, span

    def forward(self, product: bool) -> tuple[Tensor, Tensor | None]:
        """Log densities of rows, and by dimension, both in units of ``power``, float64."""
        rows, cols = self.x.shape
        tiles = walk(rows, len(self.mu), cols, TILE, self.dtype)
        joint = self.x.new_empty((2, tiles.chunks, rows))
        each = self.x.new_empty((2, tiles.chunks, rows, cols)) if product else joint
        run(
            forward, tiles.programs, self.x, self.x, self.mu, *self.given, joint[0], joint[1], each[0], each[1],
            *self.offsets, *self.sizes(tiles.span), PRODUCT=product, OFFSET=any(self.offsets), ROWS=tiles.rows,
            BLOCK=tiles.block,
        )  # fmt: skip
        return self._merged(joint), self._merged(each) if product else None

    def _merged(self, running: Tensor) -> Tensor:
        largest, total = running.double()
        nats = largest * self.unit + total.log()
        return torch.logsumexp(nats, 0) / self.unit

    def backward(
        self, grad_joint: Tensor | None, grad_product: Tensor | None, joint: Tensor | None, each: Tensor | None
    ) -> tuple[list[Tensor], Tensor]:
        """The gradients of x, mu and logvar, and Σ u of each row of mu, where there is no product."""
        rows, cols = self.x.shape
        count, product = len(self.mu), grad_product is not None
        constants: dict[str, Any] = {
            "JOINT": grad_joint is not None, "PRODUCT": product, "OFFSET": any(self.offsets),
        }  # fmt: skip
        grads = (None if t is None else t.to(self.dtype).contiguous() for t in (grad_joint, grad_product))
        kept = None if joint is None else joint.to(self.dtype)
        rest = None if joint is None or kept is None else (joint - kept).to(self.dtype)
        read = [self.x if t is None else t for t in (kept, rest, each, *grads)]
        tiles = walk(rows, count, cols, TILE, self.dtype)
        of_x = self.x.new_empty((tiles.chunks, rows, cols))
        run(
            backward_x, tiles.programs, self.x, self.x, self.mu, *self.given, *read, of_x, *self.offsets,
            *self.sizes(tiles.span), **constants, ROWS=tiles.rows, BLOCK=tiles.block,
        )  # fmt: skip
        tiles = walk(count, rows, cols, Y_TILE, self.dtype)
        first, second = self.x.new_empty((2, tiles.chunks, count, cols))
        mass = self.x.new_empty((tiles.chunks, count, cols) if product else (tiles.chunks, count))
        run(
            backward_y, tiles.programs, self.x, self.x, self.mu, *self.given, *read, mass, first, second, *self.offsets,
            *self.sizes(tiles.span), **constants, ROWS=tiles.rows, BLOCK=tiles.block,
        )  # fmt: skip
        by_x, by_first, by_second, by_mass = (t.sum(0, dtype=torch.float64) for t in (of_x, first, second, mass))
        of_logvar = 0.5 * (self.precision * by_second - (by_mass if product else by_mass[:, None]))
        return [2 * self.unit * by_x, self.precision * by_first, of_logvar], by_mass

    def kept(self, values: Tensor) -> Tensor:
        """For the backward: NaN where a density is 0, and none has a share."""
        return torch.where(values == -math.inf, math.nan, values)


def _rounded(gradients: Sequence[Tensor], like: Sequence[Tensor]) -> list[Tensor]:
    return [gradient.to(tensor.dtype) for gradient, tensor in zip(gradients, like, strict=True)]


def aggregate_posterior_forward(
    z: Tensor, mu: Tensor, logvar: Tensor, *, own: float, beside: float, keep: bool
) -> list[Tensor]:
    if z.shape[1] > MOST_DIMENSIONS:
        return reference.aggregate_posterior_forward(z, mu, logvar, own=own, beside=beside, keep=keep)
    mixture = _Mixture(z, mu, logvar, None, own, beside)
    joint, each = mixture.forward(product=True)
    assert each is not None
    outputs = [(value * mixture.unit).to(mixture.dtype) for value in (joint, each.sum(1))]
    return [*outputs, *([mixture.kept(joint), mixture.kept(each).to(mixture.dtype)] if keep else [])]


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
    options = {"own": own, "beside": beside}
    if z.shape[1] > MOST_DIMENSIONS:
        return reference.aggregate_posterior_backward(grad_qz, grad_prod, z, mu, logvar, None, None, **options)
    if log_qz is None or log_each is None:
        log_qz, log_each = aggregate_posterior_forward(z, mu, logvar, **options, keep=True)[2:]
    gradients, _ = _Mixture(z, mu, logvar, None, own, beside).backward(grad_qz, grad_prod, log_qz, log_each)
    return _rounded(gradients, (z, mu, logvar))


def mixture_forward(
    z: Tensor, means: Tensor, logvars: Tensor, log_weights: Tensor | None, *, keep: bool
) -> list[Tensor]:
    if z.shape[1] > MOST_DIMENSIONS:
        return reference.mixture_forward(z, means, logvars, log_weights, keep=keep)
    mixture = _Mixture(z, means, logvars, log_weights)
    joint, _ = mixture.forward(product=False)
    return [(joint * mixture.unit).to(mixture.dtype), *([mixture.kept(joint)] if keep else [])]


def mixture_backward(
    grad: Tensor, z: Tensor, means: Tensor, logvars: Tensor, log_weights: Tensor | None, log_prob: Tensor | None
) -> list[Tensor]:
    given = z, means, logvars, *(() if log_weights is None else (log_weights,))
    if z.shape[1] > MOST_DIMENSIONS:
        return reference.mixture_backward(grad, z, means, logvars, log_weights, None)
    if log_prob is None:
        log_prob = mixture_forward(z, means, logvars, log_weights, keep=True)[1]
    gradients, mass = _Mixture(z, means, logvars, log_weights).backward(grad, None, log_prob, None)
    return _rounded([*gradients, mass][: len(given)], given)


def _kernels(x: Tensor, y: Tensor, family: str, scales: Tensor, slope: bool) -> Tensor:
    """Σ over y of k of each row of x; or of its gradient in x. float64."""
    rows, cols = x.shape
    tiles = walk(rows, len(y), cols, TILE, x.dtype)
    out = x.new_empty((tiles.chunks, rows, cols) if slope else (tiles.chunks, rows))
    run(
        kernels, tiles.programs, x, x, y, scales, out, rows, *y.shape, tiles.span, IMQ=family == "imq",
        SCALES=len(scales), SLOPE=slope, ROWS=tiles.rows, BLOCK=tiles.block,
    )  # fmt: skip
    return out.sum(0, dtype=torch.float64) * (2 if slope else 1)


def _dense(x: Tensor, y: Tensor, scales: Sequence[float]) -> tuple[Tensor, Tensor, Tensor]:
    dtype = accumulator(x.dtype)
    return x.to(dtype).contiguous(), y.to(dtype).contiguous(), torch.tensor(scales, dtype=dtype, device=x.device)


def mmd_forward(x: Tensor, y: Tensor, *, family: str, scales: Sequence[float], unbiased: bool) -> list[Tensor]:
    if x.shape[1] > MOST_DIMENSIONS:
        return reference.mmd_forward(x, y, family=family, scales=scales, unbiased=unbiased)
    a, b, c = _dense(x, y, scales)
    of_x, of_y, between = (_kernels(*pair, family, c, slope=False).sum() for pair in ((a, a), (b, b), (a, b)))
    return [mmd_total(of_x, of_y, between, len(a), len(b), scales, unbiased).to(a.dtype)]


def mmd_backward(
    grad: Tensor, x: Tensor, y: Tensor, *, family: str, scales: Sequence[float], unbiased: bool, of_y: bool
) -> list[Tensor]:
    if x.shape[1] > MOST_DIMENSIONS:
        return reference.mmd_backward(
            grad, x, y, family=family, scales=scales, unbiased=unbiased, of_y=of_y
        )  # fmt: skip
    a, b, c = _dense(x, y, scales)
    of_aa, of_bb, of_ab = mmd_weights(len(a), len(b), unbiased)

    def pull(left: Tensor, right: Tensor, within: float) -> Tensor:
        """A pair within a sample has two ends."""
        inside, between = (_kernels(left, other, family, c, slope=True) for other in (left, right))
        return (grad.double() * (2 * within * inside + of_ab * between)).to(x.dtype)

    return [pull(a, b, of_aa), *([pull(b, a, of_bb)] if of_y else [])]
