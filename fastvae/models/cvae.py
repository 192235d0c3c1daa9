"""The conditional VAE (Sohn, Lee, Yan 2015) as an MLP: the label is an input of encoder and decoder."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .base import GaussianVAE, Posterior

MIN_STD = 1e-6  # σ = 1e-6 + softplus(·) is never 0


class CVAE(GaussianVAE):
    """Conditional Gaussian encoder (ELU, tanh) and Bernoulli decoder (tanh, ELU), with dropout.

    Args:
        data_shape: shape of one image.
        latent: elements of z.
        hidden: width of the two hidden layers on each side.
        likelihood: what the decoder's output is.
        classes: number of labels.
        dropout: probability of a hidden unit to be dropped in training.

    >>> model = CVAE()
    >>> clean, labels = torch.rand(8, 1, 28, 28), torch.arange(8)
    >>> noisy = torch.where(torch.rand_like(clean) < 0.1, torch.rand_like(clean).round(), clean)
    >>> loss, reconstruction, kl = model.loss(noisy, labels, target=clean)
    >>> model.sample(2, torch.tensor([3, 7])).shape
    torch.Size([2, 1, 28, 28])
    """

    conditional = True
    title = "Conditional VAE"

    def __init__(
        self,
        data_shape: tuple[int, ...] = (1, 28, 28),
        latent: int = 20,
        hidden: int = 400,
        likelihood: str = "bernoulli_logits",
        classes: int = 10,
        dropout: float = 0.1,
    ):
        super().__init__(data_shape, latent, hidden, likelihood)
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout must be in [0, 1), got {dropout}")
        self.classes = classes
        self.config |= {"classes": classes, "dropout": dropout}
        self.encoder = nn.Sequential(
            nn.Linear(self.data_size + classes, hidden),
            nn.ELU(),
            nn.Dropout(dropout),
            nn.Linear(hidden, hidden),
            nn.Tanh(),
            nn.Dropout(dropout),
            nn.Linear(hidden, 2 * latent),
        )
        self.decoder = nn.Sequential(
            nn.Linear(latent + classes, hidden),
            nn.Tanh(),
            nn.Dropout(dropout),
            nn.Linear(hidden, hidden),
            nn.ELU(),
            nn.Dropout(dropout),
            nn.Linear(hidden, self.data_size),
        )
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.kaiming_normal_(module.weight)  # variance scaling by fan-in (He et al. 2015)
                nn.init.zeros_(module.bias)

    def _with_label(self, x: Tensor, y: Tensor | None) -> Tensor:
        if y is None:
            raise ValueError("y must be given: this model is conditional")
        if y.shape != x.shape[:1]:
            raise ValueError(f"y must have one label an example, [{x.shape[0]}], got {list(y.shape)}")
        return torch.cat([x, F.one_hot(y.long(), self.classes).to(x.dtype)], dim=1)

    def encode(self, x: Tensor, y: Tensor | None = None) -> Posterior:
        """``[B, *data_shape]`` and labels ``[B]`` → mean and σ."""
        mu, raw = self.encoder(self._with_label(x.flatten(1), y)).chunk(2, dim=1)
        return Posterior(mu, std=MIN_STD + F.softplus(raw))

    def decode(self, z: Tensor, y: Tensor | None = None) -> Tensor:
        """``[B, latent]`` and labels ``[B]`` → ``[B, data_size]``."""
        recon = self.decoder(self._with_label(z, y))
        return torch.sigmoid(recon) if self.likelihood == "bernoulli_probs" else recon
