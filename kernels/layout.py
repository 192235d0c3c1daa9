"""What every kernel wrapper asks of a tensor's memory: rows of contiguous elements with a stride between them."""

from __future__ import annotations

import torch

TOTAL_REDUCTIONS = ("sum", "mean", "batchmean")


def as_rows(tensor: torch.Tensor) -> tuple[torch.Tensor, int]:
    """``(tensor, row_stride)``: example b starts ``b * row_stride`` elements after the tensor's first one.

    Copies only where the elements of an example are not contiguous and in order. The halves of a ``chunk`` of the
    encoder's output, a slice of the batch and an example expanded to a batch are served in place.
    """
    if not tensor.is_contiguous():
        inner = tensor[0] if tensor.shape[0] else tensor
        if inner.is_contiguous():
            return tensor, tensor.stride(0)
        tensor = tensor.contiguous()
    return tensor, cols(tensor)


def cols(tensor: torch.Tensor) -> int:
    """Elements of one example: the product of all sizes but the first."""
    return tensor.shape[1:].numel()


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
