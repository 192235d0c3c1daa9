"""What a run computes, and what the command line says about it: each field is one option of ``fastvae train``."""

from __future__ import annotations

import argparse
import inspect
import os
from dataclasses import dataclass, field, fields
from typing import Any, get_args, get_type_hints

import torch

from ..errors import UserError
from ..kernels.likelihoods import OF_IMAGES
from ..models import MODELS, GaussianVAE
from ..models.base import BOUNDS, VARIANCES
from ..models.sparse_ae import WHERE
from .corrupt import BINARISATIONS, CORRUPTIONS
from .data import SOURCES

PRECISIONS: dict[str, torch.dtype | None] = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}
LARGEST = 2**63 - 1  # int64
OPTIMIZERS = {"adam": torch.optim.Adam, "sgd": torch.optim.SGD, "adagrad": torch.optim.Adagrad}


def _own(name: str) -> dict[str, Any]:
    """What the model takes, and what it has for a default of its own."""
    arguments = inspect.signature(MODELS[name]).parameters.items()
    return {argument: parameter.default for argument, parameter in arguments} | MODELS[name].preset


def _of_each(argument: str) -> str:
    return ", ".join(f"{name} {own[argument]}" for name in MODELS if (own := _own(name)).get(argument) is not None)


def _option(default: Any, help: str, **more: Any) -> Any:
    """A field with its help, None until it is given.

    ``choices`` and ``metavar`` are as in argparse, ``low`` is the least an integer may be, ``of`` says of what it is an
    option: a ``"model"`` whose arguments name it, or any ``"vae"``. ``later`` marks what older checkpoints have not.
    """
    return field(default=None, metadata={"help": help, "default": default, **more})


def add_options(parser: argparse.ArgumentParser) -> None:
    """One option for each field of ``Config``, without a default: ``--resume`` must know what was given."""
    types = get_type_hints(Config)
    for option in fields(Config):
        kind, *_ = get_args(types[option.name]) or (types[option.name],)
        value = option.metadata["default"]
        parser.add_argument(
            f"--{option.name.replace('_', '-')}",
            type=kind,
            choices=option.metadata.get("choices"),
            metavar=option.metadata.get("metavar"),
            help=option.metadata["help"] + ("" if value is None else f" (default: {value})"),
        )


def given(options: Any) -> dict[str, Any]:
    """The options of ``fastvae train`` that were given."""
    return {option.name: value for option in fields(Config) if (value := getattr(options, option.name)) is not None}


