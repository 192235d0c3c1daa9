"""The terms of ``kernels/rows.py`` on a GPU: discretised logistics, their mixtures, categoricals, Gaussian densities.

One pass over the inputs leaves a number a row in float64 and the gradients. The formulas of a level, and why nothing in
them cancels, are in ``csrc/host/logistic.h``. What bounds a mixture is arithmetic: 4 exponentials a component and
channel for 24 bytes of parameters and gradients, so its program holds a component or two a thread, and needs no
spilling. A softmax goes over its row twice, the second time out of the cache.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..layout import accumulator
from ..rows import RowTerms, RowWork
from ..work import Work
from . import reduce
from .approx import (
    LOG2_E,
    MAGIC,
    MAGIC_BITS,
    exp_accurate,
    log_accurate,
    power_of_two,
    reciprocal_of_normal,
    rounded,
)
from .launch import plan, run
from .likelihoods import at_least
from .reconstruction import inside, offsets, over_255

LOG_SCALE_MIN = tl.constexpr(-7.0)
EDGE, NARROW = tl.constexpr(0.999), tl.constexpr(1e-5)
HALF_BIN, LEVELS = tl.constexpr(1 / 255), tl.constexpr(127.5)
EXP_MIN = tl.constexpr(-87.0)  # below, e^x is no normal float32
LOWEST = tl.constexpr(-3e38)  # finite: a difference of infinities would be NaN
COMPONENTS = 256  # of a program: two a thread
CLASSES = 1024  # of a tile


@triton.jit
def log_of_sum(x):
    """NaN of 0, as of no class that can be."""
    return tl.where(x > 0, log_accurate(x), float("nan"))


@triton.jit
def load_levels(ptr, mask, dtype: tl.constexpr):
    """x in [−1, 1], to nearest."""
    x = tl.load(ptr, mask, other=0)
    if x.dtype == tl.uint8:
        return over_255((x.to(tl.int32) * 2 - 255).to(dtype))
    else:
        return x.to(dtype) * 2 - 1


@triton.jit
def decay(x):
    """e^−x and 1 − e^−x of x from 0 to 87."""
    if x.dtype == tl.float64:
        left = tl.exp(-x)
        # what the rounding of e^−x did to the difference, its logarithm knows (Kahan)
        lost = tl.where(left < 0.5, 1 - left, tl.where(left == 1, x, (1 - left) * x / -tl.log(left)))
        return left, lost
    else:
        shifted = MAGIC - x * LOG2_E
        n = shifted - MAGIC
        r = -x - n * 0.693359375 + n * 2.12194440e-4
        square = r * r
        high = 1.9875691500e-4 * r + 1.3981999507e-3
        middle = 8.3334519073e-3 * r + 4.1665795894e-2
        low = 1.6666665459e-1 * r + 5.0000001201e-1
        growth = ((high * square + middle) * square + low) * square + r  # e^r − 1
        power = power_of_two(shifted.to(tl.int32, bitcast=True) - MAGIC_BITS)
        grown = power * growth
        return grown + power, (1.0 - power) - grown


@triton.jit
def level(x, mean, log_scale):
    """Of the log probability additive + log(factor): these two, and its derivatives in mean and log scale."""
    clamped = at_least(log_scale, LOG_SCALE_MIN)
    inverse = exp_accurate(at_least(-clamped, EXP_MIN), False)
    middle = inverse * (x - mean)
    a = tl.abs(middle)
    E = exp_accurate(at_least(-a, EXP_MIN), False)
    h = inverse * HALF_BIN
    t, lost = decay(h)
    C = at_least(lost * (1 + t), 1e-30)
    Et = E * t
    near, far = E + t, 1 + Et
    both = near * far
    # a bin at an edge has one end, and where that is on the far side of the mean, most of the mass
    lowest = x < -EDGE
    edge = lowest | (x > EDGE)
    negative = middle < 0
    below = tl.where(lowest, negative, negative == 0)
    unlikely, likely = edge & below, edge & (below == 0)
    narrow = (both > 0) & (edge == 0) & ((NARROW * both < E * C) == 0)
    inverse_all = reciprocal_of_normal(tl.where(narrow, 1 + E, both * C))
    by_both = inverse_all * C
    factor = by_both * tl.where(likely, near, tl.where(unlikely, far, C))
    additive = tl.where(likely, 0.0, -a)
    from_near = tl.where(likely, 0.0, by_both * far * t)
    from_far = tl.where(unlikely, 0.0, by_both * near * Et)
    by_a = tl.where(narrow, (E - 1) * inverse_all, from_far - from_near)
    growth = tl.where(edge, 0.0, 2 * t * t * (inverse_all * both))  # of 1 − t²
    by_width = tl.where(narrow, 1.0, (from_near + from_far + growth) * h)
    return (
        tl.where(narrow, additive - clamped, additive),
        tl.where(narrow, inverse_all * inverse_all * (1 / LEVELS), factor),
        inverse * tl.where(negative, by_a, -by_a),
        tl.where(log_scale < LOG_SCALE_MIN, 0.0, -(a * by_a + by_width)),
    )


@triton.jit
def coefficient(raw):
    """tanh, and its derivative."""
    left, lost = decay(tl.minimum(2 * tl.abs(raw), 80.0, propagate_nan=tl.PropagateNan.ALL))
    inverse = reciprocal_of_normal(1 + left)
    value = lost * inverse
    return tl.where(raw < 0, -value, value), 4 * left * (inverse * inverse)


@triton.jit
def upstream_of(upstream_ptr, at, mask, weight, UPSTREAM: tl.constexpr):
    """The factor of a row's gradients."""
    return tl.load(upstream_ptr + at, mask, other=0).to(weight.dtype) * weight if UPSTREAM else weight


