"""The latent pair: z and KL(q‖p), each switched off at compile time when not asked for, and their gradients.

Forward reads ``mu`` and ``scale`` once and writes z (12 bytes an element in float32, 6 in bfloat16); backward reads
both and the gradient of z, draws the noise again and writes two gradients (20 bytes). KL alone reads 8.

A row is an example (KL by example), else all elements at once. There, inputs with a stride between examples (the
halves of an encoder's output) are found by a division an element (``DIVIDE``). Noise is indexed by the element of z:
where a tile's rows start at multiples of four it comes four at a time (``QUADS``), else one at a time.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..reference.latent import STD_EPS as _STD_EPS
from .approx import exp, exp_accurate, log, reciprocal, rounded
from .noise import normals, normals_at
from .reconstruction import inside, offsets, whole_or_masked

STD_EPS = tl.constexpr(_STD_EPS)


@triton.jit
def places(row, start, stride, inner, ROWS: tl.constexpr, BLOCK: tl.constexpr, DIVIDE: tl.constexpr):
    """Elements of a tile, from the start of the tensor. With ``DIVIDE`` columns count through rows of ``inner``."""
    if DIVIDE:
        i = start + tl.arange(0, BLOCK)[None, :]
        example = i // inner
        return example * stride + (i - example * inner)
    else:
        return offsets(row, stride, ROWS, BLOCK) + start


@triton.jit
def fetch(ptr, at, mask, dtype: tl.constexpr, MASKED: tl.constexpr):
    return (tl.load(ptr + at, mask, other=0) if MASKED else tl.load(ptr + at)).to(dtype)


@triton.jit
def epsilon(
    seed, flat, row, start, cols,
    TOGETHER: tl.constexpr, QUADS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """ε of a tile of rows of ``cols`` elements, the first of which is element ``flat`` of z."""
    if QUADS:
        first = (flat + start + (row + tl.arange(0, ROWS))[:, None] * cols) >> 2
        return normals(seed, first, BLOCK // 4, TOGETHER)
    else:
        return normals_at(seed, flat + start + offsets(row, cols, ROWS, BLOCK))


@triton.jit
def clamped(logvar, low, high):
    """logvar within [low, high]; NaN where it is."""
    logvar = tl.where(logvar < low, low, logvar)
    return tl.where(logvar > high, high, logvar)


@triton.jit
def kl_element(
    mu, scale, d, prior_logvar, precision, NARROW: tl.constexpr, LOG_SCALE: tl.constexpr, PRIOR: tl.constexpr
):
    """½(logvar_p − log σ² + (σ² + d²)/σ_p² − 1), nats; d = mu − mu_p. Reference: kernels/reference/latent.py."""
    var = exp_accurate(scale, NARROW) if LOG_SCALE else scale * scale
    log_var = scale if LOG_SCALE else log(var + STD_EPS)
    if PRIOR:
        return 0.5 * ((var + d * d) * precision - 1.0 + (prior_logvar - log_var))
    else:
        return 0.5 * (d * d + var - 1.0 - log_var)


@triton.jit
def forward_walk(
    mu_ptr, scale_ptr, prior_mu_ptr, prior_logvar_ptr, seed, z_ptr, kl_ptr, free_bits, low, high, row, start,
    rows, cols, inner, mu_stride, scale_stride, prior_mu_stride, prior_logvar_stride, samples, steps,
    LOG_SCALE: tl.constexpr, PRIOR: tl.constexpr, SAMPLE: tl.constexpr, KL: tl.constexpr, FREE_BITS: tl.constexpr,
    CLAMP: tl.constexpr, DIVIDE: tl.constexpr, QUADS: tl.constexpr, MASKED: tl.constexpr, ROWS: tl.constexpr,
    BLOCK: tl.constexpr, dtype: tl.constexpr,
):  # fmt: skip
    """Writes z and elementwise KL; returns Σ KL of each row over this program's columns, [ROWS]."""
    NARROW: tl.constexpr = mu_ptr.dtype.element_ty != dtype
    TOGETHER: tl.constexpr = 2 if NARROW and BLOCK >= 8 else 1
    kl_sum = tl.zeros((ROWS, BLOCK), dtype)
    for _ in range(steps):
        mask = inside(row, start, rows, cols, ROWS, BLOCK) if MASKED else None
        mu = fetch(mu_ptr, places(row, start, mu_stride, inner, ROWS, BLOCK, DIVIDE), mask, dtype, MASKED)
        scale = fetch(scale_ptr, places(row, start, scale_stride, inner, ROWS, BLOCK, DIVIDE), mask, dtype, MASKED)
        if CLAMP:
            scale = clamped(scale, low, high)
        here = places(row, start, cols, inner, ROWS, BLOCK, False)
        if SAMPLE == 1:
            std = exp(0.5 * scale) if LOG_SCALE else scale
            noise = epsilon(seed, 0, row, start, cols, TOGETHER, QUADS, ROWS, BLOCK).to(dtype)
            tl.store(z_ptr + here, rounded(mu + std * noise, z_ptr.dtype.element_ty), mask)
        elif SAMPLE == 2:
            std = exp(0.5 * scale) if LOG_SCALE else scale
            for sample in range(samples):
                flat = (rows * cols) * sample
                noise = epsilon(seed, flat, row, start, cols, TOGETHER, QUADS, ROWS, BLOCK).to(dtype)
                tl.store(z_ptr + flat + here, rounded(mu + std * noise, z_ptr.dtype.element_ty), mask)
        if KL != "":
            d, prior_logvar, precision = mu, mu, mu
            if PRIOR:
                prior_mu_at = places(row, start, prior_mu_stride, inner, ROWS, BLOCK, DIVIDE)
                prior_logvar_at = places(row, start, prior_logvar_stride, inner, ROWS, BLOCK, DIVIDE)
                d = mu - fetch(prior_mu_ptr, prior_mu_at, mask, dtype, MASKED)
                prior_logvar = fetch(prior_logvar_ptr, prior_logvar_at, mask, dtype, MASKED)
                precision = exp_accurate(-prior_logvar, NARROW)
            kl = kl_element(mu, scale, d, prior_logvar, precision, NARROW, LOG_SCALE, PRIOR)
            if FREE_BITS:
                kl = tl.where(kl < free_bits, free_bits, kl)
            if KL == "elements":
                tl.store(kl_ptr + here, rounded(kl, kl_ptr.dtype.element_ty), mask)
            else:
                kl_sum += tl.where(mask, kl, 0.0) if MASKED else kl
        start += BLOCK
    return tl.sum(kl_sum, axis=1)


