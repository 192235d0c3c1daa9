"""Discretised logistics in pure torch, as PixelCNN++ has them (Salimans, Karpathy, Chen, Kingma 2017, ICLR, section 2).

Data are levels k of 256, scaled to x = 2k/255 − 1. A level holds the mass of a logistic variable between x − 1/255 and
x + 1/255; the lowest level all below, the highest all above. Where that is at most 1e-5, the density at the middle
times the width stands for it, as in the authors' code: log s is at least −7, so this happens far from the mean only.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

LOG_SCALE_MIN = -7.0
EDGE = 0.999  # beyond, in [−1, 1], a level is the lowest or the highest
NARROW = 1e-5
TINY = 1e-30  # for a logarithm that nobody looks at
KINDS = {1: 2, 3: 3}  # parameters of a component in each channel: mean, log scale, and of RGB a coefficient


def parameters_of(channels: int) -> int:
    """Parameters of one component: 10 of RGB, 3 of one channel."""
    return 1 + channels * KINDS[channels]


def log_probability(x: Tensor, mean: Tensor, log_scale: Tensor) -> Tensor:
    """The log probability of the level x in [−1, 1], nats."""
    log_scale = log_scale.clamp(min=LOG_SCALE_MIN)
    inverse, centred = torch.exp(-log_scale), x - mean
    middle, above, below = (inverse * (centred + d / 255) for d in (0, 1, -1))
    # σ(above) − σ(below) = σ(above)·σ(−below)·(1 − e^(below − above)): a difference that does not cancel
    width = (-torch.expm1(inverse * (-2 / 255))).clamp(min=TINY)
    mass = F.logsigmoid(above) + F.logsigmoid(-below) + torch.log(width)
    density = F.logsigmoid(middle) + F.logsigmoid(-middle) - log_scale - math.log(127.5)
    inside = torch.where(mass > math.log(NARROW), mass, density)
    return torch.where(x < -EDGE, F.logsigmoid(above), torch.where(x > EDGE, F.logsigmoid(-below), inside))


def scaled(target: Tensor, dtype: torch.dtype) -> Tensor:
    """Levels in [−1, 1]: uint8 as they are, floats in [0, 1]."""
    return target.to(dtype) * 2 - 1 if target.is_floating_point() else (target.to(dtype) * 2 - 255) / 255


def by_component(params: Tensor, channels: int) -> tuple[Tensor, list[Tensor]]:
    """Of ``[..., 10·K]``: the logits ``[..., K]``, and for each kind of parameter ``[..., channels, K]``."""
    each = KINDS[channels]
    count = params.shape[-1] // parameters_of(channels)
    rest = params[..., count:].reshape(*params.shape[:-1], channels, each, count)
    return params[..., :count], [rest[..., kind, :] for kind in range(each)]


def means(x: Tensor, mean: Tensor, coefficients: Tensor | None) -> Tensor:
    """Those of green given red, and of blue given both (section 2.2); x is ``[..., channels, 1]``."""
    if coefficients is None:
        return mean
    red, green, blue = mean.unbind(-2)
    c = torch.tanh(coefficients)
    green = green + c[..., 0, :] * x[..., 0, :]
    blue = blue + c[..., 1, :] * x[..., 0, :] + c[..., 2, :] * x[..., 1, :]
    return torch.stack((red, green, blue), dim=-2)


def mixture_nll(params: Tensor, target: Tensor, channels: int, channels_last: bool) -> Tensor:
    """−log Σ_k π_k ∏_c p_kc(x_c) of each pixel, ``[B, *spatial]``."""
    if not channels_last:
        params, target = params.movedim(1, -1), target.movedim(1, -1)
    x = scaled(target, params.dtype).unsqueeze(-1)
    logits, (mean, log_scale, *coefficients) = by_component(params, channels)
    mean = means(x, mean, coefficients[0] if coefficients else None)
    log_probs = log_probability(x, mean, log_scale).sum(-2) + logits.log_softmax(-1)
    return -log_probs.logsumexp(-1)
