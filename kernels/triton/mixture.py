"""The mixture of discretised logistics on a GPU: loss and gradient of a tile of pixels in one pass over its parameters.

A tile is PIXELS × COMPONENTS, the components of K padded to a power of two: 10 of 16 lanes work where K is 10. For float32, 8
bytes a parameter: read once, written once. Formula: ``csrc/host/logistic.h``, which has it from the reference.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .approx import exp_accurate, log_accurate, reciprocal_accurate, rounded

LOG_SCALE_MIN = tl.constexpr(-7.0)
HALF_BIN = tl.constexpr(1 / 255)
EDGE = tl.constexpr(0.999)
NARROW = tl.constexpr(1e-5)
LEVELS = tl.constexpr(127.5)
EXP_MIN = tl.constexpr(-87.0)


@triton.jit
def lost(x, e):
    """1 − e^−x of x ≥ 0, where e is e^−x: by its series where the two would cancel."""
    if x.dtype == tl.float64:
        near = x < 1e-2
        series = x * (1 - x / 2 * (1 - x / 3 * (1 - x / 4 * (1 - x / 5 * (1 - x / 6 * (1 - x / 7))))))
    else:
        near = x < 0.25
        p = -1 / 5040 * x + 1 / 720
        p = -p * x + 1 / 120
        p = -p * x + 1 / 24
        p = -p * x + 1 / 6
        p = -p * x + 0.5
        series = x - p * x * x
    return tl.where(near, series, 1 - e)


@triton.jit
def level(x, mean, log_scale):
    """Of the level x in [−1, 1]: ``additive, factor``, log p = additive + log(factor); ∂log p/∂mean and /∂log s."""
    clamped = tl.where(log_scale < LOG_SCALE_MIN, LOG_SCALE_MIN, log_scale)
    inverse = exp_accurate(tl.where(-clamped < EXP_MIN, EXP_MIN, -clamped), False)
    middle = inverse * (x - mean)
    a = tl.abs(middle)
    E = exp_accurate(tl.where(-a < EXP_MIN, EXP_MIN, -a), False)
    h = inverse * HALF_BIN
    t = exp_accurate(-h, False)
    C = lost(h, t) * (1 + t)
    C = tl.where(C < 1e-30, 1e-30, C)
    Et = E * t
    near, far = E + t, 1 + Et
    both = near * far
    lowest, highest = x < -EDGE, x > EDGE
    edge = lowest | highest
    toward = tl.where(lowest, middle, -middle)
    likely, unlikely = edge & (toward >= 0), edge & (toward < 0)
    narrow = (edge == 0) & (E * C <= NARROW * both)
    inverse_all = reciprocal_accurate(tl.where(narrow, 1 + E, both * C))
    by_both = inverse_all * C
    factor = by_both * tl.where(likely, near, tl.where(unlikely, far, C))
    factor = tl.where(narrow, inverse_all * inverse_all * (1 / LEVELS), factor)
    additive = tl.where(likely, 0.0, -a)
    additive = tl.where(narrow, additive - clamped, additive)
    from_near = tl.where(likely, 0.0, by_both * far * t)
    from_far = tl.where(unlikely, 0.0, by_both * near * Et)
    by_a = tl.where(narrow, (E - 1) * inverse_all, from_far - from_near)
    growth = tl.where(edge, 0.0, 2 * t * t * (inverse_all * both))
    by_width = tl.where(narrow, 1.0, (from_near + from_far + growth) * h)
    negative = tl.where(edge, (toward < 0) == lowest, middle < 0)
    by_mean = inverse * tl.where(negative, by_a, -by_a)
    by_log_scale = tl.where(log_scale < LOG_SCALE_MIN, 0.0, -(a * by_a + by_width))
    return additive, factor, by_mean, by_log_scale


@triton.jit
def coefficient(raw):
    """Tanh, and its derivative."""
    twice = 2 * tl.abs(raw)
    twice = tl.where(twice > 80.0, 80.0, twice)
    e = exp_accurate(-twice, False)
    inverse = reciprocal_accurate(1 + e)
    value = lost(twice, e) * inverse
    return tl.where(raw < 0, -value, value), 4 * e * inverse * inverse


@triton.jit
def as_data(ptr, mask, dtype: tl.constexpr):
    """A level in [−1, 1]."""
    x = tl.load(ptr, mask, other=0)
    if x.dtype == tl.uint8:
        return (
            tl.div_rn((2 * x.to(tl.int32) - 255).to(tl.float32), 255.0).to(dtype)
            if dtype == tl.float32
            else (2 * x.to(tl.int32) - 255).to(tl.float64) / 255.0
        )
    else:
        return 2 * x.to(dtype) - 1


@triton.jit
def mixture(
    params_ptr, target_ptr, upstream_ptr, values_ptr, grad_ptr, weight: tl.float64, pixels: tl.int64, total: tl.int64,
    components, pixel_stride: tl.int64, channel_stride: tl.int64, target_stride: tl.int64, target_channel: tl.int64,
    CHANNELS: tl.constexpr, VALUES: tl.constexpr, GRADIENT: tl.constexpr, UPSTREAM: tl.constexpr,
    PIXELS: tl.constexpr, COMPONENTS: tl.constexpr,
):  # fmt: skip
    """``values[pixel]``, and the gradient times weight and upstream, of PIXELS pixels."""
    dtype: tl.constexpr = tl.float64 if params_ptr.dtype.element_ty == tl.float64 else tl.float32
    EACH: tl.constexpr = 3 if CHANNELS == 3 else 2
    out: tl.constexpr = grad_ptr.dtype.element_ty
    pixel = tl.program_id(0).to(tl.int64) * PIXELS + tl.arange(0, PIXELS)
    there = pixel < total
    example, within = pixel // pixels, pixel % pixels
    k = tl.arange(0, COMPONENTS)
    mask = there[:, None] & (k < components)[None, :]
    count = components * (1 + CHANNELS * EACH)
    start = (example * pixels * count + within * pixel_stride)[:, None] + (k * channel_stride)[None, :]
    step = components * channel_stride
    target_at = example * pixels * CHANNELS + within * target_stride
    logit = tl.load(params_ptr + start, mask, other=float("-inf")).to(dtype)
    first = params_ptr + start + step
    x0 = as_data(target_ptr + target_at, there, dtype)[:, None]
    m0 = tl.load(first, mask, other=0).to(dtype)
    s0 = tl.load(first + step, mask, other=0).to(dtype)
    a0, f0, dm0, ds0 = level(x0, m0, s0)
    additive, factor = a0, f0
    if CHANNELS == 3:
        x1 = as_data(target_ptr + target_at + target_channel, there, dtype)[:, None]
        x2 = as_data(target_ptr + target_at + 2 * target_channel, there, dtype)[:, None]
        c0, g0 = coefficient(tl.load(first + 2 * step, mask, other=0).to(dtype))
        c1, g1 = coefficient(tl.load(first + 5 * step, mask, other=0).to(dtype))
        c2, g2 = coefficient(tl.load(first + 8 * step, mask, other=0).to(dtype))
        m1 = tl.load(first + 3 * step, mask, other=0).to(dtype) + c0 * x0
        a1, f1, dm1, ds1 = level(x1, m1, tl.load(first + 4 * step, mask, other=0).to(dtype))
        m2 = tl.load(first + 6 * step, mask, other=0).to(dtype) + c1 * x0 + c2 * x1
        a2, f2, dm2, ds2 = level(x2, m2, tl.load(first + 7 * step, mask, other=0).to(dtype))
        additive, factor = a0 + a1 + a2, f0 * f1 * f2
    additive += logit
    top, top_logit = tl.max(additive, axis=1), tl.max(logit, axis=1)
    share = exp_accurate(additive - top[:, None], False) * factor
    prior = exp_accurate(logit - top_logit[:, None], False)
    sums, priors = tl.sum(share, axis=1), tl.sum(prior, axis=1)
    if VALUES:
        value = (top_logit - top) + (log_accurate(priors) - log_accurate(sums))
        tl.store(values_ptr + pixel, value.to(tl.float64), there)
    if GRADIENT:
        c = tl.full((PIXELS,), weight, dtype)
        if UPSTREAM:
            c *= tl.load(upstream_ptr + pixel, there, other=0)
        share = -share * (c / sums)[:, None]
        grad = grad_ptr + start
        tl.store(grad, rounded(prior * (c / priors)[:, None] + share, out), mask)
        grad += step
        tl.store(grad, rounded(share * dm0, out), mask)
        tl.store(grad + step, rounded(share * ds0, out), mask)
        if CHANNELS == 3:
            tl.store(grad + 2 * step, rounded(share * dm1 * x0 * g0, out), mask)
            tl.store(grad + 3 * step, rounded(share * dm1, out), mask)
            tl.store(grad + 4 * step, rounded(share * ds1, out), mask)
            tl.store(grad + 5 * step, rounded(share * dm2 * x0 * g1, out), mask)
            tl.store(grad + 6 * step, rounded(share * dm2, out), mask)
            tl.store(grad + 7 * step, rounded(share * ds2, out), mask)
            tl.store(grad + 8 * step, rounded(share * dm2 * x1 * g2, out), mask)
