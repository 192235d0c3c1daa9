"""The table of ops: how each is called, who its opponents are, inputs for it, and the bytes it cannot avoid."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import functional
from . import eager
from .works import TRAINING, Work


class Op(NamedTuple):
    """``ours`` and each of ``eager`` compute the same of ``inputs``, of which the first ``leaves`` are differentiable.

    ``eager`` holds the forms people write, by contender name; the first is the one that is also compiled. Where the
    op returns z, the upstream gradient of its first output is a tensor. Where the likelihood has a learned parameter
    for each column, that is the second input. ``fields`` differentiable inputs have the shape of the data.
    """

    inputs: Callable[[Work, torch.Generator], list[Tensor]]
    leaves: tuple[int, ...]
    ours: Callable[..., Any]
    eager: dict[str, Callable[..., Any]]
    returns_z: bool = False
    learned: bool = False
    fields: int = 1


def _target(work: Work, generator: torch.Generator) -> Tensor:
    dtype, device = work.target or work.dtype, generator.device
    if dtype == torch.uint8:
        return torch.randint(0, 256, work.shape, dtype=dtype, device=device, generator=generator)
    return torch.rand(work.shape, device=device, generator=generator).to(dtype)


def _normal(shape: tuple[int, int], work: Work, generator: torch.Generator) -> Tensor:
    return torch.randn(shape, device=generator.device, generator=generator).to(work.dtype)


def _logits(work: Work, generator: torch.Generator) -> list[Tensor]:
    return [_normal(work.shape, work, generator), _target(work, generator)]


def _probs(work: Work, generator: torch.Generator) -> list[Tensor]:
    logits, target = _logits(work, generator)
    return [torch.sigmoid(logits), target]


def _counts(work: Work, generator: torch.Generator) -> list[Tensor]:
    """Half of them 0, nine in ten below 8, as reads of genes are: a mean and a dispersion spread over decades."""
    mean = (1.5 * _normal(work.shape, work, generator)).exp()
    theta = _normal((1, work.shape[1]), work, generator)[0].exp()
    return [mean, theta, torch.poisson(mean.float() * torch.exp(0.7 * mean.log().sin().float()), generator).to(mean)]


def _inflated_counts(work: Work, generator: torch.Generator) -> list[Tensor]:
    mean, theta, counts = _counts(work, generator)
    return [mean, theta, 2 * _normal(work.shape, work, generator), counts]


def _scores_of_counts(work: Work, generator: torch.Generator) -> list[Tensor]:
    mean, theta, counts = _counts(work, generator)
    return [mean.log(), theta, mean.sum(1), counts]


def _latent(work: Work, generator: torch.Generator) -> list[Tensor]:
    shape = (work.shape[0], work.latent or work.shape[1])
    return [_normal(shape, work, generator), _normal(shape, work, generator)]


def _linear(work: Work, generator: torch.Generator) -> list[Tensor]:
    rows, cols = work.shape
    hidden = _normal((rows, work.hidden), work, generator)
    weight = _normal((cols, work.hidden), work, generator) / math.sqrt(work.hidden)
    bias = torch.zeros(cols, dtype=work.dtype, device=generator.device)
    return [hidden, weight, bias, _target(work, generator)]


OPS: dict[str, Op] = {
    "bce": Op(_probs, (0,), functional.bce, {"eager": eager.bce, "eager, clipped": eager.bce_clipped}),
    "bce_with_logits": Op(
        _logits,
        (0,),
        functional.bce_with_logits,
        {"eager": eager.bce_with_logits, "eager, probabilities": eager.bce_of_sigmoid},
    ),
    "gaussian_kl": Op(_latent, (0, 1), functional.gaussian_kl, {"eager": eager.gaussian_kl}),
    "reparameterize": Op(_latent, (0, 1), functional.reparameterize, {"eager": eager.reparameterize}, returns_z=True),
    "sample_with_kl": Op(_latent, (0, 1), functional.sample_with_kl, {"eager": eager.sample_with_kl}, returns_z=True),
    "elbo_loss": Op(
        lambda work, generator: _logits(work, generator) + _latent(work, generator),
        (0, 2, 3),
        lambda *args: functional.elbo_loss(*args).loss,
        {"eager": eager.elbo_loss, "eager, probabilities": eager.elbo_loss_of_sigmoid},
    ),
    "negative_binomial_nll": Op(
        _counts,
        (0, 1),
        lambda mean, theta, counts: functional.negative_binomial_nll(mean, counts, dispersion=theta),
        {"eager": eager.negative_binomial_nll},
        learned=True,
    ),
    "zero_inflated_negative_binomial_nll": Op(
        _inflated_counts,
        (0, 1, 2),
        lambda mean, theta, logits, counts: functional.zero_inflated_negative_binomial_nll(
            mean, counts, dispersion=theta, zero_logits=logits
        ),
        {"eager": eager.zero_inflated_negative_binomial_nll},
        learned=True,
        fields=2,
    ),
    "negative_binomial_nll_from_scores": Op(
        _scores_of_counts,
        (0, 1),
        lambda scores, theta, library, counts: functional.negative_binomial_nll_from_scores(
            scores, library, counts, dispersion=theta
        ),
        {"eager": eager.negative_binomial_nll_from_scores},
        learned=True,
    ),
    "linear_bce": Op(_linear, (0, 1, 2), functional.linear_bce, {"eager": eager.linear_bce}),
}


def bytes_moved(work: Work) -> int:
    """Bytes no implementation can avoid: each input read once, each output written once.

    0 for a training step and a layer: there, matrix products count.
    """
    if work.op == TRAINING or work.hidden:
        return 0
    data, latent = _elements(work)
    size, target = work.dtype.itemsize, (work.target or work.dtype).itemsize
    z = OPS[work.op].returns_z * latent * size
    forward = data * (OPS[work.op].fields * size + target) + (2 * latent + _columns(work)) * size + z
    return forward + z + gradient_bytes(work) if work.backward else forward


def gradient_bytes(work: Work) -> int:
    """Bytes of the gradients that forward + backward returns."""
    data, latent = _elements(work)
    return (OPS[work.op].fields * data + 2 * latent + _columns(work)) * work.dtype.itemsize


def _elements(work: Work) -> tuple[int, int]:
    """Of the data and of ``mu``; 0 where the op has none."""
    op = OPS[work.op]
    has_data, has_latent = op.inputs is not _latent, len(op.leaves) > 1 and not op.learned
    return has_data * math.prod(work.shape), has_latent * work.shape[0] * (work.latent or work.shape[1])


def _columns(work: Work) -> int:
    """Elements of a learned parameter."""
    return OPS[work.op].learned * work.shape[1]
