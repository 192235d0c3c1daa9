"""Counts: Poisson and negative binomial against 50 digits, scvi-tools' own functions, and the types people count in."""

from __future__ import annotations

import functools
import itertools
import math
import random
import re
from collections.abc import Callable
from typing import Any

import mpmath
import pytest
import torch
from torch import Tensor

import fastvae

from table import (
    BACKENDS,
    DTYPES,
    INTERPRETED,
    TARGETS,
    mean_dispersion_and_count,
    negative_binomial_exactly,
    of_scores,
    on,
    reduce,
    scores_dispersion_and_count,
    value_and_gradients,
    zero_inflated_exactly,
    zero_inflated_inputs,
)

ULP = {torch.float32: 2.0**-24, torch.float64: 2.0**-53}
INTEGERS = (torch.uint8, torch.uint16, torch.uint32, torch.int8, torch.int16, torch.int32, torch.int64)


def of_every_magnitude(dtype: torch.dtype) -> list[Tensor]:
    """(mean, dispersion, count): dispersions of every exponent up to 10³⁰, counts from 0 to a million."""
    draw = random.Random(0)
    exponents = range(-99, 100, 3 if INTERPRETED else 1)
    counts = [0, 1, 2, 3, 5, 6, 7, 8, 9, 12, 20, 100, 3000, 10**6]
    rows = []
    for exponent, _ in itertools.product(exponents, range(6)):
        x = draw.choice(counts)
        mean = draw.choice([(x + 0.5) * draw.uniform(0.5, 2), 10 ** draw.uniform(-3, 4)])
        rows.append((mean, draw.uniform(1, 2) * 2.0**exponent, float(x)))
    return [t[None].contiguous() for t in torch.tensor(rows, dtype=torch.float64).to(dtype).T]


def exactly(mean: float, theta: float, x: float) -> tuple[mpmath.mpf, mpmath.mpf, mpmath.mpf, mpmath.mpf, mpmath.mpf]:
    """nll, ∂/∂mean, ∂/∂θ in 50 digits; the sizes of the first and the last: of the terms they are the sum of."""
    with mpmath.workdps(50):
        m, t, n, eps = (mpmath.mpf(number) for number in (mean, theta, x, 1e-8))
        total = t + m + eps
        growth, odds = t * mpmath.log(total / (t + eps)), n * mpmath.log((m + eps) / total)
        rising = mpmath.loggamma(n + t) - mpmath.loggamma(t)
        nll = growth - odds - rising + mpmath.loggamma(n + 1)
        by_mean = (n + t) / total - n / (m + eps)
        by_theta = mpmath.log(total / (t + eps)) + t / total - t / (t + eps) + n / total
        digammas = mpmath.digamma(t) - mpmath.digamma(n + t)
        log_growth = mpmath.log1p((n + 8) / (t + 8))
        # what Γ(x + θ)/(Γ(θ)·x!) is the product of, as far as it does not cancel against the rest
        size = growth + n + n * abs(mpmath.log((m + eps) * (n + t) / (total * max(n, 1)))) + (t + 16) * log_growth
        size += abs(mpmath.log(t)) + 8
        slope_size = growth / t + log_growth + abs(n - m) / total + 4 * min(1, 8 / t) + 1 / t
        return nll, by_mean, by_theta + digammas, size, slope_size


@pytest.mark.parametrize("dtype", ULP, ids=str)
@pytest.mark.parametrize("backend", [name for name in TARGETS if name != "torch"])
def test_log_gamma_and_digamma_over_all_exponents(backend: str, dtype: torch.dtype) -> None:
    """Within 8 ulps of the terms of the sum: the differences are computed, and what cancels is not."""
    mean, theta, x = of_every_magnitude(dtype)
    with on(backend):
        nll, (by_mean, by_theta) = value_and_gradients(
            lambda y, t, x: fastvae.negative_binomial_nll(y, x, dispersion=t, reduction="none"), [mean, theta, x], 2
        )
    unit = 8 * ULP[dtype]
    for k, numbers in enumerate(zip(mean[0].tolist(), theta[0].tolist(), x[0].tolist(), strict=True)):
        want, want_by_mean, want_by_theta, size, slope_size = exactly(*numbers)
        rounding = numbers[2] * min(ULP[dtype], 1e-8 / numbers[0])  # of mean + 1e-8
        assert abs(nll[0, k].item() - want) <= unit * size + rounding, (numbers, want)
        assert abs(by_mean[0, k].item() - want_by_mean) <= unit * abs(want_by_mean) + rounding / numbers[0], numbers
        assert abs(by_theta[0, k].item() - want_by_theta) <= unit * slope_size, (numbers, want_by_theta)


