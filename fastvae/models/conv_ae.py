"""The convolutional autoencoder."""

from __future__ import annotations

from torch import Tensor, nn

from .base import AutoEncoder, Posterior
from .layers import Convolutions, pixels


class ConvAE(Convolutions, AutoEncoder):
    """Images of any size: the convolutions of :class:`~fastvae.models.ConvVAE` around a code.

    >>> import torch
    >>> model = ConvAE((3, 17, 22))
    >>> model.reconstruct(torch.rand(2, 3, 17, 22)).shape
    torch.Size([2, 3, 17, 22])
    """

    title = "Convolutional autoencoder"

    def __init__(
        self,
        data_shape: tuple[int, ...] = (1, 28, 28),
        latent: int = 20,
        hidden: int = 64,
        likelihood: str = "bernoulli_logits",
    ):
        super().__init__(data_shape, latent, hidden, likelihood)
        self.build(data_shape, latent, latent, hidden)
        self.last = (pixels(likelihood) or nn.Identity)()

    def encode(self, x: Tensor, y: Tensor | None = None) -> Posterior:
        """``[B, C, H, W]`` → the code, ``[B, latent]``."""
        return Posterior(self.posterior(self.down(x)))

    def decode(self, z: Tensor, y: Tensor | None = None) -> Tensor:
        """``[B, latent]`` → ``[B, C, H, W]``."""
        return self.last(self.up(z))