@dataclass
class Config:
    """What a run computes: the same configuration gives the same bits on the same machine.

    >>> Config(model="conv").hidden, Config(model="ae").batch_size
    (64, 32)
    >>> Config(latent=0).check()
    Traceback (most recent call last):
    fastvae.errors.UserError: --latent must be at least 1, got 0
    """

    model: str = _option("vae", "network", choices=tuple(MODELS))
    latent: int = _option(None, f"elements of z (default: {_of_each('latent')})", metavar="N", low=1, of="model")
    hidden: int | None = _option(
        None, f"width of hidden layers (default: {_of_each('hidden')})", metavar="N", low=1, of="model"
    )
    likelihood: str = _option("bernoulli_logits", "reconstruction term", choices=OF_IMAGES)
    variance: str | None = _option(
        None, "of the likelihood gaussian (default: fixed to 1)", choices=VARIANCES, of="model", later=True
    )
    dropout: float | None = _option(
        None,
        f"share of hidden units left out (default: {_of_each('dropout')})",
        metavar="SHARE",
        of="model",
        later=True,
    )
    sparsity: float | None = _option(
        None, f"weight of the L1 norm (default: {_of_each('sparsity')})", metavar="WEIGHT", of="model", later=True
    )
    sparse: str | None = _option(
        None, "what the L1 norm is of (default: latent)", choices=WHERE, of="model", later=True
    )
    contraction: float | None = _option(
        None, f"weight of the Jacobian's norm (default: {_of_each('contraction')})", metavar="WEIGHT", of="model",
        later=True,
    )  # fmt: skip
    beta: float = _option(1.0, "weight of the KL", metavar="WEIGHT", of="vae")
    beta_warmup: int = _option(0, "raise beta from 0 over this many epochs", metavar="EPOCHS", low=0, of="vae")
    free_bits: float = _option(0.0, "least KL of each latent element", metavar="NATS", of="vae")
    samples: int = _option(1, "of z for each example", metavar="L", low=1, of="vae", later=True)
    bound: str = _option("elbo", "what is maximised", choices=BOUNDS, of="vae", later=True)
    denoise: float = _option(0.0, "corrupt this share of input pixels, or by noise of this σ", metavar="SHARE")
    corruption: str = _option("salt-and-pepper", "how --denoise corrupts", choices=tuple(CORRUPTIONS), later=True)
    binarise: str = _option("grey", "pixels as they are, or 0 and 1", choices=BINARISATIONS, later=True)
    batch_size: int = _option(128, "examples a step", metavar="N", low=1)
    parts: int = _option(1, "compute a batch in so many parts, each with noise of its own", metavar="N", low=1)
    epochs: int = _option(10, "passes over the data", metavar="N", low=1)
    optimizer: str = _option("adam", "of the weights", choices=tuple(OPTIMIZERS), later=True)
    learning_rate: float = _option(1e-3, "of the optimiser", metavar="RATE")
    precision: str = _option("fp32", "autocast", choices=tuple(PRECISIONS))
    seed: int = _option(0, "of everything random", metavar="N", low=0)
    data: str = _option("mnist5k", "data set of an installed package", choices=SOURCES)
    data_root: str | None = _option(None, "folder of IDX files or of images, instead of --data", metavar="FOLDER")
    hold_out: int | None = _option(None, "train without this class", metavar="LABEL", low=0, later=True)

    def __post_init__(self) -> None:
        self.model = self.model or "vae"
        own = _own(self.model) if self.model in MODELS else {}
        for option in fields(self):
            if getattr(self, option.name) is None:
                setattr(self, option.name, own.get(option.name, option.metadata["default"]))
        if self.data_root is not None:
            self.data_root = os.path.abspath(self.data_root)  # a run may resume from another working directory

    def check(self) -> None:
        """Raise a :class:`UserError` for the first value that cannot be."""
        for option in fields(self):
            name, value, limits = option.name.replace("_", "-"), getattr(self, option.name), option.metadata
            if value is None:
                continue
            self._check_goes_with_model(name, value, limits)
            if "choices" in limits and value not in limits["choices"]:
                raise UserError(f"--{name} must be one of {', '.join(limits['choices'])}, got {value}")
            if "low" in limits and value < limits["low"]:
                raise UserError(f"--{name} must be at least {limits['low']}, got {value}")
            if "low" in limits and value > LARGEST:
                raise UserError(f"--{name} must be at most {LARGEST}, got {value}")
        for name in ("beta", "free_bits", "sparsity", "contraction"):
            if not 0 <= (getattr(self, name) or 0) < float("inf"):
                raise UserError(f"--{name.replace('_', '-')} must be a number >= 0, got {getattr(self, name)}")
        if not 0 < self.learning_rate < float("inf"):
            raise UserError(f"--learning-rate must be > 0, got {self.learning_rate}")
        for name in ("denoise", "dropout"):
            if not 0 <= (getattr(self, name) or 0) < 1:
                raise UserError(f"--{name} must be in [0, 1), got {getattr(self, name)}")
        if self.variance == "learned" and self.likelihood != "gaussian":
            raise UserError(f"--variance learned goes with --likelihood gaussian, got {self.likelihood}")
        if self.bound == "iwae" and (self.beta, self.beta_warmup, self.free_bits) != (1, 0, 0):
            raise UserError(
                "--bound iwae excludes --beta, --beta-warmup and --free-bits: its KL is not a term by itself"
            )

    def _check_goes_with_model(self, name: str, value: Any, limits: Any) -> None:
        of, model = limits.get("of"), MODELS.get(self.model)
        if model is None:
            return
        takes = [other for other in MODELS if name.replace("-", "_") in _own(other)]
        if of == "model" and self.model not in takes:
            raise UserError(f"--{name} goes with {', '.join(takes)}; got --model {self.model}")
        if of == "vae" and value != limits["default"] and not issubclass(model, GaussianVAE):
            raise UserError(f"--{name} goes with a VAE; got --model {self.model}, which has no q(z|x)")
