"""One table of the ops: how each is called, what it should compute in float64, and inputs for it."""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Callable, Iterator
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import fastvae

import formulas

DEVICE = os.environ.get("FASTVAE_TEST_DEVICE", "cpu")  # where conftest.py has tensors made
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # Triton's kernels are among the CPU backends, and slow
BACKENDS = [n for n, s in fastvae.backends().items() if s.available and {DEVICE, "any"} & set(s.devices)]
#: sets of CPU instructions the compiled loops exist in, whether or not this processor has them
INSTRUCTION_SETS = ("baseline", "avx2", "avx512")
#: what the table runs on: each backend; and cpp by each set the processor has, of which the widest is plain "cpp"
TARGETS = list(BACKENDS)
if "cpp" in BACKENDS:
    from fastvae import _C

    TARGETS += [f"cpp-{name}" for name in _C.instruction_sets()[:-1]]
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
REDUCTIONS = ("none", "example", "sum", "mean", "batchmean")
CLAMP = (-0.5, 0.75)


class Op(NamedTuple):
    """``call`` is ours on inputs in any dtype; ``expected`` the same, elementwise, in plain float64 torch.

    ``inputs`` draws float64 inputs, of which the first ``differentiable`` are; ``eager`` is what people write.
    """

    call: Callable[..., Tensor]
    expected: Callable[..., Tensor]
    inputs: Callable[..., list[Tensor]]
    eager: Callable[..., Tensor]
    differentiable: int
    counts: bool = False  # the target is counts, which no finite difference moves


def logits_and_target(*shape: int) -> list[Tensor]:
    return [torch.randn(*shape, dtype=torch.float64) * 4, torch.rand(*shape, dtype=torch.float64)]


def probs_and_target(*shape: int) -> list[Tensor]:
    return [torch.rand(*shape, dtype=torch.float64) * 0.98 + 0.01, torch.rand(*shape, dtype=torch.float64)]


def mu_and_logvar(*shape: int) -> list[Tensor]:
    return [torch.randn(*shape, dtype=torch.float64), torch.randn(*shape, dtype=torch.float64)]


def mu_and_std(*shape: int) -> list[Tensor]:
    return [torch.randn(*shape, dtype=torch.float64), torch.rand(*shape, dtype=torch.float64) + 0.05]


def two_gaussians(*shape: int) -> list[Tensor]:
    return [torch.randn(*shape, dtype=torch.float64) for _ in range(4)]


def mean_scale_and_target(*shape: int) -> list[Tensor]:
    mean, target = logits_and_target(*shape)
    return [mean, torch.rand(*shape, dtype=torch.float64) + 0.2, target]


def mean_log_scale_and_target(*shape: int) -> list[Tensor]:
    mean, target = logits_and_target(*shape)
    return [mean, torch.randn(*shape, dtype=torch.float64), target]


def mean_and_count(*shape: int) -> list[Tensor]:
    mean = torch.randn(*shape, dtype=torch.float64).mul(1.5).exp()
    return [mean, torch.poisson(mean)]


def log_rate_and_count(*shape: int) -> list[Tensor]:
    """Small: l·x, which is rounded, cancels against log x! in the formula as it is written."""
    log_rate = torch.randn(*shape, dtype=torch.float64) * 0.7
    return [log_rate, torch.poisson(log_rate.exp())]


def mean_dispersion_and_count(*shape: int) -> list[Tensor]:
    mean, count = mean_and_count(*shape)
    return [mean, torch.randn(*shape, dtype=torch.float64).mul(2).exp(), count]


def poisson(y: Tensor, x: Tensor) -> Tensor:
    return F.poisson_nll_loss(y, x, log_input=False, reduction="none") + torch.lgamma(x + 1)


def poisson_log_rate(y: Tensor, x: Tensor) -> Tensor:
    return F.poisson_nll_loss(y, x, reduction="none") + torch.lgamma(x + 1)


def negative_binomial(mean: Tensor, theta: Tensor, x: Tensor) -> Tensor:
    """Minus ``log_nb_positive`` of scvi-tools."""
    log_total = torch.log(theta + mean + 1e-8)
    log_gammas = torch.lgamma(x + theta) - torch.lgamma(theta) - torch.lgamma(x + 1)
    return theta * (log_total - torch.log(theta + 1e-8)) + x * (log_total - torch.log(mean + 1e-8)) - log_gammas


def poisson_exactly(rate: Tensor, x: Tensor) -> Tensor:
    return formulas.poisson(rate, x, 0.0, 0.0).value.value


def negative_binomial_exactly(mean: Tensor, theta: Tensor, x: Tensor) -> Tensor:
    """The textbook's logarithms of Γ cancel, in float64 too."""
    return formulas.negative_binomial(mean, x, theta, 0.0).value.value


