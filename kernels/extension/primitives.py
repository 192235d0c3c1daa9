"""The six functions of a backend, from tensors to addresses, strides and codes. What they cost, every call costs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..checks import check_unit_range
from ..layout import accumulator, as_rows, given_priors, upstream_by_row
from ..reference.likelihoods import LIKELIHOODS

TYPES = {torch.float64: 0, torch.float32: 1, torch.bfloat16: 2, torch.float16: 3, torch.uint8: 4}  # csrc/types.h
ACCUMULATORS = {dtype: accumulator(dtype) for dtype in TYPES}
REDUCTIONS = {"": -1, "none": 0, "example": 1, "sum": 2, "mean": 3, "batchmean": 4}  # csrc/primitives.h
CODES = {name: code for code, name in enumerate(LIKELIHOODS)}  # csrc/likelihoods.h
NO_TENSOR = (0, 0)


def place(tensor: Tensor, cols: int) -> tuple[Tensor, int]:
    """``layout.as_rows``, at once for a contiguous tensor of ``cols`` elements an example."""
    return (tensor, cols) if tensor.is_contiguous() else as_rows(tensor)


def size(tensor: Tensor) -> tuple[int, int]:
    """Examples, and elements of each."""
    rows = tensor.shape[0]
    return rows, tensor.numel() // rows if rows else 0


class Primitives:
    """The primitives on one kind of device.

    Args:
        native: where the compiled functions are.
        queue: what they take besides, for work on tensors like the given one that leaves so many reduced losses; and
            what must be kept until they return.
        prepare: what is done to a fresh output.
    """

    def __init__(
        self,
        native: Any,
        queue: Callable[[Tensor, int], tuple[tuple[int, ...], Tensor | None]],
        prepare: Callable[[Tensor], Tensor],
    ):
        self.native, self.queue, self.prepare = native, queue, prepare
        self.scalars: dict[tuple[torch.dtype, torch.device], Tensor] = {}

    def empty_like(self, tensor: Tensor) -> Tensor:
        """A dense output."""
        dense = tensor.is_contiguous()
        return self.prepare(torch.empty_like(tensor) if dense else tensor.new_empty(tensor.shape))

    def loss_like(self, tensor: Tensor, reduction: str) -> Tensor:
        """An output for a loss over ``tensor``."""
        if reduction == "none":
            return self.empty_like(tensor)
        dtype = ACCUMULATORS[tensor.dtype]
        if reduction == "example":
            return tensor.new_empty(tensor.shape[:1], dtype=dtype)
        key = dtype, tensor.device
        like = self.scalars.get(key)  # twice as fast as spelling out shape, dtype and device
        if like is None:
            like = self.scalars[key] = tensor.new_empty((), dtype=dtype)
        return torch.empty_like(like)

    def reconstruction_forward(
        self,
        recon: Tensor,
        target: Tensor,
        *,
        likelihood: str,
        parameter: float,
        reduction: str,
        with_gradient: bool,
    ) -> list[Tensor]:
        rows, cols = size(recon)
        nll = self.loss_like(recon, reduction)
        outputs = [nll, self.empty_like(recon)] if with_gradient else [nll]
        y, y_stride = place(recon, cols)
        x, x_stride = place(target, cols)
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
        self, grad_nll: Tensor, recon: Tensor, target: Tensor, *, likelihood: str, parameter: float, reduction: str
    ) -> Tensor:
        rows, cols = size(recon)
        gradient = self.empty_like(recon)
        if not gradient.numel():
            return gradient
        y, y_stride = place(recon, cols)
        x, x_stride = place(target, cols)
        by_row = upstream_by_row(grad_nll, reduction, recon)
        upstream, stride = place(grad_nll.to(recon.dtype), cols) if by_row is None else by_row
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
            by_row is None,
            *queue,
        )
        return gradient

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
        outputs = []
        if seed is not None:
            outputs.append(
                self.prepare(mu.new_empty((samples, *mu.shape))) if samples else self.empty_like(mu)
            )  # fmt: skip
        if reduction:
            outputs.append(self.loss_like(mu, reduction))
        m, m_stride = place(mu, cols)
        s, s_stride = place(scale, cols)
        priors = [place(p, cols) for p in given_priors(prior_mu, prior_logvar)]
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
            *(n for t, stride in priors for n in (t.data_ptr(), stride)),
            *(() if priors else NO_TENSOR * 2),
            0 if seed is None else seed.data_ptr(),
            samples or 1,
            0 if seed is None else outputs[0].data_ptr(),
            REDUCTIONS[reduction],
            outputs[-1].data_ptr() if reduction else 0,
            *queue,
        )
        return outputs

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
        priors = given_priors(prior_mu, prior_logvar)
        gradients = [self.empty_like(t) for t in (mu, scale)]
        if grad_kl is None:
            gradients += [torch.zeros_like(p, memory_format=torch.contiguous_format) for p in priors]
            priors = []
        else:
            gradients += [self.empty_like(p) for p in priors]
        if not mu.numel():
            return gradients
        upstream, stride, by_element = None, 0, False
        if grad_kl is not None:
            by_row = upstream_by_row(grad_kl, reduction, mu)
            by_element = by_row is None
            upstream, stride = place(grad_kl.to(mu.dtype), cols) if by_row is None else by_row
        grad_z = grad_z.contiguous() if grad_z is not None and seed is not None else None
        m, m_stride = place(mu, cols)
        s, s_stride = place(scale, cols)
        placed = [place(p, cols) for p in priors]
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
            *(n for t, stride in placed for n in (t.data_ptr(), stride)),
            *(() if placed else NO_TENSOR * 2),
            0 if seed is None else seed.data_ptr(),
            samples or 1,
            0 if grad_z is None else grad_z.data_ptr(),
            REDUCTIONS[reduction],
            0 if upstream is None else upstream.data_ptr(),
            stride,
            by_element,
            *(g.data_ptr() for g in gradients[: 2 + len(placed)]),
            *(() if placed else NO_TENSOR),
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
        losses = [self.loss_like(recon, reduction), self.loss_like(recon, reduction), self.loss_like(mu, reduction)]
        gradient = [self.empty_like(recon)] if with_gradient else []
        y, y_stride = place(recon, cols)
        x, x_stride = place(target, cols)
        m, m_stride = place(mu, latent_cols)
        s, s_stride = place(scale, latent_cols)
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
            gradient[0].data_ptr() if with_gradient else 0,
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
            TYPES[losses[0].dtype],
            *(loss.data_ptr() for loss in losses),
            *queue,
        )
        if outside:
            check_unit_range(likelihood, recon, target)
        return losses + gradient
