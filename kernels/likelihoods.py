"""THE table of likelihoods: whatever lists, checks or names them derives from it.

A row declares one reconstruction term: the negative log-likelihood of x given y and its derivatives as formulas with
their source, its number, the domains of y and x, and the mean of p(x|z). The formulas are differentiable torch, so that
a second backward can go through them; they are what every backend is compared with. Backends bind their functions by
the name of the row, and ``bound`` is how they find that none is missing.

A row with a ``parameter_derivative`` takes its number as a tensor too. One likelihood may have several rows, one for
each way to write its number: ``family`` is then the name its users know.
"""

from __future__ import annotations

import enum
import math
from collections.abc import Callable, Collection
from typing import Any, NamedTuple

import torch
from torch import Tensor

#: the last argument is the number, or a tensor in its place
Formula = Callable[[Tensor, Tensor, Any], Tensor]


class Domain(enum.Enum):
    """Where numbers must lie; on a CPU somebody looks."""

    REAL = "be real"
    UNIT = "lie in [0, 1]"
    NOT_NEGATIVE = "be at least 0"
    COUNT = "be counts: 0, 1, 2, …"


class Number(NamedTuple):
    """The one number of a likelihood: what it is called, what it is unless given (None: it must be), and its domain."""

    name: str
    default: float | None
    low: float  # exclusive
    high: float = math.inf


class Likelihood(NamedTuple):
    """``nll(y, x, number)`` in nats per element; ``derivative`` is ∂nll/∂y, the others are by what they are called."""

    nll: Formula
    derivative: Formula
    target_derivative: Formula
    recon: str  # what y is called
    number: Number | None = None
    target_domain: Domain = Domain.REAL
    recon_domain: Domain = Domain.REAL
    mean: Callable[[Tensor], Tensor] = lambda y: y  # of p(x|z), which is what one shows
    says: str = ""  # in the documentation of ``elbo_loss``; "" is not one of its likelihoods
    parameter_derivative: Formula | None = None  # ∂nll/∂number
    family: str = ""  # the row of ``elbo_loss`` this is another way to write; "" is the row itself


def positive_part(y: Tensor) -> Tensor:
    """max(y, 0) with the derivative ½ at 0, which is what the two Bernoulli terms below need there."""
    return 0.5 * (y + y.abs())


def bernoulli_logits_nll(y: Tensor, x: Tensor, _: float) -> Tensor:
    return positive_part(y) - y * x + torch.log1p(torch.exp(-y.abs()))


def bernoulli_logits_derivative(y: Tensor, x: Tensor, _: float) -> Tensor:
    return torch.sigmoid(y) - x


def logits_target_derivative(y: Tensor, x: Tensor, _: float) -> Tensor:
    return -y


def bernoulli_probs_nll(y: Tensor, x: Tensor, eps: float) -> Tensor:
    """Both y and 1 − y are clamped: ``1 − clamp(y)`` would round to 0 for y near 1 and give 0·(−∞)."""
    return -x * torch.log(y.clamp(eps, 1 - eps)) - (1 - x) * torch.log((1 - y).clamp(eps, 1 - eps))


def bernoulli_probs_derivative(y: Tensor, x: Tensor, eps: float) -> Tensor:
    clipped = (y < eps) | (1 - y < eps)
    safe = torch.where(clipped, 0.5, y)
    return torch.where(clipped, 0.0, (1 - x) / (1 - safe) - x / safe)


def bernoulli_probs_target_derivative(y: Tensor, x: Tensor, eps: float) -> Tensor:
    return torch.log((1 - y).clamp(eps, 1 - eps)) - torch.log(y.clamp(eps, 1 - eps))


def bernoulli_probs_log_clamped_nll(y: Tensor, x: Tensor, _: float) -> Tensor:
    """What ``F.binary_cross_entropy`` computes: each logarithm clamped at −100."""
    return (x - 1) * torch.log1p(-y).clamp(min=-100) - x * torch.log(y).clamp(min=-100)