def zero_inflated_inputs(*shape: int) -> list[Tensor]:
    mean, theta, count = mean_dispersion_and_count(*shape)
    return [mean, theta, torch.randn(*shape, dtype=torch.float64) * 4, count]


def zero_inflated(mean: Tensor, theta: Tensor, logits: Tensor, x: Tensor) -> Tensor:
    """Minus ``log_zinb_positive`` of scvi-tools."""
    log_total, log_theta = torch.log(theta + mean + 1e-8), torch.log(theta + 1e-8)
    log_zero = -logits + theta * (log_theta - log_total)
    log_gammas = torch.lgamma(x + theta) - torch.lgamma(theta) - torch.lgamma(x + 1)
    at_zero = F.softplus(log_zero) - F.softplus(-logits)
    elsewhere = -F.softplus(-logits) + log_zero + x * (torch.log(mean + 1e-8) - log_total) + log_gammas
    return -torch.where(x < 1e-8, at_zero, elsewhere)


def zero_inflated_exactly(mean: Tensor, theta: Tensor, logits: Tensor, x: Tensor) -> Tensor:
    """−log(σ(π) + σ(−π)·e^(−n)) of a zero, as a sum of probabilities, which do not cancel."""
    nll = negative_binomial_exactly(mean, theta, x)
    at_zero = -torch.logaddexp(F.logsigmoid(logits), F.logsigmoid(-logits) - nll)
    return torch.where(x == 0, at_zero, nll - F.logsigmoid(-logits))


LIBRARY = 400.0  # counts of a cell, where a mean comes from scores


def scores_dispersion_and_count(*shape: int) -> list[Tensor]:
    scores, theta, _ = mean_dispersion_and_count(*shape)
    scores = scores.log()
    return [scores, theta, torch.poisson(of_scores(scores))]


def zero_inflated_from_scores(*shape: int) -> list[Tensor]:
    scores, theta, count = scores_dispersion_and_count(*shape)
    return [scores, theta, torch.randn(*shape, dtype=torch.float64) * 4, count]


def of_scores(scores: Tensor, library: float | Tensor = LIBRARY) -> Tensor:
    """The mean: as much of the library, one for all or ``[B]``, as softmax over an example says."""
    size = library if isinstance(library, float) else library[:, None]
    return (size * scores.flatten(1).softmax(1)).view(scores.shape)


def clipped_bce(y: Tensor, x: Tensor) -> Tensor:
    return -x * y.clamp(1e-8, 1 - 1e-8).log() - (1 - x) * (1 - y).clamp(1e-8, 1 - 1e-8).log()


def continuous_bernoulli(y: Tensor, x: Tensor) -> Tensor:
    return torch.log(torch.expm1(y) / y) - x * y


def continuous_bernoulli_of_torch(y: Tensor, x: Tensor) -> Tensor:
    """Near probability ½ torch goes by two terms of a series: not exact enough to be the expected value."""
    distribution = torch.distributions.ContinuousBernoulli(logits=y, lims=(0.48, 0.52), validate_args=False)
    return -distribution.log_prob(x)


def kl_logvar(mu: Tensor, logvar: Tensor) -> Tensor:
    return -0.5 * (1 + logvar - mu.pow(2) - logvar.exp())


def kl_std(mu: Tensor, std: Tensor) -> Tensor:
    return 0.5 * (mu.pow(2) + std.pow(2) - torch.log(1e-8 + std.pow(2)) - 1)


def kl_prior(mu: Tensor, logvar: Tensor, prior_mu: Tensor, prior_logvar: Tensor) -> Tensor:
    q = torch.distributions.Normal(mu, (0.5 * logvar).exp(), validate_args=False)
    p = torch.distributions.Normal(prior_mu, (0.5 * prior_logvar).exp(), validate_args=False)
    return torch.distributions.kl_divergence(q, p)


