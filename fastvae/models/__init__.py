"""Reference models, small enough to read: each is the paper's network around the ops of this library."""

from .base import Model, Output
from .conv_vae import ConvVAE
from .cvae import CVAE
from .registry import MODELS, build
from .vae import VAE

__all__ = ["CVAE", "MODELS", "VAE", "ConvVAE", "Model", "Output", "build"]
