"""An autoencoder whose code is made to change little with its input (Rifai et al. 2011)."""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

import torch
from torch import Tensor, nn

from .ae import AE
from .base import AutoEncoder, Output
from .layers import mlp, pixels


def sigmoid_jacobian_norm(layer: nn.Linear, z: Tensor) -> Tensor:
    """‖∂z/∂x‖² of z = sigmoid(Wx + b), which is Σⱼ (zⱼ(1 − zⱼ))² Σᵢ Wⱼᵢ² (ibid.): ``[B, latent]`` → ``[B]``."""
    return (z * (1 - z)) ** 2 @ (layer.weight**2).sum(1)


def jacobian_norm(encoder: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """‖∂z/∂x‖², the squared Frobenius norm, of any encoder that treats each example alone: ``[B, …]`` → ``[B]``."""
    return (jacobian(encoder, x) ** 2).flatten(1).sum(1)


def jacobian(encoder: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """∂z/∂x of each example, ``[B, latent, …]``."""
    return torch.func.vmap(torch.func.jacrev(lambda one: encoder(one[None])[0]))(x)


class ContractiveAE(AE):
    """Reconstruction + contraction · ‖∂z/∂x‖²: one sigmoid layer each way, or two where ``hidden`` is given.

    Args:
        data_shape: shape of one image.
        latent: elements of z.
        hidden: width of a layer between. The norm then comes from ``torch.func``, and costs ``latent`` backwards.
        likelihood: what the decoder's output is.
        contraction: weight of the squared norm; 0 is the plain autoencoder.

    >>> model = ContractiveAE((8, 8), latent=16)
    >>> loss, reconstruction, penalty = model.loss(torch.rand(2, 8, 8))
    """

    title = "Contractive autoencoder"
    preset: ClassVar = {"epochs": 20}

    def __init__(
        self,
        data_shape: tuple[int, ...] = (1, 28, 28),
        latent: int = 120,
        hidden: int | None = None,
        likelihood: str = "bernoulli_logits",
        contraction: float = 1.0,
    ):
        AutoEncoder.__init__(self, data_shape, latent, hidden, likelihood)
        if not 0 <= contraction < float("inf"):
            raise ValueError(f"contraction must be a number >= 0, got {contraction}")
        self.contraction = contraction
        self.config["contraction"] = contraction
        between = () if hidden is None else (hidden,)
        self.encoder = mlp(self.data_size, *between, latent, activation=nn.Sigmoid, last=nn.Sigmoid)
        self.decoder = mlp(latent, *between, self.data_size, activation=nn.Sigmoid, last=pixels(likelihood))

    def jacobian_norm(self, x: Tensor, z: Tensor) -> Tensor:
        """‖∂z/∂x‖² of each example."""
        layer = self.encoder[0]
        if len(self.encoder) == 2 and isinstance(layer, nn.Linear):
            return sigmoid_jacobian_norm(layer, z)
        return jacobian_norm(self.encoder, x.flatten(1))

    def penalty(self, x: Tensor, out: Output) -> Tensor:
        """Contraction · ‖∂z/∂x‖², the mean over the examples."""
        return self.contraction * self.jacobian_norm(x, out.z).mean()
