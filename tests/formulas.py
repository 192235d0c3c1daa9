"""What every op computes, written a second time and apart from ``kernels/``: the values a fuzzer compares with.

Each formula takes float64 tensors and returns, for each element, the value, its derivatives, and beside each of them
its *size*: the sum of the magnitudes of its terms. A kernel may lose a few units in the last place of the size and no
more (``ULPS``). Run on float32 tensors, the same formulas are plain eager PyTorch, which shows where float32 overflows
on the way.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from fastvae.kernels.reference.noise import WORD, philox4x32

STD_EPS = 1e-8  # inside the logarithm of σ²

# THE table of tolerances. In units of the last place (2⁻²⁴ in float32 arithmetic, 2⁻⁵³ in float64) of the size:
ULPS = {
    "value": 8.0,  # exp 2, log 1 (tests/test_math.py), a division 1, and the sums of three or four terms
    "gradient": 16.0,  # the same, a reciprocal of a rounded difference, products with weight and upstream gradient
    "sample": 8.0,  # exp 2, its argument, a product and a sum
}
# a lane of a CPU register adds up to 96 terms in float32, a program of Triton at most 64: an ulp of the sum for each
CHAIN = 96
# of log(f₁·f₂·…), where each factor in [½, 2] and each product is rounded: so many ulps of 1 nat for each element
FACTOR = 4.0
# of ε, computed in float32 for every dtype (tests/test_noise.py); a GPU's approximate instructions, and elsewhere
NOISE = {"triton": 2e-5, "cuda": 2e-5}
NOISE_ON_CPU = 3e-6
# and besides: one rounding to the dtype of a value, two to that of a gradient (fuzz.Trial.backward says which); what
# underflow costs (fuzz.floor); the series of the continuous Bernoulli, seen only in float64 (``lost``, below); a GPU's
# exp of a large argument (fuzz.Oracle.lost_in_exp, and of logits in Oracle.reconstruction); 1/σ² and e^(−log σ²) that
# underflow (of_tensor), and 1/σ where σ² overflows (gaussian_kl). Infinite or NaN is allowed only where it is right,
# where eager PyTorch is, or beyond the largest number of the dtype.


class Term(NamedTuple):
    """A number for each element, its size, and where 0 is as good: at the jump of a derivative.

    ``lost`` is what a formula that is documented to be approximate may be off by, in the arithmetic of any dtype;
    ``cancels`` joins the size where the textbook's formula is what runs: the reference, and a batched backward;
    ``before`` is what a factor that may underflow is multiplied with.
    """

    value: Tensor
    size: Tensor
    either: Tensor | None = None
    diverged: Tensor | None = None  # where an infinite value is as good: KL itself is infinite, in this arithmetic
    lost: float | Tensor = 0.0
    cancels: float | Tensor = 0.0
    before: float | Tensor = 0.0


class Nll(NamedTuple):
    """A reconstruction term of each element and its derivatives in y, in x, and in parameters that are tensors."""

    value: Term
    by_recon: Term
    by_target: Term
    by_parameter: Term | None = None
    by_zero_logits: Term | None = None


def bernoulli_coefficients(count: int) -> list[float]:
    """B₂ₖ/(2k)! for k = 1, 2, …: (−1)ᵏ⁺¹·2ζ(2k)/(2π)²ᵏ."""
    zeta = [math.pi**2 / 6, math.pi**4 / 90]
    zeta += [1 + sum(n ** -(2.0 * k) for n in range(2, 4000 if k < 6 else 60)) for k in range(3, count + 1)]
    return [-((-1) ** k) * 2 * z / (2 * math.pi) ** (2 * k) for k, z in enumerate(zeta, 1)]


COEFFICIENTS = bernoulli_coefficients(14)


def bernoulli_logits(y: Tensor, x: Tensor, _: float) -> Nll:
    a = torch.exp(-y.abs())
    high, low = y.clamp(min=0), torch.log1p(a)
    sigmoid = torch.where(y >= 0, 1 / (1 + a), a / (1 + a))
    return Nll(
        Term(high - y * x + low, high + (y * x).abs() + low),
        Term(sigmoid - x, sigmoid + x.abs()),
        Term(-y, y.abs()),
    )


def bernoulli_probs(y: Tensor, x: Tensor, eps: float) -> Nll:
    low = max(eps, 5e-324)
    log_p, log_q = y.clamp(low, 1 - eps).log(), (1 - y).clamp(low, 1 - eps).log()
    clipped = (y < eps) | (1 - y < eps)
    safe = torch.where(clipped, 0.5, y)
    up, down = (1 - x) / (1 - safe), x / safe
    slack = 8 * ulp(torch.float32) * eps  # eps itself is rounded
    on_the_edge = ((y - eps).abs() <= slack) | ((1 - y - eps).abs() <= slack)
    return Nll(
        Term(-x * log_p - (1 - x) * log_q, (x * log_p).abs() + ((1 - x) * log_q).abs() + 1),
        Term(
            torch.where(clipped & ~on_the_edge, 0.0, (1 - x) / (1 - y) - x / y),
            torch.where(clipped & ~on_the_edge, 0.0, up.abs() + down.abs()),
            on_the_edge | (clipped & x.isnan()),
        ),
        Term(log_q - log_p, log_q.abs() + log_p.abs() + 1),
    )


def bernoulli_probs_log_clamped(y: Tensor, x: Tensor, _: float) -> Nll:
    log_p, log_q = y.log().clamp(min=-100), torch.log1p(-y).clamp(min=-100)
    spread = (y * (1 - y)).clamp(min=1e-12)
    return Nll(
        Term(-x * log_p - (1 - x) * log_q, (x * log_p).abs() + ((1 - x) * log_q).abs()),
        Term((y - x) / spread, (y - x).abs() / spread),
        Term(log_q - log_p, log_q.abs() + log_p.abs()),
    )


def continuous_bernoulli_logits(y: Tensor, x: Tensor, _: float) -> Nll:
    """log((eʸ − 1)/y) − x·y and 1/(1 − e⁻ʸ) − 1/y − x, by their series where |y| < 1."""
    near = y.abs() < 1
    s, v = torch.where(near, y, 0.0), torch.where(near, 1.0, y)
    log_series, mean_series = 0.5 * s, torch.full_like(s, 0.5)
    for k, c in enumerate(COEFFICIENTS, 1):
        log_series = log_series + c / (2 * k) * s ** (2 * k)
        mean_series = mean_series + c * s ** (2 * k - 1)
    # the series of the kernels end with y¹⁰ and y⁹, which float64 sees near |y| = ½: the first terms they leave out
    short = torch.where(y.abs() <= 0.5, 1.1 * abs(COEFFICIENTS[5]) * y.abs() ** 11, 0.0)
    high = v.clamp(min=0)
    log_far = torch.log(-torch.expm1(-v.abs()) / v.abs())
    one, two = -1 / torch.expm1(-v), 1 / v
    # from |y| = ½ on the kernels subtract one from the other
    away = torch.where(near, 1 / -torch.expm1(-y.abs()), one.abs()) + 1 / y.abs()
    value = torch.where(near, log_series, high + log_far) - x * y
    value = torch.where((y == -math.inf) & (x > 0), math.inf, value)  # the limit; the terms are inf − inf
    return Nll(
        Term(
            value,
            torch.where(near, log_series.abs(), high + log_far.abs()) + (x * y).abs() + 1,
            lost=short * y.abs() / 12,
        ),
        Term(
            torch.where(near, mean_series, one - two) - x,
            torch.where(y.abs() < 0.5, 0.5 + s.abs(), away) + x.abs(),
            lost=short,
        ),
        Term(-y, y.abs()),
    )


def gaussian(y: Tensor, x: Tensor, var: float) -> Nll:
    d, constant = y - x, 0.5 * math.log(2 * math.pi * var)
    return Nll(
        Term(0.5 * d * d / var + constant, 0.5 * d * d / var + abs(constant)),
        Term(d / var, d.abs() / var),
        Term(-d / var, d.abs() / var),
    )


def mse(y: Tensor, x: Tensor, _: float) -> Nll:
    d = y - x
    return Nll(Term(d * d, d * d), Term(2 * d, 2 * d.abs()), Term(-2 * d, 2 * d.abs()))


def sign(d: Tensor) -> Tensor:
    return torch.where(d.isnan(), d, torch.sign(d))


def l1(y: Tensor, x: Tensor, _: float) -> Nll:
    s = sign(y - x)
    return Nll(Term((y - x).abs(), (y - x).abs()), Term(s, s.abs()), Term(-s, s.abs()))


def laplace(y: Tensor, x: Tensor, scale: float) -> Nll:
    d, s, constant = (y - x).abs() / scale, sign(y - x) / scale, math.log(2 * scale)
    return Nll(Term(d + constant, d + abs(constant)), Term(s, s.abs()), Term(-s, s.abs()))


COUNT_EPS = 1e-8
SERIES = (1 / 12, -1 / 360, 1 / 1260, -1 / 1680, 1 / 1188, -691 / 360360)  # of log Γ: B₂ₖ/(2k·(2k − 1))


def remainder(z: Tensor) -> Tensor:
    """log Γ(z) beyond Stirling's (z − ½)·log z − z + ½·log 2π, for z ≥ 20."""
    return sum(c * z ** -(2 * k + 1) for k, c in enumerate(SERIES))  # type: ignore[return-value]


