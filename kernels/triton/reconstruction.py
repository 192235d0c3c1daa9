"""The reconstruction pair: one walk over tiles, into which a likelihood is plugged at compile time.

One pass reads ``recon`` and ``target`` and writes the gradient beside a partial sum a program: 12 bytes an element in
float32, 6 in bfloat16, 5 with a uint8 target. The backward of an elementwise or by-example loss moves the same.

A row is an example, or all of a dense tensor at once where only the total is wanted (``plan(1, total)``). Row starts
and the starts of a program's columns are 64-bit; within a tile indices are 32-bit, so the hot loop has no 64-bit
arithmetic an element. A program whose tiles are all whole takes a walk without masks.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .approx import exp_accurate, rounded
from .likelihoods import element_terms, log_of_factors, parameter_slope, terms, zero_inflated

ONE_255TH_HIGH = tl.constexpr(2.0**-8 + 2.0**-16)
ONE_255TH_LOW = tl.constexpr(2.0**-24 + 2.0**-32 + 2.0**-40 + 2.0**-47)


@triton.jit
def over_255(number):
    """An integer from −255 to 255 over 255, to nearest, fused or not: HIGH is so short that its product is exact."""
    if number.dtype == tl.float64:
        return number / 255.0
    else:
        return number * ONE_255TH_HIGH + number * ONE_255TH_LOW


@triton.jit
def load_target(ptr, mask, dtype: tl.constexpr, MASKED: tl.constexpr):
    """x in the accumulator's dtype; uint8 means x/255."""
    x = tl.load(ptr, mask, other=0) if MASKED else tl.load(ptr)
    if x.dtype == tl.uint8:
        return over_255(x.to(tl.int32).to(dtype))  # by way of int32: one conversion instruction
    else:
        return x.to(dtype)


