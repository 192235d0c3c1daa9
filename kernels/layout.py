"""What every kernel wrapper asks of a tensor's memory: rows of contiguous elements with a stride between them."""

from __future__ import annotations

import torch

TOTAL_REDUCTIONS = ("sum", "mean", "batchmean")
BLOCK = 4096  # elements of a row where tensors are dense and rows do not matter: a multiple of every tile
ALL = 1 << 62  # in its place where one row takes everything


def as_rows(tensor: torch.Tensor) -> tuple[torch.Tensor, int]:
    """``(tensor, row_stride)``: example b starts ``b * row_stride`` elements after the tensor's first one.

    Copies only where the elements of an example are not contiguous and in order. The halves of a ``chunk`` of the
    encoder's output, a slice of the batch and an example expanded to a batch are served in place.
    """
    if tensor.is_contiguous():
        return tensor, cols(tensor)
    dense = 1
    for size, stride in zip(tensor.shape[:0:-1], tensor.stride()[:0:-1], strict=True):
        if stride != dense and size != 1:
            return tensor.contiguous(), cols(tensor)
        dense *= size
    return tensor, tensor.stride(0)


def cols(tensor: torch.Tensor) -> int:
    """Elements of one example: the product of all sizes but the first."""
    return tensor.shape[1:].numel()


def keeps_kl_gradients(recon: torch.Tensor, mu: torch.Tensor, reduction: str) -> bool:
    """Whether a one-pass ELBO may write the gradients of its KL, too: on a GPU the backward has a launch anyway.

    float16: see ``autograd.one_pass``.
    """
    return recon.is_cpu and reduction in TOTAL_REDUCTIONS and mu.dtype != torch.float16


def empty_like(tensor: torch.Tensor, copies: int = 0) -> torch.Tensor:
    """A dense output; with ``copies``, so many of them along a new first dimension."""
    if copies:
        return tensor.new_empty((copies, *tensor.shape))
    if tensor.is_contiguous():  # torch's fastest way
        return torch.empty_like(tensor)
    return torch.empty_like(tensor, memory_format=torch.contiguous_format)


def address(tensor: torch.Tensor | None) -> int:
    """Where its elements are; 0 for none."""
    return 0 if tensor is None else tensor.data_ptr()


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """The dtype arithmetic and reduced losses are in: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def reduction_weight(reduction: str, tensor: torch.Tensor) -> float:
    """What a sum over ``tensor`` is multiplied by; NaN for a mean over nothing, as in torch."""
    count = {"mean": tensor.numel(), "batchmean": tensor.shape[0]}.get(reduction, 1)
    return 1.0 / count if count else float("nan")


def loss_shape(reduction: str, tensor: torch.Tensor) -> torch.Size:
    """Shape of a loss over ``tensor``."""
    if reduction == "none":
        return tensor.shape
    return tensor.shape[:1] if reduction == "example" else torch.Size(())


def loss_dtype(reduction: str, dtype: torch.dtype) -> torch.dtype:
    """Dtype of a loss over inputs of ``dtype``: theirs elementwise, the accumulator's once reduced."""
    return dtype if reduction == "none" else accumulator(dtype)


def upstream_by_row(upstream: torch.Tensor, reduction: str, like: torch.Tensor) -> tuple[torch.Tensor, int] | None:
    """An upstream gradient that is one number for each example, and its stride; None if it differs by element.

    The elementwise loss summed by torch afterwards gets a gradient expanded from one number (an example): stride 0.
    """
    dtype = accumulator(like.dtype)
    if reduction in TOTAL_REDUCTIONS:
        return upstream.to(dtype), 0
    if reduction == "none":
        if any(upstream.stride()[1:]) or upstream.numel() == 0:
            return None
        upstream = upstream.as_strided((like.shape[0],), (upstream.stride(0),))
    upstream = upstream.to(dtype)  # which may lay it out afresh
    return upstream, upstream.stride(0)