def log_quotient(a: Tensor, b: Tensor) -> Tensor:
    """log(a/b), by what the two differ by where they are close."""
    return torch.where((a - b).abs() < 0.5 * b, torch.log1p((a - b) / b), torch.log(a / b))


def rounded(y: Tensor, unit: float) -> Tensor:
    """How much of y + 1e-8 is lost where it is rounded: nothing where y alone is what is left."""
    return (COUNT_EPS / (y + COUNT_EPS)).clamp(max=unit)


def poisson(y: Tensor, x: Tensor, _: float, unit: float) -> Nll:
    rate = y + COUNT_EPS
    large = x >= 20
    z = torch.where(large, x, 20.0)
    log_x = torch.where(x > 0, x * log_quotient(x.clamp(min=1), rate), 0.0)
    by_series = log_x + 0.5 * torch.log(2 * math.pi * z) + remainder(z)
    few = torch.where(large, 0.0, x)
    value = (y - torch.where(large, x, 0.0)) + torch.where(large, by_series, torch.lgamma(few + 1) - few * rate.log())
    # a quarter of x: without fused multiply-adds, c/rate is rounded for good
    size = (y - x).abs() + 8 + log_x.abs() + 0.25 * x + torch.log1p(x) + few * (1 + rate.log().abs())
    lost = rounded(y, unit)
    return Nll(
        Term(value, size, lost=x * lost, cancels=y + x * rate.log().abs() + torch.lgamma(x + 1).abs()),
        Term((rate - x) / rate, (rate - x).abs() / rate, lost=x / rate * lost),
        Term(torch.digamma(x + 1) - rate.log(), torch.digamma(x + 1).abs() + rate.log().abs() + 1),
    )