@pytest.mark.parametrize("dtype", ULP, ids=str)
@pytest.mark.parametrize("backend", TARGETS)
def test_log_factorials(backend: str, dtype: torch.dtype) -> None:
    """A rate of 1 is log x! and 1, all but 1e-8·x: each count to 300, then each power of two."""
    counts = torch.tensor([[*range(300), *(2.0**k for k in range(9, 24))]], dtype=dtype)
    with on(backend):
        rate = fastvae.poisson_nll(torch.ones_like(counts), counts, reduction="none")
        log_rate = fastvae.poisson_nll_with_log_rate(torch.zeros_like(counts), counts, reduction="none")
    want = torch.tensor([[float(mpmath.loggamma(x + 1)) + 1 for x in counts[0].tolist()]], dtype=torch.float64)
    ulps = 8 if backend == "torch" else 4
    assert ((log_rate.double() - want).abs() <= ulps * ULP[dtype] * want).all()
    assert ((rate.double() - want).abs() <= ulps * ULP[dtype] * want + 1e-8 * counts).all()


@pytest.mark.parametrize("backend", [name for name in BACKENDS if name != "torch"])
def test_a_large_dispersion_is_the_poisson(backend: str) -> None:
    """Where the textbook's logarithms of Γ cancel: at θ = 10¹² eager PyTorch, and the reference, are off by far."""
    mean, _, x = (t.float() for t in mean_dispersion_and_count(4, 50))
    with on(backend):
        poisson, (want,) = value_and_gradients(fastvae.poisson_nll, [mean, x], 1)
        for dispersion in (1e12, torch.full((50,), 1e12)):
            got, (grad,) = value_and_gradients(
                lambda y, x, d=dispersion: fastvae.negative_binomial_nll(y, x, dispersion=d), [mean, x], 1
            )
            torch.testing.assert_close(got, poisson, rtol=1e-5, atol=0)
            torch.testing.assert_close(grad, want, rtol=1e-5, atol=1e-6)


CALLS: dict[str, Callable[..., Tensor]] = {
    "poisson": fastvae.poisson_nll,
    "poisson_log_rate": fastvae.poisson_nll_with_log_rate,
    "negative_binomial": lambda y, x, **kw: fastvae.negative_binomial_nll(y, x, dispersion=0.7, **kw),
    "negative_binomial_per_gene": lambda y, x, **kw: fastvae.negative_binomial_nll(
        y, x, dispersion=torch.linspace(0.1, 20, y.shape[1]), **kw
    ),
    "zero_inflated": lambda y, x, **kw: fastvae.zero_inflated_negative_binomial_nll(
        y, x, dispersion=torch.linspace(0.1, 20, y.shape[1]), zero_logits=torch.full_like(y, -1.5), **kw
    ),
}