def bernoulli_probs_log_clamped_derivative(y: Tensor, x: Tensor, _: float) -> Tensor:
    return (y - x) / ((1 - y) * y).clamp(min=1e-12)


def bernoulli_probs_log_clamped_target_derivative(y: Tensor, x: Tensor, _: float) -> Tensor:
    return torch.log1p(-y).clamp(min=-100) - torch.log(y).clamp(min=-100)


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


def continuous_bernoulli_mean(y: Tensor) -> Tensor:
    """1/(1 − e⁻ʸ) − 1/y, by its series near 0."""
    near = y.abs() < 1e-2
    safe = torch.where(near, 1.0, y)
    return torch.where(near, 0.5 + y / 12, -1 / torch.expm1(-safe) - 1 / safe)


def _log(number: Any) -> Any:
    return number.log() if isinstance(number, Tensor) else math.log(number)


def _exp(number: Any) -> Any:
    if isinstance(number, Tensor):
        return number.exp()
    return math.exp(number) if number < 709 else math.inf  # where Python would raise an OverflowError


def gaussian_nll(y: Tensor, x: Tensor, var: Any) -> Tensor:
    return (x - y) ** 2 * (0.5 / var) + 0.5 * _log(2 * math.pi * var)


def gaussian_derivative(y: Tensor, x: Tensor, var: Any) -> Tensor:
    return (y - x) * (1 / var)


def gaussian_var_derivative(y: Tensor, x: Tensor, var: Any) -> Tensor:
    return (0.5 / var) * (1 - (y - x) ** 2 * (1 / var))


def gaussian_logvar_nll(y: Tensor, x: Tensor, logvar: Any) -> Tensor:
    return 0.5 * (x - y) ** 2 * _exp(-logvar) + 0.5 * (logvar + math.log(2 * math.pi))


def gaussian_logvar_derivative(y: Tensor, x: Tensor, logvar: Any) -> Tensor:
    return (y - x) * _exp(-logvar)


def gaussian_logvar_parameter_derivative(y: Tensor, x: Tensor, logvar: Any) -> Tensor:
    return 0.5 - 0.5 * (y - x) ** 2 * _exp(-logvar)


def mse_nll(y: Tensor, x: Tensor, _: float) -> Tensor:
    return (x - y) ** 2


def mse_derivative(y: Tensor, x: Tensor, _: float) -> Tensor:
    return 2 * (y - x)


def l1_nll(y: Tensor, x: Tensor, _: float) -> Tensor:
    return (x - y).abs()


def l1_derivative(y: Tensor, x: Tensor, _: float) -> Tensor:
    d = y - x
    return torch.where(d.isnan(), d, torch.sign(d))


def laplace_nll(y: Tensor, x: Tensor, scale: Any) -> Tensor:
    return (x - y).abs() * (1 / scale) + _log(2 * scale)


def laplace_derivative(y: Tensor, x: Tensor, scale: Any) -> Tensor:
    return l1_derivative(y, x, scale) * (1 / scale)


def laplace_scale_derivative(y: Tensor, x: Tensor, scale: Any) -> Tensor:
    return (1 / scale) * (1 - (y - x).abs() * (1 / scale))


def laplace_log_scale_nll(y: Tensor, x: Tensor, log_scale: Any) -> Tensor:
    return (x - y).abs() * _exp(-log_scale) + log_scale + math.log(2)


def laplace_log_scale_derivative(y: Tensor, x: Tensor, log_scale: Any) -> Tensor:
    return l1_derivative(y, x, log_scale) * _exp(-log_scale)


def laplace_log_scale_parameter_derivative(y: Tensor, x: Tensor, log_scale: Any) -> Tensor:
    return 1 - (y - x).abs() * _exp(-log_scale)


COUNT_EPS = 1e-8  # what scvi-tools adds before it takes a logarithm


