"""Backend ``triton``: fused GPU kernels for NVIDIA and AMD, from one source. This file turns tensors into launches.

With ``TRITON_INTERPRET=1`` the same kernels run on CPU tensors, slowly: for tests.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import parameters
from ..layout import Grid, accumulator, cols, given_priors, loss_dtype, loss_shape, reduction_weight, upstream_by_row
from . import elbo, latent, reconstruction, reduce
from .launch import INTERPRETED, PROGRAMS, TILE, Launch, plan, run

DEVICES = ("cuda", "cpu") if INTERPRETED else ("cuda",)
UNAVAILABLE = "" if INTERPRETED or torch.cuda.is_available() else "torch sees no CUDA device"
FLOAT32_MIN = 1.1754943508222875e-38

__all__ = [
    "elbo_forward",
    "latent_backward",
    "latent_forward",
    "reconstruction_backward",
    "reconstruction_forward",
    "rescale_",
]


def _rows(tensors: list[Tensor], by_example: bool) -> tuple[Grid, Launch]:
    """Examples as rows, or dense tensors as one row of everything."""
    grid = Grid(tensors, by_example, block=tensors[0].numel())
    return grid, plan(grid.rows, grid.cols, tensors[0].dtype)


def _parameter(likelihood: str, parameter: float, dtype: torch.dtype) -> float:
    """An eps that float32 would flush to 0 is the smallest normal number there."""
    clipped = likelihood == "bernoulli_probs" and dtype != torch.float64
    return max(parameter, FLOAT32_MIN) if clipped else parameter


def _finish(partials: Tensor, chunks: int, reduction: str, like: Tensor) -> Tensor:
    """Partial sums to the loss; partials that are the loss already are returned."""
    if reduction == "example" and chunks == 1:
        return partials
    loss = torch.empty(loss_shape(reduction, like), dtype=partials.dtype, device=like.device)
    count = chunks if reduction == "example" else partials.numel()
    run(reduce.finish, loss.numel(), like, partials, loss, reduction_weight(reduction, like), count)
    return loss


def _no_loss(reduction: str, like: Tensor) -> Tensor:
    """The loss of nothing: 0, or NaN for a mean."""
    weight = reduction_weight(reduction, like)
    shape, dtype = loss_shape(reduction, like), loss_dtype(reduction, like.dtype)
    return torch.full(shape, 0.0 * weight, dtype=dtype, device=like.device)


def _fill(work: parameters.Work) -> None:
    recon, grid = work.recon, work.grid
    tiles = plan(grid.rows, grid.cols, recon.dtype)
    partials = (grid.rows, tiles.chunks)
    if work.sums is not None:
        work.sums = torch.empty(partials, dtype=accumulator(recon.dtype), device=recon.device)
    if work.parameter_sums is not None:
        work.parameter_sums = torch.empty(partials, dtype=accumulator(recon.dtype), device=recon.device)
    outputs = (work.nll, work.sums, work.grad, work.grad_parameter, work.parameter_sums)
    run(
        reconstruction.with_tensor, tiles.programs, recon, work.recon_rows, work.target_rows, work.parameter.value,
        *(recon if t is None else t for t in (work.upstream, *outputs)), work.weight, grid.rows, grid.cols,
        work.recon_stride, work.target_stride, work.parameter.stride, work.upstream_stride, tiles.steps, tiles.chunks,
        LIKELIHOOD=work.likelihood, BY_ROW=work.parameter.kind == "row", GRADIENT=work.grad is not None,
        LOSS="elements" if work.nll is not None else "sum" if work.sums is not None else "",
        UPSTREAM="" if work.upstream is None else "elements" if work.upstream_by_element else "rows",
        ROWS=tiles.rows, BLOCK=tiles.block,
    )  # fmt: skip


def reconstruction_forward(
    recon: Tensor,
    target: Tensor,
    parameter_tensor: Tensor | None = None,
    *,
    likelihood: str,
    parameter: float,
    reduction: str,
    with_gradient: bool,
) -> list[Tensor]:
    if parameter_tensor is not None:
        return parameters.forward(
            _fill, recon, target, parameter_tensor, likelihood=likelihood, reduction=reduction,
            with_gradient=with_gradient, on_host=False,
        )  # fmt: skip
    gradient = torch.empty(recon.shape, dtype=recon.dtype, device=recon.device) if with_gradient else recon
    if not recon.numel():
        return [_no_loss(reduction, recon), *([gradient] if with_gradient else [])]
    parameter = _parameter(likelihood, parameter, recon.dtype)
    grid, tiles = _rows([recon, target], by_example=reduction == "example")
    common = {"LIKELIHOOD": likelihood, "ROWS": tiles.rows, "BLOCK": tiles.block}
    sizes = (grid.rows, grid.cols, *grid.strides, tiles.steps, tiles.chunks)
    if reduction == "none":
        nll = torch.empty(recon.shape, dtype=recon.dtype, device=recon.device)
        run(reconstruction.forward_elements, tiles.programs, recon, *grid.tensors, nll, parameter, *sizes, **common)
        return [nll]
    partials = torch.empty(grid.rows * tiles.chunks, dtype=accumulator(recon.dtype), device=recon.device)
    weight = reduction_weight(reduction, recon)
    args = (*grid.tensors, gradient, partials, parameter, weight, *sizes)
    run(reconstruction.forward, tiles.programs, recon, *args, **common, WITH_GRADIENT=with_gradient)
    return [_finish(partials, tiles.chunks, reduction, recon), *([gradient] if with_gradient else [])]


def reconstruction_backward(
    grad_nll: Tensor,
    recon: Tensor,
    target: Tensor,
    parameter_tensor: Tensor | None = None,
    *,
    likelihood: str,
    parameter: float,
    reduction: str,
) -> list[Tensor]:
    if parameter_tensor is not None:
        return parameters.backward(
            _fill, grad_nll, recon, target, parameter_tensor,
            likelihood=likelihood, reduction=reduction, on_host=False,
        )  # fmt: skip
    gradient = torch.empty(recon.shape, dtype=recon.dtype, device=recon.device)
    if not recon.numel():
        return [gradient]
    by_row = upstream_by_row(grad_nll, reduction, recon)
    if by_row is None:
        grid, tiles = _rows([recon, target, grad_nll], by_example=False)
        *inputs, upstream = grid.tensors
        *strides, stride = grid.strides
    else:
        upstream, stride = by_row
        grid, tiles = _rows([recon, target], by_example=stride != 0)
        inputs, strides = grid.tensors, grid.strides
    weight = reduction_weight(reduction, recon)
    parameter = _parameter(likelihood, parameter, recon.dtype)
    sizes = (grid.rows, grid.cols, stride, *strides, tiles.steps, tiles.chunks)
    constants = {"LIKELIHOOD": likelihood, "ROWS": tiles.rows, "BLOCK": tiles.block}
    args = (upstream, *inputs, gradient, parameter, weight, *sizes)
    run(reconstruction.backward, tiles.programs, recon, *args, **constants, BY_ELEMENT=by_row is None)
    return [gradient]


def rescale_(gradient: Tensor, upstream: Tensor) -> Tensor:
    count = gradient.numel()
    if count:
        steps = max(1, -(-count // (TILE * PROGRAMS)))
        run(reconstruction.rescale, -(-count // (TILE * steps)), gradient, gradient, upstream, count, steps, BLOCK=TILE)
    return gradient


def _latent_rows(tensors: list[Tensor], by_example: bool) -> tuple[Grid, Launch, bool]:
    """Examples as rows; or all elements as one row, with a division to find each where examples are strided."""
    grid, tiles = _rows(tensors, by_example)
    divide = not by_example and grid.rows > 1
    if divide:
        grid.rows, grid.cols = 1, grid.total
        tiles = plan(1, grid.total, tensors[0].dtype)
    return grid, tiles, divide


def _latent_constants(
    grid: Grid, tiles: Launch, divide: bool, log_scale: bool, priors: list[Tensor], sample: int, free_bits: float
) -> dict[str, Any]:
    one_row = grid.rows == 1 and sample < 2
    return {
        "LOG_SCALE": log_scale,
        "PRIOR": bool(priors),
        "SAMPLE": sample,
        "FREE_BITS": free_bits > 0,
        "DIVIDE": divide,
        "QUADS": one_row or grid.cols % 4 == 0,
        "ROWS": tiles.rows,
        "BLOCK": tiles.block,
    }


def _with_priors(grid: Grid) -> tuple[list[Tensor], list[int]]:
    """Four tensors and strides, where no prior stands ``mu``, which is not read."""
    missing = 4 - len(grid.tensors)
    return grid.tensors + grid.tensors[:1] * missing, grid.strides + [0] * missing


def _sample_mode(z: Tensor | None, samples: int) -> int:
    return 0 if z is None else 2 if samples > 1 else 1


def latent_forward(
    mu: Tensor,
    scale: Tensor,
    seed: Tensor | None,
    prior_mu: Tensor | None,
    prior_logvar: Tensor | None,
    *,
    log_scale: bool,
    samples: int,
    free_bits: float,
    reduction: str,
) -> list[Tensor]:
    shape = (samples, *mu.shape) if samples else mu.shape
    z = None if seed is None else torch.empty(shape, dtype=mu.dtype, device=mu.device)
    if not mu.numel():
        return [t for t in (z, _no_loss(reduction, mu) if reduction else None) if t is not None]
    priors = given_priors(prior_mu, prior_logvar)
    grid, tiles, divide = _latent_rows([mu, scale, *priors], by_example=reduction == "example")
    by_element = reduction == "none"
    kl = None
    if by_element:
        kl = torch.empty(mu.shape, dtype=mu.dtype, device=mu.device)
    elif reduction:
        kl = torch.empty(grid.rows * tiles.chunks, dtype=accumulator(mu.dtype), device=mu.device)
    tensors, strides = _with_priors(grid)
    constants = _latent_constants(grid, tiles, divide, log_scale, priors, _sample_mode(z, samples), free_bits)
    run(
        latent.forward, tiles.programs, mu, *tensors, *(mu if t is None else t for t in (seed, z, kl)), free_bits,
        grid.rows, grid.cols, cols(mu), *strides, samples, tiles.steps, tiles.chunks, **constants,
        KL="elements" if by_element else "sum" if reduction else "",
    )  # fmt: skip
    if kl is not None and not by_element:
        kl = _finish(kl, tiles.chunks, reduction, mu)
    return [t for t in (z, kl) if t is not None]


def latent_backward(
    grad_z: Tensor | None,
    grad_kl: Tensor | None,
    mu: Tensor,
    scale: Tensor,
    seed: Tensor | None,
    prior_mu: Tensor | None,
    prior_logvar: Tensor | None,
    *,
    log_scale: bool,
    samples: int,
    free_bits: float,
    reduction: str,
) -> list[Tensor]:
    priors = given_priors(prior_mu, prior_logvar)
    unused = [torch.zeros(mu.shape, dtype=mu.dtype, device=mu.device) for _ in priors] if grad_kl is None else []
    priors = priors if grad_kl is not None else []
    gradients = [torch.empty(mu.shape, dtype=mu.dtype, device=mu.device) for _ in range(2 + len(priors))]
    if not mu.numel():
        return gradients + unused
    upstream, upstream_stride, kl = mu, 0, ""
    if grad_kl is not None:
        by_row = upstream_by_row(grad_kl, reduction, mu)
        kl = "elements" if by_row is None else "rows"
        upstream, upstream_stride = (grad_kl.contiguous(), 0) if by_row is None else by_row
    grid, tiles, divide = _latent_rows([mu, scale, *priors], by_example=upstream_stride != 0)
    tensors, strides = _with_priors(grid)
    g = grad_z.contiguous() if grad_z is not None and seed is not None else None
    constants = _latent_constants(grid, tiles, divide, log_scale, priors, _sample_mode(g, samples), free_bits)
    run(
        latent.backward, tiles.programs, mu, mu if g is None else g, upstream, *tensors, mu if seed is None else seed,
        *gradients, *([] if priors else [mu, mu]), free_bits, reduction_weight(reduction, mu), grid.rows, grid.cols,
        cols(mu), upstream_stride, *strides, samples, tiles.steps, tiles.chunks, **constants, KL=kl,
    )  # fmt: skip
    return gradients + unused


def elbo_forward(
    recon: Tensor,
    target: Tensor,
    mu: Tensor,
    scale: Tensor,
    *,
    likelihood: str,
    parameter: float,
    log_scale: bool,
    beta: float,
    free_bits: float,
    reduction: str,
    with_gradient: bool,
) -> list[Tensor]:
    by_example = reduction == "example"
    if not recon.numel() or not mu.numel():
        nll, *gradients = reconstruction_forward(
            recon, target, likelihood=likelihood, parameter=parameter, reduction=reduction, with_gradient=with_gradient
        )
        (kl,) = latent_forward(
            mu, scale, None, None, None, log_scale=log_scale, samples=0, free_bits=free_bits, reduction=reduction
        )
        return [(nll + beta * kl).to(nll.dtype), nll, kl, *gradients]
    gradient = torch.empty(recon.shape, dtype=recon.dtype, device=recon.device) if with_gradient else recon
    grid, tiles = _rows([recon, target], by_example)
    latent_grid, latent_tiles, divide = _latent_rows([mu, scale], by_example)
    nll_partials, kl_partials = (
        torch.empty(g.rows * t.chunks, dtype=accumulator(like.dtype), device=recon.device)
        for g, t, like in ((grid, tiles, recon), (latent_grid, latent_tiles, mu))
    )
    weight = reduction_weight(reduction, recon)
    run(
        elbo.forward, tiles.programs + latent_tiles.programs, recon,
        *grid.tensors, gradient, nll_partials, _parameter(likelihood, parameter, recon.dtype), weight,
        grid.rows, grid.cols, *grid.strides, tiles.steps, tiles.chunks, tiles.programs,
        *latent_grid.tensors, kl_partials, free_bits, latent_grid.rows, latent_grid.cols, cols(mu),
        *latent_grid.strides, latent_tiles.steps, latent_tiles.chunks,
        LIKELIHOOD=likelihood, WITH_GRADIENT=with_gradient, ROWS=tiles.rows, BLOCK=tiles.block,
        LOG_SCALE=log_scale, FREE_BITS=free_bits > 0, DIVIDE=divide,
        LATENT_ROWS=latent_tiles.rows, LATENT_BLOCK=latent_tiles.block,
    )  # fmt: skip
    loss, nll = (
        torch.empty(loss_shape(reduction, recon), dtype=nll_partials.dtype, device=recon.device) for _ in range(2)
    )
    kl = torch.empty(loss_shape(reduction, mu), dtype=kl_partials.dtype, device=recon.device)
    counts = (tiles.chunks, latent_tiles.chunks) if by_example else (nll_partials.numel(), kl_partials.numel())
    weights = (weight, reduction_weight(reduction, mu))
    run(reduce.finish_elbo, loss.numel(), recon, nll_partials, kl_partials, loss, nll, kl, *weights, beta, *counts)
    return [loss, nll, kl, *([gradient] if with_gradient else [])]