@triton.jit(do_not_specialize=["count"])
def logistic_mixture(
    params_ptr, target_ptr, upstream_ptr, values_ptr, grad_ptr, weight: tl.float64, pixels: tl.int64, spatial: tl.int64,
    count,
    CHANNELS: tl.constexpr, VALUES: tl.constexpr, GRADIENT: tl.constexpr, UPSTREAM: tl.constexpr, PIXELS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """PIXELS pixels of ``count`` components. Parameters of a pixel, and its channels, are ``spatial`` apart."""
    dtype: tl.constexpr = tl.float64 if params_ptr.dtype.element_ty == tl.float64 else tl.float32
    weight = tl.full((1, 1), weight, dtype)
    pixel = tl.program_id(0).to(tl.int64) * PIXELS + tl.arange(0, PIXELS)[:, None]
    k = tl.arange(0, BLOCK)[None, :]
    there = pixel < pixels
    mask = there & (k < count)
    example, place = pixel // spatial, pixel % spatial
    EACH: tl.constexpr = 3 if CHANNELS == 3 else 2
    start = example * (1 + CHANNELS * EACH) * count * spatial + place
    at, step = start + k * spatial, count * spatial  # of the logits; from one kind of parameter to the next
    levels = target_ptr + example * CHANNELS * spatial + place
    logit = tl.load(params_ptr + at, mask, other=float("-inf")).to(dtype)
    here = params_ptr + at + step
    x = load_levels(levels, there, dtype)
    mean = tl.load(here, mask, other=0).to(dtype)
    log_scale = tl.load(here + step, mask, other=0).to(dtype)
    first, factor, by_mean, by_scale = level(x, mean, log_scale)
    additive = logit + first
    if CHANNELS == 3:
        green, blue = load_levels(levels + spatial, there, dtype), load_levels(levels + 2 * spatial, there, dtype)
        a, a_slope = coefficient(tl.load(here + 2 * step, mask, other=0).to(dtype))
        b, b_slope = coefficient(tl.load(here + 5 * step, mask, other=0).to(dtype))
        c, c_slope = coefficient(tl.load(here + 8 * step, mask, other=0).to(dtype))
        mean = tl.load(here + 3 * step, mask, other=0).to(dtype) + a * x
        log_scale = tl.load(here + 4 * step, mask, other=0).to(dtype)
        more, times, by_green, by_green_scale = level(green, mean, log_scale)
        additive, factor = additive + more, factor * times
        mean = tl.load(here + 6 * step, mask, other=0).to(dtype) + b * x + c * green
        log_scale = tl.load(here + 7 * step, mask, other=0).to(dtype)
        more, times, by_blue, by_blue_scale = level(blue, mean, log_scale)
        additive, factor = additive + more, factor * times
    top = at_least(tl.max(additive, axis=1)[:, None], LOWEST)
    top_logit = at_least(tl.max(logit, axis=1)[:, None], LOWEST)
    factor = tl.where(mask, factor * exp_accurate(additive - top, False), 0.0)
    of_logit = exp_accurate(logit - top_logit, False)
    total, total_logit = tl.sum(factor, axis=1)[:, None], tl.sum(of_logit, axis=1)[:, None]
    if VALUES:
        value = (top_logit - top) + (log_of_sum(total_logit) - log_of_sum(total))
        tl.store(values_ptr + pixel, value.to(tl.float64), there)
    if GRADIENT:
        scale = upstream_of(upstream_ptr, pixel, there, weight, UPSTREAM)
        share = factor * (-scale / total)
        kind: tl.constexpr = grad_ptr.dtype.element_ty
        tl.store(grad_ptr + at, rounded(of_logit * (scale / total_logit) + share, kind), mask)
        to = grad_ptr + at + step
        tl.store(to, rounded(by_mean * share, kind), mask)
        tl.store(to + step, rounded(by_scale * share, kind), mask)
        if CHANNELS == 3:
            by_green, by_blue = by_green * share, by_blue * share
            tl.store(to + 2 * step, rounded(by_green * a_slope * x, kind), mask)
            tl.store(to + 3 * step, rounded(by_green, kind), mask)
            tl.store(to + 4 * step, rounded(by_green_scale * share, kind), mask)
            tl.store(to + 5 * step, rounded(by_blue * b_slope * x, kind), mask)
            tl.store(to + 6 * step, rounded(by_blue, kind), mask)
            tl.store(to + 7 * step, rounded(by_blue_scale * share, kind), mask)
            tl.store(to + 8 * step, rounded(by_blue * c_slope * green, kind), mask)


@triton.jit(do_not_specialize=["chunks", "steps"])
def logistic(
    mean_ptr, target_ptr, log_scale_ptr, upstream_ptr, nll_ptr, sums_ptr, grad_mean_ptr, grad_log_scale_ptr,
    weight: tl.float64, rows: tl.int64, cols: tl.int64, mean_stride: tl.int64, target_stride: tl.int64,
    log_scale_stride: tl.int64, upstream_stride: tl.int64, steps, chunks,
    LOSS: tl.constexpr, GRADIENT: tl.constexpr, UPSTREAM: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One level an element. LOSS: "", "sum" or "elements"; UPSTREAM: "", "rows" or "elements"."""
    dtype: tl.constexpr = tl.float64 if mean_ptr.dtype.element_ty == tl.float64 else tl.float32
    row = (tl.program_id(0) // chunks).to(tl.int64) * ROWS
    chunk = tl.program_id(0) % chunks
    start = chunk.to(tl.int64) * steps * BLOCK
    at = row + tl.arange(0, ROWS)
    factor = tl.full((1, 1), weight, dtype)
    if UPSTREAM == "rows":
        factor = tl.load(upstream_ptr + at * upstream_stride, at < rows, other=0).to(dtype)[:, None] * factor
    sums = tl.zeros((ROWS, BLOCK), dtype)
    out = offsets(row, cols, ROWS, BLOCK)
    for _ in range(steps):
        mask = inside(row, start, rows, cols, ROWS, BLOCK)
        x = load_levels(target_ptr + start + offsets(row, target_stride, ROWS, BLOCK), mask, dtype)
        mean = tl.load(mean_ptr + start + offsets(row, mean_stride, ROWS, BLOCK), mask, other=0).to(dtype)
        log_scale = tl.load(log_scale_ptr + start + offsets(row, log_scale_stride, ROWS, BLOCK), mask, other=0)
        additive, product, by_mean, by_scale = level(x, mean, log_scale.to(dtype))
        nll = -(additive + log_accurate(product))
        nll = tl.where(product == product, nll, product)
        if LOSS == "sum":
            sums += tl.where(mask, nll, 0.0)
        elif LOSS == "elements":
            tl.store(nll_ptr + start + out, rounded(nll, nll_ptr.dtype.element_ty), mask)
        if GRADIENT:
            scale = -factor
            if UPSTREAM == "elements":
                scale *= tl.load(upstream_ptr + start + offsets(row, upstream_stride, ROWS, BLOCK), mask).to(dtype)
            kind: tl.constexpr = grad_mean_ptr.dtype.element_ty
            tl.store(grad_mean_ptr + start + out, rounded(by_mean * scale, kind), mask)
            tl.store(grad_log_scale_ptr + start + out, rounded(by_scale * scale, kind), mask)
        start += BLOCK
    if LOSS == "sum":
        tl.store(sums_ptr + at * chunks + chunk, tl.sum(sums, axis=1), at < rows)


@triton.jit
def softmax_of(logits_ptr, row, there, classes, dtype: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """The largest logit of each row, at least LOWEST, and the sum of e^(logit − largest), both [ROWS, 1]."""
    top = tl.full((ROWS, 1), LOWEST, dtype)
    sums = tl.zeros((ROWS, BLOCK), dtype)
    for start in range(0, classes, BLOCK):
        column = start + tl.arange(0, BLOCK)[None, :]
        logit = tl.load(logits_ptr + row * classes + column, there & (column < classes), other=float("-inf")).to(dtype)
        larger = tl.maximum(top, tl.max(logit, axis=1)[:, None])
        sums = sums * exp_accurate(top - larger, False) + exp_accurate(logit - larger, False)
        top = larger
    return top, tl.sum(sums, axis=1)[:, None]


@triton.jit
def categorical_nll(
    logits_ptr, target_ptr, upstream_ptr, values_ptr, grad_ptr, weight: tl.float64, rows: tl.int64, classes: tl.int64,
    VALUES: tl.constexpr, GRADIENT: tl.constexpr, UPSTREAM: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    dtype: tl.constexpr = tl.float64 if logits_ptr.dtype.element_ty == tl.float64 else tl.float32
    weight = tl.full((1, 1), weight, dtype)
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    there = row < rows
    target = tl.load(target_ptr + row, there, other=0)
    top, total = softmax_of(logits_ptr, row, there, classes, dtype, ROWS, BLOCK)
    if VALUES:
        known = there & (target >= 0) & (target < classes)
        chosen = tl.load(logits_ptr + row * classes + target, known, other=float("nan")).to(dtype)
        tl.store(values_ptr + row, (log_of_sum(total) + (top - chosen)).to(tl.float64), there)
    if GRADIENT:
        scale = upstream_of(upstream_ptr, row, there, weight, UPSTREAM)
        share = scale / total
        for start in range(0, classes, BLOCK):
            column = start + tl.arange(0, BLOCK)[None, :]
            mask = there & (column < classes)
            logit = tl.load(logits_ptr + row * classes + column, mask, other=float("-inf")).to(dtype)
            gradient = exp_accurate(logit - top, False) * share - tl.where(column == target, scale, 0.0)
            tl.store(grad_ptr + row * classes + column, rounded(gradient, grad_ptr.dtype.element_ty), mask)


@triton.jit
def mixed(logits, mask, top, total, log_total, unimix, classes, UNIMIX: tl.constexpr):
    """Of a tile of logits: softmax, (1 − u)·softmax + u/n, and the logarithm of that."""
    logit = tl.load(logits, mask, other=0).to(top.dtype)
    share = exp_accurate(logit - top, False) / total
    if UNIMIX:
        probability = (1 - unimix) * share + unimix / classes
        return share, probability, log_accurate(probability)
    else:
        return share, share, (logit - top) - log_total


@triton.jit
def categorical_kl(
    q_ptr, p_ptr, upstream_ptr, values_ptr, grad_q_ptr, grad_p_ptr, weight_q: tl.float64, weight_p: tl.float64,
    unimix: tl.float64, rows: tl.int64, classes: tl.int64,
    UNIMIX: tl.constexpr, VALUES: tl.constexpr, GRADIENT: tl.constexpr, UPSTREAM: tl.constexpr, ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Σ q·(log q − log p); of q = softmax(l), ∂/∂l is q·(d − Σ q·d), d = log q − log p, and of p it is p − q."""
    dtype: tl.constexpr = tl.float64 if q_ptr.dtype.element_ty == tl.float64 else tl.float32
    weight_q, weight_p = tl.full((1, 1), weight_q, dtype), tl.full((1, 1), weight_p, dtype)
    unimix, count = tl.full((1, 1), unimix, dtype), tl.full((1, 1), classes, dtype)
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    there = row < rows
    top_q, total_q = softmax_of(q_ptr, row, there, classes, dtype, ROWS, BLOCK)
    top_p, total_p = softmax_of(p_ptr, row, there, classes, dtype, ROWS, BLOCK)
    log_q, log_p = log_of_sum(total_q), log_of_sum(total_p)
    kl, flow_q = tl.zeros((ROWS, BLOCK), dtype), tl.zeros((ROWS, BLOCK), dtype)
    flow_p = tl.zeros((ROWS, BLOCK), dtype)
    for start in range(0, classes, BLOCK):
        at = row * classes + start + tl.arange(0, BLOCK)[None, :]
        mask = there & (start + tl.arange(0, BLOCK)[None, :] < classes)
        share, q, in_q = mixed(q_ptr + at, mask, top_q, total_q, log_q, unimix, count, UNIMIX)
        share_p, p, in_p = mixed(p_ptr + at, mask, top_p, total_p, log_p, unimix, count, UNIMIX)
        ratio = tl.where(mask & ((q > 0) | (q != q)), in_q - in_p, 0.0)
        kl += q * ratio
        if UNIMIX:
            flow_q += tl.where(mask, share * ratio, 0.0)
            flow_p += tl.where(mask, share_p * q / p, 0.0)
    kl = tl.sum(kl, axis=1)[:, None]
    if VALUES:
        tl.store(values_ptr + row, kl.to(tl.float64), there)
    if GRADIENT:
        scale_q = upstream_of(upstream_ptr, row, there, weight_q, UPSTREAM)
        scale_p = upstream_of(upstream_ptr, row, there, weight_p, UPSTREAM)
        if UNIMIX:
            mean_q, mean_p = tl.sum(flow_q, axis=1)[:, None], tl.sum(flow_p, axis=1)[:, None]
        else:
            mean_q, mean_p = kl, tl.full((ROWS, 1), 1.0, dtype)
        for start in range(0, classes, BLOCK):
            at = row * classes + start + tl.arange(0, BLOCK)[None, :]
            mask = there & (start + tl.arange(0, BLOCK)[None, :] < classes)
            share, q, in_q = mixed(q_ptr + at, mask, top_q, total_q, log_q, unimix, count, UNIMIX)
            share_p, p, in_p = mixed(p_ptr + at, mask, top_p, total_p, log_p, unimix, count, UNIMIX)
            ratio = tl.where(mask & ((q > 0) | (q != q)), in_q - in_p, 0.0)
            by_q = tl.where((share > 0) | (share != share), share * (ratio - mean_q), 0.0) * (1 - unimix) * scale_q
            tl.store(grad_q_ptr + at, rounded(by_q, grad_q_ptr.dtype.element_ty), mask)
            if UNIMIX:
                by_p = share_p * (mean_p - q / p)
            else:
                by_p = share_p - q
            by_p = by_p * (1 - unimix) * scale_p
            tl.store(grad_p_ptr + at, rounded(by_p, grad_p_ptr.dtype.element_ty), mask)


@triton.jit
def gaussian_tile(
    z_ptr, mu_ptr, logvar_ptr, prior_mu_ptr, prior_logvar_ptr, sample, row, there, start, examples, dims,
    PRIOR: tl.constexpr, BLOCK: tl.constexpr, dtype: tl.constexpr,
):  # fmt: skip
    """Of a tile: z − mu and logvar, likewise of the prior (z and 0 without); where it is, which of it there is."""
    column = start + tl.arange(0, BLOCK)[None, :]
    mask, at = there & (column < dims), row * dims + column
    z = tl.load(z_ptr + sample * examples * dims + at, mask, other=0).to(dtype)
    centred = z - tl.load(mu_ptr + at, mask, other=0).to(dtype)
    logvar = tl.load(logvar_ptr + at, mask, other=0).to(dtype)
    apart, prior_logvar = z, tl.zeros_like(z)
    if PRIOR:
        apart = z - tl.load(prior_mu_ptr + at, mask, other=0).to(dtype)
        prior_logvar = tl.load(prior_logvar_ptr + at, mask, other=0).to(dtype)
    return centred, logvar, apart, prior_logvar, at, mask


@triton.jit
def log_ratio(
    z_ptr, mu_ptr, logvar_ptr, prior_mu_ptr, prior_logvar_ptr, upstream_ptr, values_ptr, grad_z_ptr, grad_mu_ptr,
    grad_logvar_ptr, grad_prior_mu_ptr, grad_prior_logvar_ptr, weight: tl.float64, samples: tl.int64,
    examples: tl.int64, dims: tl.int64,
    DENSITY: tl.constexpr, PRIOR: tl.constexpr, VALUES: tl.constexpr, GRADIENT: tl.constexpr, UPSTREAM: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """log q(z) − log p(z) of every sample of ROWS examples; with DENSITY, log q(z) alone."""
    dtype: tl.constexpr = tl.float64 if z_ptr.dtype.element_ty == tl.float64 else tl.float32
    weight = tl.full((1, 1), weight, dtype)
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    there = row < examples
    if VALUES:
        for sample in range(samples):
            sums = tl.zeros((ROWS, BLOCK), dtype)
            for start in range(0, dims, BLOCK):
                centred, logvar, apart, prior_logvar, _, mask = gaussian_tile(
                    z_ptr, mu_ptr, logvar_ptr, prior_mu_ptr, prior_logvar_ptr, sample, row, there, start, examples,
                    dims, PRIOR, BLOCK, dtype,
                )  # fmt: skip
                term = -0.5 * (centred * centred * exp_accurate(-logvar, False) + logvar)
                if PRIOR:
                    term += 0.5 * (apart * apart * exp_accurate(-prior_logvar, False) + prior_logvar)
                elif not DENSITY:
                    term += 0.5 * apart * apart
                sums += tl.where(mask, term, 0.0)
            tl.store(values_ptr + sample * examples + row, tl.sum(sums, axis=1)[:, None].to(tl.float64), there)
    if GRADIENT:
        for start in range(0, dims, BLOCK):
            by_mu, by_logvar = tl.zeros((ROWS, BLOCK), dtype), tl.zeros((ROWS, BLOCK), dtype)
            by_prior_mu, by_prior_logvar = tl.zeros((ROWS, BLOCK), dtype), tl.zeros((ROWS, BLOCK), dtype)
            for sample in range(samples):
                centred, logvar, apart, prior_logvar, at, mask = gaussian_tile(
                    z_ptr, mu_ptr, logvar_ptr, prior_mu_ptr, prior_logvar_ptr, sample, row, there, start, examples,
                    dims, PRIOR, BLOCK, dtype,
                )  # fmt: skip
                scale = upstream_of(upstream_ptr, sample * examples + row, there, weight, UPSTREAM)
                slope = centred * exp_accurate(-logvar, False)
                by_mu += slope * scale
                by_logvar += 0.5 * (centred * slope - 1) * scale
                by_z = -slope
                if PRIOR:
                    pull = apart * exp_accurate(-prior_logvar, False)
                    by_prior_mu -= pull * scale
                    by_prior_logvar += 0.5 * (1 - apart * pull) * scale
                    by_z += pull
                elif not DENSITY:
                    by_z += apart
                to = grad_z_ptr + sample * examples * dims + at
                tl.store(to, rounded(by_z * scale, grad_z_ptr.dtype.element_ty), mask)
            column = start + tl.arange(0, BLOCK)[None, :]
            here, at = there & (column < dims), row * dims + column
            tl.store(grad_mu_ptr + at, rounded(by_mu, grad_mu_ptr.dtype.element_ty), here)
            tl.store(grad_logvar_ptr + at, rounded(by_logvar, grad_logvar_ptr.dtype.element_ty), here)
            if PRIOR:
                tl.store(grad_prior_mu_ptr + at, rounded(by_prior_mu, grad_prior_mu_ptr.dtype.element_ty), here)
                to = grad_prior_logvar_ptr + at
                tl.store(to, rounded(by_prior_logvar, grad_prior_logvar_ptr.dtype.element_ty), here)


def _tile(rows: int, cols: int, dtype: torch.dtype, most: int) -> dict[str, int]:
    """Short rows share a tile."""
    most = most // 2 if dtype == torch.float64 else most
    block = min(most, triton.next_power_of_2(cols))
    return {"ROWS": min(most // block, triton.next_power_of_2(rows)), "BLOCK": block}


def _wanted(work: RowWork) -> dict[str, bool]:
    return {
        "VALUES": work.values is not None,
        "GRADIENT": work.gradients is not None,
        "UPSTREAM": work.upstream is not None,
    }


def _places(work: RowWork, count: int) -> list[Tensor]:
    """Upstream, values, and so many gradients; what there is not is never touched."""
    given = [*(work.gradients or ()), *(None,) * count][:count]
    return [work.first if tensor is None else tensor for tensor in (work.upstream, work.values, *given)]


def _look(work: Any) -> int:
    """Whether to look for targets beyond their range: only on a CPU, in the interpreter."""
    tensor: Tensor = work.tensors[0]
    return int(tensor.device.type == "cpu")


def _mixture(_: RowTerms, work: RowWork) -> int:
    params, count = work.first, work.components
    block = triton.next_power_of_2(count)
    pixels = max(1, COMPONENTS // block // (2 if params.dtype == torch.float64 else 1))
    spatial = 1 if work.options["channels_last"] else work.rows // params.shape[0]
    run(
        logistic_mixture, -(-work.rows // pixels), params, params, work.tensors[1], *_places(work, 1), work.weight,
        work.rows, spatial, count, CHANNELS=work.channels, **_wanted(work), PIXELS=pixels, BLOCK=block,
        num_warps=min(16, max(4, pixels * block // 128)),
    )  # fmt: skip
    return _look(work)


def _nll(_: RowTerms, work: RowWork) -> int:
    logits = work.first
    tile = _tile(work.rows, logits.shape[-1], logits.dtype, CLASSES)
    run(
        categorical_nll, -(-work.rows // tile["ROWS"]), logits, logits, work.tensors[1], *_places(work, 1), work.weight,
        work.rows, logits.shape[-1], **_wanted(work), **tile, num_warps=4,
    )  # fmt: skip
    return _look(work)


def _kl(_: RowTerms, work: RowWork) -> int:
    logits, balance, unimix = work.first, work.options["balance"], work.options["unimix"]
    of_q, of_p = (1 - balance, balance) if balance >= 0 else (1.0, 1.0)
    tile = _tile(work.rows, logits.shape[-1], logits.dtype, CLASSES // 2)
    run(
        categorical_kl, -(-work.rows // tile["ROWS"]), logits, logits, work.tensors[1], *_places(work, 2),
        work.weight * of_q, work.weight * of_p, float(unimix), work.rows, logits.shape[-1], UNIMIX=unimix > 0,
        **_wanted(work), **tile, num_warps=4,
    )  # fmt: skip
    return 0


def _log_ratio(_: RowTerms, work: RowWork) -> int:
    z, mu, logvar, *prior = (tensor for tensor in work.tensors if tensor is not None)
    examples, dims = mu.shape[:-1].numel(), mu.shape[-1]
    tile = _tile(examples, dims, z.dtype, CLASSES // 2)
    run(
        log_ratio, -(-examples // tile["ROWS"]), z, z, mu, logvar, *(prior or (z, z)), *_places(work, 5), work.weight,
        work.rows // examples, examples, dims, DENSITY=work.term == "log_prob", PRIOR=bool(prior), **_wanted(work),
        **tile, num_warps=4,
    )  # fmt: skip
    return 0


KERNELS = {
    "logistic_mixture": _mixture,
    "categorical_nll": _nll,
    "categorical_kl": _kl,
    "log_prob": _log_ratio,
    "log_ratio": _log_ratio,
}


def fill_logistic(work: Work, nll: Tensor | None, sums: Tensor | None, gradients: list[Tensor]) -> int:
    """As ``RowTerms.fill_logistic``; four elements a thread, whose registers are many."""
    mean = work.like
    tiles = plan(work.rows, work.cols, torch.float64)
    partials = None if sums is None else mean.new_empty((work.rows, tiles.chunks), dtype=accumulator(mean.dtype))
    upstream = work.upstream if gradients else None
    run(
        logistic, tiles.programs, mean, *work.tensors,
        *(mean if t is None else t for t in (upstream, nll, partials, *(gradients or (None, None)))), work.weight,
        work.rows, work.cols, *work.strides, work.upstream_stride, tiles.steps, tiles.chunks,
        LOSS="elements" if nll is not None else "sum" if sums is not None else "", GRADIENT=bool(gradients),
        UPSTREAM="" if upstream is None else "elements" if work.by_element else "rows",
        ROWS=tiles.rows, BLOCK=tiles.block, num_warps=tiles.warps,
    )  # fmt: skip
    if partials is not None and sums is not None:
        run(reduce.finish, work.rows, sums, partials, sums, 1.0, tiles.chunks)
    return _look(work)