@triton.jit
def whole_or_masked(row, start, rows, cols, steps, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """Whether every tile of this program lies inside."""
    return (row + ROWS <= rows) & (start + steps * BLOCK <= cols)


@triton.jit
def inside(row, start, rows, cols, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """Mask of the tile that starts at (row, start)."""
    rows_left = tl.minimum(rows - row, ROWS).to(tl.int32)
    cols_left = tl.minimum(cols - start, BLOCK).to(tl.int32)
    return (tl.arange(0, ROWS) < rows_left)[:, None] & (tl.arange(0, BLOCK) < cols_left)[None, :]


@triton.jit
def offsets(row, stride, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """Elements from the start of a program's columns in row 0 to those of a tile."""
    columns = tl.arange(0, BLOCK)[None, :]
    if ROWS == 1:
        return row * stride + columns
    else:
        return (row + tl.arange(0, ROWS))[:, None] * stride + columns


@triton.jit
def forward_walk(
    recon_ptr, target_ptr, grad_ptr, parameter, weight, row, start, rows, cols, recon_stride, target_stride, steps,
    LIKELIHOOD: tl.constexpr, WITH_GRADIENT: tl.constexpr, MASKED: tl.constexpr, ROWS: tl.constexpr,
    BLOCK: tl.constexpr, dtype: tl.constexpr,
):  # fmt: skip
    """Σ nll of each row over this program's columns, [ROWS]; writes the gradient on the way."""
    recon_at = offsets(row, recon_stride, ROWS, BLOCK)
    target_at = offsets(row, target_stride, ROWS, BLOCK)
    grad_at = offsets(row, cols, ROWS, BLOCK)
    additive_sum = tl.zeros((ROWS, BLOCK), dtype)
    product = tl.full((ROWS, BLOCK), 1.0, dtype)
    for _ in range(steps):
        mask = inside(row, start, rows, cols, ROWS, BLOCK) if MASKED else None
        y = tl.load(recon_ptr + start + recon_at, mask, other=0) if MASKED else tl.load(recon_ptr + start + recon_at)
        x = load_target(target_ptr + start + target_at, mask, dtype, MASKED)
        additive, factor, derivative = terms(y.to(dtype), x, parameter, LIKELIHOOD, recon_ptr.dtype.element_ty != dtype)
        additive_sum += tl.where(mask, additive, 0.0) if MASKED else additive
        product *= tl.where(mask, factor, 1.0) if MASKED else factor
        if WITH_GRADIENT:
            gradient = rounded(derivative * weight, grad_ptr.dtype.element_ty)
            tl.store(grad_ptr + start + grad_at, gradient, mask)
        start += BLOCK
    return tl.sum(additive_sum + log_of_factors(product, LIKELIHOOD), axis=1)


@triton.jit
def forward_tiles(
    program, recon_ptr, target_ptr, grad_ptr, partials_ptr, parameter, weight, rows, cols, recon_stride,
    target_stride, steps, chunks,
    LIKELIHOOD: tl.constexpr, WITH_GRADIENT: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program's share: ``partials[row, chunk]``."""
    dtype: tl.constexpr = partials_ptr.dtype.element_ty
    parameter, weight = tl.full((1, 1), parameter, dtype), tl.full((1, 1), weight, dtype)
    row = (program // chunks).to(tl.int64) * ROWS
    chunk = program % chunks
    start = chunk.to(tl.int64) * steps * BLOCK
    if whole_or_masked(row, start, rows, cols, steps, ROWS, BLOCK):
        sums = forward_walk(
            recon_ptr, target_ptr, grad_ptr, parameter, weight, row, start, rows, cols, recon_stride, target_stride,
            steps, LIKELIHOOD, WITH_GRADIENT, False, ROWS, BLOCK, dtype,
        )  # fmt: skip
    else:
        sums = forward_walk(
            recon_ptr, target_ptr, grad_ptr, parameter, weight, row, start, rows, cols, recon_stride, target_stride,
            steps, LIKELIHOOD, WITH_GRADIENT, True, ROWS, BLOCK, dtype,
        )  # fmt: skip
    at = row + tl.arange(0, ROWS)
    tl.store(partials_ptr + at * chunks + chunk, sums, at < rows)


@triton.jit(do_not_specialize=["chunks", "steps"])
def forward(
    recon_ptr, target_ptr, grad_ptr, partials_ptr, parameter: tl.float64, weight: tl.float64, rows: tl.int64,
    cols: tl.int64, recon_stride: tl.int64, target_stride: tl.int64, steps, chunks,
    LIKELIHOOD: tl.constexpr, WITH_GRADIENT: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    forward_tiles(
        tl.program_id(0), recon_ptr, target_ptr, grad_ptr, partials_ptr, parameter, weight, rows, cols, recon_stride,
        target_stride, steps, chunks, LIKELIHOOD, WITH_GRADIENT, ROWS, BLOCK,
    )  # fmt: skip


@triton.jit
def forward_elements_walk(
    recon_ptr, target_ptr, nll_ptr, parameter, row, start, rows, cols, recon_stride, target_stride, steps,
    LIKELIHOOD: tl.constexpr, MASKED: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, dtype: tl.constexpr,
):  # fmt: skip
    recon_at = offsets(row, recon_stride, ROWS, BLOCK)
    target_at = offsets(row, target_stride, ROWS, BLOCK)
    nll_at = offsets(row, cols, ROWS, BLOCK)
    for _ in range(steps):
        mask = inside(row, start, rows, cols, ROWS, BLOCK) if MASKED else None
        y = tl.load(recon_ptr + start + recon_at, mask, other=0) if MASKED else tl.load(recon_ptr + start + recon_at)
        x = load_target(target_ptr + start + target_at, mask, dtype, MASKED)
        nll = element_terms(y.to(dtype), x, parameter, LIKELIHOOD)[0]
        tl.store(nll_ptr + start + nll_at, rounded(nll, nll_ptr.dtype.element_ty), mask)
        start += BLOCK


@triton.jit(do_not_specialize=["chunks", "steps"])
def forward_elements(
    recon_ptr, target_ptr, nll_ptr, parameter: tl.float64, rows: tl.int64, cols: tl.int64, recon_stride: tl.int64,
    target_stride: tl.int64, steps, chunks,
    LIKELIHOOD: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Elementwise nll, rounded to the dtype of ``recon``."""
    dtype: tl.constexpr = tl.float64 if recon_ptr.dtype.element_ty == tl.float64 else tl.float32
    parameter = tl.full((1, 1), parameter, dtype)
    row = (tl.program_id(0) // chunks).to(tl.int64) * ROWS
    start = (tl.program_id(0) % chunks).to(tl.int64) * steps * BLOCK
    if whole_or_masked(row, start, rows, cols, steps, ROWS, BLOCK):
        forward_elements_walk(
            recon_ptr, target_ptr, nll_ptr, parameter, row, start, rows, cols, recon_stride, target_stride, steps,
            LIKELIHOOD, False, ROWS, BLOCK, dtype,
        )  # fmt: skip
    else:
        forward_elements_walk(
            recon_ptr, target_ptr, nll_ptr, parameter, row, start, rows, cols, recon_stride, target_stride, steps,
            LIKELIHOOD, True, ROWS, BLOCK, dtype,
        )  # fmt: skip


@triton.jit
def backward_walk(
    upstream_ptr, recon_ptr, target_ptr, grad_ptr, parameter, weight, row, start, rows, cols, upstream_stride,
    recon_stride, target_stride, steps,
    LIKELIHOOD: tl.constexpr, BY_ELEMENT: tl.constexpr, MASKED: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
    dtype: tl.constexpr,
):  # fmt: skip
    recon_at = offsets(row, recon_stride, ROWS, BLOCK)
    target_at = offsets(row, target_stride, ROWS, BLOCK)
    grad_at = offsets(row, cols, ROWS, BLOCK)
    if BY_ELEMENT:
        upstream_at = offsets(row, upstream_stride, ROWS, BLOCK)
    else:
        at = row + tl.arange(0, ROWS)
        row_upstream = tl.load(upstream_ptr + at * upstream_stride, at < rows, other=0).to(dtype)[:, None] * weight
    for _ in range(steps):
        mask = inside(row, start, rows, cols, ROWS, BLOCK) if MASKED else None
        y = tl.load(recon_ptr + start + recon_at, mask, other=0) if MASKED else tl.load(recon_ptr + start + recon_at)
        x = load_target(target_ptr + start + target_at, mask, dtype, MASKED)
        derivative = terms(y.to(dtype), x, parameter, LIKELIHOOD)[2]
        if BY_ELEMENT:
            upstream = tl.load(upstream_ptr + start + upstream_at, mask).to(dtype)
        else:
            upstream = row_upstream
        tl.store(grad_ptr + start + grad_at, rounded(derivative * upstream, grad_ptr.dtype.element_ty), mask)
        start += BLOCK


@triton.jit(do_not_specialize=["chunks", "steps"])
def backward(
    upstream_ptr, recon_ptr, target_ptr, grad_ptr, parameter: tl.float64, weight: tl.float64, rows: tl.int64,
    cols: tl.int64, upstream_stride: tl.int64, recon_stride: tl.int64, target_stride: tl.int64, steps, chunks,
    LIKELIHOOD: tl.constexpr, BY_ELEMENT: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The gradient for an upstream gradient of one number a row (stride 0: for all rows), or an element."""
    dtype: tl.constexpr = tl.float64 if recon_ptr.dtype.element_ty == tl.float64 else tl.float32
    parameter, weight = tl.full((1, 1), parameter, dtype), tl.full((1, 1), weight, dtype)
    row = (tl.program_id(0) // chunks).to(tl.int64) * ROWS
    start = (tl.program_id(0) % chunks).to(tl.int64) * steps * BLOCK
    if whole_or_masked(row, start, rows, cols, steps, ROWS, BLOCK):
        backward_walk(
            upstream_ptr, recon_ptr, target_ptr, grad_ptr, parameter, weight, row, start, rows, cols, upstream_stride,
            recon_stride, target_stride, steps, LIKELIHOOD, BY_ELEMENT, False, ROWS, BLOCK, dtype,
        )  # fmt: skip
    else:
        backward_walk(
            upstream_ptr, recon_ptr, target_ptr, grad_ptr, parameter, weight, row, start, rows, cols, upstream_stride,
            recon_stride, target_stride, steps, LIKELIHOOD, BY_ELEMENT, True, ROWS, BLOCK, dtype,
        )  # fmt: skip


@triton.jit
def softmax_rows(
    scores_ptr, library_ptr, softmax_ptr, rows: tl.int64, cols: tl.int64, stride: tl.int64, BLOCK: tl.constexpr
):  # fmt: skip
    """For each row of scores the shift, and after all of those the factor: y = factor · e^(score − shift).

    The scores are read once: the largest so far, and the sum relative to that.
    """
    dtype: tl.constexpr = softmax_ptr.dtype.element_ty
    row = tl.program_id(0).to(tl.int64)
    shift = tl.full((), -1.7976931348623157e308 if dtype == tl.float64 else -3.4028234663852886e38, dtype)
    sums = tl.zeros((BLOCK,), dtype)
    for start in range(0, cols, BLOCK):
        at = start + tl.arange(0, BLOCK)
        score = tl.load(scores_ptr + row * stride + at, at < cols, other=float("-inf")).to(dtype)
        larger = tl.maximum(shift, tl.max(score, axis=0))
        sums = sums * exp_accurate(shift - larger, False) + exp_accurate(score - larger, False)
        shift = larger
    tl.store(softmax_ptr + row, shift)
    tl.store(softmax_ptr + rows + row, tl.load(library_ptr + row) / tl.sum(sums, axis=0))


@triton.jit(do_not_specialize=["chunks", "steps"])
def less_mean_flow(
    scores_ptr, softmax_ptr, share_ptr, grad_ptr, rows: tl.int64, cols: tl.int64, stride: tl.int64, steps, chunks,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """From y·∂nll/∂y to the gradient in the scores: less share · e^(score − shift)."""
    row = (tl.program_id(0) // chunks).to(tl.int64) * ROWS
    start = (tl.program_id(0) % chunks).to(tl.int64) * steps * BLOCK
    at = row + tl.arange(0, ROWS)
    shift = tl.load(softmax_ptr + at, at < rows, other=0)[:, None]
    share = tl.load(share_ptr + at, at < rows, other=0)[:, None]
    scores_at, grad_at = offsets(row, stride, ROWS, BLOCK), offsets(row, cols, ROWS, BLOCK)
    for _ in range(steps):
        mask = inside(row, start, rows, cols, ROWS, BLOCK)
        score = tl.load(scores_ptr + start + scores_at, mask, other=0)
        slope = tl.load(grad_ptr + start + grad_at, mask)
        tl.store(grad_ptr + start + grad_at, slope - exp_accurate(score - shift, False) * share, mask)
        start += BLOCK


@triton.jit
def with_tensor_walk(
    recon_ptr, target_ptr, parameter_ptr, logits_ptr, softmax_ptr, upstream_ptr, nll_ptr, grad_ptr, grad_parameter_ptr,
    grad_logits_ptr, weight, row, start, rows, cols, recon_stride, target_stride, parameter_stride, logits_stride,
    upstream_stride, steps,
    LIKELIHOOD: tl.constexpr, BY_ROW: tl.constexpr, INFLATED: tl.constexpr, SCORES: tl.constexpr, LOSS: tl.constexpr,
    GRADIENT: tl.constexpr, UPSTREAM: tl.constexpr, MASKED: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
    dtype: tl.constexpr,
):  # fmt: skip
    """Σ nll, Σ ∂nll/∂parameter and Σ y·∂nll/∂y of each row over this program's columns.

    Writes what goes by element on the way. With SCORES, what is read for y are scores.
    """
    recon_at = offsets(row, recon_stride, ROWS, BLOCK)
    target_at = offsets(row, target_stride, ROWS, BLOCK)
    parameter_at = offsets(row, parameter_stride, ROWS, BLOCK)
    upstream_at = offsets(row, upstream_stride, ROWS, BLOCK)
    logits_at = offsets(row, logits_stride, ROWS, BLOCK)
    out_at = offsets(row, cols, ROWS, BLOCK)
    at = row + tl.arange(0, ROWS)
    c = weight
    if UPSTREAM == "rows":
        c = tl.load(upstream_ptr + at * upstream_stride, at < rows, other=0).to(dtype)[:, None] * weight
    if BY_ROW:
        p = tl.load(parameter_ptr + at * parameter_stride, at < rows, other=1)[:, None]
    if SCORES:
        shift = tl.load(softmax_ptr + at, at < rows, other=0)[:, None]
        y_factor = tl.load(softmax_ptr + rows + at, at < rows, other=0)[:, None]
    sums, slopes = tl.zeros((ROWS, BLOCK), dtype), tl.zeros((ROWS, BLOCK), dtype)
    flow = tl.zeros((ROWS, BLOCK), dtype)
    for _ in range(steps):
        mask = inside(row, start, rows, cols, ROWS, BLOCK) if MASKED else None
        y = tl.load(recon_ptr + start + recon_at, mask, other=0) if MASKED else tl.load(recon_ptr + start + recon_at)
        x = load_target(target_ptr + start + target_at, mask, dtype, MASKED)
        y = y.to(dtype)
        if SCORES:
            y = exp_accurate(y - shift, False) * y_factor
        if BY_ROW:
            number = p
        elif MASKED:
            number = tl.load(parameter_ptr + start + parameter_at, mask, other=1)
        else:
            number = tl.load(parameter_ptr + start + parameter_at)
        nll, _, derivative = terms(y, x, number, LIKELIHOOD)
        if INFLATED:
            logit = tl.load(logits_ptr + start + logits_at, mask)
            nll, by_nll, by_logit = zero_inflated(nll, x, logit)
        if LOSS == "sum":
            sums += tl.where(mask, nll, 0.0) if MASKED else nll
        elif LOSS == "elements":
            tl.store(nll_ptr + start + out_at, rounded(nll, nll_ptr.dtype.element_ty), mask)
        if GRADIENT:
            if UPSTREAM == "elements":
                factor = tl.load(upstream_ptr + start + upstream_at, mask).to(dtype)
            else:
                factor = c
            if INFLATED:
                tl.store(grad_logits_ptr + start + out_at, by_logit * factor, mask)
                factor = factor * by_nll
            derivative = derivative * factor
            if SCORES:
                derivative = derivative * y
                flow += tl.where(mask, derivative, 0.0) if MASKED else derivative
            tl.store(grad_ptr + start + out_at, rounded(derivative, grad_ptr.dtype.element_ty), mask)
            slope = parameter_slope(y, x, number, LIKELIHOOD) * factor
            if BY_ROW:
                slopes += tl.where(mask, slope, 0.0) if MASKED else slope
            else:
                tl.store(grad_parameter_ptr + start + out_at, slope, mask)
        start += BLOCK
    return tl.sum(sums, axis=1), tl.sum(slopes, axis=1), tl.sum(flow, axis=1)


@triton.jit(do_not_specialize=["chunks", "steps"])
def with_tensor(
    recon_ptr, target_ptr, parameter_ptr, logits_ptr, softmax_ptr, upstream_ptr, nll_ptr, sums_ptr, grad_ptr,
    grad_parameter_ptr, parameter_sums_ptr, grad_logits_ptr, flow_ptr, weight: tl.float64, rows: tl.int64,
    cols: tl.int64, recon_stride: tl.int64, target_stride: tl.int64, parameter_stride: tl.int64,
    logits_stride: tl.int64, upstream_stride: tl.int64, steps, chunks,
    LIKELIHOOD: tl.constexpr, BY_ROW: tl.constexpr, INFLATED: tl.constexpr, SCORES: tl.constexpr, LOSS: tl.constexpr,
    GRADIENT: tl.constexpr, UPSTREAM: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A term whose parameter is a tensor. LOSS: "", "sum" or "elements"; UPSTREAM: "", "rows" or "elements"."""
    dtype: tl.constexpr = tl.float64 if recon_ptr.dtype.element_ty == tl.float64 else tl.float32
    weight = tl.full((1, 1), weight, dtype)
    row = (tl.program_id(0) // chunks).to(tl.int64) * ROWS
    chunk = tl.program_id(0) % chunks
    start = chunk.to(tl.int64) * steps * BLOCK
    if whole_or_masked(row, start, rows, cols, steps, ROWS, BLOCK):
        sums, slopes, flow = with_tensor_walk(
            recon_ptr, target_ptr, parameter_ptr, logits_ptr, softmax_ptr, upstream_ptr, nll_ptr, grad_ptr,
            grad_parameter_ptr, grad_logits_ptr, weight, row, start, rows, cols, recon_stride, target_stride,
            parameter_stride, logits_stride, upstream_stride, steps,
            LIKELIHOOD, BY_ROW, INFLATED, SCORES, LOSS, GRADIENT, UPSTREAM, False, ROWS, BLOCK, dtype,
        )  # fmt: skip
    else:
        sums, slopes, flow = with_tensor_walk(
            recon_ptr, target_ptr, parameter_ptr, logits_ptr, softmax_ptr, upstream_ptr, nll_ptr, grad_ptr,
            grad_parameter_ptr, grad_logits_ptr, weight, row, start, rows, cols, recon_stride, target_stride,
            parameter_stride, logits_stride, upstream_stride, steps,
            LIKELIHOOD, BY_ROW, INFLATED, SCORES, LOSS, GRADIENT, UPSTREAM, True, ROWS, BLOCK, dtype,
        )  # fmt: skip
    at = row + tl.arange(0, ROWS)
    if LOSS == "sum":
        tl.store(sums_ptr + at * chunks + chunk, sums, at < rows)
    if GRADIENT and BY_ROW:
        tl.store(parameter_sums_ptr + at * chunks + chunk, slopes, at < rows)
    if GRADIENT and SCORES:
        tl.store(flow_ptr + at * chunks + chunk, flow, at < rows)


@triton.jit
def rescale_tiles(program, gradient_ptr, upstream_ptr, count, steps, BLOCK: tl.constexpr):
    dtype: tl.constexpr = tl.float64 if gradient_ptr.dtype.element_ty == tl.float64 else tl.float32
    upstream = tl.load(upstream_ptr)
    if upstream != 1:
        factor = upstream.to(dtype)
        start = program.to(tl.int64) * steps * BLOCK
        for _ in range(steps):
            at = start + tl.arange(0, BLOCK)
            value = tl.load(gradient_ptr + at, at < count)
            tl.store(gradient_ptr + at, rounded(value.to(dtype) * factor, value.dtype), at < count)
            start += BLOCK


@triton.jit(do_not_specialize=["steps"])
def rescale(gradient_ptr, upstream_ptr, count: tl.int64, steps, BLOCK: tl.constexpr):
    """``gradient *= upstream`` in place; a program that finds 1 there has read one number and is done."""
    rescale_tiles(tl.program_id(0), gradient_ptr, upstream_ptr, count, steps, BLOCK)