def log_gamma(z: Tensor) -> Tensor:
    """``torch.lgamma`` of z > 0; in ONNX, which has none, log Γ(z + 8) by Stirling's series and what brings it back.

    Its next term is 2e-13 at 8 (Abramowitz & Stegun 6.1.41). By pairs, so that no product leaves float32.
    """
    if not (torch.compiler.is_exporting() and torch.onnx.is_in_onnx_export()):
        return torch.lgamma(z)
    w = z + 8
    r = 1 / w
    series = r * (1 / 12 - r * r * (1 / 360 - r * r * (1 / 1260 - r * r * (1 / 1680 - r * r / 1188))))
    rising = sum(torch.log((z + k) * (z + 7 - k)) for k in range(4))
    return (w - 0.5) * torch.log(w) - w + 0.5 * math.log(2 * math.pi) + series - rising


def poisson_nll(y: Tensor, x: Tensor, _: float) -> Tensor:
    """y − x·log(y + 1e-8) + log x!, as ``F.poisson_nll_loss(log_input=False)`` with the exact log x!."""
    return y - x * torch.log(y + COUNT_EPS) + log_gamma(x + 1)


def poisson_derivative(y: Tensor, x: Tensor, _: float) -> Tensor:
    rate = y + COUNT_EPS
    return (rate - x) / rate


def poisson_target_derivative(y: Tensor, x: Tensor, _: float) -> Tensor:
    return torch.digamma(x + 1) - torch.log(y + COUNT_EPS)


def poisson_log_rate_nll(y: Tensor, x: Tensor, _: float) -> Tensor:
    """eʸ − x·y + log x!."""
    return torch.exp(y) - x * y + log_gamma(x + 1)


def poisson_log_rate_derivative(y: Tensor, x: Tensor, _: float) -> Tensor:
    return torch.exp(y) - x


def poisson_log_rate_target_derivative(y: Tensor, x: Tensor, _: float) -> Tensor:
    return torch.digamma(x + 1) - y


def negative_binomial_nll(y: Tensor, x: Tensor, dispersion: Any) -> Tensor:
    """−log Γ(x+θ)/(Γ(θ)·x!)·(θ/(θ+y))^θ·(y/(θ+y))^x: mean y, variance y + y²/θ.

    ``log_nb_positive`` of scvi-tools, with its 1e-8 in each logarithm. log((θ+ε)/(θ+y+ε)) is written by log1p, which
    loses nothing where θ is large.
    """
    theta = torch.as_tensor(dispersion, dtype=y.dtype, device=y.device)
    total = theta + y + COUNT_EPS
    return (
        theta * torch.log1p(y / (theta + COUNT_EPS))
        - x * torch.log((y + COUNT_EPS) / total)
        + (log_gamma(theta) - log_gamma(x + theta))
        + log_gamma(x + 1)
    )


def negative_binomial_derivative(y: Tensor, x: Tensor, dispersion: Any) -> Tensor:
    """(x + θ)/(θ + y) − x/y, but for ε, over one denominator: nothing cancels."""
    mean = y + COUNT_EPS
    return dispersion / (dispersion + mean) * ((mean - x) / mean)


def negative_binomial_target_derivative(y: Tensor, x: Tensor, dispersion: Any) -> Tensor:
    total = dispersion + y + COUNT_EPS
    return torch.digamma(x + 1) - torch.digamma(x + dispersion) - torch.log((y + COUNT_EPS) / total)


def negative_binomial_dispersion_derivative(y: Tensor, x: Tensor, dispersion: Any) -> Tensor:
    """log1p(y/θ) + (x − y)/(θ + y) + ψ(θ) − ψ(x + θ), but for ε."""
    theta = torch.as_tensor(dispersion, dtype=y.dtype, device=y.device)
    shifted, total = theta + COUNT_EPS, theta + y + COUNT_EPS
    rest = (theta / shifted * (x - y) + x * COUNT_EPS / shifted) / total
    return torch.log1p(y / shifted) + rest + (torch.digamma(theta) - torch.digamma(x + theta))