@triton.jit
def forward_tiles(
    program, mu_ptr, scale_ptr, prior_mu_ptr, prior_logvar_ptr, seed_ptr, z_ptr, kl_ptr, free_bits, low, high, rows,
    cols, inner, mu_stride, scale_stride, prior_mu_stride, prior_logvar_stride, samples, steps, chunks,
    LOG_SCALE: tl.constexpr, PRIOR: tl.constexpr, SAMPLE: tl.constexpr, KL: tl.constexpr, FREE_BITS: tl.constexpr,
    CLAMP: tl.constexpr, DIVIDE: tl.constexpr, QUADS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program's share; Σ KL goes to ``kl[row, chunk]``."""
    dtype: tl.constexpr = tl.float64 if mu_ptr.dtype.element_ty == tl.float64 else tl.float32
    free_bits = tl.full((1, 1), free_bits, dtype)
    low, high = tl.full((1, 1), low, dtype), tl.full((1, 1), high, dtype)
    seed = tl.load(seed_ptr) if SAMPLE else 0
    row = (program // chunks).to(tl.int64) * ROWS
    chunk = program % chunks
    start = chunk.to(tl.int64) * steps * BLOCK
    if whole_or_masked(row, start, rows, cols, steps, ROWS, BLOCK):
        sums = forward_walk(
            mu_ptr, scale_ptr, prior_mu_ptr, prior_logvar_ptr, seed, z_ptr, kl_ptr, free_bits, low, high, row, start,
            rows, cols, inner, mu_stride, scale_stride, prior_mu_stride, prior_logvar_stride, samples, steps,
            LOG_SCALE, PRIOR, SAMPLE, KL, FREE_BITS, CLAMP, DIVIDE, QUADS, False, ROWS, BLOCK, dtype,
        )  # fmt: skip
    else:
        sums = forward_walk(
            mu_ptr, scale_ptr, prior_mu_ptr, prior_logvar_ptr, seed, z_ptr, kl_ptr, free_bits, low, high, row, start,
            rows, cols, inner, mu_stride, scale_stride, prior_mu_stride, prior_logvar_stride, samples, steps,
            LOG_SCALE, PRIOR, SAMPLE, KL, FREE_BITS, CLAMP, DIVIDE, QUADS, True, ROWS, BLOCK, dtype,
        )  # fmt: skip
    if KL == "sum":
        at = row + tl.arange(0, ROWS)
        tl.store(kl_ptr + at * chunks + chunk, sums, at < rows)


@triton.jit(do_not_specialize=["samples", "chunks", "steps"])
def forward(
    mu_ptr, scale_ptr, prior_mu_ptr, prior_logvar_ptr, seed_ptr, z_ptr, kl_ptr, free_bits: tl.float64, low: tl.float64,
    high: tl.float64, rows: tl.int64, cols: tl.int64, inner: tl.int64, mu_stride: tl.int64, scale_stride: tl.int64,
    prior_mu_stride: tl.int64, prior_logvar_stride: tl.int64, samples, steps, chunks,
    LOG_SCALE: tl.constexpr, PRIOR: tl.constexpr, SAMPLE: tl.constexpr, KL: tl.constexpr, FREE_BITS: tl.constexpr,
    CLAMP: tl.constexpr, DIVIDE: tl.constexpr, QUADS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """SAMPLE: 0 for no z, 1 for z as ``mu``, 2 for ``samples`` of them. KL: "", "elements", or "sum" to partials."""
    forward_tiles(
        tl.program_id(0), mu_ptr, scale_ptr, prior_mu_ptr, prior_logvar_ptr, seed_ptr, z_ptr, kl_ptr, free_bits, low,
        high, rows, cols, inner, mu_stride, scale_stride, prior_mu_stride, prior_logvar_stride, samples, steps, chunks,
        LOG_SCALE, PRIOR, SAMPLE, KL, FREE_BITS, CLAMP, DIVIDE, QUADS, ROWS, BLOCK,
    )  # fmt: skip


@triton.jit
def backward_walk(
    grad_z_ptr, grad_kl_ptr, mu_ptr, scale_ptr, prior_mu_ptr, prior_logvar_ptr, seed, grad_mu_ptr, grad_scale_ptr,
    grad_prior_mu_ptr, grad_prior_logvar_ptr, free_bits, low, high, weight, row, start, rows, cols, inner,
    grad_kl_stride, mu_stride, scale_stride, prior_mu_stride, prior_logvar_stride, samples, steps,
    LOG_SCALE: tl.constexpr, PRIOR: tl.constexpr, SAMPLE: tl.constexpr, KL: tl.constexpr, FREE_BITS: tl.constexpr,
    CLAMP: tl.constexpr, DIVIDE: tl.constexpr, QUADS: tl.constexpr, MASKED: tl.constexpr, ROWS: tl.constexpr,
    BLOCK: tl.constexpr, dtype: tl.constexpr,
):  # fmt: skip
    NARROW: tl.constexpr = mu_ptr.dtype.element_ty != dtype
    TOGETHER: tl.constexpr = 2 if NARROW and BLOCK >= 8 else 1
    if KL == "rows":
        at = row + tl.arange(0, ROWS)
        row_upstream = tl.load(grad_kl_ptr + at * grad_kl_stride, at < rows, other=0).to(dtype)[:, None] * weight
    for _ in range(steps):
        mask = inside(row, start, rows, cols, ROWS, BLOCK) if MASKED else None
        mu = fetch(mu_ptr, places(row, start, mu_stride, inner, ROWS, BLOCK, DIVIDE), mask, dtype, MASKED)
        scale = fetch(scale_ptr, places(row, start, scale_stride, inner, ROWS, BLOCK, DIVIDE), mask, dtype, MASKED)
        if CLAMP:
            given = scale
            scale = clamped(given, low, high)
        here = places(row, start, cols, inner, ROWS, BLOCK, False)
        grad_mu = tl.zeros((ROWS, BLOCK), dtype)
        grad_scale = tl.zeros((ROWS, BLOCK), dtype)
        std = exp_accurate(0.5 * scale, NARROW or KL == "") if LOG_SCALE else scale
        if SAMPLE == 1:
            grad_mu = fetch(grad_z_ptr, here, mask, dtype, MASKED)
            grad_scale = grad_mu * epsilon(seed, 0, row, start, cols, TOGETHER, QUADS, ROWS, BLOCK).to(dtype)
        elif SAMPLE == 2:
            for sample in range(samples):
                flat = (rows * cols) * sample
                g = fetch(grad_z_ptr, flat + here, mask, dtype, MASKED)
                grad_mu += g
                grad_scale += g * epsilon(seed, flat, row, start, cols, TOGETHER, QUADS, ROWS, BLOCK).to(dtype)
        if SAMPLE and LOG_SCALE:
            grad_scale *= 0.5 * std
        if KL != "":
            if KL == "rows":
                upstream = row_upstream
            else:
                upstream = fetch(grad_kl_ptr, here, mask, dtype, MASKED)
            d, prior_logvar, precision = mu, mu, mu
            if PRIOR:
                prior_mu_at = places(row, start, prior_mu_stride, inner, ROWS, BLOCK, DIVIDE)
                prior_logvar_at = places(row, start, prior_logvar_stride, inner, ROWS, BLOCK, DIVIDE)
                d = mu - fetch(prior_mu_ptr, prior_mu_at, mask, dtype, MASKED)
                prior_logvar = fetch(prior_logvar_ptr, prior_logvar_at, mask, dtype, MASKED)
                precision = exp_accurate(-prior_logvar, NARROW)
            if FREE_BITS:
                kl = kl_element(mu, scale, d, prior_logvar, precision, NARROW, LOG_SCALE, PRIOR)
                upstream = tl.where(kl < free_bits, 0.0, upstream + tl.zeros_like(kl))
            var = std * std
            if PRIOR:
                grad_mu += upstream * (d * precision)
                if LOG_SCALE:
                    grad_scale += upstream * 0.5 * (var * precision - 1.0)
                else:
                    grad_scale += upstream * (std * precision - std * reciprocal(var + STD_EPS))
                by_prior = -upstream * (d * precision)
                tl.store(grad_prior_mu_ptr + here, rounded(by_prior, grad_prior_mu_ptr.dtype.element_ty), mask)
                by_prior = upstream * 0.5 * (1.0 - (var + d * d) * precision)
                tl.store(grad_prior_logvar_ptr + here, rounded(by_prior, grad_prior_logvar_ptr.dtype.element_ty), mask)
            else:
                grad_mu += upstream * mu
                if LOG_SCALE:
                    grad_scale += upstream * 0.5 * (var - 1.0)
                else:
                    grad_scale += upstream * (std - std * reciprocal(var + STD_EPS))
        if CLAMP:
            grad_scale = tl.where(scale == given, grad_scale, 0.0)
        tl.store(grad_mu_ptr + here, rounded(grad_mu, grad_mu_ptr.dtype.element_ty), mask)
        tl.store(grad_scale_ptr + here, rounded(grad_scale, grad_scale_ptr.dtype.element_ty), mask)
        start += BLOCK


@triton.jit
def backward_tiles(
    program, grad_z_ptr, grad_kl_ptr, mu_ptr, scale_ptr, prior_mu_ptr, prior_logvar_ptr, seed_ptr, grad_mu_ptr,
    grad_scale_ptr, grad_prior_mu_ptr, grad_prior_logvar_ptr, free_bits, low, high, weight, rows, cols, inner,
    grad_kl_stride, mu_stride, scale_stride, prior_mu_stride, prior_logvar_stride, samples, steps, chunks,
    LOG_SCALE: tl.constexpr, PRIOR: tl.constexpr, SAMPLE: tl.constexpr, KL: tl.constexpr, FREE_BITS: tl.constexpr,
    CLAMP: tl.constexpr, DIVIDE: tl.constexpr, QUADS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    dtype: tl.constexpr = tl.float64 if mu_ptr.dtype.element_ty == tl.float64 else tl.float32
    free_bits, weight = tl.full((1, 1), free_bits, dtype), tl.full((1, 1), weight, dtype)
    low, high = tl.full((1, 1), low, dtype), tl.full((1, 1), high, dtype)
    seed = tl.load(seed_ptr) if SAMPLE else 0
    row = (program // chunks).to(tl.int64) * ROWS
    start = (program % chunks).to(tl.int64) * steps * BLOCK
    if whole_or_masked(row, start, rows, cols, steps, ROWS, BLOCK):
        backward_walk(
            grad_z_ptr, grad_kl_ptr, mu_ptr, scale_ptr, prior_mu_ptr, prior_logvar_ptr, seed, grad_mu_ptr,
            grad_scale_ptr, grad_prior_mu_ptr, grad_prior_logvar_ptr, free_bits, low, high, weight, row, start, rows,
            cols, inner, grad_kl_stride, mu_stride, scale_stride, prior_mu_stride, prior_logvar_stride, samples, steps,
            LOG_SCALE, PRIOR, SAMPLE, KL, FREE_BITS, CLAMP, DIVIDE, QUADS, False, ROWS, BLOCK, dtype,
        )  # fmt: skip
    else:
        backward_walk(
            grad_z_ptr, grad_kl_ptr, mu_ptr, scale_ptr, prior_mu_ptr, prior_logvar_ptr, seed, grad_mu_ptr,
            grad_scale_ptr, grad_prior_mu_ptr, grad_prior_logvar_ptr, free_bits, low, high, weight, row, start, rows,
            cols, inner, grad_kl_stride, mu_stride, scale_stride, prior_mu_stride, prior_logvar_stride, samples, steps,
            LOG_SCALE, PRIOR, SAMPLE, KL, FREE_BITS, CLAMP, DIVIDE, QUADS, True, ROWS, BLOCK, dtype,
        )  # fmt: skip


@triton.jit(do_not_specialize=["samples", "chunks", "steps"])
def backward(
    grad_z_ptr, grad_kl_ptr, mu_ptr, scale_ptr, prior_mu_ptr, prior_logvar_ptr, seed_ptr, grad_mu_ptr, grad_scale_ptr,
    grad_prior_mu_ptr, grad_prior_logvar_ptr, free_bits: tl.float64, low: tl.float64, high: tl.float64,
    weight: tl.float64, rows: tl.int64, cols: tl.int64, inner: tl.int64, grad_kl_stride: tl.int64,
    mu_stride: tl.int64, scale_stride: tl.int64, prior_mu_stride: tl.int64, prior_logvar_stride: tl.int64,
    samples, steps, chunks,
    LOG_SCALE: tl.constexpr, PRIOR: tl.constexpr, SAMPLE: tl.constexpr, KL: tl.constexpr, FREE_BITS: tl.constexpr,
    CLAMP: tl.constexpr, DIVIDE: tl.constexpr, QUADS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """∂mu = Σ g + c·∂kl/∂mu, ∂scale = Σ g·ε·∂σ/∂scale + c·∂kl/∂scale. KL: "", "rows" (one c a row) or "elements"."""
    backward_tiles(
        tl.program_id(0), grad_z_ptr, grad_kl_ptr, mu_ptr, scale_ptr, prior_mu_ptr, prior_logvar_ptr, seed_ptr,
        grad_mu_ptr, grad_scale_ptr, grad_prior_mu_ptr, grad_prior_logvar_ptr, free_bits, low, high, weight, rows,
        cols, inner, grad_kl_stride, mu_stride, scale_stride, prior_mu_stride, prior_logvar_stride, samples, steps,
        chunks, LOG_SCALE, PRIOR, SAMPLE, KL, FREE_BITS, CLAMP, DIVIDE, QUADS, ROWS, BLOCK,
    )  # fmt: skip