def poisson_log_rate(y: Tensor, x: Tensor, _: float, unit: float) -> Nll:
    rate, log_x = torch.exp(y), torch.log(x.clamp(min=1))
    value = rate - x * y + torch.lgamma(x + 1)
    size = rate + x * (y.abs() + log_x + 1) + log_x + 8
    return Nll(
        Term(value, size),
        Term(rate - x, rate + x),
        Term(torch.digamma(x + 1) - y, torch.digamma(x + 1).abs() + y.abs()),
    )


def negative_binomial(y: Tensor, x: Tensor, theta: float | Tensor, unit: float) -> Nll:
    """By Stirling's series where x, and where θ, is 20 or more; else by the functions of torch.

    Where x = 0, the kernels' differences of log Γ are of two numbers that are the same.
    """
    t = torch.as_tensor(theta, dtype=y.dtype, device=y.device).expand(y.shape)
    mean, lifted, b, some = y + COUNT_EPS, t + COUNT_EPS, x + t, x != 0
    total = lifted + y
    grown, growth = t * torch.log1p(y / lifted), torch.log1p(x / t)
    many, much = x >= 20, t >= 20
    c, a, safe_b = torch.where(many, x, 20.0), torch.where(much, t, 20.0), torch.where(b >= 20, b, 20.0)
    # log Γ(x + θ) − log Γ(θ), and log x!, each without x·log b − x, which the two have in common by the series
    rising = torch.where(
        much,
        (a - 0.5) * torch.log1p(x / a) + remainder(safe_b) - remainder(a),
        torch.where(
            many,
            (t - 0.5) * torch.log(safe_b) - t + 0.5 * math.log(2 * math.pi) + remainder(safe_b) - torch.lgamma(t),
            torch.lgamma(b) - torch.lgamma(t) - x * torch.log(b) + x,
        ),
    )
    odds = (mean / total) * b
    log_factorial = torch.where(
        many, 0.5 * torch.log(2 * math.pi * c) + remainder(c), torch.lgamma(torch.where(many, 1.0, x) + 1)
    )
    start = torch.where(many, 0.0, x)
    log_odds = torch.where(many, log_quotient(odds, c), torch.log(odds))
    value = grown - torch.where(x > 0, x * log_odds, 0.0) + start - rising + log_factorial
    of_some = x * (log_odds.abs() + 1) + (t + 16) * growth + 24 * torch.log(b + 16) + t.log().abs()
    size = grown + torch.where(some, of_some, 0.0) + 8
    slope = torch.log1p(y / lifted) + (t / lifted * (x - y) + x * COUNT_EPS / lifted) / total
    slopes = torch.where(
        much,
        growth - 0.5 * (1 / b - 1 / t) + digamma_remainder(safe_b) - digamma_remainder(a),
        torch.digamma(b) - torch.digamma(t),
    )
    digammas = torch.digamma(b).abs() + torch.digamma(t).abs()  # torch's own are off by some of their ulps
    slope_size = torch.log1p(y / lifted) + growth + (x - y).abs() / total + torch.where(t < 8, 4 + 1 / t + 1 / b, 1 / t)
    lost, far = rounded(y, unit), (mean - x).abs() / mean
    small = torch.finfo(torch.float32 if unit > 2.0**-50 else torch.float64).tiny  # θ/(θ + y) may underflow
    return Nll(
        Term(value, size, lost=x * lost, cancels=sum(torch.lgamma(z).abs() for z in (b, t, x + 1))),
        Term(t / total * (mean - x) / mean, t / total * far, lost=t / total * x / mean * lost + small * far),
        Term(
            torch.digamma(x + 1) - torch.digamma(b) - (mean / total).log(),
            torch.digamma(x + 1).abs() + torch.digamma(b).abs() + (mean / total).log().abs() + 1,
        ),
        Term(slope - slopes, slope_size, lost=torch.where(much, 0.0, 2.0**-51 * digammas), cancels=digammas),
    )


