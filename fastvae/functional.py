"""The public functions: arguments are checked, errors named, the reduction chosen; nothing is computed here.

Vocabulary: ``mu``, ``logvar`` (or ``std``) are the mean and log σ² (or σ) of q(z|x), ``[B, *latent]``; ``target`` is
the data, ``[B, *data]``, floating point or uint8 meaning x/255. Losses are in nats.

Reductions: ``"none"`` elementwise, ``"example"`` the sum within each example ``[B]``, ``"sum"``, ``"mean"`` over
elements as in torch, ``"batchmean"`` the sum over B: nats per example, the default. Reduced losses of half-precision
inputs are float32.

The terms of the reconstruction take a ``weight`` that broadcasts to the data. It multiplies the elements, as in torch,
where ``"mean"`` still divides by their number. A bool one is a mask: where it is False nothing is read, nothing counts,
and ``"mean"`` is over the others.

On a CPU, Bernoulli targets and probabilities outside [0, 1], and counts that are none, raise a ``ValueError``. On a GPU
nobody looks, because looking would make the host wait for the device.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Literal, NamedTuple, overload

import torch
from torch import Tensor, fx
from torch.distributions import Distribution

from . import autograd, checks, compose, linear
from .kernels import likelihoods
from .kernels.layout import accumulator
from .pairs import aggregate_posterior, gaussian_mixture_log_prob, mmd  # noqa: F401  (they are functions of this module)
from .random import draw_seed

LIKELIHOODS = likelihoods.NAMES
#: a number for all elements, or a tensor that broadcasts to the data: for each feature, each example, each element
Parameter = float | Tensor
Prior = float | Tensor
Generators = torch.Generator | list[torch.Generator] | tuple[torch.Generator, ...]
BCE_EPS = likelihoods.DEFAULT_NUMBERS["bernoulli_probs"]


class ELBOLoss(NamedTuple):
    """``loss = reconstruction + beta · kl``; all three differentiable, of the reduction asked for."""

    loss: Tensor
    reconstruction: Tensor
    kl: Tensor


def _latent(
    mu: Tensor,
    given: tuple[Tensor | None, ...],
    *,
    prior: tuple[Prior | None, ...] = (None, None, None),
    logvar_clamp: tuple[float, float] | None = None,
    std_eps: float | None = None,
    seed: Tensor | None = None,
    samples: int = 0,
    free_bits: float | Tensor = 0.0,
    free_bits_per: str = "element",
    reduction: str = "",
) -> tuple[Tensor, ...]:
    scale, log_scale = checks.scale(mu, *given)
    low, high = checks.logvar_clamp(logvar_clamp, log_scale)
    scale, log_scale = checks.exact_std(std_eps, scale, log_scale)
    mu, scale, prior_mu, prior_logvar = checks.one_dtype(mu, scale, *checks.prior(mu, *prior))
    if reduction:
        free_bits = checks.free_bits(free_bits, free_bits_per, mu, reduction)
    if isinstance(free_bits, Tensor) or free_bits_per != "element":
        wide = [t if t is None else t.to(accumulator(mu.dtype)) for t in (mu, scale, None, prior_mu, prior_logvar)]
        finer = "example" if free_bits_per == "example" else "none"
        (kl,) = autograd.apply(autograd.LATENT, tuple(wide), (log_scale, low, high, 0, 0.0, finer))
        kl = compose.at_least(kl, free_bits, free_bits_per, reduction, mu.shape)
        kl = kl.to(mu.dtype) if reduction == "none" else kl
        if seed is None:
            return (kl,)
        z = autograd.apply(autograd.LATENT, (mu, scale, seed, None, None), (log_scale, low, high, samples, 0.0, ""))
        return z[0], kl
    return autograd.apply(
        autograd.LATENT,
        (mu, scale, seed, prior_mu, prior_logvar),
        (log_scale, low, high, samples, free_bits, reduction),
    )


@overload
def reparameterize(
    mu: Tensor,
    logvar: Tensor | None = None,
    *,
    std: Tensor | None = None,
    log_std: Tensor | None = None,
    std_raw: Tensor | None = None,
    logvar_clamp: tuple[float, float] | None = None,
    samples: int | None = None,
    generator: Generators | None = None,
    seed: int | None = None,
    noise: Tensor | None = None,
    return_noise: Literal[False] = False,
) -> Tensor: ...


@overload
def reparameterize(
    mu: Tensor,
    logvar: Tensor | None = None,
    *,
    std: Tensor | None = None,
    log_std: Tensor | None = None,
    std_raw: Tensor | None = None,
    logvar_clamp: tuple[float, float] | None = None,
    samples: int | None = None,
    generator: Generators | None = None,
    seed: int | None = None,
    noise: Tensor | None = None,
    return_noise: Literal[True],
) -> tuple[Tensor, Tensor]: ...


def reparameterize(
    mu: Tensor,
    logvar: Tensor | None = None,
    *,
    std: Tensor | None = None,
    log_std: Tensor | None = None,
    std_raw: Tensor | None = None,
    logvar_clamp: tuple[float, float] | None = None,
    samples: int | None = None,
    generator: Generators | None = None,
    seed: int | None = None,
    noise: Tensor | None = None,
    return_noise: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Draw z = mu + σ·ε from q(z|x), differentiably: the reparameterization trick (Kingma & Welling 2014, eq. 10).

    Beware: the second positional argument is log σ². For σ write ``reparameterize(mu, std=std)``; no check can tell
    the two apart.

    ε is a function of the seed and of the index of the element in z, so nothing is kept for the backward, and one seed
    gives one z on every device and backend. It is the noise of ``torch.func._random.normal(key(seed), z.shape)`` in
    float32 (torch 2.14 on a CPU), so one can draw z again with PyTorch alone.

    Args:
        mu: mean, ``[B, *latent]``, float64, float32, bfloat16 or float16.
        logvar: log σ², as ``mu`` or of a shape that broadcasts to it. Give this or one of the next three.
        std: σ, likewise.
        log_std: log σ, likewise.
        std_raw: σ = softplus(std_raw), likewise.
        logvar_clamp: ``(low, high)``: log σ² is clamped to [low, high] before use, as by ``torch.clamp``, so ``logvar``
            has no gradient outside (at a bound it has). With ``logvar`` or ``log_std``. It keeps σ² finite, and what is
            computed of it, where an encoder diverges; (-30, 20) is what diffusers' autoencoders take.
        samples: draw this many for each example; z is then ``[samples, B, *latent]``.
        generator: source of the seed; torch's default generator if None, so ``torch.manual_seed`` works. As with
            ``torch.randn``, processes that were seeded alike draw alike: see "Seed each rank" in the README. A list
            has one for each example, whose noise then does not depend on the batch it is in.
        seed: a 64-bit int instead, to draw one sample again.
        noise: ε itself instead, of the shape of z.
        return_noise: return ``(z, ε)``.

    Returns:
        z in the dtype that ``mu`` and its scale promote to, ``[B, *latent]`` or ``[samples, B, *latent]``.

    Raises:
        TypeError: an argument is not a floating-point tensor (or not an int).
        ValueError: shapes or devices do not fit, ``logvar_clamp`` is not one, or not exactly one scale is given.

    >>> mu, logvar = torch.zeros(2, 3), torch.zeros(2, 3)
    >>> z = reparameterize(mu, logvar, seed=0)
    >>> torch.equal(z, reparameterize(mu, std=torch.ones(2, 3), seed=0))
    True
    >>> reparameterize(mu, logvar, samples=5).shape
    torch.Size([5, 2, 3])
    >>> z, noise = reparameterize(mu, logvar, return_noise=True)
    >>> torch.equal(z, reparameterize(mu, logvar, noise=noise))
    True
    """
    mu = checks.tensor("mu", mu)
    count, given = checks.sample_count(samples), (logvar, std, log_std, std_raw)
    if noise is not None:
        if generator is not None or seed is not None:
            raise ValueError("noise excludes generator and seed: pass one of them")
        noise = checks.noise(noise, mu, count)
        scale, log_scale = checks.scale(mu, *given)
        bounds = checks.logvar_clamp(logvar_clamp, log_scale)
        z = compose.moved(*checks.one_dtype(mu, scale)[:2], log_scale, bounds, noise)
        return (z, noise) if return_noise else z
    if isinstance(generator, (list, tuple)):
        if seed is not None:
            raise ValueError("generator and seed exclude each other: pass one of them, got both")
        scale, log_scale = checks.scale(mu, *given)
        draws = []
        for k, each in enumerate(checks.generators(generator, mu)):
            part = (scale[k : k + 1], None) if log_scale else (None, scale[k : k + 1])
            draws.append(_drawn(mu[k : k + 1], part, logvar_clamp, count, draw_seed(mu.device, each, None)))
        if draws:
            z, noise = (torch.cat(parts, 1 if count else 0) for parts in zip(*draws, strict=True))
            return (z, noise) if return_noise else z
        generator = None  # no examples, and no noise for them
    seeded = draw_seed(mu.device, generator, seed)
    if return_noise:
        return _drawn(mu, given, logvar_clamp, count, seeded)
    return _latent(mu, given, logvar_clamp=logvar_clamp, samples=count, seed=seeded)[0]


