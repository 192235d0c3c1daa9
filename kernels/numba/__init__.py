"""Backend ``numba``: CPU kernels compiled on first use for the dtypes that come, and kept on disk.

Zero-copy: kernels get the addresses of torch's own memory. This file turns tensors into addresses, strides and rows.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import parameters
from ..checks import check_unit_range
from ..layout import (
    BLOCK,
    Grid,
    cols,
    given_priors,
    loss_dtype,
    loss_shape,
    reduction_weight,
    upstream_by_row,
)
from . import latent, memory, reconstruction, threads
from .intrinsics import BFLOAT16, FLOAT16, FLOAT32, FLOAT64, UINT8
from .likelihoods import IDS

TYPES = {
    torch.float64: FLOAT64,
    torch.float32: FLOAT32,
    torch.bfloat16: BFLOAT16,
    torch.float16: FLOAT16,
    torch.uint8: UINT8,
}

__all__ = [
    "elbo_forward",
    "latent_backward",
    "latent_forward",
    "reconstruction_backward",
    "reconstruction_forward",
    "rescale_",
]


def _row_sums(
    recon: Tensor, target: Tensor, likelihood: str, parameter: float, reduction: str, with_gradient: bool
) -> tuple[Grid, Tensor, list[Tensor]]:
    """The rows, Σ nll of each in float64, and the gradient if asked for."""
    grid = Grid([recon, target], by_example=reduction == "example")
    sums = torch.empty(grid.rows, dtype=torch.float64)
    gradient = [memory.empty(recon.shape, recon.dtype)] if with_gradient else []
    if grid.rows and grid.total:
        kernel = reconstruction.forward_rows(IDS[likelihood], TYPES[recon.dtype], TYPES[target.dtype], with_gradient)
        flags = threads.run(
            kernel,
            grid.rows,
            grid.cols,
            grid.cols,
            grid.total,
            *grid.places,
            gradient[0].data_ptr() if gradient else 0,
            sums.data_ptr(),
            parameter,
            reduction_weight(reduction, recon),
        )
        if flags:
            check_unit_range(likelihood, recon, target)
    else:
        sums.zero_()
    return grid, sums, gradient


def _finish(sums: Tensor, reduction: str, like: Tensor) -> tuple[Tensor, float]:
    loss = torch.empty(loss_shape(reduction, like), dtype=loss_dtype(reduction, like.dtype))
    write = reconstruction.finish(TYPES[loss.dtype])
    by_example = reduction == "example"
    weight = reduction_weight(reduction, like)
    return loss, write(sums.shape[0], sums.data_ptr(), by_example, weight, loss.data_ptr())


def _fill(work: parameters.Work) -> None:
    by_row, by_element = work.parameter.kind == "row", work.upstream_by_element
    types = IDS[work.likelihood], TYPES[work.recon.dtype], TYPES[work.target_rows.dtype]
    outputs = (work.nll, work.sums, work.grad, work.grad_parameter, work.parameter_sums, work.columns)
    threads.run(
        reconstruction.with_tensor(*types, by_row, by_element),
        work.pieces,
        work.piece * work.grid.cols,
        work.piece,
        work.grid.rows,
        work.grid.cols,
        work.grid.total,
        work.recon_rows.data_ptr(),
        work.recon_stride,
        work.target_rows.data_ptr(),
        work.target_stride,
        work.parameter.value.data_ptr(),
        work.parameter.stride,
        0 if work.upstream is None else work.upstream.data_ptr(),
        work.upstream_stride,
        work.weight,
        *(0 if output is None else output.data_ptr() for output in outputs),
    )


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
            _fill, recon, target, parameter_tensor,
            likelihood=likelihood, reduction=reduction, with_gradient=with_gradient,
        )  # fmt: skip
    if reduction != "none":
        _, sums, gradient = _row_sums(recon, target, likelihood, parameter, reduction, with_gradient)
        return [_finish(sums, reduction, recon)[0], *gradient]
    grid = Grid([recon, target], by_example=False)
    nll = memory.empty(recon.shape, recon.dtype)
    if grid.total:
        kernel = reconstruction.forward_elements(IDS[likelihood], TYPES[recon.dtype], TYPES[target.dtype])
        places = (*grid.places, nll.data_ptr())
        flags = threads.run(kernel, grid.rows, grid.cols, grid.cols, grid.total, *places, parameter)
        if flags:
            check_unit_range(likelihood, recon, target)
    return [nll]


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
            _fill, grad_nll, recon, target, parameter_tensor, likelihood=likelihood, reduction=reduction
        )
    gradient = memory.empty(recon.shape, recon.dtype)
    if not recon.numel():
        return [gradient]
    types = (IDS[likelihood], TYPES[recon.dtype], TYPES[target.dtype])
    by_row = upstream_by_row(grad_nll, reduction, recon)
    if by_row is None:
        grid = Grid([recon, target, grad_nll.to(recon.dtype)], by_example=False)
        *inputs, upstream_ptr, upstream_stride = grid.places
        args = (upstream_ptr, upstream_stride, *inputs, gradient.data_ptr(), parameter)
        threads.run(reconstruction.backward_elements(*types), grid.rows, grid.cols, grid.cols, grid.total, *args)
        return [gradient]
    upstream, stride = by_row
    grid = Grid([recon, target], by_example=stride != 0)
    args = (
        upstream.data_ptr(),
        stride,
        *grid.places,
        gradient.data_ptr(),
        parameter,
        reduction_weight(reduction, recon),
    )
    threads.run(reconstruction.backward_rows(*types), grid.rows, grid.cols, grid.cols, grid.total, *args)
    return [gradient]


def rescale_(gradient: Tensor, upstream: Tensor) -> Tensor:
    factor = upstream.item()
    if factor != 1.0 and gradient.numel():
        rows = -(-gradient.numel() // BLOCK)
        kernel = reconstruction.rescale(TYPES[gradient.dtype])
        threads.run(kernel, rows, BLOCK, BLOCK, gradient.numel(), gradient.data_ptr(), factor)
    return gradient


NO_PRIOR = (0, 0, 0, 0)


def _latent(
    mu: Tensor,
    scale: Tensor,
    seed: Tensor | None,
    priors: list[Tensor],
    log_scale: bool,
    samples: int,
    free_bits: float,
    reduction: str,
) -> tuple[Tensor | None, Tensor | None]:
    """z if there is a seed; elementwise kl, or its row sums in float64, if there is a reduction."""
    grid = Grid([mu, scale, *priors], by_example=reduction == "example")
    z = None if seed is None else memory.empty((samples, *mu.shape) if samples else mu.shape, mu.dtype)
    by_element = reduction == "none"
    kl = None
    if reduction:
        kl = memory.empty(mu.shape, mu.dtype) if by_element else torch.empty(grid.rows, dtype=torch.float64)
    if not grid.total:
        return z, kl if kl is None else kl.zero_()
    kernel = latent.forward(TYPES[mu.dtype], int(log_scale), bool(priors), z is not None, kl is not None, by_element)
    threads.run(
        kernel,
        grid.rows,
        grid.cols * (4 * max(samples, 1) if z is not None else 1),
        grid.cols,
        grid.total,
        *grid.places,
        *(() if priors else NO_PRIOR),
        0 if seed is None else seed.item(),
        max(samples, 1),
        0 if z is None else z.data_ptr(),
        0 if kl is None else kl.data_ptr(),
        free_bits,
    )
    return z, kl


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
    priors = given_priors(prior_mu, prior_logvar)
    z, kl = _latent(mu, scale, seed, priors, log_scale, samples, free_bits, reduction)
    if kl is not None and reduction != "none":
        kl = _finish(kl, reduction, mu)[0]
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
    if grad_kl is None and priors:
        zeros = [torch.zeros(mu.shape, dtype=mu.dtype) for _ in priors]
        return latent_backward(
            grad_z, None, mu, scale, seed, None, None,
            log_scale=log_scale, samples=samples, free_bits=free_bits, reduction=reduction,
        ) + zeros  # fmt: skip
    gradients = [memory.empty(mu.shape, mu.dtype) for _ in range(2 + len(priors))]
    if not mu.numel():
        return gradients
    c, c_stride, by_element = mu, 0, False
    if grad_kl is not None:
        by_row = upstream_by_row(grad_kl, reduction, mu)
        by_element = by_row is None
        c, c_stride = (grad_kl.to(mu.dtype).contiguous(), cols(mu)) if by_row is None else by_row
    grid = Grid([mu, scale, *priors], by_example=c_stride != 0)
    with_z = grad_z is not None and seed is not None
    grad_z = grad_z.contiguous() if grad_z is not None else None
    kernel = latent.backward(TYPES[mu.dtype], int(log_scale), bool(priors), with_z, grad_kl is not None, by_element)
    threads.run(
        kernel,
        grid.rows,
        grid.cols * (4 * max(samples, 1) if with_z else 1),
        grid.cols,
        grid.total,
        0 if grad_z is None else grad_z.data_ptr(),
        c.data_ptr(),
        c_stride,
        reduction_weight(reduction, mu),
        *grid.places,
        *(() if priors else NO_PRIOR),
        0 if seed is None else seed.item(),
        max(samples, 1),
        free_bits,
        *(g.data_ptr() for g in gradients),
        *(() if priors else (0, 0)),
    )
    return gradients


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
    _, sums, gradient = _row_sums(recon, target, likelihood, parameter, reduction, with_gradient)
    _, kl_sums = _latent(mu, scale, None, [], log_scale, 0, free_bits, reduction)
    assert kl_sums is not None
    nll, nll_total = _finish(sums, reduction, recon)
    kl, kl_total = _finish(kl_sums, reduction, mu)
    if reduction == "example":
        return [(nll + beta * kl).to(nll.dtype), nll, kl, *gradient]
    return [torch.tensor(nll_total + beta * kl_total, dtype=nll.dtype), nll, kl, *gradient]