@pytest.mark.parametrize("dtype", INTEGERS, ids=str)
@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_integers_are_counts(backend: str, call: str, dtype: torch.dtype) -> None:
    """uint8 too: x, not x/255."""
    counts = torch.arange(120).view(4, 30)
    mean = (torch.rand(4, 30) * 50).bfloat16()
    with on(backend):
        got = CALLS[call](mean, counts.to(dtype))
        torch.testing.assert_close(got, CALLS[call](mean, counts.float()), rtol=0, atol=0)


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_count_that_bfloat16_lacks_is_not_rounded(backend: str, call: str) -> None:
    mean = torch.full((2, 3), 300.0).bfloat16()
    with on(backend):
        for dtype in (torch.int64, torch.float32, torch.float64):
            got = CALLS[call](mean.log() if "log" in call else mean, torch.full((2, 3), 301, dtype=dtype))
            want = CALLS[call]((mean.log() if "log" in call else mean).double(), torch.full((2, 3), 301.0).double())
            torch.testing.assert_close(got.double(), want, rtol=3e-5, atol=0)  # 301 rounded to 300 is 1e-3 off


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("reduction", ["none", "example", "batchmean"])
@pytest.mark.parametrize("backend", [name for name in TARGETS if name not in ("cuda", "triton")])
def test_what_is_no_count_is_named(backend: str, call: str, reduction: str) -> None:
    """Anywhere in a vector, and in what is left of one; NaN is let through, and seen in the loss."""
    ones = torch.ones(3, 67)
    with on(backend):
        assert CALLS[call](ones, ones * 2.0**30, reduction=reduction).isfinite().all(), "beyond what an int32 holds"
        assert CALLS[call](ones, ones * float("nan"), reduction=reduction).isnan().all()
        for at in (0, 9, 66):
            for bad, says in ((-1.0, "-1"), (0.5, "0.5"), (2.0**21 + 0.25, "2097152.25"), (-math.inf, "-inf")):
                target = ones.clone()
                target[1, at] = bad
                with pytest.raises(ValueError, match=f"^target must be counts: 0, 1, 2, …, got {re.escape(says)}: "):
                    CALLS[call](ones, target, reduction=reduction)
            if "log" not in call:
                mean = ones.clone()
                mean[1, at] = -1e-3
                name = "rate" if "poisson" in call else "mean"
                with pytest.raises(ValueError, match=f"^{name} must be at least 0, got values from -0.001.* to 1: end"):
                    CALLS[call](mean, ones, reduction=reduction)


Y = torch.ones(2, 3)


@pytest.mark.parametrize(
    ("call", "error", "says"),
    [
        (lambda: fastvae.negative_binomial_nll(Y, Y), TypeError, "dispersion"),
        (lambda: fastvae.negative_binomial_nll(Y, Y, dispersion=0), ValueError, "dispersion must be > 0, got 0"),
        (
            lambda: fastvae.negative_binomial_nll(Y.cpu(), Y.cpu(), dispersion=torch.tensor([1.0, -2.0, 1.0]).cpu()),
            ValueError,
            "dispersion must be > 0, got -2",
        ),
        (lambda: fastvae.negative_binomial_nll(Y, Y, dispersion=torch.ones(2)), ValueError, "must broadcast to"),
        (lambda: fastvae.negative_binomial_nll(Y, Y, dispersion=None), ValueError, "needs its dispersion: a number or"),
        (lambda: fastvae.nn.NegativeBinomialNLLLoss(dispersion=-1.0), ValueError, "dispersion must be > 0, got -1.0"),
        (
            lambda: fastvae.elbo_loss(Y, Y, Y, Y, likelihood="negative_binomial"),
            ValueError,
            "likelihood 'negative_binomial' needs its dispersion",
        ),
        (
            lambda: fastvae.elbo_loss(Y, Y, Y, Y, likelihood="poisson", likelihood_parameters={"dispersion": 1.0}),
            ValueError,
            "likelihood_parameters of 'poisson' must be empty",
        ),
        (
            lambda: fastvae.zero_inflated_negative_binomial_nll(Y, Y, dispersion=1.0, zero_logits=torch.ones(4)),
            ValueError,
            "zero_logits must broadcast to the shape of the data, [2, 3], got [4]",
        ),
        (
            lambda: fastvae.zero_inflated_negative_binomial_nll(Y, Y, dispersion=1.0, zero_logits="0"),
            TypeError,
            "zero_logits must be a number, got str",
        ),
        (
            lambda: fastvae.zero_inflated_negative_binomial_nll(Y, Y, dispersion=1.0, zero_logits=Y.long()),
            TypeError,
            "zero_logits must be a number or a floating-point tensor, got one of int64",
        ),
        (lambda: fastvae.poisson_nll(Y, Y.bool()), TypeError, "target must be floating point or an integer, got bool"),
        (lambda: fastvae.models.VAE(likelihood="poisson"), ValueError, "likelihood must be one of 'bernoulli_logits'"),
    ],
)
def test_errors(call: Callable[[], object], error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=re.escape(says)):
        call()