def _drawn(
    mu: Tensor,
    given: tuple[Tensor | None, ...],
    logvar_clamp: tuple[float, float] | None,
    samples: int,
    seed: Tensor,
) -> tuple[Tensor, Tensor]:
    """z and its ε, which is what a standard normal draws from the same seed."""
    z = _latent(mu, given, logvar_clamp=logvar_clamp, samples=samples, seed=seed)[0]
    zeros = torch.zeros_like(mu, dtype=z.dtype)
    return z, _latent(zeros, (zeros, None), samples=samples, seed=seed)[0].detach()


def gaussian_kl(
    mu: Tensor | Distribution,
    logvar: Tensor | Distribution | None = None,
    *,
    std: Tensor | None = None,
    log_std: Tensor | None = None,
    std_raw: Tensor | None = None,
    std_eps: float | None = None,
    prior_mu: Prior | None = None,
    prior_logvar: Prior | None = None,
    prior_std: Prior | None = None,
    logvar_clamp: tuple[float, float] | None = None,
    free_bits: float | Tensor = 0.0,
    free_bits_per: str = "element",
    reduction: str = "batchmean",
) -> Tensor:
    """KL(q‖p) of diagonal Gaussians: ½(mu² + σ² − 1 − log σ²) an element for p = N(0, I).

    With a prior: ½(logvar_p − log σ² + (σ² + (mu − mu_p)²)/σ_p² − 1). With ``std``, log σ² is log(1e-8 + std²).
    Source: Kingma & Welling 2014, appendix B.

    ``gaussian_kl(q)`` and ``gaussian_kl(q, p)`` take ``torch.distributions.Normal``, and ``Independent`` ones, exactly.

    Args:
        mu: mean of q, ``[B, *latent]``.
        logvar: log σ² of q, as ``mu`` or of a shape that broadcasts to it. Give this or one of the next three.
        std: σ of q, likewise.
        log_std: log σ of q, likewise.
        std_raw: σ = softplus(std_raw), likewise.
        std_eps: what is added to σ² in the logarithm, with ``std`` and ``std_raw``: 1e-8 unless given, or 0.
        prior_mu: mean of p: a number, or a tensor that broadcasts to ``mu``; differentiable.
        prior_logvar: log variance of p, likewise; not clamped. It or ``prior_std`` comes with ``prior_mu``.
        prior_std: standard deviation of p, likewise.
        logvar_clamp: ``(low, high)``: log σ² of q is clamped before use; see :func:`reparameterize`.
        free_bits: each element counts at least this many nats and has no gradient below. 0 is off. A tensor broadcasts
            to the elements (or examples, or dimensions).
        free_bits_per: ``"element"``; ``"example"``, where an example's sum counts at least that; or ``"dimension"``,
            where a dimension's mean over the batch does (Kingma et al. 2016, eq. 15).
        reduction: see the module.

    Returns:
        nats: elementwise, ``[B]`` or a scalar.

    Raises:
        TypeError: an argument is not a floating-point tensor.
        ValueError: shapes, devices, reduction or the choice of arguments do not fit.

    >>> gaussian_kl(torch.ones(4, 2), torch.zeros(4, 2))
    tensor(1.)
    >>> gaussian_kl(torch.ones(4, 2), torch.full((4, 2), 1e4), logvar_clamp=(-30, 0))
    tensor(1.)
    >>> gaussian_kl(torch.distributions.Normal(torch.zeros(4, 2), 1.0), torch.distributions.Normal(1.0, 1.0))
    tensor(1.)
    """
    if isinstance(mu, Distribution):
        if any(given is not None for given in (std, log_std, std_raw, prior_mu, prior_logvar, prior_std)):
            raise ValueError("gaussian_kl(q, p) of distributions takes no mean and no scale besides")
        mu, std = checks.normal("mu", mu)
        logvar, prior = None, logvar
        if prior is not None:
            prior_mu, prior_std = checks.normal("the prior", prior)
        std_eps = 0.0
    elif isinstance(logvar, Distribution):
        raise TypeError("mu must be a distribution, as logvar is, got a tensor")
    return _latent(
        checks.tensor("mu", mu),
        (logvar, std, log_std, std_raw),
        prior=(prior_mu, prior_logvar, prior_std),
        logvar_clamp=logvar_clamp,
        std_eps=std_eps,
        free_bits=free_bits,
        free_bits_per=free_bits_per,
        reduction=checks.reduction(reduction),
    )[0]


