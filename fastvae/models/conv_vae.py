"""A convolutional VAE for ``[C, H, W]`` images: two strided convolutions down, two resize-convolutions up."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .base import Model, Posterior


class ConvVAE(Model):
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
    ):
        super().__init__(data_shape, latent, hidden, likelihood)
        if len(data_shape) != 3:
            raise ValueError(f"data_shape must be (channels, height, width), got {tuple(data_shape)}")
        channels, height, width = data_shape
        half = max(hidden // 2, 1)
        # each strided convolution halves, rounding up
        self.sizes = [(height, width), (-(-height // 2), -(-width // 2)), (-(-height // 4), -(-width // 4))]
        self.bottom = (hidden, *self.sizes[2])
        bottom_size = hidden * self.sizes[2][0] * self.sizes[2][1]
        self.down1 = nn.Conv2d(channels, half, 3, stride=2, padding=1)
        self.down2 = nn.Conv2d(half, hidden, 3, stride=2, padding=1)
        self.posterior = nn.Linear(bottom_size, 2 * latent)
        self.expand = nn.Linear(latent, bottom_size)
        self.up2 = nn.Conv2d(hidden, half, 3, padding=1)
        self.up1 = nn.Conv2d(half, half, 3, padding=1)
        self.output = nn.Conv2d(half, channels, 3, padding=1)

    def encode(self, x: Tensor, y: Tensor | None = None) -> Posterior:
        """``[B, C, H, W]`` → mean and log variance, ``[B, latent]``."""
        features = F.relu(self.down2(F.relu(self.down1(x))))
        mu, logvar = self.posterior(features.flatten(1)).chunk(2, dim=1)
        return Posterior(mu, logvar)

    def decode(self, z: Tensor, y: Tensor | None = None) -> Tensor:
        """``[B, latent]`` → ``[B, C, H, W]``."""
        features = F.relu(self.expand(z)).reshape(-1, *self.bottom)
        features = F.relu(self.up2(F.interpolate(features, self.sizes[1])))
        features = F.relu(self.up1(F.interpolate(features, self.sizes[0])))
        recon = self.output(features)
        return torch.sigmoid(recon) if self.likelihood == "bernoulli_probs" else recon
