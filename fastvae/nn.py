"""A module for each function of :mod:`fastvae.functional`, with the same argument names.

The options go to the constructor, the tensors to ``forward``; the ``repr`` says what a model will compute.

>>> ELBOLoss(beta=4.0)
ELBOLoss(likelihood='bernoulli_logits', logvar_clamp=None, beta=4.0, free_bits=0.0, reduction='batchmean')
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributions import Distribution

from . import checks, discrete, functional, pairs
from .functional import Parameter, Prior
from .kernels import likelihoods

__all__ = [
    "MMD",
    "AggregatePosterior",
    "BCELoss",
    "BCEWithLogitsLoss",
    "CategoricalKL",
    "CategoricalNLLLoss",
    "ContinuousBernoulliWithLogitsLoss",
    "DiscretizedLogisticMixtureNLLLoss",
    "DiscretizedLogisticNLLLoss",
    "ELBOLoss",
    "GaussianKL",
    "GaussianMixturePrior",
    "GaussianNLLLoss",
    "GumbelSoftmax",
    "L1Loss",
    "LaplaceNLLLoss",
    "LinearBCE",
    "MSELoss",
    "NegativeBinomialNLLFromScoresLoss",
    "NegativeBinomialNLLLoss",
    "PoissonNLLLoss",
    "PoissonNLLWithLogRateLoss",
    "Reparameterize",
    "SampleWithKL",
    "StraightThroughSample",
    "ZeroInflatedNegativeBinomialNLLFromScoresLoss",
    "ZeroInflatedNegativeBinomialNLLLoss",
]


_CHECKS: dict[str, Callable[[Any], object]] = {
    "reduction": checks.reduction,
    "samples": checks.sample_count,
    "logvar_clamp": checks.logvar_clamp,
    "free_bits": lambda value: isinstance(value, Tensor) or checks.number("free_bits", value, 0),
    "free_bits_per": checks.group,
    "capacity": lambda value: value is None or checks.beta(value, "capacity"),
    "optimal_sigma": bool,
    "full": bool,
    "std_eps": lambda value: value is None or checks.number("std_eps", value, 0),
    "eps": lambda value: value is None or checks.number("eps", value, 0, 0.5, above=True),
    # a tensor is checked with the data it must fit
    **dict.fromkeys(("var", "logvar", "scale", "log_scale", "dispersion", "weight", "pos_weight"), lambda value: None),
    "beta": checks.beta,
    "likelihood": checks.likelihood,
    "chunk": checks.chunk,
    "balance": lambda value: value is None or checks.number("balance", value, 0, 1),
    "unimix": lambda value: checks.number("unimix", value, 0, 1),
    "temperature": lambda value: checks.number("temperature", value, 0, above=True),
    "hard": bool,
    "dataset_size": pairs.dataset_size_of,
    "sampling": pairs.sampling_of,
    "kernel": pairs.kernel_of,
    "bandwidth": pairs.kernel_scales,
    "unbiased": bool,
}


#: options that are shown only where they are not this
_RARE: dict[str, Any] = {
    "weight": None,
    "pos_weight": None,
    "std_eps": None,
    "capacity": None,
    "free_bits_per": "element",
    "optimal_sigma": False,
    "full": True,
}


def _is_rare(name: str, value: object) -> bool:
    return name in _RARE and not isinstance(value, Tensor) and value == _RARE[name]


class _Op(nn.Module):
    """Keeps the options of one function as attributes, which may be set again, and shows them.

    A tensor among them is a buffer (a ``Parameter`` stays one), so that it moves and is saved with the model.
    """

    def __init__(self, **options: Any):
        super().__init__()
        self._names = tuple(options)
        for name, value in options.items():
            _CHECKS[name](value)
            if isinstance(value, Tensor) and not isinstance(value, nn.Parameter):
                self.register_buffer(name, value)
            else:
                setattr(self, name, value)

    @property
    def options(self) -> dict[str, Any]:
        """The options as they are now."""
        return {name: getattr(self, name) for name in self._names}

    def extra_repr(self) -> str:
        options = self.options.items()
        return ", ".join(f"{name}={value!r}" for name, value in options if not _is_rare(name, value))


def _given(family: str, **parameters: Parameter | None) -> dict[str, Parameter]:
    """The one of a likelihood's parameters that is given, or the number it has unless one is."""
    given = {name: value for name, value in parameters.items() if value is not None}
    if len(given) > 1:
        raise ValueError(f"at most one of {' and '.join(given)} may be given, got both")
    for name, value in given.items():
        row = likelihoods.LIKELIHOODS[likelihoods.parameters(family)[name]]
        if row.number is not None and not isinstance(value, Tensor):
            checks.number(name, value, row.number.low, above=True)
    return given or {next(iter(parameters)): likelihoods.DEFAULT_NUMBERS[family]}


