"""Reference models, small enough to read: each is the paper's network around the ops of this library."""

from .base import Model, Output, build
from .conv_vae import ConvVAE
from .cvae import CVAE
from .vae import VAE

__all__ = ["CVAE", "VAE", "ConvVAE", "Model", "Output", "build"]
