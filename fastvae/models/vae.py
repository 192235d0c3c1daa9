"""The VAE of the common tutorial (Kingma & Welling 2014, appendix C.1, with ReLU): one hidden layer on each side."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .base import Model, Posterior


class VAE(Model):
    """784–400–20 by default; any data shape. Arguments: :class:`~fastvae.models.base.Model`.

    >>> model = VAE()
    >>> loss, reconstruction, kl = model.loss(torch.rand(8, 1, 28, 28))
    >>> model.sample(3).shape
    torch.Size([3, 1, 28, 28])
    """

    def __init__(
        self,
        data_shape: tuple[int, ...] = (1, 28, 28),
        latent: int = 20,
        hidden: int = 400,
        likelihood: str = "bernoulli_logits",
    ):
        super().__init__(data_shape, latent, hidden, likelihood)
        self.encoder = nn.Linear(self.data_size, hidden)
        self.posterior = nn.Linear(hidden, 2 * latent)
        self.decoder = nn.Linear(latent, hidden)
        self.output = nn.Linear(hidden, self.data_size)

    def encode(self, x: Tensor, y: Tensor | None = None) -> Posterior:
        """``[B, *data_shape]`` → mean and log variance, the two halves of one layer."""
        mu, logvar = self.posterior(F.relu(self.encoder(x.flatten(1)))).chunk(2, dim=1)
        return Posterior(mu, logvar)

    def decode(self, z: Tensor, y: Tensor | None = None) -> Tensor:
        """``[B, latent]`` → ``[B, data_size]``."""
        recon = self.output(F.relu(self.decoder(z)))
        return torch.sigmoid(recon) if self.likelihood == "bernoulli_probs" else recon