class Reparameterize(_Op):
    """:func:`fastvae.reparameterize`."""

    def __init__(self, *, logvar_clamp: tuple[float, float] | None = None, samples: int | None = None):
        super().__init__(logvar_clamp=logvar_clamp, samples=samples)

    def forward(
        self,
        mu: Tensor,
        logvar: Tensor | None = None,
        *,
        std: Tensor | None = None,
        log_std: Tensor | None = None,
        std_raw: Tensor | None = None,
        generator: functional.Generators | None = None,
        seed: int | None = None,
        noise: Tensor | None = None,
    ) -> Tensor:
        """``[B, *latent]`` → z."""
        scale: dict[str, Any] = {"std": std, "log_std": log_std, "std_raw": std_raw}
        draw: dict[str, Any] = {"generator": generator, "seed": seed, "noise": noise}
        z: Tensor = functional.reparameterize(mu, logvar, **scale, **draw, **self.options)
        return z


class GaussianKL(_Op):
    """:func:`fastvae.gaussian_kl`."""

    def __init__(
        self,
        *,
        std_eps: float | None = None,
        logvar_clamp: tuple[float, float] | None = None,
        free_bits: float | Tensor = 0.0,
        free_bits_per: str = "element",
        reduction: str = "batchmean",
    ):
        super().__init__(
            std_eps=std_eps,
            logvar_clamp=logvar_clamp,
            free_bits=free_bits,
            free_bits_per=free_bits_per,
            reduction=reduction,
        )

    def forward(
        self,
        mu: Tensor | Distribution,
        logvar: Tensor | Distribution | None = None,
        *,
        std: Tensor | None = None,
        log_std: Tensor | None = None,
        std_raw: Tensor | None = None,
        prior_mu: Prior | None = None,
        prior_logvar: Prior | None = None,
        prior_std: Prior | None = None,
    ) -> Tensor:
        """``mu`` and ``logvar`` (or ``std=``, …), with ``prior_mu=`` and its scale if there is a prior → nats."""
        scale: dict[str, Any] = {"std": std, "log_std": log_std, "std_raw": std_raw}
        prior: dict[str, Any] = {"prior_mu": prior_mu, "prior_logvar": prior_logvar, "prior_std": prior_std}
        return functional.gaussian_kl(mu, logvar, **scale, **prior, **self.options)


