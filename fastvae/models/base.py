"""What the reference models share: inputs, the loss, samples and reconstructions."""

from __future__ import annotations

import math
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from .. import checks, functional
from ..kernels.likelihoods import LIKELIHOODS, OF_IMAGES


class Output(NamedTuple):
    """What ``forward`` returns: the decoder's output and q(z|x), whose scale is ``logvar`` or ``std``."""

    recon: Tensor
    z: Tensor
    mu: Tensor
    logvar: Tensor | None = None
    std: Tensor | None = None


class Posterior(NamedTuple):
    """What ``encode`` returns: q(z|x) by its mean and one of ``logvar`` and ``std``, ``[B, latent]``."""

    mu: Tensor
    logvar: Tensor | None = None
    std: Tensor | None = None


class Model(nn.Module):
    """A Gaussian VAE. A subclass has ``encode(x, y)`` and ``decode(z, y)``.

    Args:
        data_shape: shape of one example, ``[C, H, W]``, ``[H, W]`` or ``[N]``.
        latent: elements of z.
        hidden: width of the hidden layers.
        likelihood: what the decoder's output is, one of images; see :func:`fastvae.elbo_loss`.
    """

    conditional: ClassVar[bool] = False
    #: what people call it
    title: ClassVar[str] = "VAE"
    #: what a checkpoint needs to build the model again
    config: dict[str, Any]

    def __init__(self, data_shape: tuple[int, ...], latent: int, hidden: int, likelihood: str):
        super().__init__()
        checks.likelihood(likelihood, OF_IMAGES)
        for name, value in (("latent", latent), ("hidden", hidden)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        self.data_shape, self.latent, self.likelihood = tuple(data_shape), latent, likelihood
        self.config = {
            "data_shape": list(data_shape),
            "latent": latent,
            "hidden": hidden,
            "likelihood": likelihood,
        }

    @property
    def data_size(self) -> int:
        """Elements of one example."""
        return math.prod(self.data_shape)

    def as_input(self, x: Tensor) -> Tensor:
        """``[B, *data_shape]`` in the dtype of the weights; uint8 becomes x/255."""
        dtype = next(self.parameters()).dtype
        x = x.to(dtype) / 255 if x.dtype == torch.uint8 else x.to(dtype)
        return x.reshape(-1, *self.data_shape)

    def encode(self, x: Tensor, y: Tensor | None = None) -> Posterior:
        """q(z|x) for ``[B, *data_shape]``."""
        raise NotImplementedError

    def decode(self, z: Tensor, y: Tensor | None = None) -> Tensor:
        """The likelihood's argument (logits, probabilities or mean) for ``[B, latent]``."""
        raise NotImplementedError

    def forward(self, x: Tensor, y: Tensor | None = None) -> Output:
        """Encode, sample, decode: ``[B, *data_shape]`` → :class:`Output`."""
        q = self.encode(self.as_input(x), y)
        z = functional.reparameterize(q.mu, q.logvar, std=q.std)
        return Output(self.decode(z, y), z, *q)

    def loss(
        self,
        x: Tensor,
        y: Tensor | None = None,
        *,
        target: Tensor | None = None,
        beta: float | Tensor = 1.0,
        free_bits: float = 0.0,
    ) -> functional.ELBOLoss:
        """The negative ELBO, nats per example.

        Args:
            x: input images, ``[B, *data_shape]``, floating point or uint8.
            y: labels, ``[B]``, where the model is conditional.
            target: the images to reconstruct if they are not the input: a denoiser's.
            beta: weight of the KL.
            free_bits: least nats of each latent element.
        """
        out = self(x, y)
        target = x if target is None else target
        return functional.elbo_loss(
            out.recon,
            target.reshape(out.recon.shape),
            out.mu,
            out.logvar,
            std=out.std,
            likelihood=self.likelihood,
            beta=beta,
            free_bits=free_bits,
        )

    def mean(self, recon: Tensor) -> Tensor:
        """The mean of p(x|z), which is what one shows: ``[B, *data_shape]``."""
        return LIKELIHOODS[self.likelihood].mean(recon).reshape(-1, *self.data_shape)

    @torch.no_grad()
    def sample(self, n: int, y: Tensor | None = None) -> Tensor:
        """``n`` images decoded from the prior, ``[n, *data_shape]``; ``y``, ``[n]``, says of which classes."""
        weight = next(self.parameters())
        zeros = torch.zeros(n, self.latent, dtype=weight.dtype, device=weight.device)
        return self.mean(self.decode(functional.reparameterize(zeros, zeros), y))

    @torch.no_grad()
    def reconstruct(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        """Decode the mean of q(z|x): ``[B, *data_shape]`` → the same."""
        return self.mean(self.decode(self.encode(self.as_input(x), y).mu, y))