def digamma_remainder(z: Tensor) -> Tensor:
    """The derivative of ``remainder``."""
    return sum(-(2 * k + 1) * c * z ** -(2 * k + 2) for k, c in enumerate(SERIES))  # type: ignore[return-value]


def zero_inflated(of_count: Nll, x: Tensor, logits: Tensor, unit: float, relative: float) -> Nll:
    """Of a count that is 0 with probability σ(π), too: −log(σ(π) + σ(−π)·e^(−n)) at 0, else n − log σ(−π).

    n may be off by all that its bound allows, and e^(−|π|) and e^(−|π + n|) by ``relative`` for each unit of what they
    are of. At 0 the derivative in π is a difference of two probabilities, and the value has a difference of two
    logarithms, each up to log 2, in it: some units of 1 are lost.
    """
    n, is_zero, total = of_count.value, x == 0, logits + of_count.value.value
    by_count, none = torch.sigmoid(-total), torch.sigmoid(-logits)
    log_none = F.logsigmoid(-logits)
    value = torch.where(is_zero, -torch.logaddexp(F.logsigmoid(logits), log_none - n.value), n.value - log_none)
    # of n, and of π + n, which is rounded; then by the slope of σ, as it is nowhere steeper between the two ends
    n_off = ULPS["value"] * unit * n.size + n.lost
    off = n_off + (2 * unit + relative) * total.abs()
    n_off, off = (torch.where(total.isfinite(), t, 0.0) for t in (n_off, off))
    by_count_off = off * torch.sigmoid(off - total) * torch.sigmoid(off + total)
    none_off = (relative * logits.abs() * none * torch.sigmoid(logits)).nan_to_num(0.0)

    def inflated(term: Term) -> Term:
        lost = by_count_off * term.size + (by_count + by_count_off) * term.lost
        return term._replace(
            value=torch.where(is_zero, by_count * term.value, term.value),
            size=torch.where(is_zero, by_count * term.size, term.size),
            lost=torch.where(is_zero, lost, term.lost),
            before=torch.where(is_zero, term.value.abs(), 0.0),
        )

    return Nll(
        Term(
            value,
            torch.where(is_zero, value.abs(), n.size - log_none) + 1,
            lost=torch.where(is_zero, torch.sigmoid(off - total) * n_off, n.lost),
        ),
        inflated(of_count.by_recon),
        inflated(of_count.by_target),
        None if of_count.by_parameter is None else inflated(of_count.by_parameter),
        Term(
            torch.where(is_zero, by_count - none, torch.sigmoid(logits)),
            torch.where(is_zero, by_count + none, torch.sigmoid(logits)),
            lost=torch.where(is_zero, by_count_off, 0.0) + none_off,
        ),
    )