def sample_with_kl(
    mu: Tensor,
    logvar: Tensor | None = None,
    *,
    std: Tensor | None = None,
    log_std: Tensor | None = None,
    std_raw: Tensor | None = None,
    prior_mu: Prior | None = None,
    prior_logvar: Prior | None = None,
    prior_std: Prior | None = None,
    logvar_clamp: tuple[float, float] | None = None,
    free_bits: float | Tensor = 0.0,
    free_bits_per: str = "element",
    samples: int | None = None,
    generator: torch.Generator | None = None,
    seed: int | None = None,
    reduction: str = "batchmean",
) -> tuple[Tensor, Tensor]:
    """``(z, kl)``: :func:`reparameterize` and :func:`gaussian_kl` in one pass over their inputs, forward and backward.

    Args and errors are those of the two functions. Free bits per example or dimension take a second pass.

    >>> mu, logvar = torch.zeros(2, 3), torch.zeros(2, 3)
    >>> z, kl = sample_with_kl(mu, logvar, seed=0)
    >>> torch.equal(z, reparameterize(mu, logvar, seed=0)), kl
    (True, tensor(0.))
    """
    mu, reduction = checks.tensor("mu", mu), checks.reduction(reduction)
    if isinstance(generator, (list, tuple)):
        raise TypeError("generator must be one torch.Generator, got a list: reparameterize takes one")
    z, kl = _latent(
        mu,
        (logvar, std, log_std, std_raw),
        prior=(prior_mu, prior_logvar, prior_std),
        logvar_clamp=logvar_clamp,
        free_bits=free_bits,
        free_bits_per=free_bits_per,
        reduction=reduction,
        samples=checks.sample_count(samples),
        seed=draw_seed(mu.device, generator, seed),
    )
    return z, kl


def _reconstruction(
    name: str,
    recon: Tensor,
    target: Tensor,
    likelihood: str,
    parameter: float,
    reduction: str,
    weight: Tensor | None = None,
    pos_weight: Tensor | None = None,
) -> Tensor:
    if isinstance(recon, Tensor) and isinstance(target, Tensor) and recon.dim() == target.dim() == 0:
        whole = _reconstruction(name, recon[None], target[None], likelihood, parameter, reduction, weight, pos_weight)
        return whole.reshape(())
    recon = checks.tensor(name, recon)
    target = checks.target(target, name, recon, likelihood)
    reduction = checks.reduction(reduction)
    if weight is not None or pos_weight is not None:

        def term(y: Tensor, x: Tensor) -> Tensor:
            return _reconstruction(name, y, x, likelihood, parameter, "none")

        weight = None if weight is None else checks.weight("weight", weight, recon)
        if pos_weight is None:
            return compose.weighted(term, recon, target, weight, reduction)
        both = compose.with_pos_weight(term, checks.weight("pos_weight", pos_weight, recon))
        return compose.weighted(both, recon, target, weight, reduction)
    recon, target, undo = _dense(recon, target, reduction)
    options = likelihood, parameter, reduction, autograd.one_pass(recon, reduction)
    nll = autograd.apply(autograd.RECONSTRUCTION, (recon, target, None, None, None), options)[0]
    return nll if undo is None else nll.permute(undo)


def _with_parameter(
    name: str,
    recon: Tensor,
    target: Tensor,
    family: str,
    given: Mapping[str, Parameter | None],
    reduction: str,
    weight: Tensor | None = None,
    zero_logits: Parameter | None = None,
) -> Tensor:
    """A term of a likelihood whose parameter is given in one of several ways, as a number or a tensor."""
    if isinstance(recon, Tensor) and isinstance(target, Tensor) and recon.dim() == target.dim() == 0:
        recon, target = recon[None], target[None]
        return _with_parameter(name, recon, target, family, given, reduction, weight, zero_logits).reshape(())
    recon = checks.tensor(name, recon)
    likelihood, parameter, tensor = _parameter(family, given, recon)
    if zero_logits is not None:
        zero_logits = checks.logits_of_zero(zero_logits, recon)
        tensor = zero_logits.new_full((), parameter) if tensor is None else tensor
    if tensor is None:
        return _reconstruction(name, recon, target, likelihood, parameter, reduction, weight)
    target, reduction = checks.target(target, name, recon, likelihood), checks.reduction(reduction)
    if weight is not None:
        return compose.weighted(
            lambda y, x: _with_parameter(name, y, x, family, given, "none", None, zero_logits),
            recon,
            target,
            checks.weight("weight", weight, recon),
            reduction,
        )
    options = likelihood, parameter, reduction, autograd.one_pass(recon, reduction, tensor, zero_logits)
    return autograd.apply(autograd.RECONSTRUCTION, (recon, target, tensor, zero_logits, None), options)[0]


def _from_scores(
    scores: Tensor,
    library_size: Parameter,
    target: Tensor,
    dispersion: Parameter,
    reduction: str,
    zero_logits: Parameter | None = None,
) -> Tensor:
    """A term of counts whose mean is library_size · softmax(scores) over an example."""
    given = checks.tensor("scores", scores)
    scores = given.to(accumulator(given.dtype))  # half precision has not the digits of a softmax over thousands
    target, reduction = checks.target(target, "scores", scores, "negative_binomial"), checks.reduction(reduction)
    library = checks.library_size(library_size, scores)
    likelihood, number, tensor = _parameter("negative_binomial", {"dispersion": dispersion}, scores)
    tensor = scores.new_full((), number) if tensor is None else tensor
    if zero_logits is not None:
        zero_logits = checks.logits_of_zero(zero_logits, scores)
    options = likelihood, 0.0, reduction, autograd.one_pass(scores, reduction, library, tensor, zero_logits)
    nll = autograd.apply(autograd.RECONSTRUCTION, (scores, target, tensor, zero_logits, library), options)[0]
    return nll.to(given.dtype) if reduction == "none" else nll


