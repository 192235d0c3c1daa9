"""The opponents: what people write around a VAE today, in plain PyTorch. Losses are nats per example.

Sources: the PyTorch VAE example (``F.binary_cross_entropy``, summed, and the KL), its variant on logits, the textbook's
clipped Bernoulli likelihood, and ``log_nb_positive`` of scvi-tools.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def as_float(target: Tensor, like: Tensor) -> Tensor:
    """Images as the loss wants them: uint8 becomes x/255 in the dtype of ``like``."""
    return target.to(like.dtype) / 255 if target.dtype == torch.uint8 else target


def bce(probs: Tensor, target: Tensor) -> Tensor:
    return F.binary_cross_entropy(probs, as_float(target, probs), reduction="sum") / probs.shape[0]


def bce_clipped(probs: Tensor, target: Tensor) -> Tensor:
    y, x = probs.clamp(1e-8, 1 - 1e-8), as_float(target, probs)
    return -(x * torch.log(y) + (1 - x) * torch.log(1 - y)).sum() / probs.shape[0]


def bce_with_logits(logits: Tensor, target: Tensor) -> Tensor:
    return F.binary_cross_entropy_with_logits(logits, as_float(target, logits), reduction="sum") / logits.shape[0]


def bce_of_sigmoid(logits: Tensor, target: Tensor) -> Tensor:
    return bce(torch.sigmoid(logits), target)


def gaussian_kl(mu: Tensor, logvar: Tensor) -> Tensor:
    return -0.5 * torch.sum(1 + logvar - mu.pow(2) - logvar.exp()) / mu.shape[0]


def reparameterize(mu: Tensor, logvar: Tensor) -> Tensor:
    std = torch.exp(0.5 * logvar)
    return mu + torch.randn_like(std) * std


def sample_with_kl(mu: Tensor, logvar: Tensor) -> tuple[Tensor, Tensor]:
    return reparameterize(mu, logvar), gaussian_kl(mu, logvar)


def elbo_loss(logits: Tensor, target: Tensor, mu: Tensor, logvar: Tensor) -> Tensor:
    return bce_with_logits(logits, target) + gaussian_kl(mu, logvar)


def elbo_loss_of_sigmoid(logits: Tensor, target: Tensor, mu: Tensor, logvar: Tensor) -> Tensor:
    return bce_of_sigmoid(logits, target) + gaussian_kl(mu, logvar)


def negative_binomial_nll(mean: Tensor, theta: Tensor, counts: Tensor) -> Tensor:
    log_total, log_theta = torch.log(theta + mean + 1e-8), torch.log(theta + 1e-8)
    log_gammas = torch.lgamma(counts + theta) - torch.lgamma(theta) - torch.lgamma(counts + 1)
    nll = theta * (log_total - log_theta) + counts * (log_total - torch.log(mean + 1e-8)) - log_gammas
    return nll.sum() / mean.shape[0]


def zero_inflated_negative_binomial_nll(mean: Tensor, theta: Tensor, logits: Tensor, counts: Tensor) -> Tensor:
    """As in scvi-tools: both cases of every element, each times whether it is one."""
    log_total, log_none = torch.log(theta + mean + 1e-8), F.softplus(-logits)
    log_zero = -logits + theta * (torch.log(theta + 1e-8) - log_total)
    log_gammas = torch.lgamma(counts + theta) - torch.lgamma(theta) - torch.lgamma(counts + 1)
    of_zero = F.softplus(log_zero) - log_none
    of_count = log_zero - log_none + counts * (torch.log(mean + 1e-8) - log_total) + log_gammas
    nll = (counts < 1e-8).to(mean) * of_zero + (counts > 1e-8).to(mean) * of_count
    return -nll.sum() / mean.shape[0]


def negative_binomial_nll_from_scores(scores: Tensor, theta: Tensor, library: Tensor, counts: Tensor) -> Tensor:
    """As scVI's decoder ends: shares of the genes, times the counts of a cell."""
    return negative_binomial_nll(library[:, None] * scores.softmax(-1), theta, counts)


def linear_bce(hidden: Tensor, weight: Tensor, bias: Tensor, target: Tensor) -> Tensor:
    return bce_with_logits(F.linear(hidden, weight, bias), target)
