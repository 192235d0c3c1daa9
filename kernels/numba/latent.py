"""The latent pair: z and KL(q‖p), each switched off at compile time when not asked for, and their gradients.

Forward reads ``mu`` and ``scale`` once and writes z (float32: 8 bytes an element read, 4 written); backward reads
them and the gradient of z again and writes two gradients (12 read, 8 written). Noise is made a tile at a time, in the
first-level cache, and never leaves it. A row of the loops is an example, or 4096 elements where all tensors are dense.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import numpy as np
from numba import njit

from ..reference.latent import STD_EPS
from . import cache
from .intrinsics import FLOAT32, FLOAT64, constant, inlined, load, store
from .math import exact, exp, exp_of_bounded, log
from .philox import PADDED, TILE, fill
from .reconstruction import REDUCE

#: what a scale is: σ; log σ²; or that, clamped so that σ² is a normal number, which spares exp its own bounds
STD, LOGVAR, BOUNDED_LOGVAR = range(3)
NORMAL = (-87.0, 88.0)


@functools.cache
def kind(log_scale: bool, low: float, high: float) -> int:
    """Which of them."""
    return STD if not log_scale else BOUNDED_LOGVAR if low >= NORMAL[0] and high <= NORMAL[1] else LOGVAR


def _of_logvar(exponential: Callable[..., float]) -> tuple[Callable[..., float], Callable[..., float]]:
    """KL and σ of an element whose scale is log σ²."""

    @exact
    def kl(mu, logvar, prior_mu, prior_logvar, inverse_prior_var):
        half, one = constant(0.5, mu), constant(1.0, mu)
        d = mu - prior_mu
        return half * ((d * d + exponential(logvar)) * inverse_prior_var - one + (prior_logvar - logvar))

    @exact
    def std(logvar):
        return exponential(constant(0.5, logvar) * logvar)

    return kl, std


_kl_logvar, _std_of_logvar = _of_logvar(exp)
_kl_bounded, _std_of_bounded = _of_logvar(exp_of_bounded)


@exact
def _kl_std(mu, std, prior_mu, prior_logvar, inverse_prior_var):
    half, one = constant(0.5, mu), constant(1.0, mu)
    d, var = mu - prior_mu, std * std
    return half * ((d * d + var) * inverse_prior_var - one + (prior_logvar - log(constant(STD_EPS, mu) + var)))


@exact
def _std_of_std(std):
    return std


@exact
def clamped(logvar, low, high):
    """logvar within [low, high]; NaN where it is."""
    logvar = low if logvar < low else logvar
    return high if logvar > high else logvar


@exact
def _slope_logvar(std, precision):
    half, one = constant(0.5, std), constant(1.0, std)
    return half * (std * std * precision - one)


@exact
def _slope_std(std, precision):
    return std * precision - std / (constant(STD_EPS, std) + std * std)


@exact
def kl_gradients(c, d, std, slope, precision):
    """The gradients of the KL of one element in mu, scale, prior_mu and prior_logvar, times c.

    In this order, and not in one that a compiler chooses: c·d may leave the range, and the precision bring it back.
    The last is infinite wherever the KL is, so that a sum of several is alike on every backend.
    """
    half, one = constant(0.5, d), constant(1.0, d)
    grad_mu = c * (d * precision)
    return grad_mu, c * slope, -grad_mu, half * c * (one - (std * std + d * d) * precision)


def kl_element(log_scale, mu, scale, prior_mu, prior_logvar, inverse_prior_var):
    """KL of one element, nats."""
    raise NotImplementedError("only inside compiled code")


def std_of(log_scale, scale):
    """σ of one element."""
    raise NotImplementedError("only inside compiled code")


def slope_of(log_scale, std, precision):
    """∂kl/∂scale of one element."""
    raise NotImplementedError("only inside compiled code")


@inlined(kl_element)
def _kl_element(log_scale, mu, scale, prior_mu, prior_logvar, inverse_prior_var):
    kl = (_kl_std, _kl_logvar, _kl_bounded)[log_scale.literal_value]
    return lambda log_scale, mu, scale, prior_mu, prior_logvar, inverse_prior_var: kl(
        mu, scale, prior_mu, prior_logvar, inverse_prior_var
    )


@inlined(std_of)
def _std_of(log_scale, scale):
    std = (_std_of_std, _std_of_logvar, _std_of_bounded)[log_scale.literal_value]
    return lambda log_scale, scale: std(scale)


@inlined(slope_of)
def _slope_of(log_scale, std, precision):
    slope = _slope_logvar if log_scale.literal_value else _slope_std
    return lambda log_scale, std, precision: slope(std, precision)


@functools.cache
def forward(
    dtype: int, log_scale: int, clamp: bool, with_prior: bool, with_z: bool, with_kl: bool, by_element: bool
) -> Callable[..., int]:
    """z and, for each row, Σ kl in float64; or kl elementwise if ``by_element``."""
    sources = cache.STAMP

    @njit(fastmath=REDUCE, error_model="numpy", nogil=True)
    def kernel(
        first, last, cols, total, mu_ptr, mu_stride, scale_ptr, scale_stride, prior_mu_ptr, prior_mu_stride,
        prior_logvar_ptr, prior_logvar_stride, seed, samples, z_ptr, kl_ptr, free_bits, low, high
    ):  # fmt: skip
        sources  # noqa: B018
        tile = np.empty(PADDED, np.float32)
        tile_ptr = np.int64(tile.ctypes.data)
        zero = constant(0.0, load(dtype, mu_ptr, 0))
        one, floor = constant(1.0, zero), constant(free_bits, zero)
        lowest, highest = constant(low, zero), constant(high, zero)
        for row in range(first, last):
            mu_row, scale_row, flat = row * mu_stride, row * scale_stride, row * cols
            end = min(cols, total - flat)
            if with_z:
                for sample in range(samples):
                    for start in range(0, end, TILE):
                        count = min(TILE, end - start)
                        z = sample * total + flat + start
                        offset = fill(seed, z, count, tile_ptr)
                        for j in range(count):
                            mu = load(dtype, mu_ptr, mu_row + start + j)
                            scale = load(dtype, scale_ptr, scale_row + start + j)
                            std = std_of(log_scale, clamped(scale, lowest, highest) if clamp else scale)
                            epsilon = constant(load(FLOAT32, tile_ptr, offset + j), zero)
                            store(dtype, z_ptr, z + j, mu + std * epsilon)
            if with_kl:
                prior_mu_row, prior_logvar_row = row * prior_mu_stride, row * prior_logvar_stride
                row_sum = 0.0
                for start in range(0, end, TILE):
                    tile_sum = zero
                    for j in range(start, min(start + TILE, end)):
                        mu = load(dtype, mu_ptr, mu_row + j)
                        scale = load(dtype, scale_ptr, scale_row + j)
                        scale = clamped(scale, lowest, highest) if clamp else scale
                        if with_prior:
                            prior_mu = load(dtype, prior_mu_ptr, prior_mu_row + j)
                            prior_logvar = load(dtype, prior_logvar_ptr, prior_logvar_row + j)
                            kl = kl_element(log_scale, mu, scale, prior_mu, prior_logvar, exp(-prior_logvar))
                        else:
                            kl = kl_element(log_scale, mu, scale, zero, zero, one)
                        if floor > zero:
                            kl = floor if kl < floor else kl
                        if by_element:
                            store(dtype, kl_ptr, flat + j, kl)
                        else:
                            tile_sum += kl
                    row_sum += tile_sum
                if not by_element:
                    store(FLOAT64, kl_ptr, row, row_sum)
        return 0 * tile.size  # keeps the tile alive to here

    return cache.on_disk(kernel)


@functools.cache
def backward(
    dtype: int, log_scale: int, clamp: bool, with_prior: bool, with_z: bool, with_kl: bool, by_element: bool
) -> Callable[..., int]:
    """∂mu = Σ g + c·∂kl/∂mu and ∂scale = Σ g·ε·∂σ/∂scale + c·∂kl/∂scale; c is one number a row, or an element."""
    sources, c_type = cache.STAMP, dtype if by_element else FLOAT64 if dtype == FLOAT64 else FLOAT32

    @njit(fastmath=REDUCE, error_model="numpy", nogil=True)
    def kernel(
        first, last, cols, total, grad_z_ptr, c_ptr, c_stride, weight, mu_ptr, mu_stride, scale_ptr, scale_stride,
        prior_mu_ptr, prior_mu_stride, prior_logvar_ptr, prior_logvar_stride, seed, samples, free_bits,
        low, high, grad_mu_ptr, grad_scale_ptr, grad_prior_mu_ptr, grad_prior_logvar_ptr
    ):  # fmt: skip
        sources  # noqa: B018
        zero = constant(0.0, load(dtype, mu_ptr, 0))
        one, half, floor = constant(1.0, zero), constant(0.5, zero), constant(free_bits, zero)
        lowest, highest = constant(low, zero), constant(high, zero)
        tile, g, g_epsilon = np.empty(PADDED, np.float32), np.empty(TILE, type(zero)), np.empty(TILE, type(zero))
        tile_ptr = np.int64(tile.ctypes.data)
        for row in range(first, last):
            mu_row, scale_row, flat = row * mu_stride, row * scale_stride, row * cols
            prior_mu_row, prior_logvar_row = row * prior_mu_stride, row * prior_logvar_stride
            end = min(cols, total - flat)
            row_c = zero
            if with_kl and not by_element:
                row_c = load(c_type, c_ptr, row * c_stride) * constant(weight, zero)
            for start in range(0, end, TILE):
                count = min(TILE, end - start)
                if with_z:
                    for sample in range(samples):
                        z = sample * total + flat + start
                        offset = fill(seed, z, count, tile_ptr)
                        for j in range(count):
                            value = load(dtype, grad_z_ptr, z + j)
                            product = value * constant(load(FLOAT32, tile_ptr, offset + j), zero)
                            g[j] = value if sample == 0 else g[j] + value
                            g_epsilon[j] = product if sample == 0 else g_epsilon[j] + product
                for j in range(count):
                    mu = load(dtype, mu_ptr, mu_row + start + j)
                    given = load(dtype, scale_ptr, scale_row + start + j)
                    scale = clamped(given, lowest, highest) if clamp else given
                    grad_mu = grad_scale = zero
                    std = std_of(log_scale, scale)
                    if with_z:
                        grad_mu = g[j]
                        grad_scale = half * g_epsilon[j] * std if log_scale else g_epsilon[j]
                    if with_kl:
                        c = load(c_type, c_ptr, row * c_stride + start + j) if by_element else row_c
                        prior_mu, prior_logvar, precision = zero, zero, one
                        if with_prior:
                            prior_mu = load(dtype, prior_mu_ptr, prior_mu_row + start + j)
                            prior_logvar = load(dtype, prior_logvar_ptr, prior_logvar_row + start + j)
                            precision = exp(-prior_logvar)
                        d = mu - prior_mu
                        if floor > zero:
                            kl = kl_element(log_scale, mu, scale, prior_mu, prior_logvar, precision)
                            c = zero if kl < floor else c
                        by_mu, by_scale, by_prior_mu, by_prior_logvar = kl_gradients(
                            c, d, std, slope_of(log_scale, std, precision), precision
                        )
                        grad_mu += by_mu
                        grad_scale += by_scale
                        if with_prior:
                            at = flat + start + j
                            store(dtype, grad_prior_mu_ptr, at, by_prior_mu)
                            store(dtype, grad_prior_logvar_ptr, at, by_prior_logvar)
                    if clamp:
                        grad_scale = grad_scale if scale == given else zero
                    store(dtype, grad_mu_ptr, flat + start + j, grad_mu)
                    store(dtype, grad_scale_ptr, flat + start + j, grad_scale)
        return 0 * (tile.size + g.size + g_epsilon.size)

    return cache.on_disk(kernel)
