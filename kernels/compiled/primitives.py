"""What both compiled backends fill, from a :class:`Work` to addresses, strides and codes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..layout import address
from ..likelihoods import bound
from ..work import Latent, Primitives, Reconstruction, WithTensor
from . import native

TYPES = {torch.float64: 0, torch.float32: 1, torch.bfloat16: 2, torch.float16: 3, torch.uint8: 4}  # csrc/types.h
REDUCTIONS = {"": -1, "none": 0, "example": 1, "sum": 2, "mean": 3, "batchmean": 4}  # csrc/primitives.h
CODES = bound("cpp", native.likelihood_names(), native.likelihood_names(with_tensor=True))


class Compiled(Primitives):
    """The primitives on one kind of device.

    Args:
        native: where the compiled functions are.
        queue: what they take besides, for work on tensors like the given one that leaves so many reduced losses; and
            what must be kept until they return.
    """

    block = 0  # csrc/primitives.h merges rows

    def __init__(self, native: Any, queue: Callable[[Tensor, int], tuple[tuple[int, ...], Tensor | None]]):
        super().__init__()
        self.native, self.queue = native, queue

    def fill_reconstruction(self, work: Reconstruction, loss: Tensor) -> int:
        recon, target = work.tensors
        queue, _held = self.queue(recon, work.reduction != "none")
        outside: int = self.native.reconstruction_forward(
            CODES[work.likelihood], work.parameter, TYPES[recon.dtype], TYPES[target.dtype], work.rows, work.cols,
            *work.places, address(work.grad), REDUCTIONS[work.reduction], loss.data_ptr(), *queue,
        )  # fmt: skip
        return outside

    def fill_reconstruction_gradient(self, work: Reconstruction) -> None:
        recon, target = work.tensors
        self.native.reconstruction_backward(
            CODES[work.likelihood], work.parameter, TYPES[recon.dtype], TYPES[target.dtype], work.rows, work.cols,
            *work.places, address(work.grad), REDUCTIONS[work.reduction], address(work.upstream),
            work.upstream_stride, work.by_element, *self.queue(recon, 0)[0],
        )  # fmt: skip

    def fill_with_tensor(self, work: WithTensor) -> int:
        """On a GPU it returns how many sums it leaves for each row."""
        recon, target = work.tensors[:2]
        softmax = self.for_softmax(work)
        result: int = self.native.with_tensor(
            CODES[work.likelihood], TYPES[recon.dtype], TYPES[target.dtype], work.rows, work.cols, work.total,
            *work.places[:4], work.tensor.kind == "row", work.piece, work.tensor.value.data_ptr(),
            work.tensor.stride, address(work.zero_logits), work.zero_logits_stride, address(work.upstream),
            work.upstream_stride, work.by_element, work.weight, *map(address, work.buffers),
            address(softmax), *self.queue(recon, 0)[0],
        )  # fmt: skip
        return result

    def for_softmax(self, work: WithTensor) -> Tensor | None:
        """Where a device keeps two numbers per row of scores."""
        return None

    def rescale_(self, gradient: Tensor, upstream: Tensor) -> Tensor:
        if upstream.dtype not in (torch.float32, torch.float64):
            upstream = upstream.float()
        self.native.rescale(
            TYPES[gradient.dtype], gradient.numel(), gradient.data_ptr(), upstream.data_ptr(), TYPES[upstream.dtype],
            *self.queue(gradient, 0)[0],
        )  # fmt: skip
        return gradient

    def fill_latent(self, work: Latent, z: Tensor | None, kl: Tensor | None) -> None:
        queue, _held = self.queue(work.like, kl is not None and work.reduction != "none")
        self.native.latent_forward(
            TYPES[work.like.dtype], work.log_scale, work.low, work.high, work.free_bits, work.rows, work.cols,
            *work.places, address(work.seed), work.samples, address(z), REDUCTIONS[work.reduction], address(kl), *queue,
        )  # fmt: skip

    def fill_latent_gradients(self, work: Latent, grad_z: Tensor | None, gradients: list[Tensor]) -> None:
        of_prior = (gradients[2].data_ptr(), gradients[3].data_ptr()) if len(gradients) > 2 else (0, 0)
        self.native.latent_backward(
            TYPES[gradients[0].dtype], work.log_scale, work.low, work.high, work.free_bits, work.rows, work.cols,
            *work.places, 0 if work.seed is None else work.seed.data_ptr(), work.samples,
            0 if grad_z is None else grad_z.data_ptr(), REDUCTIONS[work.reduction],
            0 if work.upstream is None else work.upstream.data_ptr(), work.upstream_stride, work.by_element,
            gradients[0].data_ptr(), gradients[1].data_ptr(), *of_prior, *self.queue(gradients[0], 0)[0],
        )  # fmt: skip

    def fill_elbo_gradients(
        self, work: Latent, gradient: Tensor, upstream: Tensor, beta: float, gradients: list[Tensor]
    ) -> None:
        assert work.upstream is not None
        self.native.elbo_backward(
            TYPES[gradient.dtype], gradient.numel(), gradient.data_ptr(), upstream.data_ptr(), TYPES[upstream.dtype],
            TYPES[gradients[0].dtype], work.log_scale, work.low, work.high, work.free_bits, work.rows, work.cols,
            *work.places[:4], beta, REDUCTIONS[work.reduction], work.upstream.data_ptr(), gradients[0].data_ptr(),
            gradients[1].data_ptr(), *self.queue(gradient, 0)[0],
        )  # fmt: skip

    def fill_elbo(self, data: Reconstruction, latent: Latent, beta: float, losses: list[Tensor]) -> int:
        recon, target = data.tensors
        loss, nll, kl = losses
        queue, _held = self.queue(recon, 2)
        outside: int = self.native.elbo_forward(
            CODES[data.likelihood], data.parameter, TYPES[recon.dtype], TYPES[target.dtype], data.rows, data.cols,
            *data.places, 0 if data.grad is None else data.grad.data_ptr(),
            TYPES[latent.tensors[0].dtype], latent.log_scale, latent.low, latent.high, latent.free_bits, latent.cols,
            *latent.places, beta, REDUCTIONS[data.reduction], TYPES[loss.dtype], loss.data_ptr(), nll.data_ptr(),
            kl.data_ptr(), *(map(Tensor.data_ptr, latent.gradients) if latent.gradients else (0, 0)), *queue,
        )  # fmt: skip
        return outside