def _parameter(family: str, given: Mapping[str, Parameter | None], recon: Tensor) -> tuple[str, float, Tensor | None]:
    """The row of the table, its number, and the tensor in the number's place if one was given."""
    chosen = {name: value for name, value in given.items() if value is not None}
    if not chosen:
        checks.needs_no_parameter(family)
        return family, likelihoods.DEFAULT_NUMBERS[family], None
    rows = likelihoods.parameters(family)
    for name in chosen:
        if name not in rows:
            known = f"one of {', '.join(map(repr, rows))}" if rows else "empty"
            raise ValueError(f"likelihood_parameters of {family!r} must be {known}, got {name!r}")
    if len(chosen) > 1:
        raise ValueError(f"at most one of {' and '.join(chosen)} may be given, got both")
    ((name, value),) = chosen.items()
    number = likelihoods.LIKELIHOODS[rows[name]].number
    assert number is not None
    if isinstance(value, Tensor) and rows[name] not in likelihoods.WITH_TENSOR:
        raise TypeError(f"{name} must be a number, got a tensor")
    return rows[name], *checks.parameter(name, value, number.low, min(number.high, checks.LARGEST), recon)


def _dense(recon: Tensor, target: Tensor, reduction: str) -> tuple[Tensor, Tensor, tuple[int, ...] | None]:
    """Views in the order ``recon`` has in memory, and how to undo that for an elementwise loss.

    The order within an example does not matter to a reconstruction term, so images and videos that are
    ``channels_last`` need no copy. A target in another order is copied into this one: here, once
    for the forward and the backward.
    """
    if recon.dim() not in (4, 5) or recon.is_contiguous():
        return recon, target, None
    last = recon.dim() - 1
    order = (0, *range(2, last + 1), 1)
    if not recon.permute(order).is_contiguous():
        return recon, target, None
    undo = (0, last, *range(1, last)) if reduction == "none" else None
    return recon.permute(order), target.permute(order).contiguous(), undo


def bce(
    probs: Tensor,
    target: Tensor,
    *,
    eps: float | None = BCE_EPS,
    weight: Tensor | None = None,
    reduction: str = "batchmean",
) -> Tensor:
    """Bernoulli negative log-likelihood of probabilities, clipped: finite for every probability in [0, 1].

    −x·log(yᶜ) − (1−x)·log((1−y)ᶜ), where ·ᶜ clamps to [eps, 1 − eps]; clamping 1 − y, and not only y, is what
    keeps it finite in float32, where 1 − 1e-8 is 1. The gradient is (1−x)/(1−y) − x/y, and 0 where y is clipped.

    Args:
        probs: y, ``[B, *data]`` in [0, 1].
        target: x, as ``probs``, in [0, 1], also bool; or uint8 meaning x/255.
        eps: the clip, in (0, 0.5); None computes exactly what ``F.binary_cross_entropy`` does.
        weight: see the module.
        reduction: see the module.

    Returns:
        nats: elementwise, ``[B]`` or a scalar.

    Raises:
        TypeError: an argument is not a tensor of a dtype named here.
        ValueError: shapes or devices differ, ``eps`` or the reduction is not one, or (on a CPU) values leave [0, 1].

    >>> bce(torch.tensor([[0.0, 0.5, 1.0]]), torch.tensor([[0.0, 1.0, 1.0]]))
    tensor(0.6931)
    """
    if eps is None:
        return _reconstruction("probs", probs, target, "bernoulli_probs_log_clamped", 0.0, reduction, weight)
    eps = checks.number("eps", eps, 0, 0.5, above=True)
    return _reconstruction("probs", probs, target, "bernoulli_probs", eps, reduction, weight)


def bce_with_logits(
    logits: Tensor,
    target: Tensor,
    *,
    weight: Tensor | None = None,
    pos_weight: Tensor | None = None,
    reduction: str = "batchmean",
) -> Tensor:
    """Bernoulli negative log-likelihood of logits, stable: max(l, 0) − l·x + log(1 + e^−|l|); gradient sigmoid(l) − x.

    Args:
        logits: l, ``[B, *data]``.
        target: x, as ``logits``, in [0, 1], also bool; or uint8 meaning x/255.
        weight: see the module.
        pos_weight: weight of a 1, of a shape that broadcasts to ``logits``; as in torch.
        reduction: see the module.

    Returns:
        nats: elementwise, ``[B]`` or a scalar.

    Raises:
        TypeError: an argument is not a tensor of a dtype named here.
        ValueError: shapes or devices differ, the reduction is not one, or (on a CPU) targets are outside [0, 1].

    >>> bce_with_logits(torch.zeros(2, 3), torch.ones(2, 3), reduction="example")
    tensor([2.0794, 2.0794])
    """
    return _reconstruction("logits", logits, target, "bernoulli_logits", 0.0, reduction, weight, pos_weight)


def continuous_bernoulli_with_logits(
    logits: Tensor, target: Tensor, *, weight: Tensor | None = None, reduction: str = "batchmean"
) -> Tensor:
    """Continuous Bernoulli negative log-likelihood of logits: log((e^l − 1)/l) − l·x, a density on [0, 1].

    Source: Loaiza-Ganem & Cunningham 2019, eq. 9, written in the logit. Args and errors as :func:`bce_with_logits`.

    >>> continuous_bernoulli_with_logits(torch.zeros(1, 4), torch.rand(1, 4)).abs() < 1e-6
    tensor(True)
    """
    return _reconstruction("logits", logits, target, "continuous_bernoulli_logits", 0.0, reduction, weight)


def mse(recon: Tensor, target: Tensor, *, weight: Tensor | None = None, reduction: str = "batchmean") -> Tensor:
    """Squared error (x − y)², as ``F.mse_loss`` but for the default reduction.

    Args:
        recon: y, ``[B, *data]``.
        target: x, as ``recon``; or uint8 meaning x/255.
        weight: see the module.
        reduction: see the module.

    Raises:
        TypeError: an argument is not a tensor of a dtype named here.
        ValueError: shapes or devices differ, or the reduction is not one.

    >>> mse(torch.zeros(2, 3), torch.ones(2, 3))
    tensor(3.)
    """
    return _reconstruction("recon", recon, target, "mse", 0.0, reduction, weight)


def l1(recon: Tensor, target: Tensor, *, weight: Tensor | None = None, reduction: str = "batchmean") -> Tensor:
    """Absolute error |x − y|, as ``F.l1_loss`` but for the default reduction. Args and errors as :func:`mse`.

    >>> l1(torch.zeros(2, 3), torch.full((2, 3), -2.0))
    tensor(6.)
    """
    return _reconstruction("recon", recon, target, "l1", 0.0, reduction, weight)