def of_difference(derivative: Formula) -> Formula:
    """∂nll/∂x where nll is a function of y − x."""
    return lambda y, x, number: -derivative(y, x, number)


def zero_inflated_nll(nll: Tensor, zero_logits: Tensor, x: Tensor) -> Tensor:
    """−log(σ(π)·[x = 0] + σ(−π)·e^(−nll)): with probability σ(π) a count is 0 whatever its likelihood says.

    As in scvi-tools' ``log_zinb_positive``, softplus(−π) − softplus(−π − nll) at 0, but without the difference of two
    large numbers. Any likelihood of counts may be so.
    """
    both, zero = zero_logits + nll, torch.zeros_like(nll)  # maximum has the derivative ½ at 0, and ∞ is no NaN
    low = torch.log1p(torch.exp(-zero_logits.abs()))
    rest = low - torch.log1p(torch.exp(-both.abs()))
    at_zero = torch.minimum(torch.maximum(-zero_logits, zero), nll) + rest
    return torch.where(x == 0, at_zero, torch.maximum(zero_logits, zero) + low + nll)


def zero_inflated_derivatives(nll: Tensor, zero_logits: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """In nll, and in π."""
    at_zero = torch.sigmoid(-zero_logits - nll)
    by_nll = torch.where(x == 0, at_zero, 1.0)
    return by_nll, torch.where(x == 0, at_zero - torch.sigmoid(-zero_logits), torch.sigmoid(zero_logits))


LIKELIHOODS: dict[str, Likelihood] = {
    "bernoulli_logits": Likelihood(
        bernoulli_logits_nll,
        bernoulli_logits_derivative,
        logits_target_derivative,
        "logits",
        target_domain=Domain.UNIT,
        mean=torch.sigmoid,
        says="Bernoulli, from logits",
    ),
    "bernoulli_probs": Likelihood(
        bernoulli_probs_nll,
        bernoulli_probs_derivative,
        bernoulli_probs_target_derivative,
        "probs",
        Number("eps", 1e-8, 0, 0.5),
        target_domain=Domain.UNIT,
        recon_domain=Domain.UNIT,
        says="Bernoulli, from probabilities clipped at 1e-8",
    ),
    "bernoulli_probs_log_clamped": Likelihood(
        bernoulli_probs_log_clamped_nll,
        bernoulli_probs_log_clamped_derivative,
        bernoulli_probs_log_clamped_target_derivative,
        "probs",
        target_domain=Domain.UNIT,
        recon_domain=Domain.UNIT,
    ),
    "continuous_bernoulli_logits": Likelihood(
        continuous_bernoulli_logits_nll,
        continuous_bernoulli_logits_derivative,
        logits_target_derivative,
        "logits",
        target_domain=Domain.UNIT,
        mean=continuous_bernoulli_mean,
        says="continuous Bernoulli, from logits",
    ),
    "gaussian": Likelihood(
        gaussian_nll,
        gaussian_derivative,
        of_difference(gaussian_derivative),
        "mean",
        Number("var", 1.0, 0),
        says="Gaussian of variance 1, from its mean",
        parameter_derivative=gaussian_var_derivative,
    ),
    "gaussian_logvar": Likelihood(
        gaussian_logvar_nll,
        gaussian_logvar_derivative,
        of_difference(gaussian_logvar_derivative),
        "mean",
        Number("logvar", 0.0, -math.inf),
        parameter_derivative=gaussian_logvar_parameter_derivative,
        family="gaussian",
    ),
    "mse": Likelihood(mse_nll, mse_derivative, of_difference(mse_derivative), "recon", says="squared error"),
    "l1": Likelihood(l1_nll, l1_derivative, of_difference(l1_derivative), "recon", says="absolute error"),
    "laplace": Likelihood(
        laplace_nll,
        laplace_derivative,
        of_difference(laplace_derivative),
        "loc",
        Number("scale", 1.0, 0),
        says="Laplace of scale 1, from its location",
        parameter_derivative=laplace_scale_derivative,
    ),
    "laplace_log_scale": Likelihood(
        laplace_log_scale_nll,
        laplace_log_scale_derivative,
        of_difference(laplace_log_scale_derivative),
        "loc",
        Number("log_scale", 0.0, -math.inf),
        parameter_derivative=laplace_log_scale_parameter_derivative,
        family="laplace",
    ),
    "poisson": Likelihood(
        poisson_nll,
        poisson_derivative,
        poisson_target_derivative,
        "rate",
        target_domain=Domain.COUNT,
        recon_domain=Domain.NOT_NEGATIVE,
        says="Poisson, from its rate",
    ),
    "poisson_log_rate": Likelihood(
        poisson_log_rate_nll,
        poisson_log_rate_derivative,
        poisson_log_rate_target_derivative,
        "log_rate",
        target_domain=Domain.COUNT,
        mean=torch.exp,
        says="Poisson, from the logarithm of its rate",
    ),
    "negative_binomial": Likelihood(
        negative_binomial_nll,
        negative_binomial_derivative,
        negative_binomial_target_derivative,
        "mean",
        Number("dispersion", None, 0),
        target_domain=Domain.COUNT,
        recon_domain=Domain.NOT_NEGATIVE,
        says="negative binomial, from its mean; it needs its dispersion",
        parameter_derivative=negative_binomial_dispersion_derivative,
    ),
}

#: those of ``elbo_loss``
NAMES = tuple(name for name, row in LIKELIHOODS.items() if row.says)


#: those whose number may be a tensor
WITH_TENSOR = tuple(name for name, row in LIKELIHOODS.items() if row.parameter_derivative)


def parameters(family: str) -> dict[str, str]:
    """The ways to write the number of a likelihood of ``elbo_loss``, each with its row: ``{"var": "gaussian", …}``."""
    rows = LIKELIHOODS.items()
    return {row.number.name: name for name, row in rows if row.number and (row.family or name) == family}


#: the number a likelihood takes unless one is given; 0 where it has none
DEFAULT_NUMBERS = {name: (row.number.default or 0.0) if row.number else 0.0 for name, row in LIKELIHOODS.items()}

#: likelihoods that are none without their number
NEED_A_NUMBER = frozenset(name for name, row in LIKELIHOODS.items() if row.number and row.number.default is None)

#: those of ``elbo_loss`` that the reference models and ``fastvae train`` take
OF_IMAGES = tuple(name for name in NAMES if LIKELIHOODS[name].target_domain is not Domain.COUNT)

#: likelihoods of counts, whose integer targets are numbers as they are: uint8 does not mean x/255
OF_COUNTS = frozenset(name for name, row in LIKELIHOODS.items() if row.target_domain is Domain.COUNT)


def bound(backend: str, names: Collection[str], with_tensor: Collection[str]) -> dict[str, int]:
    """Codes by name: places in ``names``, the likelihoods a backend has functions for.

    Args:
        backend: its name, for the error.
        names: of its functions.
        with_tensor: those of them that have a derivative in their number.

    Raises:
        ImportError: one of the table is missing there, or one there is not in the table.
    """
    for what, table, there in (
        ("function", LIKELIHOODS, names),
        ("derivative in its number", WITH_TENSOR, with_tensor),
    ):
        for missing in set(table) - set(there):
            raise ImportError(f"likelihood {missing!r} has no {what} in backend {backend!r}")
        for unknown in set(there) - set(table):
            raise ImportError(
                f"backend {backend!r} has a {what} for likelihood {unknown!r}, which kernels/likelihoods.py lacks"
            )
    return {name: code for code, name in enumerate(names)}
