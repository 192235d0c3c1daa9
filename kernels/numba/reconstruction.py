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
from .intrinsics import FLOAT32, FLOAT64, UINT8, constant, everything, load, load_like, store
from .likelihoods import WATCH_RECON, WATCH_TARGET, element_terms, parameter_slope, terms, zero_inflated
from .math import exp, log_normal

# reassoc lets LLVM keep one partial sum (or product) a vector lane
REDUCE = {"contract", "nsz", "reassoc"}
CLEAR = np.int32(0)
FACTORS = 96  # in [1, 2], multiplied before their logarithm is taken; 2¹²⁷ is the end of float32


def watches(likelihood: int, target_type: int) -> tuple[Callable[..., int], Callable[..., int]]:
    """What looks at recon, and at target: a byte's x/255 is in every domain."""
    return WATCH_RECON[likelihood], everything if target_type == UINT8 else WATCH_TARGET[likelihood]


@functools.cache
def forward_rows(likelihood: int, recon_type: int, target_type: int, with_gradient: bool) -> Callable[..., int]:
    """Σ nll of each row in float64; with the gradient for an upstream gradient of ``weight``.

    The compiled function returns whether a value is outside its domain.
    """
    sources, watch_recon, watch_target = cache.STAMP, *watches(likelihood, target_type)

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
                    flags = watch_recon(watch_target(flags, x), y)
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
    sources, watch_recon, watch_target = cache.STAMP, *watches(likelihood, target_type)

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
                flags = watch_recon(watch_target(flags, x), y)
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
def softmax_of(recon_type: int) -> Callable[..., tuple[float, float]]:
    """``(shift, inverse)`` of a row of scores, whose softmax is inverse · e^(score − shift)."""
    sources = cache.STAMP

    @njit(fastmath=REDUCE, error_model="numpy", nogil=True)
    def stable(recon_ptr, first, count):
        sources  # noqa: B018
        zero = constant(0.0, load(recon_type, recon_ptr, 0))
        shift = load(recon_type, recon_ptr, first)
        for j in range(count):
            shift = max(shift, load(recon_type, recon_ptr, first + j))
        total = 0.0
        for start in range(0, count, FACTORS):
            part = zero
            for j in range(start, min(start + FACTORS, count)):
                part += exp(load(recon_type, recon_ptr, first + j) - shift)
            total += part
        return shift, constant(1.0 / total, zero)

    return stable


@functools.cache
def with_tensor(
    likelihood: int,
    recon_type: int,
    target_type: int,
    by_row: bool,
    upstream_by_element: bool,
    inflated: bool,
    from_scores: bool,
) -> Callable[..., int]:
    """Everything of a term whose parameter is a tensor: what is written is what has an address.

    One loop for each output, over a row that is in the cache by then: each loop is vectorised. The parameter is one
    number per row if ``by_row``, else one per element. Each piece of ``piece`` rows has a row of ``columns`` to itself.
    ``inflated`` by logits of zero, one per element. ``from_scores`` recon is library · softmax of what is read.
    """
    sources, real = cache.STAMP, FLOAT64 if recon_type == FLOAT64 else FLOAT32
    watch_recon, watch_target = watches(likelihood, target_type)
    softmax = softmax_of(recon_type)

    @njit(fastmath=REDUCE, error_model="numpy", nogil=True, forceinline=True)
    def load_recon(recon_ptr, at, shift, factor):
        y = load(recon_type, recon_ptr, at)
        if from_scores:
            y = exp(y - shift) * factor
        return y

    @njit(fastmath=REDUCE, error_model="numpy", nogil=True)
    def fill(
        first, last, piece, rows, cols, total, recon_ptr, recon_stride, target_ptr, target_stride, parameter_ptr,
        parameter_stride, logits_ptr, logits_stride, upstream_ptr, upstream_stride, weight, nll_ptr, sums_ptr, grad_ptr,
        grad_parameter_ptr, parameter_sums_ptr, columns_ptr, grad_logits_ptr, library_ptr, flow_ptr
    ):  # fmt: skip
        sources  # noqa: B018
        flags = CLEAR
        zero = constant(0.0, load(recon_type, recon_ptr, 0))
        for row in range(first * piece, min(last * piece, rows)):
            recon, target, out, columns = row * recon_stride, row * target_stride, row * cols, row // piece * cols
            parameter, upstream, logits = row * parameter_stride, row * upstream_stride, row * logits_stride
            end = min(cols, total - out)
            number, scale = zero, constant(weight, zero)
            shift, inverse, factor = zero, zero, zero
            if from_scores:
                shift, inverse = softmax(recon_ptr, recon, end)
                factor = load(real, library_ptr, row) * inverse
            if by_row:
                number = load(real, parameter_ptr, parameter)
            if not upstream_by_element and upstream_ptr:
                scale *= load(real, upstream_ptr, upstream)
            if nll_ptr:
                for j in range(end):
                    p = number if by_row else load(real, parameter_ptr, parameter + j)
                    y = load_recon(recon_ptr, recon + j, shift, factor)
                    x = load_like(target_type, target_ptr, target + j, zero)
                    flags = watch_recon(watch_target(flags, x), y)
                    nll = terms(likelihood, y, x, p)[0]
                    if inflated:
                        nll = zero_inflated(nll, x, load(real, logits_ptr, logits + j))[0]
                    store(recon_type, nll_ptr, out + j, nll)
            if sums_ptr:
                row_sum = 0.0
                for start in range(0, end, FACTORS):
                    part = zero
                    for j in range(start, min(start + FACTORS, end)):
                        p = number if by_row else load(real, parameter_ptr, parameter + j)
                        y = load_recon(recon_ptr, recon + j, shift, factor)
                        x = load_like(target_type, target_ptr, target + j, zero)
                        flags = watch_recon(watch_target(flags, x), y)
                        nll = terms(likelihood, y, x, p)[0]
                        if inflated:
                            nll = zero_inflated(nll, x, load(real, logits_ptr, logits + j))[0]
                        part += nll
                    row_sum += part
                store(FLOAT64, sums_ptr, row, row_sum)
            if grad_ptr:
                slope_sum, flow_sum = 0.0, 0.0
                for start in range(0, end, FACTORS):
                    part, flow = zero, zero
                    for j in range(start, min(start + FACTORS, end)):
                        p = number if by_row else load(real, parameter_ptr, parameter + j)
                        c = load(recon_type, upstream_ptr, upstream + j) if upstream_by_element else scale
                        y = load_recon(recon_ptr, recon + j, shift, factor)
                        x = load_like(target_type, target_ptr, target + j, zero)
                        nll, _, derivative = terms(likelihood, y, x, p)
                        if inflated:
                            _, by_nll, by_logit = zero_inflated(nll, x, load(real, logits_ptr, logits + j))
                            store(real, grad_logits_ptr, out + j, by_logit * c)
                            c *= by_nll
                        derivative *= c
                        if from_scores:
                            derivative *= y
                            flow += derivative
                        store(recon_type, grad_ptr, out + j, derivative)
                        if by_row:
                            part += parameter_slope(likelihood, y, x, p) * c
                    slope_sum += part
                    flow_sum += flow
                if by_row:
                    store(FLOAT64, parameter_sums_ptr, row, slope_sum)
                if from_scores:
                    store(FLOAT64, flow_ptr, row, flow_sum)
                    share = constant(flow_sum, zero) * inverse
                    for j in range(end):  # what a softmax passes on
                        e = exp(load(recon_type, recon_ptr, recon + j) - shift)
                        store(recon_type, grad_ptr, out + j, load(recon_type, grad_ptr, out + j) - e * share)
            if grad_parameter_ptr or columns_ptr:
                for j in range(end):
                    p = load(real, parameter_ptr, parameter + j)
                    c = load(recon_type, upstream_ptr, upstream + j) if upstream_by_element else scale
                    y = load_recon(recon_ptr, recon + j, shift, factor)
                    x = load_like(target_type, target_ptr, target + j, zero)
                    slope = parameter_slope(likelihood, y, x, p) * c
                    if inflated:
                        slope *= zero_inflated(terms(likelihood, y, x, p)[0], x, load(real, logits_ptr, logits + j))[1]
                    if columns_ptr:
                        at = columns + j
                        store(FLOAT64, columns_ptr, at, load(FLOAT64, columns_ptr, at) + slope)
                    else:
                        store(real, grad_parameter_ptr, out + j, slope)
        return flags

    return cache.on_disk(fill)


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