def gaussian_nll(
    mean: Tensor,
    target: Tensor,
    var: Parameter | None = None,
    *,
    logvar: Parameter | None = None,
    optimal_sigma: bool = False,
    full: bool = True,
    weight: Tensor | None = None,
    reduction: str = "batchmean",
) -> Tensor:
    """Gaussian negative log-likelihood: ½((x − mean)²/var + log(2π·var)), differentiable in mean, variance and x.

    Unless ``full=False``, all of the density, so that ELBOs compare: ``F.gaussian_nll_loss`` with ``full=True``.

    Args:
        mean: ``[B, *data]``.
        target: x, as ``mean``; or uint8 meaning x/255.
        var: σ² of the decoder, > 0: a number (1 unless given), or a tensor that broadcasts to ``mean``: ``[]`` for
            one learned variance, ``[*data]`` for one per feature, ``[B, 1, …]`` for one per example, ``[B, *data]``.
        logvar: log σ² in place of ``var``, likewise.
        optimal_sigma: in place of both, the σ² that fits the batch best, its mean squared error, which is one more
            pass (the σ-VAE of Rybkin et al. 2021).
        full: False leaves the constant ½·log 2π out, as ``F.gaussian_nll_loss`` does unless told.
        weight: see the module.
        reduction: see the module.

    Returns:
        nats: elementwise, ``[B]`` or a scalar.

    Raises:
        TypeError: an argument is not of a type named here.
        ValueError: shapes or devices differ, the reduction is not one, more than one variance is given, or
            ``var`` is not positive (in a tensor, that is seen on a CPU).

    >>> gaussian_nll(torch.zeros(1, 2), torch.zeros(1, 2))
    tensor(1.8379)
    >>> gaussian_nll(torch.zeros(2, 3), torch.ones(2, 3), logvar=torch.zeros(3))
    tensor(4.2568)
    >>> gaussian_nll(torch.zeros(2, 3), torch.full((2, 3), 5.0), optimal_sigma=True, reduction="mean")
    tensor(3.0284)
    """
    if optimal_sigma:
        if var is not None or logvar is not None:
            raise ValueError("optimal_sigma takes the place of var and logvar, got one of them, too")
        error = mse(mean, target, weight=weight, reduction="mean")
        if weight is not None and weight.dtype != torch.bool:
            error = error / weight.to(error.dtype).expand(mean.shape).mean()
        var = error.clamp(min=torch.finfo(error.dtype).tiny)
    nll = _with_parameter("mean", mean, target, "gaussian", {"var": var, "logvar": logvar}, reduction, weight)
    if full:
        return nll
    return nll - 0.5 * math.log(2 * math.pi) * compose.counted(mean, weight, reduction)


def laplace_nll(
    loc: Tensor,
    target: Tensor,
    *,
    scale: Parameter | None = None,
    log_scale: Parameter | None = None,
    weight: Tensor | None = None,
    reduction: str = "batchmean",
) -> Tensor:
    """Laplace negative log-likelihood: |x − loc|/scale + log(2·scale), differentiable in loc, scale and x.

    The density of ``torch.distributions.Laplace(loc, scale)``; its mode is what :func:`l1` fits.

    Args:
        loc: ``[B, *data]``.
        target: x, as ``loc``; or uint8 meaning x/255.
        scale: b of the decoder, > 0: a number (1 unless given) or a tensor, as ``var`` of :func:`gaussian_nll`.
        log_scale: log b in place of ``scale``, likewise.
        weight: see the module.
        reduction: see the module.

    Returns:
        nats: elementwise, ``[B]`` or a scalar.

    Raises:
        TypeError: an argument is not of a type named here.
        ValueError: shapes or devices differ, the reduction is not one, both ``scale`` and ``log_scale`` are given, or
            ``scale`` is not positive (in a tensor, that is seen on a CPU).

    >>> laplace_nll(torch.zeros(1, 2), torch.ones(1, 2))
    tensor(3.3863)
    """
    return _with_parameter("loc", loc, target, "laplace", {"scale": scale, "log_scale": log_scale}, reduction, weight)


def poisson_nll(rate: Tensor, target: Tensor, *, weight: Tensor | None = None, reduction: str = "batchmean") -> Tensor:
    """Poisson negative log-likelihood of counts: λ − x·log(λ + 1e-8) + log x!.

    ``F.poisson_nll_loss(log_input=False)`` with the exact log x!, so that ELBOs compare; the 1e-8 keeps a rate of 0
    finite. Decoders that end in log λ are better served by :func:`poisson_nll_with_log_rate`.

    Args:
        rate: λ, ``[B, *data]``, at least 0.
        target: counts x, as ``rate``: of any integer dtype (uint8 as it is, not x/255), or whole numbers in floats.
        weight: see the module.
        reduction: see the module.

    Returns:
        nats: elementwise, ``[B]`` or a scalar.

    Raises:
        TypeError: an argument is not a tensor of a dtype named here.
        ValueError: shapes or devices differ, the reduction is not one, or (on a CPU) a target is no count or a rate is
            negative.

    >>> poisson_nll(torch.ones(1, 3), torch.tensor([[0, 1, 2]]), reduction="none")
    tensor([[1.0000, 1.0000, 1.6931]])
    """
    return _reconstruction("rate", rate, target, "poisson", 0.0, reduction, weight)


def poisson_nll_with_log_rate(
    log_rate: Tensor, target: Tensor, *, weight: Tensor | None = None, reduction: str = "batchmean"
) -> Tensor:
    """Poisson negative log-likelihood of counts, from l = log λ: eˡ − x·l + log x!; gradient eˡ − x.

    Args and errors as :func:`poisson_nll`, but for ``log_rate``, which is any real number.

    >>> poisson_nll_with_log_rate(torch.zeros(1, 3), torch.tensor([[0, 1, 2]]))
    tensor(3.6931)
    """
    return _reconstruction("log_rate", log_rate, target, "poisson_log_rate", 0.0, reduction, weight)


def negative_binomial_nll(
    mean: Tensor,
    target: Tensor,
    *,
    dispersion: Parameter,
    weight: Tensor | None = None,
    reduction: str = "batchmean",
) -> Tensor:
    """Negative binomial negative log-likelihood of counts, of mean μ and variance μ + μ²/θ.

    log Γ(θ) + log x! − log Γ(x + θ) + θ·log((θ + μ + ε)/(θ + ε)) − x·log((μ + ε)/(θ + μ + ε)), ε = 1e-8: minus
    ``log_nb_positive`` of scvi-tools, differentiable in mean, dispersion and x. Source: Lopez et al. 2018. For large θ
    it is the Poisson, and stays exact where the logarithms of Γ would cancel.

    Args:
        mean: μ, ``[B, *data]``, at least 0.
        target: counts x, as ``mean``: of any integer dtype (uint8 as it is, not x/255), or whole numbers in floats.
        dispersion: inverse dispersion θ, > 0: a number, or a tensor that broadcasts to ``mean``: ``[genes]`` for one
            per gene, ``[B, genes]`` for one per cell and gene; for one per gene and batch, ``theta[batch_index]``.
        weight: see the module.
        reduction: see the module.

    Returns:
        nats: elementwise, ``[B]`` or a scalar.

    Raises:
        TypeError: an argument is not of a type named here.
        ValueError: shapes or devices differ, the reduction is not one, or (on a CPU) a target is no count, a mean is
            negative or a dispersion is not positive.

    >>> negative_binomial_nll(torch.ones(1, 3), torch.tensor([[0, 1, 2]]), dispersion=torch.ones(3))
    tensor(4.1589)
    """
    given = {"dispersion": dispersion}
    return _with_parameter("mean", mean, target, "negative_binomial", given, reduction, weight)


