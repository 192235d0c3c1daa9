"""The ELBO in one launch and a finish, and its backward in one: the first programs walk the data, the others the KL."""

from __future__ import annotations

import triton
import triton.language as tl

from . import latent, reconstruction


@triton.jit(do_not_specialize=["chunks", "programs", "latent_chunks", "steps", "latent_steps"])
def forward(
    recon_ptr, target_ptr, grad_ptr, nll_partials_ptr, parameter: tl.float64, weight: tl.float64, rows: tl.int64,
    cols: tl.int64, recon_stride: tl.int64, target_stride: tl.int64, steps, chunks, programs, mu_ptr, scale_ptr,
    kl_partials_ptr, free_bits: tl.float64, low: tl.float64, high: tl.float64, latent_rows: tl.int64,
    latent_cols: tl.int64, inner: tl.int64, mu_stride: tl.int64, scale_stride: tl.int64, latent_steps, latent_chunks,
    LIKELIHOOD: tl.constexpr, WITH_GRADIENT: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
    LOG_SCALE: tl.constexpr, FREE_BITS: tl.constexpr, CLAMP: tl.constexpr, DIVIDE: tl.constexpr,
    LATENT_ROWS: tl.constexpr, LATENT_BLOCK: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    if program < programs:
        reconstruction.forward_tiles(
            program, recon_ptr, target_ptr, grad_ptr, nll_partials_ptr, parameter, weight, rows, cols, recon_stride,
            target_stride, steps, chunks, LIKELIHOOD, WITH_GRADIENT, ROWS, BLOCK,
        )  # fmt: skip
    else:
        latent.forward_tiles(
            program - programs, mu_ptr, scale_ptr, mu_ptr, mu_ptr, mu_ptr, mu_ptr, kl_partials_ptr, free_bits,
            low, high, latent_rows, latent_cols, inner, mu_stride, scale_stride, 0, 0, 0, latent_steps, latent_chunks,
            LOG_SCALE, False, 0, "sum", FREE_BITS, CLAMP, DIVIDE, False, LATENT_ROWS, LATENT_BLOCK,
        )  # fmt: skip


@triton.jit(do_not_specialize=["steps", "programs", "latent_steps", "latent_chunks"])
def backward(
    gradient_ptr, upstream_ptr, count: tl.int64, steps, programs, latent_upstream_ptr, mu_ptr, scale_ptr, grad_mu_ptr,
    grad_scale_ptr, free_bits: tl.float64, low: tl.float64, high: tl.float64, weight: tl.float64,
    latent_rows: tl.int64, latent_cols: tl.int64, inner: tl.int64, mu_stride: tl.int64, scale_stride: tl.int64,
    latent_steps, latent_chunks,
    LOG_SCALE: tl.constexpr, FREE_BITS: tl.constexpr, CLAMP: tl.constexpr, DIVIDE: tl.constexpr, BLOCK: tl.constexpr,
    LATENT_ROWS: tl.constexpr, LATENT_BLOCK: tl.constexpr,
):  # fmt: skip
    """The first programs rescale what the forward has written, the others write the gradients of the KL."""
    program = tl.program_id(0)
    if program < programs:
        reconstruction.rescale_tiles(program, gradient_ptr, upstream_ptr, count, steps, BLOCK)
    else:
        latent.backward_tiles(
            program - programs, mu_ptr, latent_upstream_ptr, mu_ptr, scale_ptr, mu_ptr, mu_ptr, mu_ptr, grad_mu_ptr,
            grad_scale_ptr, grad_mu_ptr, grad_mu_ptr, free_bits, low, high, weight, latent_rows, latent_cols, inner, 0,
            mu_stride, scale_stride, 0, 0, 0, latent_steps, latent_chunks,
            LOG_SCALE, False, 0, "rows", FREE_BITS, CLAMP, DIVIDE, False, LATENT_ROWS, LATENT_BLOCK,
        )  # fmt: skip
