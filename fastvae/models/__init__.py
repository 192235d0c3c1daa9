"""The models of the field's textbooks, small enough to read: each a network around this library's ops.

Begin with ``base.py``, which has the interface and the two losses, then ``ae.py`` and ``vae.py``.
"""

from __future__ import annotations

from typing import Any

from .ae import AE, DenoisingAE, LinearAE
from .base import AutoEncoder, GaussianVAE, Output
from .contractive_ae import ContractiveAE
from .conv_ae import ConvAE
from .conv_vae import ConvVAE, SigmaConvVAE
from .cvae import CVAE
from .lstm_ae import LSTMAE
from .sparse_ae import SparseAE
from .vae import AEVB, IWAE, VAE, VAEDigits

__all__ = [
    "AE", "AEVB", "CVAE", "IWAE", "LSTMAE", "MODELS", "VAE", "AutoEncoder", "ContractiveAE", "ConvAE", "ConvVAE",
    "DenoisingAE", "GaussianVAE", "LinearAE", "Model", "Output", "SigmaConvVAE", "SparseAE", "VAEDigits", "build",
]  # fmt: skip

#: the models by name: a new one is one row here
MODELS: dict[str, type[AutoEncoder]] = {
    "vae": VAE,
    "cvae": CVAE,
    "conv": ConvVAE,
    "conv-vae": SigmaConvVAE,
    "aevb": AEVB,
    "vae-digits": VAEDigits,
    "iwae": IWAE,
    "linear-ae": LinearAE,
    "ae": AE,
    "conv-ae": ConvAE,
    "denoising-ae": DenoisingAE,
    "sparse-ae": SparseAE,
    "contractive-ae": ContractiveAE,
    "lstm-ae": LSTMAE,
}
Model = GaussianVAE  # its name before there were others


def build(name: str, config: dict[str, Any]) -> AutoEncoder:
    """The model of that name, a key of ``MODELS``, from its ``config``.

    >>> build("vae", {"latent": 2}).latent
    2
    """
    if name not in MODELS:
        raise ValueError(f"model must be one of {', '.join(map(repr, MODELS))}, got {name!r}")
    return MODELS[name](**config)