def zero_inflated_negative_binomial_nll(
    mean: Tensor,
    target: Tensor,
    *,
    dispersion: Parameter,
    zero_logits: Parameter,
    weight: Tensor | None = None,
    reduction: str = "batchmean",
) -> Tensor:
    """The same of counts that are 0 with probability σ(π) whatever the negative binomial says, as where reads drop out.

    softplus(−π) − softplus(−π − n) where x = 0, else softplus(π) + n, n the :func:`negative_binomial_nll` of x: minus
    ``log_zinb_positive`` of scvi-tools, differentiable in mean, dispersion, zero_logits and x, by one kernel. Source:
    Lopez et al. 2018.

    Args:
        mean: μ, ``[B, *data]``, at least 0.
        target: counts x, as ``mean``: see :func:`negative_binomial_nll`.
        dispersion: inverse dispersion θ, > 0: see :func:`negative_binomial_nll`.
        zero_logits: π, the logit of a zero's extra probability: a number, or a tensor that broadcasts to ``mean``.
        weight: see the module.
        reduction: see the module.

    Returns:
        nats: elementwise, ``[B]`` or a scalar.

    Raises:
        TypeError: an argument is not of a type named here.
        ValueError: as :func:`negative_binomial_nll`.

    >>> x, zero_logits = torch.tensor([[0, 1, 2]]), torch.zeros(1, 3)
    >>> zero_inflated_negative_binomial_nll(torch.ones(1, 3), x, dispersion=torch.ones(3), zero_logits=zero_logits)
    tensor(5.1397)
    """
    given = {"dispersion": dispersion}
    return _with_parameter("mean", mean, target, "negative_binomial", given, reduction, weight, zero_logits)


def negative_binomial_nll_from_scores(
    scores: Tensor,
    library_size: Parameter,
    target: Tensor,
    *,
    dispersion: Parameter,
    reduction: str = "batchmean",
) -> Tensor:
    """:func:`negative_binomial_nll` of the mean library_size · softmax(scores), which is never stored.

    That is how scVI's decoder ends: shares of the genes, times the counts of a cell. The softmax, its backward and the
    likelihood are one kernel. Differentiable in scores, library size, dispersion and x. For a Poisson,
    ``poisson_nll_with_log_rate(scores.log_softmax(1) + library_size.log(), target)``.

    Args:
        scores: ``[B, *data]``; the softmax is over all elements of an example. Half precision is converted first.
        library_size: > 0, in counts: a number, or a tensor of one per example, ``[B]`` or ``[B, 1]``.
        target: counts x, as ``scores``: see :func:`negative_binomial_nll`.
        dispersion: inverse dispersion θ, > 0: see :func:`negative_binomial_nll`.
        reduction: see the module.

    Returns:
        nats: elementwise, ``[B]`` or a scalar.

    Raises:
        TypeError: an argument is not of a type named here.
        ValueError: as :func:`negative_binomial_nll`; or a library size is not positive, or not one per example.

    >>> x = torch.tensor([[0, 1, 2]])
    >>> negative_binomial_nll_from_scores(torch.zeros(1, 3), 3.0, x, dispersion=torch.ones(3))
    tensor(4.1589)
    """
    return _from_scores(scores, library_size, target, dispersion, reduction)


def zero_inflated_negative_binomial_nll_from_scores(
    scores: Tensor,
    library_size: Parameter,
    target: Tensor,
    *,
    dispersion: Parameter,
    zero_logits: Parameter,
    reduction: str = "batchmean",
) -> Tensor:
    """:func:`zero_inflated_negative_binomial_nll` of the mean library_size · softmax(scores).

    Args and errors as :func:`negative_binomial_nll_from_scores`, and ``zero_logits`` besides.

    >>> x, zero_logits = torch.tensor([[0, 1, 2]]), torch.zeros(1, 3)
    >>> zero_inflated_negative_binomial_nll_from_scores(
    ...     torch.zeros(1, 3), 3.0, x, dispersion=torch.ones(3), zero_logits=zero_logits
    ... )
    tensor(5.1397)
    """
    return _from_scores(scores, library_size, target, dispersion, reduction, zero_logits)


LINEAR_REDUCTIONS = ("example", "sum", "mean", "batchmean")


def linear_bce(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    *,
    likelihood: str = "bernoulli_logits",
    reduction: str = "batchmean",
    chunk: int | None = None,
) -> Tensor:
    """A decoder's last layer and its loss: ``bce_with_logits(F.linear(hidden, weight, bias), target)``.

    Logits and their gradient exist for ``chunk`` examples at a time, so that memory no longer grows with batch × data.
    Values and gradients are those of the two calls, to rounding. Source of the term: :func:`bce_with_logits`.

    Args:
        hidden: inputs of the layer, ``[B, *, K]``; under autocast in its dtype.
        weight: ``[M, K]``, in the dtype of ``hidden``, as ``torch.nn.Linear`` has it.
        bias: ``[M]``, or None.
        target: the data, ``[B, *, M]``; or uint8 meaning x/255.
        likelihood: what the layer's outputs are, see :func:`elbo_loss`.
        reduction: ``"batchmean"``, ``"sum"``, ``"mean"`` or ``"example"``.
        chunk: examples at a time; None for as many as fit a cache, or keep a GPU busy.

    Returns:
        nats: ``[B]`` or a scalar.

    Raises:
        TypeError: an argument is not a tensor of a dtype named here, or ``chunk`` not an int.
        ValueError: shapes, devices, likelihood or reduction do not fit. ``"none"`` does not: its result is as large as
            what is avoided here.

    Under ``torch.compile``, ``torch.func`` and where ``target`` requires grad, it is the two calls.

    >>> hidden, layer, x = torch.randn(8, 400), torch.nn.Linear(400, 784), torch.rand(8, 784)
    >>> loss = linear_bce(hidden, layer.weight, layer.bias, x)
    >>> torch.allclose(loss, bce_with_logits(layer(hidden), x))
    True
    """
    hidden = checks.tensor("hidden", hidden)
    hidden, weight, bias = checks.linear(hidden, weight, bias)
    outputs = hidden.new_empty(()).expand(*hidden.shape[:-1], len(weight))  # a shape without memory
    likelihood = checks.likelihood(likelihood)
    checks.needs_no_parameter(likelihood)
    target = checks.target(target, "the layer's output", outputs, likelihood)
    if reduction == "none":
        raise ValueError(
            "reduction must be 'example', 'sum', 'mean' or 'batchmean' for linear_bce, got 'none': its result is as "
            "large as the logits; call torch.nn.functional.linear and the term one by one"
        )
    reduction = checks.reduction(reduction, LINEAR_REDUCTIONS)
    count = checks.chunk(chunk)
    term = {"likelihood": likelihood, "parameter": likelihoods.DEFAULT_NUMBERS[likelihood], "reduction": reduction}
    return linear.loss(hidden, weight, bias, target, term, count)