#: of counts, whose formulas know the unit of the arithmetic that is judged, too
COUNTS = {"poisson": poisson, "poisson_log_rate": poisson_log_rate, "negative_binomial": negative_binomial}
NLL = {
    "bernoulli_logits": bernoulli_logits,
    "bernoulli_probs": bernoulli_probs,
    "bernoulli_probs_log_clamped": bernoulli_probs_log_clamped,
    "continuous_bernoulli_logits": continuous_bernoulli_logits,
    "gaussian": gaussian,
    "mse": mse,
    "l1": l1,
    "laplace": laplace,
}


def of_tensor(name: str, y: Tensor, x: Tensor, p: Tensor, relative: float, tiny: float) -> Nll:
    """h·(log v + K) + m/v, m = ½d² or |d|, of v = p or e^p: the Gaussian's v is σ², h is ½, K is log 2π.

    1/v may be off by ``tiny``, below which it underflows, and e^(−p) besides by ``relative`` for each unit of p.
    """
    h, k = (0.5, math.log(2 * math.pi)) if "var" in name else (1.0, math.log(2))
    d = y - x
    m, slope = (h * (d * d), d) if "var" in name else (d.abs(), sign(d))
    if name.startswith("log"):
        inverse = torch.exp(-p)
        off = tiny + relative * (p.abs() * inverse).nan_to_num(0.0, posinf=math.inf)  # ∞·0 where p is infinite
        log, far, by_recon = p, m * inverse, slope * inverse
        inner, inner_size, inner_off = h - far, h + far, m * off
    else:
        inverse = 1 / p
        log, far, by_recon, off = torch.log(p), m / p, slope / p, torch.full_like(p, tiny)
        inner, inner_size, inner_off = (h - far) / p, (h + far) / p, off * (h + far) + m * inverse * off
    size, lost = by_recon.abs(), slope.abs() * off
    return Nll(
        Term(far + h * (log + k), far + h * (log.abs() + k), lost=m * off),
        Term(by_recon, size, lost=lost),
        Term(-by_recon, size, lost=lost),
        Term(inner, inner_size, lost=inner_off),
    )


class KL(NamedTuple):
    """KL(q‖p) of each element and its derivatives in mu, logvar (or std), mu_p and logvar_p."""

    value: Term
    gradients: tuple[Term, ...]