@pytest.mark.parametrize("backend", BACKENDS)
def test_elbo_loss_and_modules(backend: str) -> None:
    mean, theta, x = (t.float() for t in mean_dispersion_and_count(6, 9))
    mu, logvar = torch.randn(6, 2), torch.randn(6, 2)
    learned = torch.nn.Parameter(theta[0].clone())
    terms = {
        "poisson": (fastvae.poisson_nll, fastvae.nn.PoissonNLLLoss, {}),
        "poisson_log_rate": (fastvae.poisson_nll_with_log_rate, fastvae.nn.PoissonNLLWithLogRateLoss, {}),
        "negative_binomial": (fastvae.negative_binomial_nll, fastvae.nn.NegativeBinomialNLLLoss, {"dispersion": 1.3}),
        "per gene": (fastvae.negative_binomial_nll, fastvae.nn.NegativeBinomialNLLLoss, {"dispersion": learned}),
    }
    with on(backend):
        for name, (term, module, parameters) in terms.items():
            likelihood = "negative_binomial" if name == "per gene" else name
            want = term(mean, x.int(), **parameters)
            out = fastvae.elbo_loss(
                mean, x.int(), mu, logvar, likelihood=likelihood, likelihood_parameters=parameters, beta=0.5
            )
            torch.testing.assert_close(out.reconstruction, want)
            torch.testing.assert_close(out.loss, want + 0.5 * fastvae.gaussian_kl(mu, logvar))
            torch.testing.assert_close(module(**parameters)(mean, x.int()), want)
        loss = fastvae.nn.NegativeBinomialNLLLoss(dispersion=learned)
        assert list(loss.parameters()) == [learned]
        loss(mean, x).backward()
        assert learned.grad is not None
        assert learned.grad.isfinite().all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_mean_of_zero(backend: str) -> None:
    """A gene no cell of a type expresses: finite, and the gradient says to raise it if a count was seen."""
    mean, x = torch.zeros(2, 3, requires_grad=True), torch.tensor([[0, 1, 9], [0, 2, 40]])
    with on(backend):
        for call in (CALLS["poisson"], CALLS["negative_binomial"]):
            loss = call(mean, x, reduction="none")
            (grad,) = torch.autograd.grad(loss.sum(), mean)
            assert loss.isfinite().all()
            torch.testing.assert_close(loss[:, 0], torch.zeros(2))
            assert (grad[:, 0] > 0).all()
            assert (grad[:, 1:] < -1e7).all()


#: of dispersion and of zero_logits, for data [6, 3, 5]
BROADCAST = [((6, 3, 5), (6, 3, 5)), ((3, 5), (5,)), ((6, 1, 1), (3, 1)), ((), ()), ((5,), (6, 1, 1))]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shapes", BROADCAST, ids=str)
@pytest.mark.parametrize("backend", TARGETS)
def test_zero_inflation_broadcasts(backend: str, shapes: tuple[tuple[int, ...], ...], dtype: torch.dtype) -> None:
    mean, *parameters, x = zero_inflated_inputs(6, 3, 5)
    parameters = [t.flatten()[: torch.Size(s).numel()].reshape(s) for t, s in zip(parameters, shapes, strict=True)]
    inputs = [t.to(dtype) for t in (mean, *parameters, x)]
    exact = [t.double() for t in inputs]
    for reduction in ("none", "example", "batchmean"):
        with on(backend):
            got, grads = value_and_gradients(
                lambda y, t, p, x, r=reduction: fastvae.zero_inflated_negative_binomial_nll(
                    y, x, dispersion=t, zero_logits=p, reduction=r
                ),
                inputs,
                3,
            )

        def expected(*tensors: Tensor, r: str = reduction) -> Tensor:
            y, t, p, x = tensors
            nll = zero_inflated_exactly(y, t.expand(y.shape), p.expand(y.shape), x)
            return nll if r == "none" else nll.flatten(1).sum(1) if r == "example" else nll.sum() / 6

        want, want_grads = value_and_gradients(expected, exact, 3)
        tolerance = 1e-5 if dtype == torch.float32 else torch.finfo(dtype).eps
        torch.testing.assert_close(got.double(), want, rtol=tolerance, atol=tolerance)
        for grad, want_grad, t in zip(grads, want_grads, inputs, strict=False):
            assert (grad.shape, grad.dtype) == (t.shape, t.dtype)
            scale = max(1.0, want_grad.abs().max().item())
            torch.testing.assert_close(grad.double(), want_grad, rtol=2 * tolerance, atol=4 * tolerance * scale)


