"""Backend ``numba``: CPU kernels compiled on first use for the dtypes that come, and kept on disk.

Zero-copy: kernels get the addresses of torch's own memory. This file chooses the kernel and hands it a ``Work``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..layout import BLOCK, address
from ..reference import (  # noqa: F401  (no kernels of its own: sums over pairs, some rows at a time)
    aggregate_posterior_backward,
    aggregate_posterior_forward,
    mixture_backward,
    mixture_forward,
    mmd_backward,
    mmd_forward,
)
from ..reference.rows import rows_backward, rows_forward
from ..work import NO_PRIOR, Latent, Primitives, Reconstruction, WithTensor, Work
from . import latent as latents
from . import memory, threads
from . import reconstruction as reconstructions
from .intrinsics import BFLOAT16, FLOAT16, FLOAT32, FLOAT64, UINT8
from .likelihoods import IDS

TYPES = {
    torch.float64: FLOAT64,
    torch.float32: FLOAT32,
    torch.bfloat16: BFLOAT16,
    torch.float16: FLOAT16,
    torch.uint8: UINT8,
}

NO_BOUNDS = (float("-inf"), float("inf"))


def _finish(sums: Tensor, work: Work, loss: Tensor) -> None:
    """Row sums to the loss."""
    write = reconstructions.finish(TYPES[loss.dtype])
    write(sums.shape[0], sums.data_ptr(), work.reduction == "example", work.weight, loss.data_ptr())


class Numba(Primitives):
    """Row sums come in float64, and are added up in pairs."""

    empty_like = staticmethod(memory.empty_like)

    def _nll_sums(self, work: Reconstruction) -> tuple[Tensor, int]:
        """Σ nll of each row, and whether a value left [0, 1]."""
        recon, target = work.tensors
        types = IDS[work.likelihood], TYPES[recon.dtype], TYPES[target.dtype]
        sums = torch.empty(work.rows, dtype=torch.float64, device="cpu")
        flags = threads.run(
            reconstructions.forward_rows(*types, work.grad is not None), work.rows, work.cols, work.cols, work.total,
            *work.places, 0 if work.grad is None else work.grad.data_ptr(), sums.data_ptr(), work.parameter,
            work.weight,
        )  # fmt: skip
        return sums, flags

    def fill_reconstruction(self, work: Reconstruction, loss: Tensor) -> int:
        if work.reduction != "none":
            sums, flags = self._nll_sums(work)
            _finish(sums, work, loss)
            return flags
        recon, target = work.tensors
        kernel = reconstructions.forward_elements(IDS[work.likelihood], TYPES[recon.dtype], TYPES[target.dtype])
        args = (work.cols, work.total, *work.places, loss.data_ptr(), work.parameter)
        return threads.run(kernel, work.rows, work.cols, *args)

    def fill_reconstruction_gradient(self, work: Reconstruction) -> None:
        recon, target = work.tensors
        kernel = reconstructions.backward_elements if work.by_element else reconstructions.backward_rows
        weight = () if work.by_element else (work.weight,)
        threads.run(
            kernel(IDS[work.likelihood], TYPES[recon.dtype], TYPES[target.dtype]), work.rows, work.cols, work.cols,
            work.total, address(work.upstream), work.upstream_stride, *work.places, address(work.grad),
            work.parameter, *weight,
        )  # fmt: skip

    def fill_with_tensor(self, work: WithTensor) -> int:
        recon, target = work.tensors[:2]
        types = IDS[work.likelihood], TYPES[recon.dtype], TYPES[target.dtype]
        return threads.run(
            reconstructions.with_tensor(
                *types, work.tensor.kind == "row", work.by_element, work.zero_logits is not None,
                work.library is not None,
            ),
            work.pieces, work.piece * work.cols, work.piece, work.rows, work.cols, work.total, *work.places[:4],
            work.tensor.value.data_ptr(), work.tensor.stride, address(work.zero_logits), work.zero_logits_stride,
            address(work.upstream), work.upstream_stride, work.weight, *map(address, work.buffers),
        )  # fmt: skip

    def rescale_(self, gradient: Tensor, upstream: Tensor) -> Tensor:
        factor = upstream.item()
        if factor != 1.0 and gradient.numel():
            rows = -(-gradient.numel() // BLOCK)
            kernel = reconstructions.rescale(TYPES[gradient.dtype])
            threads.run(kernel, rows, BLOCK, BLOCK, gradient.numel(), gradient.data_ptr(), factor)
        return gradient

    def _latent(self, work: Latent, z: Tensor | None, kl: Tensor | None) -> None:
        """``kl`` is elementwise, or takes a sum a row."""
        kind = latents.kind(work.log_scale, work.low, work.high)
        switches = work.clamp, work.prior, z is not None, kl is not None, work.reduction == "none"
        threads.run(
            latents.forward(TYPES[work.tensors[0].dtype], kind, *switches), work.rows,
            work.cols * (1 if z is None else 4 * work.samples), work.cols, work.total, *work.places,
            0 if work.seed is None else work.seed.item(), work.samples, address(z), address(kl), work.free_bits,
            work.low, work.high,
        )  # fmt: skip

    def fill_latent(self, work: Latent, z: Tensor | None, kl: Tensor | None) -> None:
        if kl is None or work.reduction == "none":
            return self._latent(work, z, kl)
        sums = torch.empty(work.rows, dtype=torch.float64, device="cpu")
        self._latent(work, z, sums)
        _finish(sums, work, kl)

    def fill_latent_gradients(self, work: Latent, grad_z: Tensor | None, gradients: list[Tensor]) -> None:
        kind = latents.kind(work.log_scale, work.low, work.high)
        switches = work.clamp, work.prior, grad_z is not None, work.upstream is not None, work.by_element
        threads.run(
            latents.backward(TYPES[gradients[0].dtype], kind, *switches), work.rows,
            work.cols * (1 if grad_z is None else 4 * work.samples), work.cols, work.total, address(grad_z),
            address(work.upstream), work.upstream_stride, work.weight, *work.places,
            0 if work.seed is None else work.seed.item(), work.samples, work.free_bits,
            work.low, work.high,
            *map(Tensor.data_ptr, gradients), *(() if work.prior else (0, 0)),
        )  # fmt: skip

    def fill_elbo(self, data: Reconstruction, latent: Latent, beta: float, losses: list[Tensor]) -> int:
        loss, nll, kl = losses
        sums = torch.empty(data.rows + latent.rows, dtype=torch.float64, device="cpu")
        nll_sums = sums.data_ptr()
        kl_sums = nll_sums + 8 * data.rows
        recon, target = data.tensors
        grad, free_bits, low, high = data.grad, latent.free_bits, latent.low, latent.high
        types = TYPES[recon.dtype], TYPES[target.dtype]
        flags = threads.run(
            reconstructions.forward_rows(IDS[data.likelihood], *types, grad is not None),
            data.rows, data.cols, data.cols, data.total, *data.places, 0 if grad is None else grad.data_ptr(),
            nll_sums, data.parameter, data.weight,
        )  # fmt: skip
        kind = latents.kind(latent.log_scale, low, high)
        threads.run(
            latents.forward(
                TYPES[latent.tensors[0].dtype], kind, (low, high) != NO_BOUNDS, False, False, True, False,
            ),
            latent.rows, latent.cols, latent.cols, latent.total, *latent.places, *NO_PRIOR, 0, 1, 0, kl_sums,
            free_bits, low, high,
        )  # fmt: skip
        reconstructions.finish_elbo(TYPES[loss.dtype], TYPES[kl.dtype])(
            data.rows, nll_sums, data.weight, latent.rows, kl_sums, latent.weight, beta, data.reduction == "example",
            loss.data_ptr(), nll.data_ptr(), kl.data_ptr(),
        )  # fmt: skip
        return flags


_primitives = Numba()

elbo_backward = _primitives.elbo_backward
elbo_forward = _primitives.elbo_forward
latent_backward = _primitives.latent_backward
latent_forward = _primitives.latent_forward
reconstruction_backward = _primitives.reconstruction_backward
reconstruction_forward = _primitives.reconstruction_forward
rescale_ = _primitives.rescale_

__all__ = ["elbo_forward", "latent_backward", "latent_forward", "reconstruction_backward", "reconstruction_forward"]
__all__ += ["rescale_", "rows_backward", "rows_forward"]  # the last two are the reference's compositions
