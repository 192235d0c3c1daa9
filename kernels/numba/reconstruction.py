"""The reconstruction pair: one loop over rows, into which a likelihood is plugged at compile time.

Reads ``recon`` and ``target`` once. The one-pass forward writes the gradient beside the loss: for float32, 8 bytes an
element read and 4 written. A row of the loop is an example, or 4096 elements where a total of dense tensors is wanted.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import numpy as np
from numba import njit

from . import cache
from .intrinsics import FLOAT32, FLOAT64, UINT8, constant, load, load_like, outside_unit, store
from .likelihoods import BOUNDED_RECON, BOUNDED_TARGET, element_terms, terms
from .math import log_normal

# reassoc lets LLVM keep one partial sum (or product) a vector lane
REDUCE = {"contract", "nsz", "reassoc"}
CLEAR = np.int32(0)
FACTORS = 96  # in [1, 2], multiplied before their logarithm is taken; 2¹²⁷ is the end of float32


@functools.cache
def forward_rows(likelihood: int, recon_type: int, target_type: int, with_gradient: bool) -> Callable[..., int]:
    """Σ nll of each row in float64; with the gradient for an upstream gradient of ``weight``.

    The compiled function returns whether a value is outside the unit interval that must not be.
    """
    sources, check_recon = cache.STAMP, likelihood in BOUNDED_RECON
    check_target = likelihood in BOUNDED_TARGET and target_type != UINT8

    @njit(fastmath=REDUCE, error_model="numpy", nogil=True)
    def forward(
        first,
        last,
        cols,
        total,
        recon_ptr,
        recon_stride,
        target_ptr,
        target_stride,
        grad_ptr,
        sums_ptr,
        parameter,
        weight,
    ):
        sources  # noqa: B018  (part of the key of the cache on disk)
        flags = CLEAR
        for row in range(first, last):
            recon, target, grad = row * recon_stride, row * target_stride, row * cols
            end = min(cols, total - grad)
            zero = constant(0.0, load(recon_type, recon_ptr, 0))
            scale, p = constant(weight, zero), constant(parameter, zero)
            row_sum = 0.0
            for start in range(0, end, FACTORS):
                additive_sum, product = zero, constant(1.0, zero)
                for j in range(start, min(start + FACTORS, end)):
                    y = load(recon_type, recon_ptr, recon + j)
                    x = load_like(target_type, target_ptr, target + j, zero)
                    if check_target:
                        flags = outside_unit(flags, x)
                    if check_recon:
                        flags = outside_unit(flags, y)
                    additive, factor, derivative = terms(likelihood, y, x, p)
                    additive_sum += additive
                    product *= factor
                    if with_gradient:
                        store(recon_type, grad_ptr, grad + j, derivative * scale)
                row_sum += additive_sum + log_normal(product)
            store(FLOAT64, sums_ptr, row, row_sum)
        return flags

    return cache.on_disk(forward)


@functools.cache
def forward_elements(likelihood: int, recon_type: int, target_type: int) -> Callable[..., int]:
    """Elementwise nll, rounded to the dtype of ``recon``."""
    sources, check_recon = cache.STAMP, likelihood in BOUNDED_RECON
    check_target = likelihood in BOUNDED_TARGET and target_type != UINT8

    @njit(fastmath=REDUCE, error_model="numpy", nogil=True)
    def forward(first, last, cols, total, recon_ptr, recon_stride, target_ptr, target_stride, nll_ptr, parameter):
        sources  # noqa: B018
        flags = CLEAR
        zero = constant(0.0, load(recon_type, recon_ptr, 0))
        p = constant(parameter, zero)
        for row in range(first, last):
            recon, target, nll_row = row * recon_stride, row * target_stride, row * cols
            for j in range(min(cols, total - nll_row)):
                y = load(recon_type, recon_ptr, recon + j)
                x = load_like(target_type, target_ptr, target + j, zero)
                if check_target:
                    flags = outside_unit(flags, x)
                if check_recon:
                    flags = outside_unit(flags, y)
                nll, _ = element_terms(likelihood, y, x, p)
                store(recon_type, nll_ptr, nll_row + j, nll)
        return flags

    return cache.on_disk(forward)


@functools.cache
def backward_rows(likelihood: int, recon_type: int, target_type: int) -> Callable[..., int]:
    """The gradient for an upstream gradient of one number a row (``upstream_stride`` 1) or for all rows (0)."""
    sources, upstream_type = cache.STAMP, FLOAT64 if recon_type == FLOAT64 else FLOAT32

    @njit(fastmath=REDUCE, error_model="numpy", nogil=True)
    def backward(
        first,
        last,
        cols,
        total,
        upstream_ptr,
        upstream_stride,
        recon_ptr,
        recon_stride,
        target_ptr,
        target_stride,
        grad_ptr,
        parameter,
        weight,
    ):
        sources  # noqa: B018
        zero = constant(0.0, load(recon_type, recon_ptr, 0))
        p = constant(parameter, zero)
        for row in range(first, last):
            recon, target, grad = row * recon_stride, row * target_stride, row * cols
            upstream = load(upstream_type, upstream_ptr, row * upstream_stride) * constant(weight, zero)
            for j in range(min(cols, total - grad)):
                y = load(recon_type, recon_ptr, recon + j)
                x = load_like(target_type, target_ptr, target + j, zero)
                _, _, derivative = terms(likelihood, y, x, p)
                store(recon_type, grad_ptr, grad + j, derivative * upstream)
        return 0

    return cache.on_disk(backward)


@functools.cache
def backward_elements(likelihood: int, recon_type: int, target_type: int) -> Callable[..., int]:
    """The gradient for an upstream gradient of one number an element, in the dtype of ``recon``."""
    sources = cache.STAMP

    @njit(fastmath=REDUCE, error_model="numpy", nogil=True)
    def backward(
        first, last, cols, total, upstream_ptr, upstream_stride, recon_ptr, recon_stride, target_ptr, target_stride,
        grad_ptr, parameter
    ):  # fmt: skip
        sources  # noqa: B018
        zero = constant(0.0, load(recon_type, recon_ptr, 0))
        p = constant(parameter, zero)
        for row in range(first, last):
            recon, target, grad = row * recon_stride, row * target_stride, row * cols
            upstream = row * upstream_stride
            for j in range(min(cols, total - grad)):
                y = load(recon_type, recon_ptr, recon + j)
                x = load_like(target_type, target_ptr, target + j, zero)
                _, _, derivative = terms(likelihood, y, x, p)
                store(recon_type, grad_ptr, grad + j, derivative * load(recon_type, upstream_ptr, upstream + j))
        return 0

    return cache.on_disk(backward)


@functools.cache
def rescale(gradient_type: int) -> Callable[..., int]:
    """``gradient *= factor`` in place, over rows of 4096 elements."""
    sources = cache.STAMP

    @njit(fastmath=REDUCE, error_model="numpy", nogil=True)
    def multiply(first, last, cols, total, grad_ptr, factor):
        sources  # noqa: B018
        scale = constant(factor, load(gradient_type, grad_ptr, 0))
        for j in range(first * cols, min(last * cols, total)):
            store(gradient_type, grad_ptr, j, load(gradient_type, grad_ptr, j) * scale)
        return 0

    return cache.on_disk(multiply)


@functools.cache
def finish(loss_type: int) -> Callable[..., float]:
    """Row sums to the loss: ``loss[row] = sums[row]`` for each example, else their sum times ``weight``; returns that.

    Rows are added in order, whatever thread summed them: the same bits for any number of threads.
    """
    sources = cache.STAMP

    @njit(error_model="numpy", nogil=True)
    def write(rows, sums_ptr, by_example, weight, loss_ptr):
        sources  # noqa: B018
        total = 0.0
        for row in range(rows):
            value = load(FLOAT64, sums_ptr, row)
            total += value
            if by_example:
                store(loss_type, loss_ptr, row, value)
        total *= weight
        if not by_example:
            store(loss_type, loss_ptr, 0, total)
        return total

    return cache.on_disk(write)
