"""Autoencoders of plain layers: linear, basic, denoising."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor, nn

from .base import AutoEncoder, Posterior
from .layers import mlp, pixels


class LinearAE(AutoEncoder):
    """784–20–784 without an activation, squared error: it finds the subspace of the first 20 principal components.

    Source: Baldi & Hornik 1989. The code is a linear map of PCA's, not PCA's own: its elements are neither orthogonal
    nor sorted.

    >>> import torch
    >>> LinearAE().reconstruct(torch.rand(2, 1, 28, 28)).shape
    torch.Size([2, 1, 28, 28])
    """

    title = "Linear autoencoder"
    preset: ClassVar = {"epochs": 100, "learning_rate": 5e-3, "batch_size": 250}

    def __init__(self, data_shape: tuple[int, ...] = (1, 28, 28), latent: int = 20, likelihood: str = "mse"):
        super().__init__(data_shape, latent, None, likelihood)
        self.encoder, self.decoder = nn.Linear(self.data_size, latent), nn.Linear(latent, self.data_size)

    def encode(self, x: Tensor, y: Tensor | None = None) -> Posterior:
        """``[B, *data_shape]`` → the code, ``[B, latent]``."""
        return Posterior(self.encoder(x.flatten(1)))

    def decode(self, z: Tensor, y: Tensor | None = None) -> Tensor:
        """``[B, latent]`` → ``[B, data_size]``."""
        return self.decoder(z)


class AE(AutoEncoder):
    """784–128–3–128–784 with sigmoids everywhere, scored by the clipped cross-entropy.

    ``encoder`` and ``decoder`` are models of their own, of flat images:

    >>> import torch
    >>> model = AE()
    >>> model.decoder(model.encoder(torch.rand(2, 784))).shape
    torch.Size([2, 784])
    """

    preset: ClassVar = {"epochs": 5, "batch_size": 32}
    activation: type[nn.Module] = nn.Sigmoid

    def __init__(
        self,
        data_shape: tuple[int, ...] = (1, 28, 28),
        latent: int = 3,
        hidden: int = 128,
        likelihood: str = "bernoulli_probs",
    ):
        super().__init__(data_shape, latent, hidden, likelihood)
        self.encoder = mlp(self.data_size, hidden, latent, activation=self.activation, last=self.activation)
        self.decoder = mlp(latent, hidden, self.data_size, activation=self.activation, last=pixels(likelihood))

    def encode(self, x: Tensor, y: Tensor | None = None) -> Posterior:
        """``[B, *data_shape]`` → the code, ``[B, latent]``."""
        return Posterior(self.encoder(x.flatten(1)))

    def decode(self, z: Tensor, y: Tensor | None = None) -> Tensor:
        """``[B, latent]`` → ``[B, data_size]``."""
        return self.decoder(z)


class DenoisingAE(AE):
    """A corrupted image in, the clean one out (Vincent et al. 2008): a code that only copies would not do.

    What corrupts the input is an option of the training: ``--corruption`` and ``--denoise``.

    >>> import torch
    >>> clean = torch.rand(2, 784)
    >>> loss = DenoisingAE().loss(clean + 0.3 * torch.randn(2, 784), target=clean)
    """

    title = "Denoising autoencoder"
    preset: ClassVar = {"denoise": 0.5, "corruption": "gaussian"}
    activation = nn.ReLU

    def __init__(
        self,
        data_shape: tuple[int, ...] = (1, 28, 28),
        latent: int = 64,
        hidden: int = 512,
        likelihood: str = "bernoulli_logits",
    ):
        super().__init__(data_shape, latent, hidden, likelihood)
