"""Each reconstruction term as two formulas: the negative log-likelihood of x given y, and its derivative in y.

The derivative is written in differentiable torch, so that a second backward can go through it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

Formula = Callable[[Tensor, Tensor, float], Tensor]


class Likelihood(NamedTuple):
    """``nll(y, x, parameter)`` in nats an element and ``derivative(y, x, parameter)`` = ∂nll/∂y."""

    nll: Formula
    derivative: Formula


def positive_part(y: Tensor) -> Tensor:
    """max(y, 0) with the derivative ½ at 0, which is what the two Bernoulli terms below need there."""
    return 0.5 * (y + y.abs())


def bernoulli_logits_nll(y: Tensor, x: Tensor, _: float) -> Tensor:
    return positive_part(y) - y * x + torch.log1p(torch.exp(-y.abs()))


def bernoulli_logits_derivative(y: Tensor, x: Tensor, _: float) -> Tensor:
    return torch.sigmoid(y) - x


def bernoulli_probs_nll(y: Tensor, x: Tensor, eps: float) -> Tensor:
    """Both y and 1 − y are clamped: ``1 − clamp(y)`` would round to 0 for y near 1 and give 0·(−∞)."""
    return -x * torch.log(y.clamp(eps, 1 - eps)) - (1 - x) * torch.log((1 - y).clamp(eps, 1 - eps))


def bernoulli_probs_derivative(y: Tensor, x: Tensor, eps: float) -> Tensor:
    clipped = (y < eps) | (1 - y < eps)
    safe = torch.where(clipped, 0.5, y)
    return torch.where(clipped, 0.0, (1 - x) / (1 - safe) - x / safe)


def bernoulli_probs_log_clamped_nll(y: Tensor, x: Tensor, _: float) -> Tensor:
    """What ``F.binary_cross_entropy`` computes: each logarithm clamped at −100."""
    return (x - 1) * torch.log1p(-y).clamp(min=-100) - x * torch.log(y).clamp(min=-100)


def bernoulli_probs_log_clamped_derivative(y: Tensor, x: Tensor, _: float) -> Tensor:
    return (y - x) / ((1 - y) * y).clamp(min=1e-12)


def continuous_bernoulli_logits_nll(y: Tensor, x: Tensor, _: float) -> Tensor:
    """log((eʸ − 1)/y) − x·y: the log-normaliser of Loaiza-Ganem & Cunningham (2019), eq. 9, in the logit."""
    u = y.abs()
    small = u < 0.5
    v = torch.where(small, 1.0, u)
    u2 = torch.where(small, y * y, 0.0)
    series = u2 * (1 / 24 + u2 * (-1 / 2880 + u2 * (1 / 181440 + u2 * (-1 / 9676800 + u2 / 479001600))))
    return torch.where(small, 0.5 * y + series, positive_part(y) + torch.log(-torch.expm1(-v) / v)) - x * y


def continuous_bernoulli_logits_derivative(y: Tensor, x: Tensor, _: float) -> Tensor:
    """The mean 1/(1 − e⁻ʸ) − 1/y, minus x."""
    small = y.abs() < 0.5
    v = torch.where(small, 1.0, y)
    s = torch.where(small, y, 0.0)
    s2 = s * s
    series = 0.5 + s * (1 / 12 + s2 * (-1 / 720 + s2 * (1 / 30240 + s2 * (-1 / 1209600 + s2 / 47900160))))
    return torch.where(small, series, -1 / torch.expm1(-v) - 1 / v) - x


def gaussian_nll(y: Tensor, x: Tensor, var: float) -> Tensor:
    return (x - y) ** 2 * (0.5 / var) + 0.5 * math.log(2 * math.pi * var)


def gaussian_derivative(y: Tensor, x: Tensor, var: float) -> Tensor:
    return (y - x) * (1 / var)


def mse_nll(y: Tensor, x: Tensor, _: float) -> Tensor:
    return (x - y) ** 2


def mse_derivative(y: Tensor, x: Tensor, _: float) -> Tensor:
    return 2 * (y - x)


def l1_nll(y: Tensor, x: Tensor, _: float) -> Tensor:
    return (x - y).abs()


def l1_derivative(y: Tensor, x: Tensor, _: float) -> Tensor:
    d = y - x
    return torch.where(d.isnan(), d, torch.sign(d))


LIKELIHOODS: dict[str, Likelihood] = {
    "bernoulli_logits": Likelihood(bernoulli_logits_nll, bernoulli_logits_derivative),
    "bernoulli_probs": Likelihood(bernoulli_probs_nll, bernoulli_probs_derivative),
    "bernoulli_probs_log_clamped": Likelihood(bernoulli_probs_log_clamped_nll, bernoulli_probs_log_clamped_derivative),
    "continuous_bernoulli_logits": Likelihood(continuous_bernoulli_logits_nll, continuous_bernoulli_logits_derivative),
    "gaussian": Likelihood(gaussian_nll, gaussian_derivative),
    "mse": Likelihood(mse_nll, mse_derivative),
    "l1": Likelihood(l1_nll, l1_derivative),
}
