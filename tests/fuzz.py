"""One fuzzed call: the inputs it describes, what must come out, and the comparison, on any backend."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

import fastvae
from fastvae.kernels.likelihoods import LIKELIHOODS, OF_COUNTS, Domain

import formulas
from formulas import CHAIN, COUNTS, FACTOR, NLL, NOISE, NOISE_ON_CPU, ULPS, Term, ulp
from table import TARGETS, on

INF, NAN = float("inf"), float("nan")
TOTALS = ("sum", "mean", "batchmean")
if ONLY := os.environ.get("FASTVAE_FUZZ_ON"):
    TARGETS = [name for name in ONLY.split(",") if name in TARGETS]

#: public function → likelihood, and the name of its number
RECONSTRUCTIONS: dict[str, tuple[str, str]] = {
    "bce": ("bernoulli_probs", "eps"),
    "bce(eps=None)": ("bernoulli_probs_log_clamped", ""),
    "bce_with_logits": ("bernoulli_logits", ""),
    "continuous_bernoulli_with_logits": ("continuous_bernoulli_logits", ""),
    "mse": ("mse", ""),
    "l1": ("l1", ""),
    "gaussian_nll": ("gaussian", "var"),
    "laplace_nll": ("laplace", "scale"),
    "poisson_nll": ("poisson", ""),
    "poisson_nll_with_log_rate": ("poisson_log_rate", ""),
    "negative_binomial_nll": ("negative_binomial", "dispersion"),
}
#: parameter that may be a tensor → public function, likelihood, and what its values are drawn from
PARAMETERS: dict[str, tuple[str, str, str]] = {
    "var": ("gaussian_nll", "gaussian", "positive"),
    "logvar": ("gaussian_nll", "gaussian", "logvar"),
    "scale": ("laplace_nll", "laplace", "positive"),
    "log_scale": ("laplace_nll", "laplace", "logvar"),
    "dispersion": ("negative_binomial_nll", "negative_binomial", "dispersion"),
}
#: its shape, of that of recon
BROADCAST: dict[str, Callable[[tuple[int, ...]], tuple[int, ...]]] = {
    "whole": lambda s: s,
    "feature": lambda s: s[1:],
    "every example": lambda s: (1, *s[1:]),
    "channel": lambda s: s[1:2] + (1,) * len(s[2:]),
    "last": lambda s: s[-1:],
    "example": lambda s: s[:1] + (1,) * len(s[1:]),
    "example and channel": lambda s: s[:2] + (1,) * len(s[2:]),
    "one": lambda s: (1,) * len(s),
    "scalar": lambda s: (),
}


@dataclasses.dataclass(frozen=True)
class Case:
    """All that a call depends on.

    Tensors are numbered: recon, target, mu, scale, prior, the likelihood's parameter, the logits of zero.
    """

    op: str
    likelihood: str = "mse"
    number: float = 0.0
    shape: tuple[int, ...] = (2, 3)  # of recon, or of mu where there is no recon
    latent: tuple[int, ...] = (2,)  # elbo_loss, vae_loss: the shape of mu after the batch
    dtypes: tuple[torch.dtype, ...] = (torch.float32,) * 6
    layouts: tuple[str, ...] = ("contiguous",) * 6
    values: tuple[int, ...] = (0,) * 6
    specials: int = 0  # so many special values in each tensor
    outside: bool = False  # a value outside its domain, or a variance not above 0, where that is an error
    reduction: str = "batchmean"
    std: bool = False  # σ in place of log σ²
    prior: str = ""  # "full", or which dimensions are broadcast
    free_bits: float = 0.0
    beta: float = 1.0
    beta_tensor: bool = False
    samples: int | None = None
    upstream: str = "one"
    backward: str = "once"  # "again" (retain_graph), "batched" (is_grads_batched)
    wanted: int = 63  # bit k: tensor k requires grad
    used: int = 7  # bit k: output k has an upstream gradient
    seed: int = 0
    parameter: str = ""  # the name of a tensor in the place of the number
    broadcast: str = "whole"
    inflated: str = ""  # zero_logits: a "number", or the shape of a tensor, of BROADCAST
    zero_logits: float = 0.0
    clamp: tuple[float, float] | None = None  # of logvar


# ---- inputs

DRAWS: dict[str, list[Callable[[Any], Tensor]]] = {
    "logits": [
        lambda r: r.normal() * 4,
        lambda r: r.uniform(-1, 1),
        lambda r: r.uniform(-100, 100),
        lambda r: r.uniform(-1e4, 1e4),
    ],
    "probs": [
        lambda r: r.uniform(0, 1),
        lambda r: 10 ** r.uniform(-12, 0),
        lambda r: 1 - 10 ** r.uniform(-9, 0),
        lambda r: r.uniform(0, 1).round(),
    ],
    "unit": [
        lambda r: r.uniform(0, 1),
        lambda r: r.uniform(0, 1).round(),
        lambda r: 10 ** r.uniform(-12, 0),
        lambda r: 1 - 10 ** r.uniform(-9, 0),
    ],
    "real": [
        lambda r: r.normal(),
        lambda r: r.normal() * 100,
        lambda r: r.normal() * 1e-3,
        lambda r: r.normal().round(),
    ],
    "logvar": [
        lambda r: r.normal(),
        lambda r: r.uniform(-20, 20),
        lambda r: r.uniform(-100, 100),
        lambda r: r.normal(),
    ],
    "std": [
        lambda r: r.uniform(0.05, 1),
        lambda r: 10 ** r.uniform(-6, 3),
        lambda r: r.uniform(0, 2).round(),
        lambda r: r.uniform(0.05, 1),
    ],
    "positive": [
        lambda r: r.uniform(0.05, 1),
        lambda r: 10 ** r.uniform(-6, 3),
        lambda r: 10 ** r.uniform(-30, 30),
        lambda r: r.uniform(0.5, 2.5).round(),
    ],
    "count": [
        lambda r: r.uniform(0, 4).floor(),
        lambda r: r.uniform(0, 40).floor(),
        lambda r: (10 ** r.uniform(0, 6)).floor(),
        lambda r: (10 ** r.uniform(0, 20)).floor(),
    ],
    "zero logits": [
        lambda r: r.normal() * 4,
        lambda r: 10 ** r.uniform(-40, 0) * r.normal().sign(),
        lambda r: r.uniform(-100, 100),
        lambda r: r.uniform(-1e4, 1e4),
    ],
    "mean": [
        lambda r: r.normal().exp(),
        lambda r: r.uniform(0, 40).floor(),
        lambda r: 10 ** r.uniform(-3, 6),
        lambda r: 10 ** r.uniform(-30, 30),
    ],
}
SPECIALS: dict[str, list[float]] = {
    "logits": [0.0, -0.0, 1e-45, -1e-45, 0.5, -0.5, 17, -17, 88, -88, 104, -104, 1e4, -1e4, INF, -INF, NAN],
    "probs": [0.0, -0.0, 1e-45, 1e-38, 1e-12, 1e-8, 0.5, 1 - 2.0**-24, 1.0, NAN],
    "unit": [0.0, -0.0, 1e-45, 1e-38, 0.5, 1 - 2.0**-24, 1.0, 1 + 2.0**-22, NAN],
    "real": [0.0, -0.0, 1e-45, -1e-38, 1e4, -1e4, 1e18, -1e20, 3e38, INF, -INF, NAN],
    "logvar": [0.0, -0.0, 1e-45, 87, -87, 88.8, 100, -100, -104, 200, -200, 1e4, -1e4, INF, -INF, NAN],
    "std": [0.0, -0.0, 1e-45, 1e-30, 1e-4, 1e19, 1e20, INF, NAN],
    "positive": [1e-300, 1e-45, 4e-39, 1e-30, 0.159, 0.5, 1e4, 1e19, 4e37, 3e38, INF, NAN],
    "count": [0.0, -0.0, 1, 2, 6, 7, 8, 9, 170, 2.0**23, 2.0**24, 1e9, 1e20, NAN],
    "mean": [0.0, -0.0, 1e-45, 1e-38, 1e-12, 1e-8, 1e-4, 1.0, 7.0, 1e4, 1e9, 1e20, NAN],
    "dispersion": [1e-300, 1e-45, 4e-39, 1e-30, 0.5, 7.99, 8.0, 1e4, 1e19, NAN],
}
DRAWS["dispersion"] = [*DRAWS["positive"][:2], lambda r: 10 ** r.uniform(-30, 25), DRAWS["positive"][3]]
# half of them 0
DRAWS["inflated count"] = [lambda r, of=of: of(r) * r.uniform(0, 2).floor() for of in DRAWS["count"]]
SPECIALS["inflated count"] = SPECIALS["count"]
SPECIALS["zero logits"] = [*SPECIALS["logits"], 3e38, -3e38]
POSITIVE = ("positive", "dispersion")
FINITE = ("count", "inflated count", "mean", "dispersion")  # infinite ones are NaN in some term of any formula
#: a role whose numbers the call looks at, and what it says of others
DOMAINS = {
    "probs": (Domain.UNIT, r"must lie in \[0, 1\]"),
    "unit": (Domain.UNIT, r"must lie in \[0, 1\]"),
    "count": (Domain.COUNT, "must be counts"),
    "inflated count": (Domain.COUNT, "must be counts"),
    "mean": (Domain.NOT_NEGATIVE, "must be at least 0"),
}


class Draw:
    """Numbers of one shape, of a seed."""

    def __init__(self, seed: int, shape: tuple[int, ...]):
        self.shape, self.generator = shape, torch.Generator().manual_seed(seed)

    def normal(self) -> Tensor:
        return torch.randn(self.shape, dtype=torch.float64, generator=self.generator)

    def uniform(self, low: float, high: float) -> Tensor:
        return torch.rand(self.shape, dtype=torch.float64, generator=self.generator) * (high - low) + low

    def integers(self, count: int, below: int) -> list[int]:
        return torch.randint(below, (count,), generator=self.generator).tolist()


def junk(t: Tensor) -> Tensor:
    """What lies between the elements: reading it would be seen."""
    return torch.full_like(t, 255 if t.dtype == torch.uint8 else NAN)


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda t: t,
    "chunk": lambda t: torch.cat([junk(t), t], dim=-1).chunk(2, dim=-1)[1] if t.shape[-1] else t,
    "offset": lambda t: torch.cat([junk(t.reshape(-1))[:1], t.reshape(-1)])[1:].view(t.shape) if t.numel() else t,
    "strided": lambda t: torch.stack([t, junk(t)], dim=-1)[..., 0],
    "transposed": lambda t: t.transpose(0, -1).contiguous().transpose(0, -1),
    "every other example": lambda t: torch.stack([t, junk(t)], dim=1)[:, 0],
    "one example": lambda t: t[:1].expand_as(t),
    "one feature": lambda t: t[..., :1].expand_as(t),
    "negated": lambda t: t if t.dtype == torch.uint8 else torch._neg_view(-t),
    "channels last": lambda t: t.to(memory_format=torch.channels_last) if t.dim() == 4 else t,
}


def roles(case: Case) -> list[str]:
    """What each tensor is."""
    latent = ["real", "std" if case.std else "logvar"] + (["real", "logvar"] if case.prior else [])
    if case.op in ("reparameterize", "gaussian_kl", "sample_with_kl"):
        return latent
    row = LIKELIHOODS[case.likelihood]
    recon = {"logits": "logits", "probs": "probs", "rate": "mean", "log_rate": "logvar"}.get(row.recon, "real")
    recon = "mean" if row.recon_domain is Domain.NOT_NEGATIVE else recon
    count = "inflated count" if case.inflated else "count"
    pair = [recon, {Domain.UNIT: "unit", Domain.COUNT: count}.get(row.target_domain, "real")]
    parameter = [PARAMETERS[case.parameter][2]] if case.parameter else []
    logits = ["zero logits"] if logits_are_tensor(case) else []
    return pair + ([] if case.op in RECONSTRUCTIONS else latent) + parameter + logits


def logits_are_tensor(case: Case) -> bool:
    return case.inflated in BROADCAST


def prior_shape(case: Case, k: int) -> tuple[int, ...]:
    shape = case.shape
    if case.prior == "batch":
        return (1, *shape[1:])
    if case.prior == "features":
        return (*shape[:-1], 1)
    if case.prior == "lower":
        return shape[1:]
    if case.prior == "number":
        return ()
    if case.prior == "mixed":
        return shape if k % 2 else shape[1:]
    return shape


def tensors(case: Case) -> list[Tensor]:
    """The inputs, as laid out."""
    drawn = []
    names = roles(case)
    both = case.op in ("elbo_loss", "vae_loss")
    for k, role in enumerate(names):
        latent = k >= 2 if both else case.op not in RECONSTRUCTIONS
        shape = (case.shape[0], *case.latent) if both and latent else case.shape
        if latent and not both and k >= 2:
            shape = prior_shape(case, k)
        if role == "zero logits":
            shape = BROADCAST[case.inflated](case.shape)
        elif case.parameter and k == len(names) - 1 - logits_are_tensor(case):
            shape = BROADCAST[case.broadcast](case.shape)
        draw = Draw(case.seed * 8 + k, shape)
        dtype = case.dtypes[k]
        if k == 1 and dtype == torch.uint8 and not latent:
            values = draw.uniform(0, 256).to(torch.uint8)
            if case.inflated:
                values = values * draw.uniform(0, 2).to(torch.uint8)
        else:
            dtype = torch.float32 if dtype == torch.uint8 else dtype
            values = DRAWS[role][case.values[k]](draw).to(dtype)
            if values.numel() and case.specials:
                pool = SPECIALS[role]
                for at, which in zip(
                    draw.integers(case.specials, values.numel()), draw.integers(case.specials, len(pool)), strict=True
                ):
                    values.view(-1)[at] = pool[which]
            if case.outside and role in DOMAINS and values.numel():
                beyond = (1.5, -0.25, 0.5 if role in FINITE else INF, -INF)[case.seed % 4]
                values.view(-1)[draw.integers(1, values.numel())[0]] = beyond
            if role in FINITE:
                values = values.clamp(max=torch.finfo(dtype).max)
            if role in POSITIVE and case.outside and values.numel():
                values = values - values.max()
            elif role in POSITIVE:  # rounding may give 0; in float32, 1/v, 2v and 2πv must be normal numbers
                info = torch.finfo(dtype)
                low, high = (0.0, INF) if case.dtypes[0] == torch.float64 else (1.2e-38, min(5e37, info.max))
                if role == "dispersion":  # and so must Γ(θ + 8)/Γ(θ) over that of θ + x, and what 65,536/θ add up to
                    low = 1e-280 if case.dtypes[0] == torch.float64 else 1e-30
                values = values.clamp(max(low, info.smallest_normal * info.eps), high)
            # rounding may leave [0, 1], where only a target's rounding is forgiven
            if role == "probs" and not case.outside:
                values = values.clamp(0, 1)
        drawn.append(LAYOUTS[case.layouts[k]](values) if values.dim() else values)
    return drawn


def upstreams(case: Case, like: Tensor, k: int) -> Tensor:
    """Upstream gradient ``k`` for an output like that."""
    shape, dtype = like.shape, like.dtype
    draw = Draw(case.seed * 8 + 7919 * (k + 1), tuple(shape))
    kind = case.upstream
    if kind == "one":
        return torch.ones(shape, dtype=dtype) * (1 + k)
    if kind == "zero":
        return torch.zeros((), dtype=dtype).expand(shape)
    scale = {"scaled": 65536.0 if dtype != torch.float16 else 256.0, "tiny": 1e-30}.get(kind, 1.0)
    values = (draw.normal() * scale).to(dtype)
    if not values.dim() or not values.numel():
        return values
    if kind == "number":
        return values.reshape(-1)[:1].reshape((1,) * values.dim()).expand(shape)
    if kind == "example":
        return values[(slice(None), *(slice(0, 1),) * (values.dim() - 1))].expand(shape)
    if kind in LAYOUTS:
        return LAYOUTS[kind](values)
    return values


# ---- what must come out


class Expected(NamedTuple):
    """Numbers in float64, by how much they may be missed in accumulator precision, and others that will do as well."""

    value: Tensor
    slack: Tensor
    others: tuple[Tensor, ...] = ()


def accumulator(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def weight(reduction: str, shape: torch.Size) -> float:
    count = {"mean": shape.numel(), "batchmean": shape[0]}.get(reduction, 1)
    return 1 / count if count else NAN


def by_example(t: Tensor) -> Tensor:
    return t.reshape(t.shape[0], t.shape[1:].numel())


def floor(dtype: torch.dtype, *factors: Tensor) -> Tensor:
    """What underflow may cost: the smallest normal number, and some subnormals times each factor."""
    info = torch.finfo(dtype)
    cost = torch.full((), 2 * info.tiny)
    for factor in factors:
        cost = cost + (4 * info.tiny + 4 * info.smallest_normal * info.eps) * factor.abs()
    return cost


def reduced(term: Term, reduction: str, dtype: torch.dtype, more: float) -> Expected:
    """A loss of the reduction; ``more`` joins the size of each element once they are added up."""
    unit = ulp(dtype)
    if reduction == "none":
        return Expected(term.value, ULPS["value"] * unit * term.size + term.lost + floor(dtype))
    size = term.size + more + term.lost / unit / ULPS["value"]
    if reduction == "example":
        value, total, count = by_example(term.value).sum(1), by_example(size).sum(1), term.value.shape[1:].numel()
    else:
        w = weight(reduction, term.value.shape)
        value, total, count = term.value.sum() * w, size.sum() * w, term.value.numel()
    return Expected(value, (ULPS["value"] + min(count, CHAIN)) * unit * total + floor(dtype) * count)


def spread(upstream: Tensor, reduction: str, shape: torch.Size, dtype: torch.dtype) -> Tensor:
    """An upstream gradient, for each element."""
    upstream = upstream.to(dtype)
    if reduction == "example":
        return upstream.reshape(-1, *(1,) * (len(shape) - 1)).expand(shape)
    return upstream if reduction == "none" else (upstream * weight(reduction, shape)).expand(shape)


def chained(c: Tensor, term: Term, dtype: torch.dtype) -> Expected:
    """``c`` times a derivative."""
    value = c * term.value
    size = ULPS["gradient"] * ulp(dtype) * (c * term.size).abs() + c.abs() * term.lost
    others = () if term.either is None else (torch.where(term.either, 0 * value, value),)
    if term.diverged is not None:
        others += (torch.where(term.diverged, value.sign() * INF, value),)
    before = torch.as_tensor(term.before)
    return Expected(value, size + floor(dtype, 1 + c, term.size, c * term.size, (1 + c.abs()) * before), others)


def plus(a: Expected | None, b: Expected | None) -> Expected | None:
    if a is None or b is None:
        return a if b is None else b
    others = *(o + b.value for o in a.others), *(a.value + o for o in b.others)
    return Expected(a.value + b.value, a.slack + b.slack, others)


def added(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    if a is None or b is None:
        return a if b is None else b
    return a.to(torch.promote_types(a.dtype, b.dtype)) + b


def times(a: Expected, factor: float) -> Expected:
    return Expected(a.value * factor, a.slack * abs(factor))


class Oracle:
    """The expected outputs of a case and, for upstream gradients of those, of its inputs, in float64.

    Without a ``narrow`` one, it is that: its arithmetic is the accumulator's, and its infinities and NaNs are allowed.
    """

    def __init__(
        self, case: Case, inputs: list[Tensor], backend_noise: float, narrow: Oracle | None, textbook: bool = False
    ):
        self.textbook = textbook
        self.case, self.inputs, self.noise, self.wide = case, inputs, backend_noise, narrow is not None
        self.outputs: list[Expected] = []
        self.dtypes: list[torch.dtype] = []
        first_latent = 0 if case.op in ("reparameterize", "gaussian_kl", "sample_with_kl") else 2
        if logits_are_tensor(case):
            *self.inputs, self.logits = self.inputs
        if case.parameter:
            *self.inputs, self.parameter = self.inputs
        if first_latent:
            self.reconstruction()
        if len(self.inputs) > first_latent:
            self.latent(first_latent, narrow)
        if case.op in ("elbo_loss", "vae_loss"):
            nll, kl = self.outputs
            weighted = times(kl, case.beta if case.op == "elbo_loss" else 1.0)
            loss = plus(nll, weighted)
            assert loss is not None
            unit = ulp(self.accumulated)
            loss = loss._replace(slack=loss.slack + 2 * unit * (nll.value.abs() + weighted.value.abs()))
            if case.op == "elbo_loss":
                self.outputs, self.dtypes = [loss, nll, kl], [self.dtypes[0], *self.dtypes]
            else:
                self.outputs, self.dtypes = [loss], [torch.promote_types(*self.dtypes)]

    def arithmetic(self, t: Tensor, dtype: torch.dtype) -> Tensor:
        t = t.detach().resolve_neg()
        pixels = t.dtype == torch.uint8 and self.case.likelihood not in OF_COUNTS
        t = t.to(dtype) / 255 if pixels else t.to(dtype)
        return t.double() if self.wide else t

    def reduction(self) -> str:
        return "sum" if self.case.op == "vae_loss" else self.case.reduction

    def reconstruction(self) -> None:
        case, (recon, target) = self.case, self.inputs[:2]
        self.accumulated = dtype = accumulator(recon.dtype)
        y, x = self.arithmetic(recon, dtype), self.arithmetic(target.reshape(recon.shape), dtype)
        on_gpu = self.noise != NOISE_ON_CPU and dtype == torch.float32
        if case.likelihood in COUNTS:
            p = self.arithmetic(self.parameter, dtype) if case.parameter else case.number
            if case.inflated and not case.parameter:
                p = self.arithmetic(torch.tensor(case.number, dtype=torch.float64), dtype)
            self.nll = COUNTS[case.likelihood](y, x, p, ulp(dtype))
            if not case.parameter:
                self.nll = self.nll._replace(by_parameter=None)
            if self.textbook:
                self.nll = formulas.Nll(*(t if t is None else self.by_textbook(t) for t in self.nll))
            if case.inflated:
                number = torch.tensor(case.zero_logits, dtype=torch.float64)
                logits = self.arithmetic(self.logits if logits_are_tensor(case) else number, dtype).expand(y.shape)
                self.nll = formulas.zero_inflated(self.nll, x, logits, ulp(dtype), 2 * ulp(dtype) * on_gpu)
        elif case.parameter:
            p = self.arithmetic(self.parameter, dtype)
            relative = 2 * ulp(dtype) * on_gpu  # Triton's exp of p, as in lost_in_exp
            self.nll = formulas.of_tensor(case.parameter, y, x, p, relative, torch.finfo(dtype).smallest_normal)
        else:
            self.nll = NLL[case.likelihood](y, x, case.number)
        if on_gpu and "logits" in case.likelihood:
            # a GPU's e^(−|y|) = 2^(−|y|·log₂e): rounding the product costs |y| ulps; continuous: over (1 − e^(−|y|))²
            a = torch.exp(-y.abs())
            off = 2 * ulp(dtype) * (y.abs() * a).nan_to_num(0.0) * (1 if case.likelihood == "bernoulli_logits" else 8)
            value, by_recon, by_target = self.nll[:3]
            self.nll = formulas.Nll(*(t._replace(lost=t.lost + off) for t in (value, by_recon, by_target)))
        if not self.wide and "logits" in case.likelihood:  # eager's −log p of an infinite logit is inf − inf
            value = self.nll.value
            self.nll = self.nll._replace(value=value._replace(value=value.value.masked_fill(y.isinf(), NAN)))
        reduction = self.reduction()
        more = FACTOR if LIKELIHOODS[case.likelihood].target_domain is Domain.UNIT else 0.0
        self.outputs.append(reduced(self.nll.value, reduction, dtype, more))
        self.dtypes.append(recon.dtype if reduction == "none" else dtype)

    def by_textbook(self, term: Term) -> Term:
        """Two logarithms of Γ, or two digammas, are computed and subtracted: two infinities among them."""
        cancels = torch.as_tensor(term.cancels)
        value = term.value if self.wide else term.value.masked_fill(cancels.isinf(), NAN)
        return term._replace(value=value, size=term.size + cancels)

    def latent(self, first: int, narrow: Oracle | None) -> None:
        case, inputs = self.case, self.inputs[first:]
        promoted = inputs[0].dtype
        for t in inputs[1:]:
            promoted = torch.promote_types(promoted, t.dtype)
        self.latent_dtype, self.latent_accumulated = promoted, accumulator(promoted)
        if not first:
            self.accumulated = self.latent_accumulated
        shape = inputs[0].shape
        values = [self.arithmetic(t.to(promoted), self.latent_accumulated).expand(shape) for t in inputs]
        mu, scale = values[:2]
        moved = None
        if case.clamp is not None:
            low, high = (torch.tensor(bound, dtype=self.latent_accumulated).item() for bound in case.clamp)
            moved = ~((scale >= low) & (scale <= high))
            scale = scale.clamp(low, high)
        prior_mu, prior_logvar = values[2:] if len(values) == 4 else (None, None)
        dtype = self.latent_accumulated
        if case.op in ("reparameterize", "sample_with_kl"):
            z_shape = shape if case.samples is None else torch.Size((case.samples, *shape))
            self.epsilon = formulas.epsilon(case.seed, z_shape).to(mu.dtype)
            self.sigma = scale if case.std else torch.exp(0.5 * scale)
            shift = self.sigma * self.epsilon
            slack = ULPS["sample"] * ulp(dtype) * (mu.abs() + shift.abs()) + self.noise * self.sigma.abs()
            slack = slack + self.lost_in_exp(scale) * shift.abs()
            self.outputs.append(Expected(mu + shift, slack + floor(dtype, self.epsilon)))
            self.dtypes.append(promoted)
        if case.op != "reparameterize":
            info = torch.finfo(dtype)
            tiny = info.smallest_normal * (info.eps if self.noise == NOISE_ON_CPU else 1)
            beyond = None if narrow is None else ~narrow.kl.value.value.isfinite()
            self.kl = formulas.gaussian_kl(
                mu, scale, prior_mu, prior_logvar, not case.std, case.free_bits, ulp(dtype), tiny, info.max, beyond
            )
            reduction = self.reduction()
            self.outputs.append(reduced(self.kl.value, reduction, dtype, 0.0))
            self.dtypes.append(promoted if reduction == "none" else dtype)
        self.mu, self.scale, self.moved = mu, scale, moved

    def lost_in_exp(self, scale: Tensor) -> Tensor:
        """Triton's σ: exp(x) = 2^(x·log₂e), where rounding the product costs |x| ulps (kernels/triton/approx.py)."""
        if self.noise == NOISE_ON_CPU or self.case.std or self.latent_accumulated == torch.float64:
            return torch.zeros_like(scale)
        return 2 * ulp(torch.float32) * (0.5 * scale).abs().nan_to_num(0.0)

    def gradients(self, upstream: list[Tensor | None]) -> list[Expected | None]:
        """For each input, None where no output that is used depends on it."""
        case, reduction = self.case, self.reduction()
        both = case.op in ("elbo_loss", "vae_loss")
        beta = case.beta if case.op == "elbo_loss" else 1.0
        of_parameter = len(self.inputs)
        of_logits = of_parameter + bool(case.parameter)
        results: list[Expected | None] = [None] * (of_logits + logits_are_tensor(case))
        if case.op in RECONSTRUCTIONS or both:
            u = upstream[0]
            if both and len(upstream) > 1:
                u = added(u, upstream[1])
            if u is not None:
                dtype = accumulator(self.inputs[0].dtype)
                c = spread(u, reduction, self.inputs[0].shape, torch.float64 if self.wide else dtype)
                for k, term in enumerate((self.nll.by_recon, self.nll.by_target)):
                    results[k] = chained(c, term, dtype)
                if self.nll.by_parameter is not None:
                    results[of_parameter] = self.summed(c, self.nll.by_parameter, dtype)
                if logits_are_tensor(case):
                    assert self.nll.by_zero_logits is not None
                    results[of_logits] = self.added_up(c, self.nll.by_zero_logits, dtype)
        first = 2 if both else 0
        if not both and case.op in RECONSTRUCTIONS:
            return results
        dtype = self.latent_accumulated
        arithmetic = torch.float64 if self.wide else dtype
        u = None if case.op == "reparameterize" else upstream[-1]
        if both:
            u = None if upstream[0] is None else upstream[0].to(arithmetic) * beta
            u = added(u, upstream[2]) if len(upstream) > 2 else u
        if case.op in ("reparameterize", "sample_with_kl") and upstream[0] is not None:
            g = upstream[0].to(arithmetic)
            half = torch.ones_like(self.sigma) if case.std else 0.5 * self.sigma
            by_epsilon, size, g_size = g * self.epsilon, g.abs() * (self.epsilon.abs() + 1), g.abs()
            tiny = floor(dtype, g, by_epsilon).expand(g.shape)
            if case.samples is not None:
                g, by_epsilon, size, g_size, tiny = (t.sum(0) for t in (g, by_epsilon, size, g_size, tiny))
            units = (ULPS["gradient"] + (case.samples or 1)) * ulp(dtype) + self.lost_in_exp(self.scale)
            results[0] = Expected(g, units * g_size + tiny)
            results[1] = Expected(
                by_epsilon * half, (units * size + self.noise * g_size) * half.abs() + tiny * (1 + half.abs())
            )
        if u is not None:
            c = spread(u, reduction, self.inputs[first].shape, arithmetic)
            for k, term in enumerate(self.kl.gradients):
                results[first + k] = plus(results[first + k], chained(c, term, dtype))
        by_scale = results[first + 1]
        if self.moved is not None and by_scale is not None:
            # no gradient, whatever came from above
            value, slack = by_scale.value.masked_fill(self.moved, 0.0), by_scale.slack.masked_fill(self.moved, 0.0)
            others = tuple(other.masked_fill(self.moved, 0.0) for other in by_scale.others)
            results[first + 1] = Expected(value, slack, others)
        # a broadcast prior's gradient is rounded to its dtype, then added up
        for k in range(first + 2, len(self.inputs)):
            result, own = results[k], self.inputs[k]
            if result is not None and own.shape != result.value.shape:
                value = result.value if self.wide else result.value.to(own.dtype).to(arithmetic)
                rounding = 2 * ulp(own.dtype) * value.abs() + torch.finfo(own.dtype).tiny
                count = value.numel() // max(own.numel(), 1)
                slack = result.slack + rounding + min(count, 4096) * ulp(dtype) * value.abs()
                for other in result.others:  # some may be 0, others not
                    slack = slack + ((other != value) & other.isfinite()) * value.abs()
                others = tuple(o.sum_to_size(own.shape) for o in result.others)
                results[k] = Expected(value.sum_to_size(own.shape), slack.sum_to_size(own.shape), others)
        return results

    def summed(self, c: Tensor, term: Term, dtype: torch.dtype) -> Expected:
        """The gradient in the parameter: elements in accumulator precision, added up in float64 over its broadcast.

        But for one number an example, or one for all, where a lane of a register adds up float32 first.
        """
        element, shape = chained(c, term, dtype), self.parameter.shape
        value, slack = element.value.double(), element.slack.expand(element.value.shape)
        if (shape[1:] if len(shape) == value.dim() else shape).numel() == 1:
            slack = slack + min(value.numel() // max(shape.numel(), 1), CHAIN) * ulp(dtype) * (c * term.size).abs()
        return Expected(value.sum_to_size(shape), slack.sum_to_size(shape))

    def added_up(self, c: Tensor, term: Term, dtype: torch.dtype) -> Expected:
        """The gradient in the logits of zero: elements in accumulator precision, which torch adds up in that."""
        element, shape = chained(c, term, dtype), self.logits.shape
        count = element.value.numel() // max(shape.numel(), 1)
        slack = element.slack + (min(count, CHAIN) * ulp(dtype) * (c * term.size).abs() if count > 1 else 0.0)
        return Expected(element.value.sum_to_size(shape), slack.expand(element.value.shape).sum_to_size(shape))


# ---- comparison


def same(a: Tensor, b: Tensor) -> bool:
    return bool(((a == b) | (a.isnan() & b.isnan())).all()) if a.is_floating_point() else torch.equal(a, b)


def compare(what: str, got: Tensor, want: Expected, eager: Expected, roundings: int = 1, upstream: float = 0.0) -> None:
    """``got`` is ``want`` within its slack and ``roundings`` to its dtype, NaN and infinite where that is.

    Or where eager PyTorch is. Beyond the largest number of the dtype, infinity will do.
    """
    g, info = got.detach().double(), torch.finfo(got.dtype)
    unit = ulp(got.dtype)
    assert got.shape == want.value.shape, f"{what}: shape {list(got.shape)}, not {list(want.value.shape)}"

    def near(w: Tensor) -> Tensor:
        slack = want.slack + roundings * unit * w.abs() + 2 * info.tiny * info.eps * (1 + upstream)
        finite = g.isfinite() & w.isfinite() & ((g - w).abs() <= slack)
        beyond = g.isinf() & (g.sign() * w + slack >= info.max * (1 - unit))
        return (g == w) | (g.isnan() & w.isnan()) | finite | beyond

    ok = near(want.value)
    for other in want.others:
        ok |= near(other)
    if not ok.all():
        for e in (eager.value, *eager.others):
            ok |= ~e.isfinite() & ((g == e) | (g.isnan() & e.isnan()))
    if not ok.all():
        at = (~ok).nonzero()[0].tolist()
        index = tuple(at)
        slack = torch.as_tensor(want.slack).expand(g.shape)[index].item()
        raise AssertionError(
            f"{what}{at}: got {g[index].item():.17g}, want {want.value[index].item():.17g} within {slack:.3g} and "
            f"{roundings} rounding(s) to {got.dtype}, eager {eager.value[index].item():.9g}; "
            f"{(~ok).sum()} of {ok.numel()} wrong"
        )


def call(case: Case, inputs: list[Tensor]) -> list[Tensor]:
    """The op's outputs."""
    latent: dict[str, Any] = {}
    tensor: dict[str, Tensor] = {}
    logits: dict[str, Any] = {"zero_logits": case.zero_logits} if case.inflated else {}
    if logits_are_tensor(case):
        *inputs, logits["zero_logits"] = inputs
    if case.parameter:
        *inputs, tensor[case.parameter] = inputs
    rest = inputs
    if case.op in RECONSTRUCTIONS or case.op in ("elbo_loss", "vae_loss"):
        rest = inputs[2:]
    if rest:
        latent = {"std" if case.std else "logvar": rest[1]}
    if len(rest) == 4:
        latent |= {"prior_mu": rest[2], "prior_logvar": rest[3]}
    if rest and case.clamp is not None:
        latent["logvar_clamp"] = case.clamp
    if case.op in RECONSTRUCTIONS:
        _, name = RECONSTRUCTIONS[case.op]
        options = tensor or ({name: case.number} if name else {"eps": None} if "None" in case.op else {})
        function = getattr(fastvae, ("zero_inflated_" if case.inflated else "") + case.op.partition("(")[0])
        return [function(*inputs, reduction=case.reduction, **options, **logits)]
    if case.op == "vae_loss":
        recon, target, mu, logvar = inputs
        return [fastvae.vae_loss(recon, target, mu, logvar)]
    if case.op == "elbo_loss":
        beta = torch.tensor(case.beta) if case.beta_tensor else case.beta
        options = {"likelihood": case.likelihood, "beta": beta, "free_bits": case.free_bits}
        options["likelihood_parameters"] = tensor or (
            {"dispersion": case.number} if case.likelihood == "negative_binomial" else {}
        )
        options["likelihood_parameters"] |= logits
        return list(fastvae.elbo_loss(*inputs[:2], rest[0], **latent, **options, reduction=case.reduction))
    if case.op == "reparameterize":
        return [fastvae.reparameterize(rest[0], **latent, samples=case.samples, seed=case.seed)]
    latent |= {"free_bits": case.free_bits, "reduction": case.reduction}
    if case.op == "gaussian_kl":
        return [fastvae.gaussian_kl(rest[0], **latent)]
    return list(fastvae.sample_with_kl(rest[0], **latent, samples=case.samples, seed=case.seed))


def refusal(case: Case, inputs: list[Tensor]) -> str:
    """What the error says that the values ask for, if they do: they may have been overwritten by the layout."""
    given = list(zip(inputs, roles(case), strict=True))
    for t, role in given:  # arguments before data
        if role in POSITIVE and bool((t <= 0).any()):
            return f"{case.parameter} must be > 0"
    for t, role in reversed(given):
        if role in DOMAINS and t.dtype != torch.uint8:
            domain, says = DOMAINS[role]
            slack = 1e-6 if role == "unit" else 0.0
            wrong = t < -slack
            if domain is Domain.UNIT:
                wrong = wrong | (t > 1 + slack)
            if domain is Domain.COUNT:
                wrong = wrong | ((t % 1 != 0) & t.isfinite())
            if bool(wrong.any()):
                return says
    return ""


class Trial:
    """A case ready to run: its inputs, and what must come out of them, which several backends are compared with."""

    def __init__(self, case: Case):
        self.case, self.inputs = case, tensors(case)
        self.before = [t.clone() for t in self.inputs]
        self.refused = refusal(case, self.inputs)
        self.oracles: dict[tuple[float, bool], tuple[Oracle, Oracle]] = {}
        self.expected: dict[Any, tuple[list[Expected | None], list[Expected | None]]] = {}

    def oracle(self, noise: float, textbook: bool = False) -> tuple[Oracle, Oracle]:
        key = noise, textbook
        if key not in self.oracles:
            eager = Oracle(self.case, self.inputs, noise, None, textbook)
            self.oracles[key] = Oracle(self.case, self.inputs, noise, eager, textbook), eager
        return self.oracles[key]

    def gradients(self, oracle: tuple[float, bool], turn: int, given: list[Tensor | None]) -> Any:
        """Expected and eager; the upstream gradients follow from the case and the turn."""
        key = oracle, turn, tuple(u is None for u in given)
        if key not in self.expected:
            want, eager = self.oracle(*oracle)
            self.expected[key] = want.gradients(given), eager.gradients(given)
        return self.expected[key]

    def run(self, target: str) -> None:
        """Forward and backward on one backend; AssertionError where it is not what must come out."""
        case = self.case
        leaves = [
            t.detach().requires_grad_(t.is_floating_point() and bool(case.wanted >> k & 1))
            for k, t in enumerate(self.inputs)
        ]
        with on(target):
            if self.refused and target in NOISE:  # a GPU's kernels do not look
                return
            if self.refused:
                with pytest.raises(ValueError, match=self.refused):
                    call(case, leaves)
                return
            outputs = call(case, leaves)
            oracle = NOISE.get(target, NOISE_ON_CPU), target == "torch" or case.backward == "batched"
            want, eager = self.oracle(*oracle)
            assert len(outputs) == len(want.outputs)
            for k, output in enumerate(outputs):
                assert output.dtype == want.dtypes[k], f"output {k} is {output.dtype}, not {want.dtypes[k]}"
                compare(f"output {k}", output, want.outputs[k], eager.outputs[k])
            used = [k for k in range(len(outputs)) if case.used >> k & 1] or [0]
            used = [k for k in used if outputs[k].requires_grad]
            if used and any(leaf.requires_grad for leaf in leaves):
                self.backward(oracle, outputs, leaves, used)
        for k, (t, kept) in enumerate(zip(self.inputs, self.before, strict=True)):
            assert same(t, kept), f"input {k} was written to"

    def backward(
        self, oracle: tuple[float, bool], outputs: list[Tensor], leaves: list[Tensor], used: list[int]
    ) -> None:
        case, differentiable = self.case, [k for k, leaf in enumerate(leaves) if leaf.requires_grad]
        wanted, losses = [leaves[k] for k in differentiable], [outputs[k] for k in used]
        turns = 1 if case.backward == "once" else 2
        several = [[upstreams(case, outputs[k], 3 * turn + k) for k in used] for turn in range(turns)]
        before = [[u.clone() for u in upstream] for upstream in several]
        if case.backward == "batched":
            stacked = [torch.stack(list(of_output)) for of_output in zip(*several, strict=True)]
            batched = torch.autograd.grad(losses, wanted, stacked, is_grads_batched=True, allow_unused=True)
            results = [tuple(None if g is None else g[turn] for g in batched) for turn in range(turns)]
        else:
            results = [
                torch.autograd.grad(losses, wanted, upstream, retain_graph=turn + 1 < turns, allow_unused=True)
                for turn, upstream in enumerate(several)
            ]
        for turn, (upstream, grads) in enumerate(zip(several, results, strict=True)):
            given: list[Tensor | None] = [None] * len(outputs)
            for k, u in zip(used, upstream, strict=True):
                given[k] = u
            expected, plain = self.gradients(oracle, turn, given)
            largest = max((u.double().abs().nan_to_num(0).max().item() for u in upstream if u.numel()), default=0.0)
            for k, grad in zip(differentiable, grads, strict=True):
                what, e, p = f"gradient of input {k}, turn {turn}", expected[k], plain[k]
                if grad is None or e is None:
                    assert grad is None or bool((grad == 0).all()), f"{what}: of what it does not depend on"
                    assert e is None or bool((e.value == 0).all()), f"{what} is None"
                    continue
                assert grad.dtype == leaves[k].dtype, f"{what} is {grad.dtype}"
                # written in the forward, then rescaled; or cast from the dtype all were promoted to
                compare(what, grad, e, p, roundings=2, upstream=largest)
            for u, kept in zip(upstream, before[turn], strict=True):
                assert same(u, kept), "an upstream gradient was written to"


__all__ = ["BROADCAST", "LAYOUTS", "PARAMETERS", "RECONSTRUCTIONS", "TARGETS", "Case", "Trial"]
