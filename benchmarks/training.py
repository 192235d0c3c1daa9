"""One optimiser step of the 784–400–20 VAE: the same network and Adam for everybody, only z and the loss differ."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..models import VAE
from . import eager
from .timing import Call
from .works import Work


def eager_loss(model: VAE, x: Tensor) -> Tensor:
    """What people write around this network."""
    mu, logvar, _ = model.encode(x)
    assert logvar is not None
    logits = model.decode(eager.reparameterize(mu, logvar))
    return eager.elbo_loss(logits, x, mu, logvar)


def own_loss(model: VAE, x: Tensor) -> Tensor:
    """The same with this library."""
    return model.loss(x).loss


class _Given(torch.autograd.Function):
    """0, of any tensors; its gradients are random numbers that are there already."""

    kept: dict[torch.Size, Tensor] = {}  # noqa: RUF012

    @staticmethod
    def forward(ctx: Any, *tensors: Tensor) -> Tensor:
        ctx.shapes = [tensor.shape for tensor in tensors]
        for tensor in tensors:
            if tensor.shape not in _Given.kept:
                _Given.kept[tensor.shape] = 1e-3 * torch.randn_like(tensor)
        return tensors[0].new_zeros(())

    @staticmethod
    def backward(ctx: Any, _: Tensor) -> tuple[Tensor, ...]:
        return tuple(_Given.kept[shape] for shape in ctx.shapes)


def no_loss(model: VAE, x: Tensor) -> Tensor:
    """The network alone, its floor: no sample, and the gradients of the loss are given."""
    mu, logvar, _ = model.encode(x)
    assert logvar is not None
    value: Tensor = _Given.apply(model.decode(mu), mu, logvar)
    return value


def step(work: Work, device: str, loss: Callable[[VAE, Tensor], Tensor]) -> Call:
    """A call that trains a model of its own on one batch; under autocast where the work is in half precision."""
    kind = torch.device(device).type
    rows, size = work.shape
    with torch.random.fork_rng([device] if kind == "cuda" else []):
        torch.manual_seed(0)
        model = VAE((size,), latent=work.latent).to(device)
        x = torch.rand(rows, size, device=device)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    half = work.dtype in (torch.bfloat16, torch.float16)

    def call() -> None:
        optimizer.zero_grad()
        with torch.autocast(kind, work.dtype if half else None, enabled=half):
            value = loss(model, x)
        value.backward()
        optimizer.step()

    return call
