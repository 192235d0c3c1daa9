"""The six functions of a backend, from tensors to addresses, strides and codes. What they cost, every call costs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .. import parameters
from ..checks import check_unit_range
from ..layout import TOTAL_REDUCTIONS, accumulator, as_rows, upstream_by_row
from ..likelihoods import bound
from . import native

TYPES = {torch.float64: 0, torch.float32: 1, torch.bfloat16: 2, torch.float16: 3, torch.uint8: 4}  # csrc/types.h
ACCUMULATORS = {dtype: accumulator(dtype) for dtype in TYPES}
REDUCTIONS = {"": -1, "none": 0, "example": 1, "sum": 2, "mean": 3, "batchmean": 4}  # csrc/primitives.h
CODES = bound("cpp", native.likelihood_names(), native.likelihood_names(with_tensor=True))
TOTALS = frozenset(TOTAL_REDUCTIONS)
NO_PRIOR = (0, 0, 0, 0)


def place(tensor: Tensor, cols: int) -> tuple[Tensor, int]:
    """``layout.as_rows``, at once for a contiguous tensor of ``cols`` elements an example."""
    return (tensor, cols) if tensor.is_contiguous() else as_rows(tensor)


def empty_like(tensor: Tensor) -> Tensor:
    """A dense output; torch has no faster way to one."""
    return torch.empty_like(tensor, memory_format=torch.contiguous_format)


def size(tensor: Tensor) -> tuple[int, int]:
    """Examples, and elements of each."""
    rows = tensor.shape[0]
    return rows, tensor.numel() // rows if rows else 0


def place_upstream(upstream: Tensor, reduction: str, like: Tensor, cols: int) -> tuple[Tensor, int, bool]:
    """An upstream gradient, its stride, and whether it differs by element: ``layout.upstream_by_row``, if need be."""
    if reduction in TOTALS and upstream.dtype == ACCUMULATORS[like.dtype]:
        return upstream, 0, False
    by_row = upstream_by_row(upstream, reduction, like)
    if by_row is None:
        return *place(upstream.to(like.dtype), cols), True
    return *by_row, False


def place_prior(
    prior_mu: Tensor | None, prior_logvar: Tensor | None, cols: int
) -> tuple[tuple[int, ...], list[Tensor]]:
    """Addresses and strides, and the tensors that must be kept while those are in use."""
    if prior_mu is None or prior_logvar is None:
        return NO_PRIOR, []
    m, m_stride = place(prior_mu, cols)
    s, s_stride = place(prior_logvar, cols)
    return (m.data_ptr(), m_stride, s.data_ptr(), s_stride), [m, s]


class Primitives:
    """The primitives on one kind of device.

    Args:
        native: where the compiled functions are.
        queue: what they take besides, for work on tensors like the given one that leaves so many reduced losses; and
            what must be kept until they return.
    """

    on_host = True

    def __init__(
        self,
        native: Any,
        queue: Callable[[Tensor, int], tuple[tuple[int, ...], Tensor | None]],
    ):
        self.native, self.queue = native, queue
        self.scalars: dict[torch.dtype, Tensor] = {}

    def loss_like(self, tensor: Tensor, reduction: str) -> Tensor:
        """An output for a loss over ``tensor``."""
        if reduction == "none":
            return empty_like(tensor)
        dtype = ACCUMULATORS[tensor.dtype]
        if reduction == "example":
            return tensor.new_empty(tensor.shape[:1], dtype=dtype)
        if not tensor.is_cpu:  # a CUDA graph being captured would own a tensor kept for later
            return tensor.new_empty((), dtype=dtype)
        like = self.scalars.get(dtype)  # twice as fast as spelling out shape, dtype and device
        if like is None:
            like = self.scalars[dtype] = tensor.new_empty((), dtype=dtype)
        return torch.empty_like(like)

    def fill(self, work: parameters.Work) -> int:
        """A term whose parameter is a tensor; returns how many sums it leaves for each row."""
        outputs = (work.nll, work.sums, work.grad, work.grad_parameter, work.parameter_sums, work.columns)
        parts: int = self.native.with_tensor(
            CODES[work.likelihood],
            TYPES[work.recon.dtype],
            TYPES[work.target_rows.dtype],
            work.grid.rows,
            work.grid.cols,
            work.grid.total,
            work.recon_rows.data_ptr(),
            work.recon_stride,
            work.target_rows.data_ptr(),
            work.target_stride,
            work.parameter.kind == "row",
            work.piece,
            work.parameter.value.data_ptr(),
            work.parameter.stride,
            0 if work.upstream is None else work.upstream.data_ptr(),
            work.upstream_stride,
            work.upstream_by_element,
            work.weight,
            *(0 if output is None else output.data_ptr() for output in outputs),
            *self.queue(work.recon, 0)[0],
        )
        return parts

    def reconstruction_forward(
        self,
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
                self.fill, recon, target, parameter_tensor,
                likelihood=likelihood, reduction=reduction, with_gradient=with_gradient, on_host=self.on_host,
            )  # fmt: skip
        rows, cols = size(recon)
        nll = self.loss_like(recon, reduction)
        outputs = [nll, empty_like(recon)] if with_gradient else [nll]
        y, y_stride = (recon, cols) if recon.is_contiguous() else as_rows(recon)
        x, x_stride = (target, cols) if target.is_contiguous() else as_rows(target)
        queue, _held = self.queue(recon, reduction != "none")
        outside = self.native.reconstruction_forward(
            CODES[likelihood],
            parameter,
            TYPES[y.dtype],
            TYPES[x.dtype],
            rows,
            cols,
            y.data_ptr(),
            y_stride,
            x.data_ptr(),
            x_stride,
            outputs[1].data_ptr() if with_gradient else 0,
            REDUCTIONS[reduction],
            nll.data_ptr(),
            *queue,
        )
        if outside:
            check_unit_range(likelihood, recon, target)
        return outputs

    def reconstruction_backward(
        self,
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
                self.fill, grad_nll, recon, target, parameter_tensor,
                likelihood=likelihood, reduction=reduction, on_host=self.on_host,
            )  # fmt: skip
        rows, cols = size(recon)
        gradient = empty_like(recon)
        if not rows * cols:
            return [gradient]
        y, y_stride = (recon, cols) if recon.is_contiguous() else as_rows(recon)
        x, x_stride = (target, cols) if target.is_contiguous() else as_rows(target)
        upstream, stride, by_element = place_upstream(grad_nll, reduction, recon, cols)
        queue, _held = self.queue(recon, 0)
        self.native.reconstruction_backward(
            CODES[likelihood],
            parameter,
            TYPES[y.dtype],
            TYPES[x.dtype],
            rows,
            cols,
            y.data_ptr(),
            y_stride,
            x.data_ptr(),
            x_stride,
            gradient.data_ptr(),
            REDUCTIONS[reduction],
            upstream.data_ptr(),
            stride,
            by_element,
            *queue,
        )
        return [gradient]

    def rescale_(self, gradient: Tensor, upstream: Tensor) -> Tensor:
        if upstream.dtype not in (torch.float32, torch.float64):
            upstream = upstream.float()
        queue, _held = self.queue(gradient, 0)
        self.native.rescale(
            TYPES[gradient.dtype],
            gradient.numel(),
            gradient.data_ptr(),
            upstream.data_ptr(),
            TYPES[upstream.dtype],
            *queue,
        )
        return gradient

    def latent_forward(
        self,
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
        rows, cols = size(mu)
        z = kl = None
        if seed is not None:
            z = mu.new_empty((samples, *mu.shape)) if samples else empty_like(mu)
        if reduction:
            kl = self.loss_like(mu, reduction)
        m, m_stride = (mu, cols) if mu.is_contiguous() else as_rows(mu)
        s, s_stride = (scale, cols) if scale.is_contiguous() else as_rows(scale)
        prior, _kept = place_prior(prior_mu, prior_logvar, cols)
        queue, _held = self.queue(mu, reduction not in ("", "none"))
        self.native.latent_forward(
            TYPES[m.dtype],
            log_scale,
            free_bits,
            rows,
            cols,
            m.data_ptr(),
            m_stride,
            s.data_ptr(),
            s_stride,
            *prior,
            0 if seed is None else seed.data_ptr(),
            samples or 1,
            0 if z is None else z.data_ptr(),
            REDUCTIONS[reduction],
            0 if kl is None else kl.data_ptr(),
            *queue,
        )
        return [t for t in (z, kl) if t is not None]

    def latent_backward(
        self,
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
        rows, cols = size(mu)
        grad_mu, grad_scale = empty_like(mu), empty_like(scale)
        gradients = [grad_mu, grad_scale]
        grad_priors = 0, 0
        if prior_mu is not None and prior_logvar is not None:
            if grad_kl is None:  # z does not depend on the prior
                priors = prior_mu, prior_logvar
                gradients += [torch.zeros_like(p, memory_format=torch.contiguous_format) for p in priors]
                prior_mu = prior_logvar = None
            else:
                gradients += [empty_like(prior_mu), empty_like(prior_logvar)]
                grad_priors = gradients[2].data_ptr(), gradients[3].data_ptr()
        if not rows * cols:
            return gradients
        upstream, stride, by_element = None, 0, False
        if grad_kl is not None:
            upstream, stride, by_element = place_upstream(grad_kl, reduction, mu, cols)
        grad_z = grad_z.contiguous() if grad_z is not None and seed is not None else None
        m, m_stride = (mu, cols) if mu.is_contiguous() else as_rows(mu)
        s, s_stride = (scale, cols) if scale.is_contiguous() else as_rows(scale)
        prior, _kept = place_prior(prior_mu, prior_logvar, cols)
        queue, _held = self.queue(mu, 0)
        self.native.latent_backward(
            TYPES[m.dtype],
            log_scale,
            free_bits,
            rows,
            cols,
            m.data_ptr(),
            m_stride,
            s.data_ptr(),
            s_stride,
            *prior,
            0 if seed is None else seed.data_ptr(),
            samples or 1,
            0 if grad_z is None else grad_z.data_ptr(),
            REDUCTIONS[reduction],
            0 if upstream is None else upstream.data_ptr(),
            stride,
            by_element,
            grad_mu.data_ptr(),
            grad_scale.data_ptr(),
            *grad_priors,
            *queue,
        )
        return gradients

    def elbo_forward(
        self,
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
        rows, cols = size(recon)
        latent_cols = size(mu)[1]
        loss = self.loss_like(recon, reduction)
        nll = torch.empty_like(loss)
        kl = torch.empty_like(loss) if mu.dtype == recon.dtype else self.loss_like(mu, reduction)
        outputs = [loss, nll, kl, empty_like(recon)] if with_gradient else [loss, nll, kl]
        y, y_stride = (recon, cols) if recon.is_contiguous() else as_rows(recon)
        x, x_stride = (target, cols) if target.is_contiguous() else as_rows(target)
        m, m_stride = (mu, latent_cols) if mu.is_contiguous() else as_rows(mu)
        s, s_stride = (scale, latent_cols) if scale.is_contiguous() else as_rows(scale)
        queue, _held = self.queue(recon, 2)
        outside = self.native.elbo_forward(
            CODES[likelihood],
            parameter,
            TYPES[y.dtype],
            TYPES[x.dtype],
            rows,
            cols,
            y.data_ptr(),
            y_stride,
            x.data_ptr(),
            x_stride,
            outputs[3].data_ptr() if with_gradient else 0,
            TYPES[m.dtype],
            log_scale,
            free_bits,
            latent_cols,
            m.data_ptr(),
            m_stride,
            s.data_ptr(),
            s_stride,
            beta,
            REDUCTIONS[reduction],
            TYPES[loss.dtype],
            loss.data_ptr(),
            nll.data_ptr(),
            kl.data_ptr(),
            *queue,
        )
        if outside:
            check_unit_range(likelihood, recon, target)
        return outputs
