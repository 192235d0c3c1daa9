"""What a run computes, and what the command line says about it: each field is one option of ``fastvae train``."""

from __future__ import annotations

import inspect
import os
from dataclasses import dataclass, field
from typing import Any

import torch

from ..errors import UserError
from ..functional import LIKELIHOODS
from ..models import MODELS
from .data import SOURCES

PRECISIONS: dict[str, torch.dtype | None] = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}
LARGEST = 2**63 - 1  # int64


def _hidden(model: str) -> int:
    """The width ``model`` has of its own."""
    width: int = inspect.signature(MODELS[model]).parameters["hidden"].default
    return width


def _option(default: Any, help: str, **more: Any) -> Any:
    """A field with its help; ``choices`` and ``metavar`` as in argparse."""
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
    latent: int = _option(20, "elements of z", metavar="N")
    hidden: int = _option(
        None, f"width of hidden layers (default: {', '.join(f'{m} {_hidden(m)}' for m in MODELS)})", metavar="N"
    )
    likelihood: str = _option("bernoulli_logits", "reconstruction term", choices=LIKELIHOODS)
    beta: float = _option(1.0, "weight of the KL", metavar="WEIGHT")
    beta_warmup: int = _option(0, "raise beta from 0 over this many epochs", metavar="EPOCHS")
    free_bits: float = _option(0.0, "least KL of each latent element", metavar="NATS")
    denoise: float = _option(0.0, "salt and pepper on this share of input pixels", metavar="SHARE")
    batch_size: int = _option(128, "examples a step", metavar="N")
    epochs: int = _option(10, "passes over the data", metavar="N")
    learning_rate: float = _option(1e-3, "of Adam", metavar="RATE")
    precision: str = _option("fp32", "autocast", choices=tuple(PRECISIONS))
    seed: int = _option(0, "of everything random", metavar="N")
    data: str = _option("mnist5k", "data set of an installed package", choices=SOURCES)
    data_root: str | None = _option(None, "folder of MNIST-style IDX files, instead of --data", metavar="FOLDER")

    def __post_init__(self) -> None:
        if self.hidden is None and self.model in MODELS:
            self.hidden = _hidden(self.model)
        if self.data_root is not None:
            self.data_root = os.path.abspath(self.data_root)  # a run may resume from another working directory

    def check(self) -> None:
        """Raise a :class:`UserError` for the first value that cannot be."""
        for name, choices in (
            ("model", MODELS),
            ("likelihood", LIKELIHOODS),
            ("precision", PRECISIONS),
            ("data", SOURCES),
        ):
            if getattr(self, name) not in choices:
                raise UserError(f"--{name} must be one of {', '.join(choices)}, got {getattr(self, name)}")
        for name, low in (
            ("latent", 1),
            ("hidden", 1),
            ("batch_size", 1),
            ("epochs", 1),
            ("beta_warmup", 0),
            ("seed", 0),
        ):
            if getattr(self, name) < low:
                raise UserError(f"--{name.replace('_', '-')} must be at least {low}, got {getattr(self, name)}")
            if getattr(self, name) > LARGEST:
                raise UserError(f"--{name.replace('_', '-')} must be at most {LARGEST}, got {getattr(self, name)}")
        for name in ("beta", "free_bits"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise UserError(f"--{name.replace('_', '-')} must be a number >= 0, got {getattr(self, name)}")
        if not 0 < self.learning_rate < float("inf"):
            raise UserError(f"--learning-rate must be > 0, got {self.learning_rate}")
        if not 0 <= self.denoise < 1:
            raise UserError(f"--denoise must be in [0, 1), got {self.denoise}")
