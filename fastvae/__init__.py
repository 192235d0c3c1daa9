"""Fused sampling and loss kernels for variational autoencoders.

>>> import torch, fastvae
>>> mu, logvar = torch.randn(8, 20), torch.randn(8, 20)
>>> z = fastvae.reparameterize(mu, logvar)
>>> loss, reconstruction, kl = fastvae.elbo_loss(torch.randn(8, 784), torch.rand(8, 784), mu, logvar)
"""

import importlib
from types import ModuleType

from torch import fx as _fx

from . import functional, nn, random
from .discrete import (
    categorical_kl,
    categorical_nll,
    discretized_logistic_mixture_nll,
    discretized_logistic_mixture_sample,
    discretized_logistic_nll,
    gumbel_softmax,
    straight_through_sample,
)
from .functional import (
    bce,
    bce_with_logits,
    continuous_bernoulli_with_logits,
    elbo_loss,
    gaussian_kl,
    gaussian_nll,
    l1,
    laplace_nll,
    linear_bce,
    mse,
    negative_binomial_nll,
    negative_binomial_nll_from_scores,
    poisson_nll,
    poisson_nll_with_log_rate,
    reparameterize,
    sample_with_kl,
    vae_loss,
    zero_inflated_negative_binomial_nll,
    zero_inflated_negative_binomial_nll_from_scores,
)
from .importance import gaussian_log_prob, importance_weighted_bound, log_q_minus_log_p
from .pairs import aggregate_posterior, gaussian_mixture_log_prob, mmd
from .registry import backends, use_backend

__version__ = "0.1.0"

_LOADED_LATE = ("distributions", "integrations", "models")


def __getattr__(name: str) -> ModuleType:
    """``fastvae.models`` and the others without an import of their own, loaded when first asked for."""
    if name in _LOADED_LATE:
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


__all__ = [
    "aggregate_posterior",
    "backends",
    "bce",
    "bce_with_logits",
    "categorical_kl",
    "categorical_nll",
    "continuous_bernoulli_with_logits",
    "discretized_logistic_mixture_nll",
    "discretized_logistic_mixture_sample",
    "discretized_logistic_nll",
    "elbo_loss",
    "functional",
    "gaussian_kl",
    "gaussian_log_prob",
    "gaussian_mixture_log_prob",
    "gaussian_nll",
    "gumbel_softmax",
    "importance_weighted_bound",
    "l1",
    "laplace_nll",
    "linear_bce",
    "log_q_minus_log_p",
    "mmd",
    "mse",
    "negative_binomial_nll",
    "negative_binomial_nll_from_scores",
    "nn",
    "poisson_nll",
    "poisson_nll_with_log_rate",
    "random",
    "reparameterize",
    "sample_with_kl",
    "straight_through_sample",
    "use_backend",
    "vae_loss",
    "zero_inflated_negative_binomial_nll",
    "zero_inflated_negative_binomial_nll_from_scores",
]

for _name in __all__:  # a call of each is one node to torch.fx.symbolic_trace
    if hasattr(functional, _name):
        _fx.wrap(_name)
