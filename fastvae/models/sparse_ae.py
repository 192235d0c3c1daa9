"""An overcomplete autoencoder that is kept from copying by the L1 norm of its activations."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor, nn

from .ae import AE
from .base import Output

WHERE = ("latent", "all")


class SparseAE(AE):
    """784–1024 rectified elements–784: reconstruction + sparsity · Σ|activation|.

    Args:
        data_shape: shape of one image.
        latent: elements of z, more than the data's.
        hidden: width of the hidden layers.
        likelihood: what the decoder's output is.
        sparsity: weight of the L1 norm; 0 is the plain overcomplete autoencoder.
        sparse: of the ``"latent"`` alone, or of ``"all"`` hidden activations of encoder and decoder.

    >>> import torch
    >>> model = SparseAE((8, 8), latent=100, hidden=64, sparsity=0.01)
    >>> loss, reconstruction, l1 = model.loss(torch.rand(2, 8, 8))
    """

    title = "Sparse autoencoder"
    preset: ClassVar = {"epochs": 20}
    activation = nn.ReLU

    def __init__(
        self,
        data_shape: tuple[int, ...] = (1, 28, 28),
        latent: int = 1024,
        hidden: int = 512,
        likelihood: str = "bernoulli_logits",
        sparsity: float = 0.1,
        sparse: str = "latent",
    ):
        super().__init__(data_shape, latent, hidden, likelihood)
        if not 0 <= sparsity < float("inf"):
            raise ValueError(f"sparsity must be a number >= 0, got {sparsity}")
        if sparse not in WHERE:
            raise ValueError(f"sparse must be one of {', '.join(map(repr, WHERE))}, got {sparse!r}")
        self.sparsity, self.sparse = sparsity, sparse
        self.config |= {"sparsity": sparsity, "sparse": sparse}

    def penalty(self, x: Tensor, out: Output) -> Tensor:
        """Sparsity · Σ|activation|, per example."""
        norm = out.z.abs().sum()
        if self.sparse == "all":
            for layers, inputs in ((self.encoder[:2], x.flatten(1)), (self.decoder[:2], out.z)):
                norm = norm + layers(inputs).abs().sum()
        return self.sparsity * norm / len(x)