_ELBO_REDUCTIONS = ("example", "sum", "batchmean")


def elbo_loss(
    recon: Tensor,
    target: Tensor,
    mu: Tensor,
    logvar: Tensor | None = None,
    *,
    std: Tensor | None = None,
    log_std: Tensor | None = None,
    std_raw: Tensor | None = None,
    prior_mu: Prior | None = None,
    prior_logvar: Prior | None = None,
    prior_std: Prior | None = None,
    likelihood: str = "bernoulli_logits",
    likelihood_parameters: Mapping[str, Parameter | None] | None = None,
    logvar_clamp: tuple[float, float] | None = None,
    beta: float | Tensor = 1.0,
    capacity: float | Tensor | None = None,
    free_bits: float | Tensor = 0.0,
    free_bits_per: str = "element",
    samples: int | None = None,
    weight: Tensor | None = None,
    reduction: str = "batchmean",
    **parameters: Parameter | None,
) -> ELBOLoss:
    """The negative ELBO, −E[log p(x|z)] + β·KL(q(z|x)‖p(z)), in one launch where it is as most people have it.

    A learned variance, a prior other than N(0, I), several samples, a weight and free bits by group take two or three.
    Source: Kingma & Welling 2014, eq. 7; β: Higgins et al. 2017; the capacity: Burgess et al. 2018, eq. 8.

    Args:
        recon: the decoder's output, ``[B, *data]``; with ``samples``, ``[samples, B, *data]``.
        target: the data, ``[B, *data]``; or uint8 meaning x/255.
        mu: mean of q, ``[B, *latent]``.
        logvar: log σ² of q, as ``mu``. Give this, ``std``, ``log_std`` or ``std_raw``: see :func:`gaussian_kl`.
        std: σ of q, likewise.
        log_std: log σ of q, likewise.
        std_raw: σ = softplus(std_raw), likewise.
        prior_mu: mean of p, 0 unless given; with ``prior_logvar`` or ``prior_std``: see :func:`gaussian_kl`.
        prior_logvar: log variance of p.
        prior_std: standard deviation of p.
        likelihood: what ``recon`` is: ``"bernoulli_logits"``, ``"bernoulli_probs"`` (clipped at 1e-8),
            ``"continuous_bernoulli_logits"``, ``"gaussian"`` (mean, variance 1), ``"laplace"`` (location,
            scale 1), ``"mse"`` or ``"l1"``; and of counts ``"poisson"`` (rate), ``"poisson_log_rate"`` or
            ``"negative_binomial"`` (mean).
        likelihood_parameters: another variance or scale, or a learned one: ``{"var": …}`` or ``{"logvar": …}`` for
            ``"gaussian"``, ``{"scale": …}`` or ``{"log_scale": …}`` for ``"laplace"``, ``{"eps": …}`` for
            ``"bernoulli_probs"``; ``{"dispersion": …}``, which ``"negative_binomial"`` needs, and ``"zero_logits"``
            beside it. Numbers, or tensors as for :func:`gaussian_nll`.
        logvar_clamp: ``(low, high)``: log σ² is clamped before use; see :func:`reparameterize`.
        beta: weight of the KL, ≥ 0: a number, or a 0-d tensor, which a captured graph can be annealed with.
        capacity: C in nats per example: the loss is then reconstruction + β·|KL − C|. A number or a 0-d tensor.
        free_bits: see :func:`gaussian_kl`.
        free_bits_per: likewise.
        samples: L samples of z for each example: ``recon`` has them first, and its term is their mean.
        weight: of the elements of the reconstruction, or a mask: see the module.
        reduction: ``"batchmean"``, ``"sum"`` or ``"example"``.
        **parameters: those of the likelihood by name: ``var=0.1``. (``logvar`` is q's.)

    Returns:
        ``(loss, reconstruction, kl)``.

    Raises:
        TypeError: an argument is not of a type named here.
        ValueError: shapes, devices, likelihood or reduction do not fit. ``"none"`` and ``"mean"`` do not: the terms
            have different shapes, and means over different counts would reweight the KL.

    >>> out = elbo_loss(torch.zeros(2, 784), torch.rand(2, 784), torch.ones(2, 20), torch.zeros(2, 20))
    >>> out.kl, out.loss == out.reconstruction + out.kl
    (tensor(10.), tensor(True))
    """
    if parameters:
        likelihood_parameters = _by_name(likelihood_parameters, parameters)
    recon = checks.tensor("recon", recon)
    likelihood = checks.likelihood(likelihood)
    count = 0 if samples is None else checks.samples_of("recon", recon, samples)
    target = checks.target(target, "a sample of recon" if count else "recon", recon[0] if count else recon, likelihood)
    mu = checks.tensor("mu", mu)
    if mu.size(0) != target.size(0):
        raise ValueError(f"mu must have the batch size of recon, {target.shape[0]}, got {mu.shape[0]}")
    if mu.device != recon.device:
        raise ValueError(f"mu must be on the device of recon, {recon.device}, got {mu.device}")
    if reduction in ("none", "mean"):
        raise ValueError(
            f"reduction must be 'example', 'sum' or 'batchmean' for elbo_loss, got {reduction!r}: its terms have "
            "different shapes; call the reconstruction term and gaussian_kl one by one"
        )
    reduction = checks.reduction(reduction, _ELBO_REDUCTIONS)
    beta = checks.beta(beta)
    if likelihood_parameters and "eps" in likelihood_parameters and likelihood_parameters["eps"] is None:
        likelihood = "bernoulli_probs_log_clamped" if likelihood == "bernoulli_probs" else likelihood
    tensor, parameter, row = None, likelihoods.DEFAULT_NUMBERS[likelihood], likelihood
    if likelihood_parameters or likelihood in likelihoods.NEED_A_NUMBER:
        own = {name: value for name, value in (likelihood_parameters or {}).items() if name != "zero_logits"}
        row, parameter, tensor = _parameter(likelihood, own, recon)
        zero_logits = (likelihood_parameters or {}).get("zero_logits")
        if zero_logits is not None and likelihood != "negative_binomial":
            raise ValueError(f"zero_logits are for 'negative_binomial', got likelihood {likelihood!r}")
    else:
        own, zero_logits = {}, None
    given, prior = (logvar, std, log_std, std_raw), (prior_mu, prior_logvar, prior_std)
    if (
        tensor is not None
        or zero_logits is not None
        or prior_mu is not None
        or prior_logvar is not None
        or prior_std is not None
        or count
        or weight is not None
        or isinstance(free_bits, Tensor)
        or free_bits_per != "element"
    ):
        kl = _latent(
            mu,
            given,
            prior=prior,
            logvar_clamp=logvar_clamp,
            free_bits=free_bits,
            free_bits_per=free_bits_per,
            reduction=reduction,
        )[0]

        def term(recon: Tensor, target: Tensor, reduction: str) -> Tensor:
            return _with_parameter("recon", recon, target, likelihood, own, reduction, weight, zero_logits)

        reconstruction = _over_samples(term, recon, target, reduction) if count else term(recon, target, reduction)
        loss = reconstruction + beta * _excess(kl, capacity, reduction, mu)
        return ELBOLoss(loss.to(reconstruction.dtype), reconstruction, kl)
    scale, log_scale = checks.scale(mu, *given)
    low, high = checks.logvar_clamp(logvar_clamp, log_scale)
    if type(free_bits) is not float or not 0 <= free_bits <= checks.LARGEST:
        free_bits = checks.number("free_bits", free_bits, 0)
    mu, scale, _, _ = checks.one_dtype(mu, scale)
    # compiled, a number would be a constant: one graph for each value of an annealed beta
    outside = isinstance(beta, Tensor) or capacity is not None or torch.compiler.is_dynamo_compiling()
    in_kernel = 1.0 if isinstance(beta, Tensor) or outside else beta
    recon, target, _ = _dense(recon, target, reduction)
    with_gradient = autograd.one_pass(recon, reduction)
    options = row, parameter, log_scale, low, high, in_kernel, free_bits, reduction, with_gradient
    loss, reconstruction, kl, *_ = autograd.apply(autograd.ELBO, (recon, target, mu, scale), options)
    if outside:
        loss = (reconstruction + beta * _excess(kl, capacity, reduction, mu)).to(reconstruction.dtype)
    return ELBOLoss(loss, reconstruction, kl)