OPS: dict[str, Op] = {
    "bce": Op(fastvae.bce, clipped_bce, probs_and_target, clipped_bce, 1),
    "bce_eps_none": Op(
        lambda y, x, **kw: fastvae.bce(y, x, eps=None, **kw),
        lambda y, x: F.binary_cross_entropy(y, x, reduction="none"),
        probs_and_target,
        lambda y, x: F.binary_cross_entropy(y, x, reduction="none"),
        1,
    ),
    "bce_with_logits": Op(
        fastvae.bce_with_logits,
        lambda y, x: F.binary_cross_entropy_with_logits(y, x, reduction="none"),
        logits_and_target,
        lambda y, x: F.binary_cross_entropy_with_logits(y, x, reduction="none"),
        1,
    ),
    "continuous_bernoulli_with_logits": Op(
        fastvae.continuous_bernoulli_with_logits,
        continuous_bernoulli,
        logits_and_target,
        continuous_bernoulli_of_torch,
        1,
    ),
    "mse": Op(
        fastvae.mse,
        lambda y, x: F.mse_loss(y, x, reduction="none"),
        logits_and_target,
        lambda y, x: F.mse_loss(y, x, reduction="none"),
        1,
    ),
    "l1": Op(
        fastvae.l1,
        lambda y, x: F.l1_loss(y, x, reduction="none"),
        logits_and_target,
        lambda y, x: F.l1_loss(y, x, reduction="none"),
        1,
    ),
    "gaussian_nll": Op(
        lambda y, x, **kw: fastvae.gaussian_nll(y, x, var=0.7, **kw),
        lambda y, x: 0.5 * ((x - y) ** 2 / 0.7 + math.log(2 * math.pi * 0.7)),
        logits_and_target,
        lambda y, x: F.gaussian_nll_loss(y, x, torch.full_like(y, 0.7), full=True, reduction="none"),
        1,
    ),
    "laplace_nll": Op(
        lambda y, x, **kw: fastvae.laplace_nll(y, x, scale=0.3, **kw),
        lambda y, x: (x - y).abs() / 0.3 + math.log(2 * 0.3),
        logits_and_target,
        lambda y, x: -torch.distributions.Laplace(y, 0.3, validate_args=False).log_prob(x),
        1,
    ),
    "gaussian_nll_var": Op(
        lambda y, var, x, **kw: fastvae.gaussian_nll(y, x, var=var, **kw),
        lambda y, var, x: 0.5 * ((x - y) ** 2 / var + torch.log(2 * math.pi * var)),
        mean_scale_and_target,
        lambda y, var, x: F.gaussian_nll_loss(y, x, var, full=True, eps=0, reduction="none"),
        2,
    ),
    "gaussian_nll_logvar": Op(
        lambda y, logvar, x, **kw: fastvae.gaussian_nll(y, x, logvar=logvar, **kw),
        lambda y, logvar, x: 0.5 * ((x - y) ** 2 * torch.exp(-logvar) + logvar + math.log(2 * math.pi)),
        mean_log_scale_and_target,
        lambda y, logvar, x: 0.5 * ((x - y) ** 2 / torch.exp(logvar) + logvar + math.log(2 * math.pi)),
        2,
    ),
    "laplace_nll_scale": Op(
        lambda y, scale, x, **kw: fastvae.laplace_nll(y, x, scale=scale, **kw),
        lambda y, scale, x: (x - y).abs() / scale + torch.log(2 * scale),
        mean_scale_and_target,
        lambda y, scale, x: -torch.distributions.Laplace(y, scale, validate_args=False).log_prob(x),
        2,
    ),
    "laplace_nll_log_scale": Op(
        lambda y, log_scale, x, **kw: fastvae.laplace_nll(y, x, log_scale=log_scale, **kw),
        lambda y, log_scale, x: (x - y).abs() * torch.exp(-log_scale) + log_scale + math.log(2),
        mean_log_scale_and_target,
        lambda y, log_scale, x: -torch.distributions.Laplace(y, log_scale.exp(), validate_args=False).log_prob(x),
        2,
    ),
    "poisson_nll": Op(fastvae.poisson_nll, poisson_exactly, mean_and_count, poisson, 1, counts=True),
    "poisson_nll_with_log_rate": Op(
        fastvae.poisson_nll_with_log_rate, poisson_log_rate, log_rate_and_count, poisson_log_rate, 1, counts=True
    ),
    "negative_binomial_nll": Op(
        lambda y, x, **kw: fastvae.negative_binomial_nll(y, x, dispersion=1.7, **kw),
        lambda y, x: negative_binomial_exactly(y, torch.full_like(y, 1.7), x),
        mean_and_count,
        lambda y, x: negative_binomial(y, torch.full_like(y, 1.7), x),
        1,
        counts=True,
    ),
    "negative_binomial_nll_dispersion": Op(
        lambda y, theta, x, **kw: fastvae.negative_binomial_nll(y, x, dispersion=theta, **kw),
        negative_binomial_exactly,
        mean_dispersion_and_count,
        negative_binomial,
        2,
        counts=True,
    ),
    "zero_inflated_negative_binomial_nll": Op(
        lambda y, theta, logits, x, **kw: fastvae.zero_inflated_negative_binomial_nll(
            y, x, dispersion=theta, zero_logits=logits, **kw
        ),
        zero_inflated_exactly,
        zero_inflated_inputs,
        zero_inflated,
        3,
        counts=True,
    ),
    "negative_binomial_nll_from_scores": Op(
        lambda s, theta, x, **kw: fastvae.negative_binomial_nll_from_scores(s, LIBRARY, x, dispersion=theta, **kw),
        lambda s, theta, x: negative_binomial_exactly(of_scores(s), theta, x),
        scores_dispersion_and_count,
        lambda s, theta, x: negative_binomial(of_scores(s), theta, x),
        2,
        counts=True,
    ),
    "zero_inflated_negative_binomial_nll_from_scores": Op(
        lambda s, theta, logits, x, **kw: fastvae.zero_inflated_negative_binomial_nll_from_scores(
            s, LIBRARY, x, dispersion=theta, zero_logits=logits, **kw
        ),
        lambda s, theta, logits, x: zero_inflated_exactly(of_scores(s), theta, logits, x),
        zero_inflated_from_scores,
        lambda s, theta, logits, x: zero_inflated(of_scores(s), theta, logits, x),
        3,
        counts=True,
    ),
    "gaussian_kl": Op(fastvae.gaussian_kl, kl_logvar, mu_and_logvar, kl_logvar, 2),
    "gaussian_kl_std": Op(lambda mu, std, **kw: fastvae.gaussian_kl(mu, std=std, **kw), kl_std, mu_and_std, kl_std, 2),
    "gaussian_kl_prior": Op(
        lambda mu, logvar, prior_mu, prior_logvar, **kw: fastvae.gaussian_kl(
            mu, logvar, prior_mu=prior_mu, prior_logvar=prior_logvar, **kw
        ),
        kl_prior,
        two_gaussians,
        kl_prior,
        4,
    ),
    "gaussian_kl_clamped": Op(
        lambda mu, logvar, **kw: fastvae.gaussian_kl(mu, logvar, logvar_clamp=CLAMP, **kw),
        lambda mu, logvar: kl_logvar(mu, logvar.clamp(*CLAMP)),
        mu_and_logvar,
        lambda mu, logvar: kl_logvar(mu, logvar.clamp(*CLAMP)),
        2,
    ),
    "gaussian_kl_prior_clamped": Op(
        lambda mu, logvar, prior_mu, prior_logvar, **kw: fastvae.gaussian_kl(
            mu, logvar, prior_mu=prior_mu, prior_logvar=prior_logvar, logvar_clamp=CLAMP, **kw
        ),
        lambda mu, logvar, *prior: kl_prior(mu, logvar.clamp(*CLAMP), *prior),
        two_gaussians,
        lambda mu, logvar, *prior: kl_prior(mu, logvar.clamp(*CLAMP), *prior),
        4,
    ),
    "gaussian_kl_free_bits": Op(
        lambda mu, logvar, **kw: fastvae.gaussian_kl(mu, logvar, free_bits=0.4, **kw),
        lambda mu, logvar: kl_logvar(mu, logvar).clamp(min=0.4),
        mu_and_logvar,
        lambda mu, logvar: kl_logvar(mu, logvar).clamp(min=0.4),
        2,
    ),
}