class SampleWithKL(_Op):
    """:func:`fastvae.sample_with_kl`."""

    def __init__(
        self,
        *,
        logvar_clamp: tuple[float, float] | None = None,
        samples: int | None = None,
        free_bits: float | Tensor = 0.0,
        free_bits_per: str = "element",
        reduction: str = "batchmean",
    ):
        super().__init__(
            logvar_clamp=logvar_clamp,
            samples=samples,
            free_bits=free_bits,
            free_bits_per=free_bits_per,
            reduction=reduction,
        )

    def forward(
        self,
        mu: Tensor,
        logvar: Tensor | None = None,
        *,
        std: Tensor | None = None,
        log_std: Tensor | None = None,
        std_raw: Tensor | None = None,
        prior_mu: Prior | None = None,
        prior_logvar: Prior | None = None,
        prior_std: Prior | None = None,
        generator: torch.Generator | None = None,
        seed: int | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Tensors as for :class:`GaussianKL` → ``(z, kl)``."""
        scale: dict[str, Any] = {"std": std, "log_std": log_std, "std_raw": std_raw}
        prior: dict[str, Any] = {"prior_mu": prior_mu, "prior_logvar": prior_logvar, "prior_std": prior_std}
        return functional.sample_with_kl(mu, logvar, **scale, **prior, generator=generator, seed=seed, **self.options)


class BCELoss(_Op):
    """:func:`fastvae.bce`. A ``weight`` that is a tensor is a buffer, as in torch."""

    def __init__(
        self, weight: Tensor | None = None, *, eps: float | None = functional.BCE_EPS, reduction: str = "batchmean"
    ):
        super().__init__(weight=weight, eps=eps, reduction=reduction)

    def forward(self, probs: Tensor, target: Tensor) -> Tensor:
        """``[B, *data]`` twice → nats."""
        return functional.bce(probs, target, **self.options)


class BCEWithLogitsLoss(_Op):
    """:func:`fastvae.bce_with_logits`. ``weight`` and ``pos_weight`` are buffers, as in torch."""

    def __init__(self, weight: Tensor | None = None, *, pos_weight: Tensor | None = None, reduction: str = "batchmean"):
        super().__init__(weight=weight, pos_weight=pos_weight, reduction=reduction)

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        """``[B, *data]`` twice → nats."""
        return functional.bce_with_logits(logits, target, **self.options)


class ContinuousBernoulliWithLogitsLoss(_Op):
    """:func:`fastvae.continuous_bernoulli_with_logits`."""

    def __init__(self, *, reduction: str = "batchmean"):
        super().__init__(reduction=reduction)

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        """``[B, *data]`` twice → nats."""
        return functional.continuous_bernoulli_with_logits(logits, target, **self.options)


class MSELoss(_Op):
    """:func:`fastvae.mse`."""

    def __init__(self, *, reduction: str = "batchmean"):
        super().__init__(reduction=reduction)

    def forward(self, recon: Tensor, target: Tensor) -> Tensor:
        """``[B, *data]`` twice → squared error."""
        return functional.mse(recon, target, **self.options)


class L1Loss(_Op):
    """:func:`fastvae.l1`."""

    def __init__(self, *, reduction: str = "batchmean"):
        super().__init__(reduction=reduction)

    def forward(self, recon: Tensor, target: Tensor) -> Tensor:
        """``[B, *data]`` twice → absolute error."""
        return functional.l1(recon, target, **self.options)


class GaussianNLLLoss(_Op):
    """:func:`fastvae.gaussian_nll`."""

    def __init__(
        self,
        *,
        var: Parameter | None = None,
        logvar: Parameter | None = None,
        optimal_sigma: bool = False,
        full: bool = True,
        reduction: str = "batchmean",
    ):
        given: dict[str, Any] = {"var": var, "logvar": logvar}
        number = given if optimal_sigma else _given("gaussian", **given)
        super().__init__(**number, optimal_sigma=optimal_sigma, full=full, reduction=reduction)

    def forward(self, mean: Tensor, target: Tensor, var: Parameter | None = None) -> Tensor:
        """``[B, *data]`` twice → nats; a ``var`` given here, as to torch's module, is taken instead."""
        options = self.options
        if var is not None:
            options = {**options, "var": var, "logvar": None}
        return functional.gaussian_nll(mean, target, **options)


class LaplaceNLLLoss(_Op):
    """:func:`fastvae.laplace_nll`."""

    def __init__(
        self, *, scale: Parameter | None = None, log_scale: Parameter | None = None, reduction: str = "batchmean"
    ):
        super().__init__(**_given("laplace", scale=scale, log_scale=log_scale), reduction=reduction)

    def forward(self, loc: Tensor, target: Tensor) -> Tensor:
        """``[B, *data]`` twice → nats."""
        return functional.laplace_nll(loc, target, **self.options)


class ELBOLoss(_Op):
    """:func:`fastvae.elbo_loss`. To anneal, set ``loss.beta`` (or ``loss.capacity``)."""

    def __init__(
        self,
        *,
        likelihood: str = "bernoulli_logits",
        logvar_clamp: tuple[float, float] | None = None,
        beta: float | Tensor = 1.0,
        capacity: float | Tensor | None = None,
        free_bits: float | Tensor = 0.0,
        free_bits_per: str = "element",
        reduction: str = "batchmean",
    ):
        super().__init__(
            likelihood=likelihood,
            logvar_clamp=logvar_clamp,
            beta=beta,
            capacity=capacity,
            free_bits=free_bits,
            free_bits_per=free_bits_per,
            reduction=reduction,
        )

    def forward(
        self,
        recon: Tensor,
        target: Tensor,
        mu: Tensor,
        logvar: Tensor | None = None,
        **more: Any,
    ) -> functional.ELBOLoss:
        """``[B, *data]`` twice and ``[B, *latent]`` twice → ``(loss, reconstruction, kl)``.

        By name, what :func:`fastvae.elbo_loss` takes besides: ``std=``, ``prior_mu=``, ``samples=``, ``weight=``, …
        """
        return functional.elbo_loss(recon, target, mu, logvar, **{**self.options, **more})


class PoissonNLLLoss(_Op):
    """:func:`fastvae.poisson_nll`."""

    def __init__(self, *, reduction: str = "batchmean"):
        super().__init__(reduction=reduction)

    def forward(self, rate: Tensor, target: Tensor) -> Tensor:
        """``[B, *data]`` twice → nats."""
        return functional.poisson_nll(rate, target, **self.options)


class PoissonNLLWithLogRateLoss(_Op):
    """:func:`fastvae.poisson_nll_with_log_rate`."""

    def __init__(self, *, reduction: str = "batchmean"):
        super().__init__(reduction=reduction)

    def forward(self, log_rate: Tensor, target: Tensor) -> Tensor:
        """``[B, *data]`` twice → nats."""
        return functional.poisson_nll_with_log_rate(log_rate, target, **self.options)


class NegativeBinomialNLLLoss(_Op):
    """:func:`fastvae.negative_binomial_nll`; ``dispersion`` may be a ``Parameter``, which is learned then."""

    def __init__(self, *, dispersion: Parameter, reduction: str = "batchmean"):
        super().__init__(**_given("negative_binomial", dispersion=dispersion), reduction=reduction)

    def forward(self, mean: Tensor, target: Tensor) -> Tensor:
        """``[B, *data]`` twice → nats."""
        return functional.negative_binomial_nll(mean, target, **self.options)


class ZeroInflatedNegativeBinomialNLLLoss(_Op):
    """:func:`fastvae.zero_inflated_negative_binomial_nll`; a ``dispersion`` that is a ``Parameter`` is learned."""

    def __init__(self, *, dispersion: Parameter, reduction: str = "batchmean"):
        super().__init__(**_given("negative_binomial", dispersion=dispersion), reduction=reduction)

    def forward(self, mean: Tensor, zero_logits: Tensor, target: Tensor) -> Tensor:
        """``[B, *data]`` three times → nats."""
        return functional.zero_inflated_negative_binomial_nll(mean, target, zero_logits=zero_logits, **self.options)


class NegativeBinomialNLLFromScoresLoss(_Op):
    """:func:`fastvae.negative_binomial_nll_from_scores`; a ``dispersion`` that is a ``Parameter`` is learned."""

    def __init__(self, *, dispersion: Parameter, reduction: str = "batchmean"):
        super().__init__(**_given("negative_binomial", dispersion=dispersion), reduction=reduction)

    def forward(self, scores: Tensor, library_size: Parameter, target: Tensor) -> Tensor:
        """``[B, *data]``, ``[B]``, ``[B, *data]`` → nats."""
        return functional.negative_binomial_nll_from_scores(scores, library_size, target, **self.options)


class ZeroInflatedNegativeBinomialNLLFromScoresLoss(_Op):
    """:func:`fastvae.zero_inflated_negative_binomial_nll_from_scores`, likewise."""

    def __init__(self, *, dispersion: Parameter, reduction: str = "batchmean"):
        super().__init__(**_given("negative_binomial", dispersion=dispersion), reduction=reduction)

    def forward(self, scores: Tensor, library_size: Parameter, zero_logits: Tensor, target: Tensor) -> Tensor:
        """``[B, *data]``, ``[B]``, ``[B, *data]`` twice → nats."""
        return functional.zero_inflated_negative_binomial_nll_from_scores(
            scores, library_size, target, zero_logits=zero_logits, **self.options
        )


class DiscretizedLogisticNLLLoss(_Op):
    """:func:`fastvae.discretized_logistic_nll`; a ``Parameter`` as ``log_scale`` is learned."""

    def __init__(self, *, log_scale: Parameter, reduction: str = "batchmean"):
        super().__init__(log_scale=log_scale, reduction=reduction)

    def forward(self, mean: Tensor, target: Tensor) -> Tensor:
        """``[B, *data]`` twice, the second levels → nats."""
        return discrete.discretized_logistic_nll(mean, target, **self.options)


class DiscretizedLogisticMixtureNLLLoss(_Op):
    """:func:`fastvae.discretized_logistic_mixture_nll`."""

    def __init__(self, *, reduction: str = "batchmean"):
        super().__init__(reduction=reduction)

    def forward(self, params: Tensor, target: Tensor) -> Tensor:
        """``[B, *spatial, 10·K]`` and levels ``[B, *spatial, 3]``, or channels first → nats."""
        return discrete.discretized_logistic_mixture_nll(params, target, **self.options)


class CategoricalNLLLoss(_Op):
    """:func:`fastvae.categorical_nll`."""

    def __init__(self, *, reduction: str = "batchmean"):
        super().__init__(reduction=reduction)

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        """``[B, *positions, classes]`` and classes ``[B, *positions]`` → nats."""
        return discrete.categorical_nll(logits, target, **self.options)


class CategoricalKL(_Op):
    """:func:`fastvae.categorical_kl`."""

    def __init__(self, *, balance: float | None = None, unimix: float = 0.0, reduction: str = "batchmean"):
        super().__init__(balance=balance, unimix=unimix, reduction=reduction)

    def forward(self, logits_q: Tensor, logits_p: Tensor) -> Tensor:
        """``[B, *groups, classes]`` twice → nats."""
        return discrete.categorical_kl(logits_q, logits_p, **self.options)


class StraightThroughSample(_Op):
    """:func:`fastvae.straight_through_sample`."""

    def __init__(self, *, unimix: float = 0.0):
        super().__init__(unimix=unimix)

    def forward(self, logits: Tensor, *, generator: torch.Generator | None = None, seed: int | None = None) -> Tensor:
        """``[B, *groups, classes]`` → one-hot vectors of that shape."""
        return discrete.straight_through_sample(logits, **self.options, generator=generator, seed=seed)


class GumbelSoftmax(_Op):
    """:func:`fastvae.gumbel_softmax`. To anneal, set ``sample.temperature``."""

    def __init__(self, *, temperature: float = 1.0, hard: bool = False):
        super().__init__(temperature=temperature, hard=hard)

    def forward(self, logits: Tensor, *, generator: torch.Generator | None = None, seed: int | None = None) -> Tensor:
        """``[B, *groups, classes]`` → vectors of that shape that sum to 1."""
        return discrete.gumbel_softmax(logits, **self.options, generator=generator, seed=seed)


class LinearBCE(nn.Linear):
    """:func:`fastvae.linear_bce` with a layer of its own: the end of a decoder and its loss.

    It is a ``torch.nn.Linear`` whose ``forward`` takes the target too, so a checkpoint of the layer it replaces loads.

    Args:
        in_features: K.
        out_features: M.
        bias: whether there is one.
        likelihood: see :func:`fastvae.linear_bce`.
        reduction: likewise.
        chunk: likewise.
        device: see ``torch.nn.Linear``.
        dtype: likewise.

    >>> end = LinearBCE(400, 784)
    >>> hidden = torch.randn(8, 400)
    >>> end(hidden, torch.rand(8, 784)).shape, end.recon(hidden).shape
    (torch.Size([]), torch.Size([8, 784]))
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        likelihood: str = "bernoulli_logits",
        reduction: str = "batchmean",
        chunk: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__(in_features, out_features, bias, device, dtype)
        self.likelihood, self.reduction, self.chunk = checks.likelihood(likelihood), reduction, checks.chunk(chunk)
        checks.reduction(reduction, functional.LINEAR_REDUCTIONS)

    @classmethod
    def of(cls, layer: nn.Linear, **options: Any) -> LinearBCE:
        """One that shares the parameters of ``layer``: ``LinearBCE.of(decoder[-1])``. TypeError if it is no Linear."""
        if not isinstance(layer, nn.Linear):
            raise TypeError(
                f"layer must be an nn.Linear, a decoder's last without a sigmoid after it, got {type(layer).__name__}"
            )
        end = cls(layer.in_features, layer.out_features, layer.bias is not None, device="meta", **options)
        end.weight, end.bias = layer.weight, layer.bias
        return end.train(layer.training)

    def forward(self, hidden: Tensor, target: Tensor) -> Tensor:  # type: ignore[override]
        """``[B, *, K]`` and ``[B, *, M]`` → nats."""
        return functional.linear_bce(
            hidden, self.weight, self.bias, target,
            likelihood=self.likelihood, reduction=self.reduction, chunk=self.chunk,
        )  # fmt: skip

    def recon(self, hidden: Tensor) -> Tensor:
        """The layer's output, for sampling: ``[B, *, K]`` → ``[B, *, M]``."""
        return super().forward(hidden)

    def extra_repr(self) -> str:
        options = f"likelihood={self.likelihood!r}, reduction={self.reduction!r}, chunk={self.chunk}"
        return f"{super().extra_repr()}, {options}"


class AggregatePosterior(_Op):
    """:func:`fastvae.aggregate_posterior`."""

    def __init__(self, *, dataset_size: int | None = None, sampling: str = "weighted"):
        super().__init__(dataset_size=dataset_size, sampling=sampling)

    def forward(self, z: Tensor, mu: Tensor, logvar: Tensor) -> tuple[Tensor, Tensor]:
        """``(log_qz, log_prod_qz)``, each ``[B]``."""
        return functional.aggregate_posterior(z, mu, logvar, **self.options)


class MMD(_Op):
    """:func:`fastvae.mmd`."""

    def __init__(
        self,
        *,
        kernel: str = "rbf",
        bandwidth: float | Sequence[float] | None = None,
        unbiased: bool = False,
    ):
        super().__init__(kernel=kernel, bandwidth=bandwidth, unbiased=unbiased)

    def forward(self, z: Tensor, prior_z: Tensor) -> Tensor:
        """MMD² of the two samples."""
        return functional.mmd(z, prior_z, **self.options)


class GaussianMixturePrior(nn.Module):
    """A learned mixture of ``components`` diagonal Gaussians in ``latent`` dimensions: VaDE's prior, or a GMM's.

    ``forward(z)`` is :func:`fastvae.gaussian_mixture_log_prob` of its own ``means`` (drawn from N(0, I)), ``logvars``
    (0 at first) and ``logits`` of the weights (equal at first).

    >>> prior = GaussianMixturePrior(10, 2)
    >>> prior
    GaussianMixturePrior(components=10, latent=2)
    >>> prior(torch.zeros(4, 2)).shape
    torch.Size([4])
    """

    def __init__(self, components: int, latent: int):
        super().__init__()
        for name, value in (("components", components), ("latent", latent)):
            if isinstance(value, bool) or not isinstance(value, int):
                raise TypeError(f"{name} must be an int, got {type(value).__name__}")
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        self.means = nn.Parameter(torch.randn(components, latent))
        self.logvars = nn.Parameter(torch.zeros(components, latent))
        self.logits = nn.Parameter(torch.zeros(components))

    def forward(self, z: Tensor) -> Tensor:
        """Log p(z), nats."""
        return functional.gaussian_mixture_log_prob(z, self.means, self.logvars, self.logits.log_softmax(0))

    def extra_repr(self) -> str:
        components, latent = self.means.shape
        return f"components={components}, latent={latent}"