def _by_name(
    given: Mapping[str, Parameter | None] | None, parameters: Mapping[str, Parameter | None]
) -> Mapping[str, Parameter | None]:
    for name in parameters:
        if name not in _PARAMETERS:
            known = _OTHER_NAMES.get(name)
            hint = f": it is called {known} here" if known else ""
            raise TypeError(f"elbo_loss has no argument {name!r}{hint}")
    return {**(given or {}), **parameters}


_PARAMETERS = {"zero_logits", *(row.number.name for row in likelihoods.LIKELIHOODS.values() if row.number is not None)}
_OTHER_NAMES = {
    **dict.fromkeys(("kl_weight", "kld_weight", "beta_weight", "weight_kl", "kl_coef"), "beta"),
    **dict.fromkeys(("n_samples", "num_samples", "L"), "samples"),
    **dict.fromkeys(("sigma", "prior_scale"), "prior_std"),
    **dict.fromkeys(("log_var", "log_sigma2"), "logvar"),
    **dict.fromkeys(("mask", "sample_weight"), "weight"),
    "prior_mean": "prior_mu",
    "log_sigma": "log_std",
    "theta": "dispersion",
    "C": "capacity",
}


def _over_samples(
    term: Callable[[Tensor, Tensor, str], Tensor], recon: Tensor, target: Tensor, reduction: str
) -> Tensor:
    """The mean of ``term`` over the samples, which come first; the target is read again for each, not copied."""
    count, batch = recon.shape[:2]
    if reduction == "example":
        return torch.stack([term(sample, target, reduction) for sample in recon.unbind()]).mean(0)
    whole = term(recon, target.expand(recon.shape), "sum")
    return whole / (count * batch if reduction == "batchmean" else count)


def _excess(kl: Tensor, capacity: float | Tensor | None, reduction: str, mu: Tensor) -> Tensor:
    """What β weighs."""
    if capacity is None:
        return kl
    capacity = checks.beta(capacity, "capacity")
    return (kl - (capacity * mu.shape[0] if reduction == "sum" else capacity)).abs()


def vae_loss(recon_x: Tensor, x: Tensor, mu: Tensor, logvar: Tensor) -> Tensor:
    """The ``loss_function`` of the PyTorch VAE example: summed ``F.binary_cross_entropy`` + KL, the same numbers.

    Args:
        recon_x: probabilities, ``[B, *data]``.
        x: the data in [0, 1] (or uint8 meaning x/255), with as many elements; it is reshaped to ``recon_x``.
        mu: mean of q, ``[B, *latent]``.
        logvar: log σ² of q, as ``mu``.

    Returns:
        The sum over all examples, in nats.

    Raises:
        TypeError: an argument is not a tensor of a dtype named here.
        ValueError: shapes or devices do not fit, or (on a CPU) values are outside [0, 1].

    >>> loss = vae_loss(torch.full((2, 784), 0.5), torch.rand(2, 1, 28, 28), torch.ones(2, 20), torch.zeros(2, 20))
    >>> f"{loss:.1f}"
    '1106.9'
    """
    recon_x = checks.tensor("recon_x", recon_x)
    if isinstance(x, Tensor) and x.shape != recon_x.shape:
        if x.numel() != recon_x.numel():
            raise ValueError(f"x must have as many elements as recon_x, {list(recon_x.shape)}, got {list(x.shape)}")
        x = x.reshape(recon_x.shape)
    reconstruction = _reconstruction("recon_x", recon_x, x, "bernoulli_probs_log_clamped", 0.0, "sum")
    return reconstruction + gaussian_kl(mu, logvar, reduction="sum")


for _name, _function in list(globals().items()):  # as in fastvae/__init__.py, for those who call fastvae.functional.…
    if getattr(_function, "__module__", None) == __name__ and not _name.startswith("_") and _name.islower():
        fx.wrap(_name)
