"""Backend ``cpp``: the compiled loops on a CPU, on as many threads as torch uses."""

from __future__ import annotations

import torch
from torch import Tensor

from . import native
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


_primitives = Compiled(native, _queue)

elbo_forward = _primitives.elbo_forward
latent_backward = _primitives.latent_backward
latent_forward = _primitives.latent_forward
reconstruction_backward = _primitives.reconstruction_backward
reconstruction_forward = _primitives.reconstruction_forward
rescale_ = _primitives.rescale_