@pytest.mark.parametrize("backend", TARGETS)
def test_zero_inflation_at_its_ends(backend: str) -> None:
    """From no extra zeros to nothing but zeros, and logits that no exponential holds: finite, as is the gradient."""
    logits = torch.tensor([-1e4, -100.0, -20.0, 0.0, 20.0, 100.0, 1e4])
    mean = torch.tensor([[1e-6], [1.0], [1e4]]).expand(3, 7).contiguous()
    for count in (0.0, 3.0):
        x = torch.full((3, 7), count)
        with on(backend):
            nll, grads = value_and_gradients(
                lambda y, p, x: fastvae.zero_inflated_negative_binomial_nll(
                    y, x, dispersion=2.0, zero_logits=p, reduction="none"
                ),
                [mean, logits.expand(3, 7).contiguous(), x],
                2,
            )
            plain = fastvae.negative_binomial_nll(mean, x, dispersion=2.0, reduction="none")
        assert all(t.isfinite().all() for t in (nll, *grads))
        torch.testing.assert_close(nll[:, :2], plain[:, :2], rtol=1e-6, atol=1e-6)
        want = torch.zeros(3) if count == 0 else plain[:, 6] + 1e4
        torch.testing.assert_close(nll[:, 6], want, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_zero_inflation_by_module_and_only_for_some(backend: str) -> None:
    mean, theta, logits, x = (t.float() for t in zero_inflated_inputs(6, 9))
    learned = torch.nn.Parameter(theta[0].clone())
    with on(backend):
        loss = fastvae.nn.ZeroInflatedNegativeBinomialNLLLoss(dispersion=learned, reduction="sum")
        call = lambda y, t, p: fastvae.zero_inflated_negative_binomial_nll(  # noqa: E731
            y, x.int(), dispersion=t, zero_logits=p, reduction="sum"
        )
        torch.testing.assert_close(loss(mean, logits, x.int()), call(mean, learned, logits))
        whole = value_and_gradients(call, [mean, learned, logits], 3)[1]
        for k, want in enumerate(whole):
            leaves = [t.detach().requires_grad_(j == k) for j, t in enumerate((mean, learned, logits))]
            value = call(*leaves)
            for _ in range(2):  # the second backward computes what the first was handed
                (grad,) = torch.autograd.grad(2 * value, leaves[k], retain_graph=True)
                torch.testing.assert_close(grad, 2 * want)
        torch.testing.assert_close(call(mean, 1.5, 0.5), call(mean, torch.full((9,), 1.5), torch.full((9,), 0.5)))


@pytest.mark.parametrize(
    ("dtype", "rtol", "atol"), [(torch.float32, 1e-5, 5e-5), (torch.float64, 1e-12, 1e-11)], ids=["float32", "float64"]
)
def test_scvi_tools_own_functions(dtype: torch.dtype, rtol: float, atol: float) -> None:
    """log_nb_positive and log_zinb_positive, and the distributions that its models return, all of them in float64.

    (In float32 theirs are off by up to 6e-4 nats here.)
    """
    distributions = pytest.importorskip("scvi.distributions", reason="scvi-tools is not installed")
    from scvi.distributions._negative_binomial import log_nb_positive, log_zinb_positive

    mean, theta, logits, x = (t.to(dtype) for t in zero_inflated_inputs(64, 200))

    def compare(call: Callable[..., Tensor], theirs: Callable[..., Tensor], *leaves: Tensor) -> None:
        got, got_grads = value_and_gradients(call, leaves, len(leaves))
        want, want_grads = value_and_gradients(theirs, [leaf.double() for leaf in leaves], len(leaves))
        torch.testing.assert_close(got.double(), -want, rtol=rtol, atol=atol)
        for grad, want_grad in zip(got_grads, want_grads, strict=True):
            torch.testing.assert_close(grad.double(), -want_grad, rtol=10 * rtol, atol=10 * atol)

    none: dict[str, Any] = {"reduction": "none"}
    for dispersion in (theta, theta[0], theta[:, :1]):
        call = lambda y, t: fastvae.negative_binomial_nll(y, x, dispersion=t, **none)  # noqa: E731
        compare(call, lambda y, t: log_nb_positive(x.double(), y, t), mean, dispersion)
        compare(call, lambda y, t: distributions.NegativeBinomial(mu=y, theta=t).log_prob(x.double()), mean, dispersion)
    inflated = lambda y, t, p: fastvae.zero_inflated_negative_binomial_nll(  # noqa: E731
        y, x, dispersion=t, zero_logits=p, **none
    )
    compare(inflated, lambda y, t, p: log_zinb_positive(x.double(), y, t, p), mean, theta[0], logits)
    own = distributions.ZeroInflatedNegativeBinomial
    compare(inflated, lambda y, t, p: own(mu=y, theta=t, zi_logits=p).log_prob(x.double()), mean, theta[0], logits)
    compare(  # theirs is torch's Poisson, which has no ε
        lambda y: fastvae.poisson_nll(y, x, **none),
        lambda y: distributions.Poisson(y + 1e-8).log_prob(x.double()) + 1e-8,
        mean,
    )


def composed(
    scores: Tensor, library: Tensor, theta: Tensor, logits: Tensor | None, x: Tensor, reduction: str
) -> Tensor:
    """What `…_from_scores` stands for, in plain torch."""
    mean = of_scores(scores, library)
    if logits is None:
        return reduce(negative_binomial_exactly(mean, theta.expand(mean.shape), x), reduction)
    return reduce(zero_inflated_exactly(mean, theta.expand(mean.shape), logits, x), reduction)


def from_scores(
    scores: Tensor, library: Tensor, theta: Tensor, logits: Tensor | None, x: Tensor, reduction: str
) -> Tensor:
    options: dict[str, Any] = {"dispersion": theta, "reduction": reduction}
    if logits is None:
        return fastvae.negative_binomial_nll_from_scores(scores, library, x, **options)
    return fastvae.zero_inflated_negative_binomial_nll_from_scores(scores, library, x, zero_logits=logits, **options)


def scores_and_all(*shape: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Scores, library, dispersion, logits of zero and counts, in float64."""
    scores, theta, count = scores_dispersion_and_count(*shape)
    return scores, torch.rand(shape[0], dtype=torch.float64) * 900 + 100, theta, torch.randn_like(scores), count


@pytest.mark.parametrize("inflated", [False, True], ids=["plain", "inflated"])
@pytest.mark.parametrize("dispersion", ["gene", "cell", "element", "number"])
@pytest.mark.parametrize("dtype", DTYPES[:2] if INTERPRETED else DTYPES, ids=str)  # halves are torch's to convert
@pytest.mark.parametrize("backend", TARGETS)
def test_scores_stand_for_a_mean(backend: str, dtype: torch.dtype, dispersion: str, inflated: bool) -> None:
    """Values and gradients in all four, library too; rows longer and shorter than a vector, and more than a piece."""
    ulps = 40 if backend == "torch" else 8  # whose log Γ cancel
    for shape in ((4, 3, 7), (3, 5), (2, 1000), (70, 11))[: 1 if INTERPRETED else 4]:
        scores, library, theta, logits, x = (t.to(dtype) for t in scores_and_all(*shape))
        theta = {"gene": theta[0], "cell": theta.flatten(1)[:, :1].reshape(-1, *(1,) * (len(shape) - 1))}.get(
            dispersion, theta if dispersion == "element" else theta.flatten()[0]
        )
        inputs, exact_x = [scores, library, theta, *([logits] if inflated else [])], x.double()
        for reduction in ("none", "example", "batchmean"):

            def call(function: Callable[..., Tensor], *a: Tensor, x: Tensor = x, r: str = reduction) -> Tensor:
                return function(*a[:3], a[3] if inflated else None, x.to(a[0].dtype), r)

            upstream = torch.randn(shape if reduction == "none" else shape[:1] if reduction == "example" else ())
            with on(backend):
                got, grads = value_and_gradients(functools.partial(call, from_scores), inputs, len(inputs), upstream)
            exact = [t.double() for t in inputs]
            want, want_grads = value_and_gradients(functools.partial(call, composed), exact, len(inputs), upstream)
            unit = torch.finfo(dtype if reduction == "none" else torch.promote_types(dtype, torch.float32)).eps
            inexact = 1e-12  # what the formula loses in float64
            counts = exact_x if reduction == "none" else exact_x.flatten(1).sum(1)
            size = want.abs().max() + counts.max()  # a mean that is an ulp off moves the loss by x ulps
            assert (got.double() - want).abs().max() <= (ulps * unit + inexact) * size
            for grad, want_grad, t in zip(grads, want_grads, inputs, strict=True):
                assert (grad.shape, grad.dtype) == (t.shape, t.dtype)
                # what cancels in a sum may be larger than that is
                bound = (40 * torch.finfo(dtype).eps + inexact) * max(
                    1.0, want_grad.abs().max().item(), exact_x.max().item()
                )
                assert (grad.double() - want_grad).abs().max() <= bound


@pytest.mark.parametrize("backend", TARGETS)
def test_scores_of_any_size(backend: str) -> None:
    """No exponential overflows, a score of −∞ is a mean of 0, and adding a number to all of a row changes nothing."""
    x = torch.tensor([[0.0, 3.0, 1.0, 0.0, 7.0]]).repeat(4, 1)
    scores = torch.tensor([[1e4, -1e4, 0.0, 9999.0, 1e4], [-1e30, -1e30, -1e30, -1e30, -1e30], [3e38, 1, 2, 3, -3e38]])
    scores = torch.cat([scores, torch.tensor([[0.0, 1.0, -1.0, -math.inf, 2.0]])])
    with on(backend):
        call = lambda s: fastvae.negative_binomial_nll_from_scores(s, 11.0, x, dispersion=2.0, reduction="none")  # noqa: E731
        nll, (grad,) = value_and_gradients(call, [scores], 1)
        assert nll.isfinite().all()
        assert grad.isfinite().all()
        torch.testing.assert_close(grad.sum(1), torch.zeros(4), rtol=0, atol=1e-5)
        torch.testing.assert_close(nll[3], call(scores + 16.0)[3], rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(
            nll[3, 3], fastvae.negative_binomial_nll(Y[:1, :1] * 0, Y[:1, :1] * 0, dispersion=2.0)
        )


@pytest.mark.parametrize("backend", BACKENDS)
def test_scores_by_other_ways(backend: str) -> None:
    """A library in each of its shapes, the modules, gradients of some, a second backward, both vmaps, torch.compile."""
    scores, library, theta, logits, x = (t.float() for t in scores_and_all(6, 30))
    with on(backend):
        call = lambda size: fastvae.negative_binomial_nll_from_scores(scores, size, x.int(), dispersion=theta[0])  # noqa: E731
        want = call(library)
        assert torch.equal(call(library[:, None]), want)
        assert torch.equal(call(library.double()), want)
        assert torch.equal(call(torch.tensor(250.0)), call(250.0))
        assert torch.equal(call(torch.tensor([[250.0]])), call(250.0))
        learned = torch.nn.Parameter(theta[0].clone())
        module = fastvae.nn.NegativeBinomialNLLFromScoresLoss(dispersion=learned)
        torch.testing.assert_close(module(scores, library, x), want)
        inflated = fastvae.nn.ZeroInflatedNegativeBinomialNLLFromScoresLoss(dispersion=learned, reduction="example")
        got = inflated(scores, library, logits, x)
        torch.testing.assert_close(got, composed(scores, library, theta[0], logits, x, "example"), rtol=1e-5, atol=1e-4)
        leaves = [scores, library, theta[0].clone(), logits]
        whole = value_and_gradients(lambda *a: from_scores(*a, x, "batchmean"), leaves, 4)[1]
        for k, expected in enumerate(whole):
            own = [t.detach().requires_grad_(j == k) for j, t in enumerate(leaves)]
            loss = from_scores(*own, x, "batchmean")
            for _ in range(2):
                (grad,) = torch.autograd.grad(2 * loss, own[k], retain_graph=True)
                torch.testing.assert_close(grad, 2 * expected)
        each = torch.vmap(lambda s, n, x: from_scores(s[None], n[None], theta[0], None, x[None], "sum"))(
            scores, library, x
        )
        torch.testing.assert_close(
            each, from_scores(scores, library, theta[0], None, x, "example"), rtol=1e-5, atol=1e-4
        )
        losses = lambda *a: from_scores(*a, x, "example")  # noqa: E731
        rows = torch.autograd.functional.jacobian(losses, tuple(leaves), vectorize=True)
        for row, expected in zip(rows, whole, strict=True):
            torch.testing.assert_close(row.sum(0) / 6, expected, rtol=1e-4, atol=1e-5)
        learning = [t.clone().requires_grad_() for t in leaves]
        compiled = torch.compile(losses, fullgraph=True)
        grads = torch.autograd.grad(compiled(*learning).mean(), learning)
        for grad, expected in zip(grads, whole, strict=True):
            torch.testing.assert_close(grad, expected, rtol=1e-4, atol=1e-5)
        with torch.no_grad():
            torch.testing.assert_close(compiled(*learning), losses(*leaves))
    deep = torch.rand(6, 6, 5)  # whose second dimension is as long as the batch
    counts = torch.ones_like(deep)
    sizes = torch.arange(1.0, 7.0)
    call = lambda size: fastvae.negative_binomial_nll_from_scores(deep, size, counts, dispersion=1.0)  # noqa: E731
    for shape in ((6, 1), (6, 1, 1)):
        assert torch.equal(call(sizes.view(shape)), call(sizes))


def test_scores_and_double_backward() -> None:
    scores, library, theta, logits, x = scores_and_all(2, 4)
    inputs = [t.requires_grad_() for t in (scores, library, theta[0].clone(), logits)]
    for reduction in ("none", "batchmean"):
        call = lambda *a, r=reduction: from_scores(*a, x, r)  # noqa: E731
        assert torch.autograd.gradcheck(call, inputs)
        assert torch.autograd.gradgradcheck(call, inputs)


@pytest.mark.parametrize(
    ("scores", "library", "says"),
    [
        (Y, torch.ones(3), r"library_size must be one number for each example, \[2\], got \[3\]"),
        (Y, torch.ones(2, 3), r"library_size must be one number for each example, \[2\], got \[2, 3\]"),
        (torch.ones(3, 3), torch.ones(1, 3), r"library_size must be one number for each example, \[3\], got \[1, 3\]"),
        (Y, torch.tensor([4.0, 0.0]), r"library_size must be > 0, got 0"),
        (Y, -1, r"library_size must be > 0, got -1"),
        (Y[0], 5.0, r"scores must be \[B, \*data\], which softmax goes over, got \[3\]"),
        (Y, 5.0, r"target must be counts: 0, 1, 2, …, got 0.5: pass raw counts"),
    ],
)
def test_errors_of_scores(scores: Tensor, library: Any, says: str) -> None:
    target = torch.full_like(scores, 0.5 if "counts" in says else 1.0)
    with pytest.raises(ValueError, match=says):
        fastvae.negative_binomial_nll_from_scores(scores.cpu(), library, target.cpu(), dispersion=1.0)
