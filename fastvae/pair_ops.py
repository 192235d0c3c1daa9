"""The operators of sums over pairs, each with its fake: rows of the tables of ``ops.py``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .kernels.layout import accumulator
from .registry import backend_for

_POSTERIOR = "Tensor z, Tensor mu, Tensor logvar"
_MIXTURE = "Tensor z, Tensor means, Tensor logvars, Tensor? log_weights"
_SAMPLING, _KERNEL = "float own, float beside", "str family, float[] scales, bool unbiased"

SCHEMAS = {
    "aggregate_posterior_forward": f"({_POSTERIOR}, *, {_SAMPLING}, bool keep) -> Tensor[]",
    "aggregate_posterior_backward": f"(Tensor? grad_qz, Tensor? grad_prod, {_POSTERIOR}, Tensor? log_qz, "
    f"Tensor? log_each, *, {_SAMPLING}) -> Tensor[]",
    "mixture_forward": f"({_MIXTURE}, *, bool keep) -> Tensor[]",
    "mixture_backward": f"(Tensor grad, {_MIXTURE}, Tensor? log_prob) -> Tensor[]",
    "mmd_forward": f"(Tensor x, Tensor y, *, {_KERNEL}) -> Tensor[]",
    "mmd_backward": f"(Tensor grad, Tensor x, Tensor y, *, {_KERNEL}, bool of_y) -> Tensor[]",
}


def _sent(name: str, first: int) -> Callable[..., list[Tensor]]:
    """Primitive ``name`` of the backend that serves the tensor at place ``first``."""

    def send(*tensors: Tensor | None, **options: Any) -> list[Tensor]:
        place = tensors[first]
        assert place is not None
        result: list[Tensor] = getattr(backend_for(place.device.type), name)(*tensors, **options)
        return result

    return send


def _like(tensor: Tensor) -> Tensor:
    return tensor.new_empty(tensor.shape)


def _of_rows(z: Tensor, *shape: int) -> Tensor:
    return z.new_empty(shape, dtype=accumulator(z.dtype))


def _kept(z: Tensor) -> Tensor:
    return z.new_empty((z.shape[0],), dtype=torch.float64)


def _aggregate_fake(z: Tensor, mu: Tensor, logvar: Tensor, *, keep: bool, **_: float) -> list[Tensor]:
    outputs = [_of_rows(z, z.shape[0]) for _ in range(2)]
    return [*outputs, *([_kept(z), _of_rows(z, z.shape[0], z.shape[1])] if keep else [])]


def _aggregate_backward_fake(grad_qz: Any, grad_prod: Any, *tensors: Tensor, **_: float) -> list[Tensor]:
    return [_like(tensor) for tensor in tensors[:3]]


def _mixture_fake(z: Tensor, *_: Any, keep: bool) -> list[Tensor]:
    return [_of_rows(z, z.shape[0]), *([_kept(z)] if keep else [])]


def _mixture_backward_fake(grad: Tensor, *tensors: Tensor) -> list[Tensor]:
    return [_like(tensor) for tensor in tensors[:4] if tensor is not None]


def _mmd_fake(x: Tensor, y: Tensor, *, family: str, scales: Sequence[float], unbiased: bool) -> list[Tensor]:
    return [_of_rows(x)]


def _mmd_backward_fake(grad: Tensor, x: Tensor, y: Tensor, *, of_y: bool, **_: Any) -> list[Tensor]:
    return [_like(tensor) for tensor in (x, y)[: 1 + of_y]]


IMPLEMENTATIONS: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
    "aggregate_posterior_forward": (_sent("aggregate_posterior_forward", 0), _aggregate_fake),
    "aggregate_posterior_backward": (_sent("aggregate_posterior_backward", 2), _aggregate_backward_fake),
    "mixture_forward": (_sent("mixture_forward", 0), _mixture_fake),
    "mixture_backward": (_sent("mixture_backward", 1), _mixture_backward_fake),
    "mmd_forward": (_sent("mmd_forward", 0), _mmd_fake),
    "mmd_backward": (_sent("mmd_backward", 1), _mmd_backward_fake),
}
