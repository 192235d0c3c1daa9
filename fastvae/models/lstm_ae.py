"""An autoencoder of sequences (Srivastava, Mansimov, Salakhutdinov 2015): the rows of an image are its steps."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn

from .base import AutoEncoder, Posterior


class LSTMAE(AutoEncoder):
    """An LSTM to one vector; that vector, repeated at every step, to an LSTM and a linear layer.

    ``[C, H, W]`` is a sequence of H steps of C·W numbers each; ``[1, T, 1]`` a series of T numbers.

    >>> model = LSTMAE((1, 50, 1), latent=8)
    >>> model.reconstruct(torch.rand(2, 1, 50, 1)).shape
    torch.Size([2, 1, 50, 1])
    """

    title = "LSTM autoencoder"
    preset: ClassVar = {"batch_size": 64, "learning_rate": 2e-3, "epochs": 20}

    def __init__(self, data_shape: tuple[int, ...] = (1, 28, 28), latent: int = 64, likelihood: str = "mse"):
        super().__init__(data_shape, latent, None, likelihood)
        if len(data_shape) != 3:
            raise ValueError(f"data_shape must be (channels, steps, width), got {tuple(data_shape)}")
        self.channels, self.steps, self.width = data_shape
        self.encoder = nn.LSTM(self.channels * self.width, latent, batch_first=True)
        self.decoder = nn.LSTM(latent, latent, batch_first=True)
        self.output = nn.Linear(latent, self.channels * self.width)

    def encode(self, x: Tensor, y: Tensor | None = None) -> Posterior:
        """``[B, C, H, W]`` → the hidden state after the last step, ``[B, latent]``."""
        _, (state, _) = self.encoder(x.transpose(1, 2).flatten(2))
        return Posterior(state[-1])

    def decode(self, z: Tensor, y: Tensor | None = None) -> Tensor:
        """``[B, latent]`` → ``[B, C, H, W]``."""
        states, _ = self.decoder(z[:, None].expand(-1, self.steps, -1))
        rows = self.output(states).unflatten(2, (self.channels, self.width)).transpose(1, 2)
        return torch.sigmoid(rows) if self.likelihood == "bernoulli_probs" else rows
