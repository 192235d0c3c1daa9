"""VAEs with one hidden layer on each side, and one with two."""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .base import GaussianVAE, Posterior
from .layers import mlp, pixels


class VAE(GaussianVAE):
    """The common tutorial's, 784–400–20 by default (Kingma & Welling 2014, appendix C.1, with ReLU); any data shape.

    Arguments: :class:`~fastvae.models.base.GaussianVAE`.

    >>> model = VAE()
    >>> loss, reconstruction, kl = model.loss(torch.rand(8, 1, 28, 28))
    >>> model.sample(3).shape
    torch.Size([3, 1, 28, 28])
    """

    activation: Callable[[Tensor], Tensor] = staticmethod(F.relu)

    def __init__(
        self,
        data_shape: tuple[int, ...] = (1, 28, 28),
        latent: int = 20,
        hidden: int = 400,
        likelihood: str = "bernoulli_logits",
        variance: str = "fixed",
    ):
        super().__init__(data_shape, latent, hidden, likelihood, variance)
        self.encoder = nn.Linear(self.data_size, hidden)
        self.posterior = nn.Linear(hidden, 2 * latent)
        self.decoder = nn.Linear(latent, hidden)
        self.output = nn.Linear(hidden, self.data_size)

    def encode(self, x: Tensor, y: Tensor | None = None) -> Posterior:
        """``[B, *data_shape]`` → mean and log variance, the two halves of one layer."""
        mu, logvar = self.posterior(self.activation(self.encoder(x.flatten(1)))).chunk(2, dim=1)
        return Posterior(mu, logvar)

    def decode(self, z: Tensor, y: Tensor | None = None) -> Tensor:
        """``[B, latent]`` → ``[B, data_size]``."""
        recon = self.output(self.activation(self.decoder(z)))
        return torch.sigmoid(recon) if self.likelihood == "bernoulli_probs" else recon


class AEVB(VAE):
    """As the paper trained it: 500 tanh units, batches of 100, one sample a datum, Adagrad (section 5).

    Its weights start from N(0, 0.01), read as the variance.
    """

    title = "VAE as in the AEVB paper"
    preset: ClassVar = {"batch_size": 100, "samples": 1, "optimizer": "adagrad", "learning_rate": 0.02}
    activation = staticmethod(torch.tanh)

    def __init__(
        self,
        data_shape: tuple[int, ...] = (1, 28, 28),
        latent: int = 20,
        hidden: int = 500,
        likelihood: str = "bernoulli_logits",
        variance: str = "fixed",
    ):
        super().__init__(data_shape, latent, hidden, likelihood, variance)
        for name, value in self.named_parameters():
            if name.endswith("weight"):
                nn.init.normal_(value, std=0.1)


class VAEDigits(VAE):
    """The from-scratch NumPy VAE on 8×8 digits: 64–16–2, ReLU, squared error, SGD."""

    title = "VAE from scratch on 8×8 digits"
    preset: ClassVar = {
        "data": "digits15", "optimizer": "sgd", "learning_rate": 1e-3, "batch_size": 32, "epochs": 201,
    }  # fmt: skip

    def __init__(
        self,
        data_shape: tuple[int, ...] = (1, 8, 8),
        latent: int = 2,
        hidden: int = 16,
        likelihood: str = "mse",
        variance: str = "fixed",
    ):
        super().__init__(data_shape, latent, hidden, likelihood, variance)


class IWAE(GaussianVAE):
    """784–200–200–50, tanh, trained by the bound of several samples (Burda, Grosse, Salakhutdinov 2016, section 5)."""

    title = "Importance-weighted autoencoder"
    preset: ClassVar = {"bound": "iwae", "samples": 5, "binarise": "dynamic", "batch_size": 100}

    def __init__(
        self,
        data_shape: tuple[int, ...] = (1, 28, 28),
        latent: int = 50,
        hidden: int = 200,
        likelihood: str = "bernoulli_logits",
    ):
        super().__init__(data_shape, latent, hidden, likelihood)
        self.encoder = mlp(self.data_size, hidden, hidden, 2 * latent, activation=nn.Tanh)
        self.decoder = mlp(latent, hidden, hidden, self.data_size, activation=nn.Tanh, last=pixels(likelihood))

    def encode(self, x: Tensor, y: Tensor | None = None) -> Posterior:
        """``[B, *data_shape]`` → mean and log variance, ``[B, latent]``."""
        mu, logvar = self.encoder(x.flatten(1)).chunk(2, dim=1)
        return Posterior(mu, logvar)

    def decode(self, z: Tensor, y: Tensor | None = None) -> Tensor:
        """``[B, latent]`` → ``[B, data_size]``."""
        return self.decoder(z)
