"""A likelihood's parameter that is a tensor: how kernels read it, and its gradient from what they leave."""

from __future__ import annotations

import torch
from torch import Tensor

from .layout import accumulator, as_rows

CHUNK = 1 << 15  # numbers torch adds up on one thread


class Parameter:
    """A tensor that broadcasts to ``like``, as kernels read it: by ``"row"``, by ``"column"`` or by ``"element"``.

    By row it is one number per example, or one for all (stride 0). By column it is one row of elements, the same for
    each example. ``value`` is in the dtype of the arithmetic.
    """

    def __init__(self, given: Tensor, like: Tensor):
        shape = (1,) * (like.dim() - given.dim()) + given.shape
        value = given.to(accumulator(like.dtype)).reshape(shape)
        across = shape[0] != 1
        if all(size == 1 for size in shape[1:]):
            self.kind, self.value, self.stride = "row", value.reshape(shape[0]).contiguous(), int(across)
        else:
            self.kind = "element" if across else "column"
            self.value, stride = as_rows(value.expand(like.shape if across else (1, *like.shape[1:])))
            self.stride = stride if across else 0
        self.given, self.shape = given, shape

    def gradient(self, parts: Tensor, data: torch.Size) -> Tensor:
        """The gradient in ``given``, not yet rounded, from what the kernel left: by row and column ``[parts, …]``."""
        if self.kind == "row":
            total = parts if self.stride else ordered_sum(parts)
        elif self.kind == "column":
            total = parts.sum(0).reshape(1, *data[1:]).sum_to_size(self.shape)
        else:
            total = parts if self.shape == data else parts.double().sum_to_size(self.shape)
        return total.reshape(self.given.shape).to(gradient_dtype(self.given, data, self.value.dtype))


def gradient_dtype(parameter: Tensor, data: torch.Size, arithmetic: torch.dtype) -> torch.dtype:
    """Of a gradient before it is rounded to that of ``parameter``: sums stay in float64, whose range they may need."""
    return arithmetic if parameter.shape == data else torch.float64


def by_row(sums: Tensor) -> Tensor:
    """One sum a row, in float64, from the parts of each."""
    return sums if sums.dim() == 1 else sums.sum(1, dtype=torch.float64)


def ordered_sum(values: Tensor) -> Tensor:
    """Σ of a vector, the same bits for any number of threads."""
    return torch.stack([chunk.sum() for chunk in values.split(CHUNK)]).sum() if len(values) > CHUNK else values.sum()
