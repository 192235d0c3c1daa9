"""Backend ``cpp``: the compiled loops on a CPU, on as many threads as torch uses."""

from __future__ import annotations

import torch
from torch import Tensor

from ..rows import RowTerms
from ..work import Work
from . import native, rows
from .pairs import (  # noqa: F401
    aggregate_posterior_backward,
    aggregate_posterior_forward,
    mixture_backward,
    mixture_forward,
    mmd_backward,
    mmd_forward,
)
from .primitives import Compiled


def _queue(_: Tensor, losses: int) -> tuple[tuple[int], None]:
    return (torch.get_num_threads(),), None


class Host(RowTerms, Compiled):
    """With kernels for the terms of rows."""

    keeps_kl_gradients = True
    row_kernels = rows.KERNELS
    logistic_kernel = True

    def sum_rows(self, values: Tensor, count: int) -> Tensor:
        return rows.sum_rows(values, count)

    def fill_logistic(self, work: Work, nll: Tensor | None, sums: Tensor | None, gradients: list[Tensor]) -> int:
        return rows.logistic(work, nll, sums, gradients)


_primitives = Host(native, _queue)

KERNELS = native.kernels  # for csrc/autograd
elbo_backward = _primitives.elbo_backward
elbo_forward = _primitives.elbo_forward
latent_backward = _primitives.latent_backward
latent_forward = _primitives.latent_forward
reconstruction_backward = _primitives.reconstruction_backward
reconstruction_forward = _primitives.reconstruction_forward
rescale_ = _primitives.rescale_
rows_backward = _primitives.rows_backward
rows_forward = _primitives.rows_forward