@njit(error_model="numpy", nogil=True)
def in_pairs(rows, sums_ptr):
    """The sum of ``rows`` sums, which are overwritten.

    In pairs, whatever thread summed a row: the same bits for any number of threads. One after the other, thousands of
    them would lose more in float64 than eager's sum does.
    """
    left = rows
    while left > 1:
        pairs = left // 2
        for pair in range(pairs):
            total = load(FLOAT64, sums_ptr, 2 * pair) + load(FLOAT64, sums_ptr, 2 * pair + 1)
            store(FLOAT64, sums_ptr, pair, total)
        if left % 2:
            store(FLOAT64, sums_ptr, pairs, load(FLOAT64, sums_ptr, left - 1))
        left = pairs + left % 2
    return load(FLOAT64, sums_ptr, 0)


@functools.cache
def finish(loss_type: int) -> Callable[..., None]:
    """Row sums to the loss: ``loss[row] = sums[row]`` for each example, else their sum times ``weight``."""
    sources = cache.STAMP

    @njit(error_model="numpy", nogil=True)
    def write(rows, sums_ptr, by_example, weight, loss_ptr):
        sources  # noqa: B018
        if by_example:
            for row in range(rows):
                store(loss_type, loss_ptr, row, load(FLOAT64, sums_ptr, row))
        else:
            store(loss_type, loss_ptr, 0, in_pairs(rows, sums_ptr) * weight)

    return cache.on_disk(write)


@functools.cache
def finish_elbo(nll_type: int, kl_type: int) -> Callable[..., None]:
    """As :func:`finish`, for both parts, and nll + β·kl of them in float64."""
    sources = cache.STAMP

    @njit(error_model="numpy", nogil=True)
    def write(
        rows, nll_sums_ptr, nll_weight, kl_rows, kl_sums_ptr, kl_weight, beta, by_example, loss_ptr, nll_ptr, kl_ptr
    ):
        sources  # noqa: B018
        for row in range(rows if by_example else 1):
            if by_example:
                nll, kl = load(FLOAT64, nll_sums_ptr, row), load(FLOAT64, kl_sums_ptr, row)
            else:
                nll = in_pairs(rows, nll_sums_ptr) * nll_weight
                kl = in_pairs(kl_rows, kl_sums_ptr) * kl_weight
            store(nll_type, loss_ptr, row, nll + beta * kl)
            store(nll_type, nll_ptr, row, nll)
            store(kl_type, kl_ptr, row, kl)

    return cache.on_disk(write)
