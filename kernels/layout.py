"""What every kernel wrapper asks of a tensor's memory: rows of contiguous elements with a stride between them."""

from __future__ import annotations

import torch

TOTAL_REDUCTIONS = ("sum", "mean", "batchmean")
BLOCK = 4096  # elements of a row where tensors are dense and rows do not matter: a multiple of every tile


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


class Grid:
    """Rows the loops run over: the examples, or blocks of dense tensors if ``by_example`` is false."""

    def __init__(self, tensors: list[torch.Tensor], by_example: bool, block: int = BLOCK):
        like = tensors[0]
        self.rows, self.total = like.shape[0], like.numel()
        self.cols = self.total // self.rows if self.rows else cols(like)
        self.tensors, self.strides = [], []
        for tensor in tensors:
            placed, stride = (tensor, self.cols) if tensor.is_contiguous() else as_rows(tensor)
            self.tensors.append(placed)  # as_rows may copy: keep the copy while its address is in use
            self.strides.append(stride)
        if not by_example and (self.rows == 1 or self.strides.count(self.cols) == len(tensors)):
            self.cols, self.rows = block, -(-self.total // max(block, 1))
            self.strides = [block] * len(tensors)

    @property
    def places(self) -> list[int]:
        """Address and row stride of each tensor."""
        places: list[int] = []
        for tensor, stride in zip(self.tensors, self.strides, strict=True):
            places += tensor.data_ptr(), stride
        return places


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


def given_priors(prior_mu: torch.Tensor | None, prior_logvar: torch.Tensor | None) -> list[torch.Tensor]:
    """Both, or none."""
    return [] if prior_mu is None or prior_logvar is None else [prior_mu, prior_logvar]
