"""Reference models, small enough to read: each is the paper's network around the ops of this library."""

from __future__ import annotations

from typing import Any

from .base import Model, Output
from .conv_vae import ConvVAE
from .cvae import CVAE
from .vae import VAE

__all__ = ["CVAE", "MODELS", "VAE", "ConvVAE", "Model", "Output", "build"]

#: the models by name: a new one is one row here
MODELS: dict[str, type[Model]] = {"vae": VAE, "cvae": CVAE, "conv": ConvVAE}


def build(name: str, config: dict[str, Any]) -> Model:
    """The model of that name, a key of ``MODELS``, from its ``config``.

    >>> build("vae", {"latent": 2}).latent
    2
    """
    if name not in MODELS:
        raise ValueError(f"model must be one of {', '.join(map(repr, MODELS))}, got {name!r}")
    return MODELS[name](**config)
