"""Convolutional VAEs for ``[C, H, W]`` images: two strided convolutions down, two resize-convolutions up."""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .base import GaussianVAE, Posterior
from .layers import Convolutions

MIN_STD = 1e-6  # σ = 1e-6 + softplus(·) is never 0


class ConvVAE(Convolutions, GaussianVAE):
    """Any image size. ``hidden`` is the number of channels at a quarter of the size; half of them at half of it.

    >>> model = ConvVAE((3, 17, 22))
    >>> model.reconstruct(torch.rand(2, 3, 17, 22)).shape
    torch.Size([2, 3, 17, 22])
    """

    title = "Convolutional VAE"

    def __init__(
        self,
        data_shape: tuple[int, ...] = (1, 28, 28),
        latent: int = 20,
        hidden: int = 64,
        likelihood: str = "bernoulli_logits",
        variance: str = "fixed",
    ):
        super().__init__(data_shape, latent, hidden, likelihood, variance)
        self.build(data_shape, 2 * latent, latent, hidden)

    def encode(self, x: Tensor, y: Tensor | None = None) -> Posterior:
        """``[B, C, H, W]`` → mean and log variance, ``[B, latent]``."""
        mu, logvar = self.posterior(self.down(x)).chunk(2, dim=1)
        return Posterior(mu, logvar)

    def decode(self, z: Tensor, y: Tensor | None = None) -> Tensor:
        """``[B, latent]`` → ``[B, C, H, W]``."""
        recon = self.up(z)
        return torch.sigmoid(recon) if self.likelihood == "bernoulli_probs" else recon


class SigmaConvVAE(ConvVAE):
    """The encoder gives σ, the decoder probabilities; a noisy image in, the clean one out; dropout on both sides.

    The loss is −Σ x·log y + (1 − x)·log(1 − y), y clipped to [1e-8, 1 − 1e-8], and ½Σ mu² + σ² − log(1e-8 + σ²) − 1.

    >>> clean = torch.rand(2, 1, 28, 28)
    >>> noisy = torch.where(torch.rand_like(clean) < 0.1, torch.rand_like(clean).round(), clean)
    >>> loss, reconstruction, kl = SigmaConvVAE().loss(noisy, target=clean)
    """

    title = "Convolutional VAE with σ and clipped cross-entropy"
    preset: ClassVar = {"denoise": 0.1}

    def __init__(
        self,
        data_shape: tuple[int, ...] = (1, 28, 28),
        latent: int = 20,
        hidden: int = 64,
        likelihood: str = "bernoulli_probs",
        dropout: float = 0.1,
    ):
        super().__init__(data_shape, latent, hidden, likelihood)
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout must be in [0, 1), got {dropout}")
        self.config["dropout"] = dropout
        self.between = nn.Dropout(dropout)  # keep_prob = 1 − dropout

    def encode(self, x: Tensor, y: Tensor | None = None) -> Posterior:
        """``[B, C, H, W]`` → mean and σ, ``[B, latent]``."""
        mu, raw = self.posterior(self.down(x)).chunk(2, dim=1)
        return Posterior(mu, std=MIN_STD + F.softplus(raw))
