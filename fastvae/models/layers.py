"""Encoders and decoders that several models have."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import torch.nn.functional as F
from torch import Tensor, nn


def mlp(*sizes: int, activation: Callable[[], nn.Module], last: Callable[[], nn.Module] | None = None) -> nn.Sequential:
    """Linear layers of these sizes with ``activation`` between, and ``last`` at the end.

    >>> mlp(4, 3, 2, activation=nn.ReLU, last=nn.Sigmoid)
    Sequential(
      (0): Linear(in_features=4, out_features=3, bias=True)
      (1): ReLU()
      (2): Linear(in_features=3, out_features=2, bias=True)
      (3): Sigmoid()
    )
    """
    layers: list[nn.Module] = []
    for inputs, outputs in pairwise(sizes):
        layers += [nn.Linear(inputs, outputs), activation()]
    layers.pop()
    return nn.Sequential(*layers, *([last()] if last else []))


def pixels(likelihood: str) -> Callable[[], nn.Module] | None:
    """The last layer of a decoder: a sigmoid where its output is probabilities."""
    return nn.Sigmoid if likelihood == "bernoulli_probs" else None


class Convolutions(nn.Module):
    """Two strided convolutions down, two resize-convolutions up, for ``[C, H, W]`` of any size: a mixin of models.

    ``hidden`` is the number of channels at a quarter of the size; half of them at half of it.
    """

    def build(self, data_shape: tuple[int, ...], codes: int, latent: int, hidden: int) -> None:
        """Make the layers, which lead to ``codes`` numbers and come from ``latent`` ones."""
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
        self.posterior = nn.Linear(bottom_size, codes)
        self.between: nn.Module = nn.Identity()
        self.expand = nn.Linear(latent, bottom_size)
        self.up2 = nn.Conv2d(hidden, half, 3, padding=1)
        self.up1 = nn.Conv2d(half, half, 3, padding=1)
        self.output = nn.Conv2d(half, channels, 3, padding=1)

    def down(self, x: Tensor) -> Tensor:
        """``[B, C, H, W]`` → ``[B, bottom_size]``."""
        return self.between(F.relu(self.down2(F.relu(self.down1(x)))).flatten(1))

    def up(self, z: Tensor) -> Tensor:
        """``[B, latent]`` → ``[B, C, H, W]``."""
        features = self.between(F.relu(self.expand(z))).reshape(-1, *self.bottom)
        features = F.relu(self.up2(F.interpolate(features, self.sizes[1])))
        features = F.relu(self.up1(F.interpolate(features, self.sizes[0])))
        return self.output(features)