def gaussian_kl(
    mu: Tensor,
    scale: Tensor,
    prior_mu: Tensor | None,
    prior_logvar: Tensor | None,
    log_scale: bool,
    free_bits: float,
    unit: float,
    tiny: float,
    largest: float,
    beyond: Tensor | None = None,
) -> KL:
    """``unit``: of the arithmetic that is judged. e^(−log σ_p²) may be off by ``tiny``, below which it underflows.

    Where σ² is above the ``largest`` number, σ/(1e-8 + σ²) may be lost, as it is in eager PyTorch: it is 1/σ then, and
    is seen beside σ/σ_p² only where σ_p, too, is so large. To keep it would cost each element a comparison and two
    selections.

    Where ``beyond``, the arithmetic has no finite KL, which then is neither below ``free_bits`` nor above.
    """
    if log_scale:
        var, log_var = torch.exp(scale), scale
    else:
        var, log_var = scale * scale, torch.log(STD_EPS + scale * scale)
    zero = torch.zeros_like(mu)
    m, s = (zero, zero) if prior_mu is None or prior_logvar is None else (prior_mu, prior_logvar)
    d, precision = mu - m, torch.exp(-s)
    kl = 0.5 * ((var + d * d) * precision - 1 + s - log_var)
    size = 0.5 * ((var + d * d) * precision + 1 + s.abs() + log_var.abs() + (not log_scale))
    if log_scale:
        by_scale = 0.5 * (var * precision - 1)
        scale_size = 0.5 * (var * precision + 1)
    else:
        by_scale = scale * precision - scale / (STD_EPS + var)
        scale_size = scale.abs() * precision + scale.abs() / (STD_EPS + var)
    by_logvar = 0.5 * (1 - (var + d * d) * precision)
    lost_slope = torch.where(var > largest, 1 / scale.abs(), 0.0) if not log_scale else 0.0
    diverged, far, off = kl.isinf(), var + d * d, 0.0 if prior_mu is None else tiny
    gradients = [
        Term(d * precision, d.abs() * precision, lost=d.abs() * off),
        Term(by_scale, scale_size, lost=(var if log_scale else scale.abs()) * off + lost_slope),
        Term(-d * precision, d.abs() * precision, lost=d.abs() * off),
        Term(by_logvar, 0.5 * (1 + far * precision), lost=far * off),
    ][: 2 if prior_mu is None else 4]
    if free_bits > 0:
        slack = 16 * unit * (size + free_bits)
        low, near = kl < free_bits, ((kl - free_bits).abs() <= slack) | kl.isnan()
        near = near if beyond is None else near | beyond
        kl = torch.where(kl.isnan(), kl, kl.clamp(min=free_bits))
        gradients = [
            g._replace(
                value=torch.where(low & ~near, 0.0, g.value), size=torch.where(low & ~near, 0.0, g.size), either=near
            )
            for g in gradients
        ]
    return KL(Term(kl, size + free_bits, lost=far * off), tuple(g._replace(diverged=diverged) for g in gradients))


def ulp(dtype: torch.dtype) -> float:
    """Half a unit in the last place of 1: what one rounding loses at most."""
    return torch.finfo(dtype).eps / 2


def epsilon(seed: int, shape: torch.Size) -> Tensor:
    """The noise contract in float64; the radius comes from (r + ½)·2⁻³² rounded to float32, which is part of it."""
    count, key = shape.numel(), seed % (1 << 64)
    q = torch.arange((count + 3) // 4)
    zero = torch.zeros_like(q)
    words = philox4x32((torch.tensor(key & WORD), torch.tensor(key >> 32)), (q, zero, zero, zero))
    pairs = []
    for radius_word, angle_word in (words[:2], words[2:]):
        radius = (-2 * ((radius_word.float() + 0.5) * 2.0**-32).double().log()).sqrt()
        angle = (angle_word.double() + 0.5) * (2 * math.pi * 2.0**-32)
        pairs += [radius * angle.cos(), radius * angle.sin()]
    return torch.stack(pairs, dim=1).reshape(-1)[:count].reshape(shape)


class CategoricalKL(torch.autograd.Function):
    """``apply(logits_q, logits_p, unimix)`` in NumPy's longest float: in float64, torch's own is 4e-15 off.

    With q = (1 − u)·s + u/n, s = softmax(logits): Σ q·log(q/p), and its derivatives in both logits.
    """

    @staticmethod
    def forward(ctx: Any, logits_q: Tensor, logits_p: Tensor, unimix: float) -> Tensor:
        kept = np.longdouble(1) - np.longdouble(unimix)
        shares, mixed = [], []
        for logits in (logits_q, logits_p):
            x = logits.detach().cpu().numpy().astype(np.longdouble)
            powers = np.exp(x - x.max(-1, keepdims=True))
            shares.append(powers / powers.sum(-1, keepdims=True))
            mixed.append(kept * shares[-1] + np.longdouble(unimix) / x.shape[-1])
        (q, p), log_ratio = mixed, np.log(mixed[0]) - np.log(mixed[1])
        ctx.gradients = []
        for share, slope in zip(shares, (log_ratio + 1, -q / p), strict=True):
            gradient = kept * share * (slope - (slope * share).sum(-1, keepdims=True))
            ctx.gradients.append(logits_q.new_tensor(gradient.astype(np.float64)))
        return logits_q.new_tensor((q * log_ratio).sum(-1).astype(np.float64))

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        of_q, of_p = (upstream[..., None] * gradient for gradient in ctx.gradients)
        return of_q, of_p, None