def reduce(elements: Tensor, reduction: str) -> Tensor:
    """What each reduction means, in plain torch."""
    if reduction == "none":
        return elements
    if reduction == "example":
        return elements.flatten(1).sum(dim=1) if elements.dim() > 1 else elements
    if reduction == "batchmean":
        return elements.sum() / elements.shape[0]
    return elements.sum() if reduction == "sum" else elements.mean()


def value_and_gradients(
    call: Callable[..., Tensor], inputs: list[Tensor], differentiable: int, upstream: Tensor | None = None
):
    """The value and its gradients in the first ``differentiable`` inputs, for ``upstream`` (default: 1)."""
    leaves = [t.detach().requires_grad_(k < differentiable) for k, t in enumerate(inputs)]
    value = call(*leaves)
    upstream = torch.ones_like(value) if upstream is None else upstream.to(value.dtype)
    return value.detach(), list(torch.autograd.grad(value, leaves[:differentiable], upstream))


@contextlib.contextmanager
def instruction_set(name: str) -> Iterator[None]:
    """Inside, the compiled CPU loops are those of ``name``; or the test is skipped where they cannot be."""
    if not fastvae.backends()["cpp"].available:
        pytest.skip(fastvae.backends()["cpp"].reason)
    before = _C.instructions()
    try:
        _C.instructions(name)
    except ValueError as error:
        pytest.skip(str(error))
    try:
        yield
    finally:
        _C.instructions(before)


@contextlib.contextmanager
def on(target: str) -> Iterator[None]:
    """Inside, the backend of ``TARGETS`` is in use, by the instructions it is asked to use."""
    name, _, instructions = target.partition("-")
    with fastvae.use_backend(name), instruction_set(instructions) if instructions else contextlib.nullcontext():
        yield
