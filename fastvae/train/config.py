"""What a run computes, and what the command line says about it: each field is one option of ``fastvae train``."""

from __future__ import annotations

import inspect
import os
from dataclasses import dataclass, field, fields
from typing import Any

import torch

from ..errors import UserError
from ..kernels.likelihoods import OF_IMAGES
from ..models import MODELS
from .data import SOURCES

PRECISIONS: dict[str, torch.dtype | None] = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}
LARGEST = 2**63 - 1  # int64
#: the width each model has of its own
HIDDEN = {name: inspect.signature(model).parameters["hidden"].default for name, model in MODELS.items()}
WIDTHS = ", ".join(f"{model} {width}" for model, width in HIDDEN.items())


def _option(default: Any, help: str, **more: Any) -> Any:
    """A field with its help; ``choices`` and ``metavar`` as in argparse, ``low`` the least an integer may be."""
    return field(default=default, metadata={"help": help, **more})


@dataclass
class Config:
    """What a run computes: the same configuration gives the same bits on the same machine.

    >>> Config(model="conv").hidden
    64
    >>> Config(latent=0).check()
    Traceback (most recent call last):
    fastvae.errors.UserError: --latent must be at least 1, got 0
    """

    model: str = _option("vae", "network", choices=tuple(MODELS))
    latent: int = _option(20, "elements of z", metavar="N", low=1)
    hidden: int = _option(None, f"width of hidden layers (default: {WIDTHS})", metavar="N", low=1)
    likelihood: str = _option("bernoulli_logits", "reconstruction term", choices=OF_IMAGES)
    beta: float = _option(1.0, "weight of the KL", metavar="WEIGHT")
    beta_warmup: int = _option(0, "raise beta from 0 over this many epochs", metavar="EPOCHS", low=0)
    free_bits: float = _option(0.0, "least KL of each latent element", metavar="NATS")
    denoise: float = _option(0.0, "salt and pepper on this share of input pixels", metavar="SHARE")
    batch_size: int = _option(128, "examples a step", metavar="N", low=1)
    parts: int = _option(1, "compute a batch in so many parts, each with noise of its own", metavar="N", low=1)
    epochs: int = _option(10, "passes over the data", metavar="N", low=1)
    learning_rate: float = _option(1e-3, "of Adam", metavar="RATE")
    precision: str = _option("fp32", "autocast", choices=tuple(PRECISIONS))
    seed: int = _option(0, "of everything random", metavar="N", low=0)
    data: str = _option("mnist5k", "data set of an installed package", choices=SOURCES)
    data_root: str | None = _option(None, "folder of MNIST-style IDX files, instead of --data", metavar="FOLDER")

    def __post_init__(self) -> None:
        if self.hidden is None and self.model in MODELS:
            self.hidden = HIDDEN[self.model]
        if self.data_root is not None:
            self.data_root = os.path.abspath(self.data_root)  # a run may resume from another working directory

    def check(self) -> None:
        """Raise a :class:`UserError` for the first value that cannot be."""
        for option in fields(self):
            name, value, limits = option.name.replace("_", "-"), getattr(self, option.name), option.metadata
            if "choices" in limits and value not in limits["choices"]:
                raise UserError(f"--{name} must be one of {', '.join(limits['choices'])}, got {value}")
            if "low" in limits and value < limits["low"]:
                raise UserError(f"--{name} must be at least {limits['low']}, got {value}")
            if "low" in limits and value > LARGEST:
                raise UserError(f"--{name} must be at most {LARGEST}, got {value}")
        for name in ("beta", "free_bits"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise UserError(f"--{name.replace('_', '-')} must be a number >= 0, got {getattr(self, name)}")
        if not 0 < self.learning_rate < float("inf"):
            raise UserError(f"--learning-rate must be > 0, got {self.learning_rate}")
        if not 0 <= self.denoise < 1:
            raise UserError(f"--denoise must be in [0, 1), got {self.denoise}")
