"""What people type beside the plain call: each against what PyTorch, or the formula, says."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributions import Independent, Laplace, Normal, kl_divergence

import fastvae

from table import BACKENDS, on

B, D, L, S = 6, 10, 4, 3
REDUCTIONS = ("none", "example", "sum", "mean", "batchmean")


@pytest.fixture(autouse=True, params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> Any:
    with on(request.param):
        yield request.param


def data(seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(B, D, generator=generator), torch.rand(B, D, generator=generator)


def latents(seed: int = 1) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(B, L, generator=generator), torch.randn(B, L, generator=generator)


def reduced(elements: Tensor, reduction: str) -> Tensor:
    return {
        "none": lambda t: t,
        "example": lambda t: t.flatten(1).sum(1),
        "sum": torch.sum,
        "mean": torch.mean,
        "batchmean": lambda t: t.sum() / len(t),
    }[reduction](elements)


def same(ours: Callable[..., Tensor], theirs: Callable[..., Tensor], *inputs: Tensor, rtol: float = 1e-5) -> None:
    """Values and gradients, of all inputs, for an upstream gradient that differs by element."""
    results = []
    for call in (ours, theirs):
        leaves = [t.detach().clone().requires_grad_() for t in inputs]
        value = call(*leaves)
        upstream = torch.linspace(0.5, 1.5, max(value.numel(), 1)).to(value.dtype).reshape(value.shape)
        results.append([value.detach(), *torch.autograd.grad(value, leaves, upstream)])
    for got, want in zip(*results, strict=True):
        assert (got.shape, got.dtype) == (want.shape, want.dtype)
        torch.testing.assert_close(got, want, rtol=rtol, atol=rtol)


# ---- weights, masks, targets


@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
@pytest.mark.parametrize("shape", [(B, D), (D,), (B, 1), ()], ids=str)
def test_weights_are_those_of_torch(shape: tuple[int, ...], reduction: str) -> None:
    logits, x = data()
    weight, pos_weight = torch.rand(shape) * 3, torch.rand(shape) * 3
    options: dict[str, Any] = {"reduction": reduction}
    for given in ({"weight": weight}, {"pos_weight": pos_weight}, {"weight": weight, "pos_weight": pos_weight}):
        same(
            lambda y, w=given: fastvae.bce_with_logits(y, x, **w, **options),
            lambda y, w=given: F.binary_cross_entropy_with_logits(y, x, **w, **options),
            logits,
        )
        module = fastvae.nn.BCEWithLogitsLoss(**given, **options)
        torch.testing.assert_close(
            module(logits, x), torch.nn.BCEWithLogitsLoss(**given, **options)(logits, x), rtol=1e-5, atol=1e-5
        )
        assert set(module.state_dict()) == set(given)
    same(
        lambda y: fastvae.bce(y.sigmoid(), x, eps=None, weight=weight, **options),
        lambda y: F.binary_cross_entropy(y.sigmoid(), x, weight=weight.expand(B, D), **options),
        logits,
    )


def test_a_pos_weight_at_its_ends() -> None:
    logits = torch.tensor([[-200.0, -1.0, 0.0, 1.0, 200.0]])
    for x in (torch.zeros(1, 5), torch.ones(1, 5), torch.full((1, 5), 0.25)):
        for p in (0.0, 1e-30, 1.0, 1e20):
            pos_weight = torch.full((5,), p)
            same(
                lambda y, x=x, p=pos_weight: fastvae.bce_with_logits(y, x, pos_weight=p, reduction="none"),
                lambda y, x=x, p=pos_weight: (  # torch's own gradient cancels here
                    x * p * F.softplus(-y.double()) + (1 - x) * F.softplus(y.double())
                ).float(),
                logits,
            )


TERMS: dict[str, tuple[Callable[..., Tensor], Callable[[Tensor, Tensor], Tensor]]] = {
    "mse": (fastvae.mse, lambda y, x: (y - x) ** 2),
    "l1": (fastvae.l1, lambda y, x: (y - x).abs()),
    "gaussian_nll": (
        lambda y, x, **kw: fastvae.gaussian_nll(y, x, torch.full((D,), 0.5), **kw),
        lambda y, x: -Normal(y, math.sqrt(0.5)).log_prob(x),
    ),
    "laplace_nll": (
        lambda y, x, **kw: fastvae.laplace_nll(y, x, scale=0.5, **kw),
        lambda y, x: -Laplace(y, 0.5).log_prob(x),
    ),
    "poisson_nll_with_log_rate": (
        lambda y, x, **kw: fastvae.poisson_nll_with_log_rate(y, (3 * x).round(), **kw),
        lambda y, x: y.exp() - (3 * x).round() * y + torch.lgamma((3 * x).round() + 1),
    ),
    "negative_binomial_nll": (
        lambda y, x, **kw: fastvae.negative_binomial_nll(y.exp(), (3 * x).round(), dispersion=2.0, **kw),
        lambda y, x: -torch.distributions.NegativeBinomial(2.0, logits=y - math.log(2)).log_prob((3 * x).round()),
    ),
}


@pytest.mark.parametrize("name", TERMS)
def test_a_mask_hides_what_it_hides(name: str) -> None:
    """NaN under it: neither the loss nor a gradient sees that; a mean is over what is left."""
    ours, theirs = TERMS[name]
    y, x = data()
    mask = torch.rand(B, D) > 0.4
    mask[2] = False
    hidden = torch.where(mask, x, torch.nan)
    for reduction in REDUCTIONS:

        def expected(y: Tensor, r: str = reduction) -> Tensor:
            nll = torch.where(mask, theirs(torch.where(mask, y, 0.0), x), 0.0)
            return nll.sum() / mask.sum() if r == "mean" else reduced(nll, r)

        def masked(y: Tensor, r: str = reduction) -> Tensor:
            return ours(torch.where(mask, y, torch.nan), hidden, weight=mask, reduction=r)

        same(masked, expected, y)
        same(
            lambda y, r=reduction: ours(y, x, weight=mask.float(), reduction=r),
            lambda y, r=reduction: reduced(theirs(y, x) * mask, r),
            y,
        )


def test_padded_sequences() -> None:
    """A mask [B, T, 1], and a target of bytes; half precision comes back as such."""
    logits, x = torch.randn(2, 5, 3), torch.randint(0, 256, (2, 5, 3), dtype=torch.uint8)
    mask = (torch.arange(5) < torch.tensor([[3], [5]]))[..., None]
    want = F.binary_cross_entropy_with_logits(logits, x / 255, reduction="none") * mask
    got = fastvae.bce_with_logits(logits, x, weight=mask, reduction="example")
    torch.testing.assert_close(got, want.sum((1, 2)))
    half = fastvae.bce_with_logits(logits.bfloat16(), x, weight=mask, reduction="none")
    assert half.dtype == torch.bfloat16
    assert fastvae.bce_with_logits(logits.bfloat16(), x, weight=mask).dtype == torch.float32
    elbo = fastvae.elbo_loss(logits, x, *(t[:2] for t in latents()), weight=mask)
    torch.testing.assert_close(elbo.reconstruction, got.mean())


def test_weights_of_data_of_one_number_an_example() -> None:
    logits, x, weight = torch.randn(B), torch.rand(B), torch.rand(B)
    want = F.binary_cross_entropy_with_logits(logits, x, weight, reduction="none")
    torch.testing.assert_close(fastvae.bce_with_logits(logits, x, weight=weight, reduction="example"), want)


def test_targets_of_other_dtypes() -> None:
    logits, x = data()
    ones = (x > 0.5).float()
    want = F.binary_cross_entropy_with_logits(logits, ones)
    for dtype in (torch.bool, torch.int64, torch.int32, torch.int8, torch.float16):
        torch.testing.assert_close(fastvae.bce_with_logits(logits, ones.to(dtype), reduction="mean"), want)
    numbers = torch.randint(-5, 300, (B, D))
    torch.testing.assert_close(fastvae.mse(logits, numbers, reduction="mean"), F.mse_loss(logits, numbers.float()))


def test_numbers_in_place_of_tensors() -> None:
    """0-d inputs, where torch takes them."""
    y, x = torch.tensor(0.3), torch.tensor(1.0)
    for name, theirs in (
        ("bce_with_logits", F.binary_cross_entropy_with_logits),
        ("mse", F.mse_loss),
        ("l1", F.l1_loss),
    ):
        for reduction in ("none", "sum", "mean"):
            same(
                lambda y, n=name, r=reduction: getattr(fastvae, n)(y, x, reduction=r),
                lambda y, f=theirs, r=reduction: f(y, x, reduction=r),
                y,
            )
    same(
        lambda y, v: fastvae.gaussian_nll(y, x, v), lambda y, v: -Normal(y, v.sqrt()).log_prob(x), y, torch.tensor(2.0)
    )


@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
def test_gaussian_nll_as_torch_has_it(reduction: str) -> None:
    """``var`` as a third argument, and without the constant."""
    mean, x = data()
    for full in (False, True):
        same(
            lambda y, v, f=full: fastvae.gaussian_nll(y, x, v, full=f, reduction=reduction),
            lambda y, v, f=full: F.gaussian_nll_loss(y, x, v, full=f, reduction=reduction),
            mean,
            torch.rand(B, D) + 0.5,
        )
    module = fastvae.nn.GaussianNLLLoss(full=False, reduction=reduction)
    torch.testing.assert_close(module(mean, x, x + 1), F.gaussian_nll_loss(mean, x, x + 1, reduction=reduction))
    mask = torch.rand(B, D) > 0.3
    full, rest = (fastvae.gaussian_nll(mean, x, full=f, weight=mask, reduction=reduction) for f in (True, False))
    constant = 0.5 * math.log(2 * math.pi) * {"none": mask.float(), "sum": mask.sum(), "mean": 1}[reduction]
    torch.testing.assert_close(full - rest, constant + torch.zeros_like(rest), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_the_optimal_sigma(reduction: str) -> None:
    mean, x = data()

    def expected(y: Tensor) -> Tensor:
        return reduced(-Normal(y, ((x - y) ** 2).mean().sqrt()).log_prob(x), reduction)

    same(lambda y: fastvae.gaussian_nll(y, x, optimal_sigma=True, reduction=reduction), expected, mean)
    torch.testing.assert_close(
        fastvae.nn.GaussianNLLLoss(optimal_sigma=True, reduction=reduction)(mean, x), expected(mean)
    )
    perfect = x.clone().requires_grad_()
    nll = fastvae.gaussian_nll(perfect, x, optimal_sigma=True, reduction=reduction).sum()
    (grad,) = torch.autograd.grad(nll, perfect)
    assert nll.isfinite()
    assert (grad == 0).all()


# ---- the latent terms


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_other_scales(reduction: str) -> None:
    mu, s = latents()
    options: dict[str, Any] = {"reduction": reduction}
    same(
        lambda m, s: fastvae.gaussian_kl(m, log_std=s, **options),
        lambda m, s: reduced(kl_divergence(Normal(m, s.exp()), Normal(0.0, 1.0)), reduction),
        mu,
        s,
    )
    same(
        lambda m, s: fastvae.gaussian_kl(m, std_raw=s, std_eps=0, **options),
        lambda m, s: reduced(kl_divergence(Normal(m, F.softplus(s)), Normal(0.0, 1.0)), reduction),
        mu,
        s,
    )
    same(  # one scale for all examples
        lambda m, s: fastvae.gaussian_kl(m, s, **options),
        lambda m, s: fastvae.gaussian_kl(m, s.expand(B, L).clone(), **options),
        mu,
        s[0],
    )
    for name, sigma in (("log_std", s.exp()), ("std_raw", F.softplus(s))):
        z = fastvae.reparameterize(mu, **{name: s}, seed=7)
        torch.testing.assert_close(z, fastvae.reparameterize(mu, std=sigma, seed=7))
        z, kl = fastvae.sample_with_kl(mu, **{name: s}, seed=7, **options)
        torch.testing.assert_close(z, fastvae.reparameterize(mu, std=sigma, seed=7))
        torch.testing.assert_close(kl, fastvae.gaussian_kl(mu, **{name: s}, **options))


def test_small_scales_are_exact_without_an_epsilon() -> None:
    """At σ = 1e-4 the lecture's log(1e-8 + σ²) has half the gradient."""
    std = torch.full((B, L), 1e-4, requires_grad=True)
    (grad,) = torch.autograd.grad(fastvae.gaussian_kl(torch.zeros(B, L), std=std, std_eps=0, reduction="sum"), std)
    torch.testing.assert_close(grad, torch.full((B, L), -1e4))
    (grad,) = torch.autograd.grad(fastvae.gaussian_kl(torch.zeros(B, L), std=std, reduction="sum"), std)
    torch.testing.assert_close(grad, torch.full((B, L), -5e3), rtol=1e-3, atol=0)


def test_distributions() -> None:
    mu, s = latents()
    q, p = Normal(mu, s.exp()), Normal(torch.full((L,), 0.5), 2.0)
    want = kl_divergence(q, p)
    torch.testing.assert_close(fastvae.gaussian_kl(q, p, reduction="none"), want)
    torch.testing.assert_close(fastvae.gaussian_kl(Independent(q, 1), Independent(p, 1)), want.sum(1).mean())
    torch.testing.assert_close(fastvae.gaussian_kl(q), kl_divergence(q, Normal(0.0, 1.0)).sum(1).mean())
    same(
        lambda m, s: fastvae.gaussian_kl(Normal(m, s.exp()), p),
        lambda m, s: kl_divergence(Normal(m, s.exp()), p).sum(1).mean(),
        mu,
        s,
    )
    torch.testing.assert_close(fastvae.nn.GaussianKL()(q, p), want.sum(1).mean())


@pytest.mark.parametrize(
    "prior", [{"prior_logvar": 2 * math.log(2.0)}, {"prior_std": 2.0}, {"prior_std": torch.tensor(2.0)}]
)
def test_a_prior_of_numbers(prior: dict[str, Any]) -> None:
    mu, logvar = latents()
    want = kl_divergence(Normal(mu, (0.5 * logvar).exp()), Normal(0.5, 2.0))
    torch.testing.assert_close(fastvae.gaussian_kl(mu, logvar, prior_mu=0.5, **prior, reduction="none"), want)
    logits, x = data()
    elbo = fastvae.elbo_loss(logits, x, mu, logvar, prior_mu=0.5, **prior, beta=0.3)
    torch.testing.assert_close(elbo.kl, want.sum(1).mean())
    torch.testing.assert_close(elbo.loss, fastvae.bce_with_logits(logits, x) + 0.3 * elbo.kl)


@pytest.mark.parametrize("reduction", ["batchmean", "sum", "mean", "example", "none"])
@pytest.mark.parametrize("per", ["element", "example", "dimension"])
def test_free_bits_by_group(per: str, reduction: str) -> None:
    mu, logvar = latents()
    if (per, reduction) in {("dimension", "example"), ("dimension", "none"), ("example", "none")}:
        with pytest.raises(ValueError, match=r"^reduction must not be"):
            fastvae.gaussian_kl(mu, logvar, free_bits=0.4, free_bits_per=per, reduction=reduction)
        return
    shape = {"element": (L,), "example": (B,), "dimension": (L,)}[per]
    for free in (0.4, torch.rand(shape) * {"element": 1, "example": 6, "dimension": 2}[per]):

        def expected(m: Tensor, s: Tensor, free: Any = free) -> Tensor:
            kl, least = kl_divergence(Normal(m, (0.5 * s).exp()), Normal(0.0, 1.0)), torch.as_tensor(free)
            if per == "element":
                return reduced(torch.maximum(kl, least), reduction)
            if per == "example":
                kl = torch.maximum(kl.sum(1), least)
                return kl.sum() / (B * L) if reduction == "mean" else reduced(kl[:, None], reduction)
            whole = torch.maximum(kl.mean(0), least).sum()
            return whole * {"batchmean": 1, "sum": B, "mean": 1 / L}[reduction]

        options: dict[str, Any] = {"free_bits": free, "free_bits_per": per, "reduction": reduction}
        same(lambda m, s, o=options: fastvae.gaussian_kl(m, s, **o), expected, mu, logvar)
        same(lambda m, s, o=options: fastvae.sample_with_kl(m, s, seed=1, **o)[1], expected, mu, logvar)
        z = fastvae.sample_with_kl(mu, logvar, seed=1, **options)[0]
        assert torch.equal(z, fastvae.reparameterize(mu, logvar, seed=1))
        if reduction in ("batchmean", "sum", "example"):
            same(lambda m, s, o=options: fastvae.elbo_loss(*data(), m, s, **o).kl, expected, mu, logvar)


def test_free_bits_of_half_precision_are_summed_in_float32() -> None:
    mu, logvar = (t.bfloat16() for t in latents())
    kl = fastvae.gaussian_kl(mu, logvar, free_bits=0.1, free_bits_per="dimension")
    want = fastvae.gaussian_kl(mu.float(), logvar.float(), free_bits=0.1, free_bits_per="dimension")
    assert kl.dtype == torch.float32
    torch.testing.assert_close(kl, want)


def test_noise_that_is_given_and_returned() -> None:
    mu, logvar = latents()
    for samples, shape in ((None, (B, L)), (S, (S, B, L))):
        z, noise = fastvae.reparameterize(mu, logvar, samples=samples, seed=3, return_noise=True)
        assert noise.shape == shape
        assert torch.equal(z, fastvae.reparameterize(mu, logvar, samples=samples, seed=3))
        torch.testing.assert_close(z, mu + (0.5 * logvar).exp() * noise)
        again = fastvae.reparameterize(mu, logvar, samples=samples, noise=noise)
        torch.testing.assert_close(z, again)
    same(
        lambda m, s: fastvae.reparameterize(m, s, noise=noise, samples=S, logvar_clamp=(-1, 1)),
        lambda m, s: m + (0.5 * s.clamp(-1, 1)).exp() * noise,
        mu,
        logvar,
    )
    torch.testing.assert_close(fastvae.nn.Reparameterize()(mu, std=logvar.exp(), noise=mu), mu + logvar.exp() * mu)


def test_a_generator_for_each_example() -> None:
    """An example's noise does not depend on the batch it is in, as with diffusers' lists."""
    mu, logvar = latents()

    def generators() -> list[torch.Generator]:
        return [torch.Generator().manual_seed(k) for k in range(B)]

    for samples in (None, S):
        z = fastvae.reparameterize(mu, logvar, generator=generators(), samples=samples)
        part = fastvae.reparameterize(mu[2:4], logvar[2:4], generator=generators()[2:4], samples=samples)
        assert torch.equal(z[2:4] if samples is None else z[:, 2:4], part)
        noise = (z - mu) / (0.5 * logvar).exp()
        assert noise.std() > 0.5
    module = fastvae.nn.Reparameterize()
    assert torch.equal(module(mu, logvar, generator=generators()), module(mu, logvar, generator=generators()))
    one = torch.Generator().manual_seed(5)
    assert torch.equal(module(mu, logvar, generator=one), module(mu, logvar, generator=one.manual_seed(5)))
    empty = torch.zeros(0, L)
    assert fastvae.reparameterize(empty, empty, generator=[]).shape == (0, L)
    assert fastvae.reparameterize(empty, empty, samples=S, generator=[], return_noise=True)[1].shape == (S, 0, L)


# ---- the whole ELBO


@pytest.mark.parametrize("target_dtype", [torch.float32, torch.uint8, torch.bool], ids=str)
@pytest.mark.parametrize("reduction", ["batchmean", "sum", "example"])
def test_the_mean_over_samples_of_z(reduction: str, target_dtype: torch.dtype) -> None:
    mu, logvar = latents()
    x = (data()[1] * (255 if target_dtype == torch.uint8 else 1)).round().to(target_dtype)
    numbers = x.float() / (255 if target_dtype == torch.uint8 else 1)
    recon = torch.randn(S, B, D)

    def expected(y: Tensor) -> Tensor:
        return reduced(
            F.binary_cross_entropy_with_logits(y, numbers.expand(S, B, D), reduction="none").mean(0), reduction
        )

    same(lambda y: fastvae.elbo_loss(y, x, mu, logvar, samples=S, reduction=reduction).reconstruction, expected, recon)
    weight = torch.rand(B, D)
    same(
        lambda y, v: (
            fastvae.elbo_loss(
                y, numbers, mu, logvar, likelihood="gaussian", samples=S, reduction=reduction, weight=weight, var=v
            ).reconstruction
        ),
        lambda y, v: reduced((weight * -Normal(y, v.sqrt()).log_prob(numbers)).mean(0), reduction),
        recon,
        torch.rand(D) + 0.5,
    )
    module = fastvae.nn.ELBOLoss(reduction=reduction)
    torch.testing.assert_close(module(recon, x, mu, logvar, samples=S).reconstruction, expected(recon))


@pytest.mark.parametrize("reduction", ["batchmean", "sum", "example"])
@pytest.mark.parametrize("capacity", [0.0, 3.0, torch.tensor(3.0)], ids=str)
def test_a_capacity(capacity: float | Tensor, reduction: str) -> None:
    (logits, x), (mu, logvar) = data(), latents()

    def expected(m: Tensor, s: Tensor) -> Tensor:
        out = fastvae.elbo_loss(logits, x, m, s, reduction=reduction)
        return out.reconstruction + 4 * (out.kl - capacity * (B if reduction == "sum" else 1)).abs()

    same(
        lambda m, s: fastvae.elbo_loss(logits, x, m, s, beta=4.0, capacity=capacity, reduction=reduction).loss,
        expected,
        mu,
        logvar,
    )
    module = fastvae.nn.ELBOLoss(beta=4.0, reduction=reduction)
    module.capacity = capacity
    torch.testing.assert_close(module(logits, x, mu, logvar).loss, expected(mu, logvar))


def test_parameters_of_the_likelihood_by_name() -> None:
    (y, x), (mu, logvar) = data(), latents()
    counts = (3 * x).round()

    def reconstruction(likelihood: str, target: Tensor = x, recon: Tensor = y, **parameters: Any) -> Tensor:
        return fastvae.elbo_loss(recon, target, mu, logvar, likelihood=likelihood, **parameters).reconstruction

    assert torch.equal(reconstruction("gaussian", var=0.1), fastvae.gaussian_nll(y, x, var=0.1))
    assert torch.equal(reconstruction("laplace", scale=0.1), fastvae.laplace_nll(y, x, scale=0.1))
    probs = y.sigmoid()
    assert torch.equal(reconstruction("bernoulli_probs", recon=probs, eps=None), fastvae.bce(probs, x, eps=None))
    assert torch.equal(reconstruction("bernoulli_probs", recon=probs, eps=0.1), fastvae.bce(probs, x, eps=0.1))
    for logits in (y, 0.5):
        assert torch.equal(
            reconstruction("negative_binomial", counts, y.exp(), dispersion=2.0, zero_logits=logits),
            fastvae.zero_inflated_negative_binomial_nll(y.exp(), counts, dispersion=2.0, zero_logits=logits),
        )


def test_all_of_it_compiles_whole() -> None:
    x, (mu, logvar) = data()[1], latents()
    recon, mask = torch.randn(S, B, D), torch.rand(B, D) > 0.3

    def step(recon: Tensor, mu: Tensor, logvar: Tensor) -> Tensor:
        out = fastvae.elbo_loss(
            recon, x, mu, log_std=logvar[0], samples=S, weight=mask, likelihood="gaussian", var=mu[0, 0].exp(),
            prior_mu=0.5, prior_std=2.0, free_bits=0.1, free_bits_per="dimension", capacity=0.5,
        )  # fmt: skip
        more = fastvae.bce_with_logits(recon[0], x > 0.5, pos_weight=x + 1, weight=x)
        return out.loss + more + fastvae.gaussian_nll(recon[1], x, optimal_sigma=True)

    same(torch.compile(step, fullgraph=True), step, recon, mu, logvar)
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(step, fullgraph=True)(recon, mu, logvar), step(recon, mu, logvar))


Y, X = torch.zeros(B, D), torch.zeros(B, D)
M = torch.zeros(B, L)
BAD: list[tuple[Callable[[], object], type[Exception], str]] = [
    (
        lambda: fastvae.elbo_loss(Y, X, M, M, kl_weight=0.1),
        TypeError,
        "elbo_loss has no argument 'kl_weight': it is called beta here",
    ),
    (
        lambda: fastvae.elbo_loss(Y, X, M, M, mask=X > 0),
        TypeError,
        "elbo_loss has no argument 'mask': it is called weight here",
    ),
    (lambda: fastvae.elbo_loss(Y, X, M, M, colour=1), TypeError, "elbo_loss has no argument 'colour'"),
    (
        lambda: fastvae.elbo_loss(Y, X, M, M, var=1.0),
        ValueError,
        "likelihood_parameters of 'bernoulli_logits' must be empty, got 'var'",
    ),
    (
        lambda: fastvae.elbo_loss(Y, X, M, M, zero_logits=1.0),
        ValueError,
        "zero_logits are for 'negative_binomial', got likelihood",
    ),
    (
        lambda: fastvae.elbo_loss(Y, X, M, M, samples=3),
        ValueError,
        "recon must be [samples, B, ...] with samples=3, got [6, 10]",
    ),
    (lambda: fastvae.elbo_loss(Y, X, M, M, capacity=-1), ValueError, "capacity must be >= 0, got -1"),
    (
        lambda: fastvae.bce(torch.rand(3, B, D), X),
        ValueError,
        "target must have the shape of probs, [3, 6, 10], got [6, 10]; if probs holds samples",
    ),
    (
        lambda: fastvae.mse(Y, X, weight=torch.ones(3)),
        ValueError,
        "weight must broadcast to the shape of the data, [6, 10], got [3]",
    ),
    (lambda: fastvae.mse(Y, X, weight=2.0), TypeError, "weight must be a tensor, got float"),
    (
        lambda: fastvae.mse(Y, X, weight=X.long()),
        TypeError,
        "weight must be floating point, or bool for a mask, got int64",
    ),
    (lambda: fastvae.bce_with_logits(Y, X, pos_weight=X > 0), TypeError, "pos_weight must be floating point, got bool"),
    (
        lambda: fastvae.mse(Y, X, reduction="batch_mean"),
        ValueError,
        "reduction must be one of 'none', 'example', 'sum', 'mean', 'batchmean', got 'batch_mean': did you mean 'batch",
    ),
    (
        lambda: fastvae.gaussian_kl(M, std=M, log_std=M),
        ValueError,
        "exactly one of logvar, std, log_std and std_raw must be given, got std and log_std",
    ),
    (lambda: fastvae.gaussian_kl(M, M, std_eps=0), ValueError, "std_eps is what gaussian_kl adds to std², got logvar"),
    (
        lambda: fastvae.gaussian_kl(M, std=M, std_eps=1e-3),
        ValueError,
        "std_eps must be 1e-08, which is the default, or 0, got 0.001",
    ),
    (lambda: fastvae.gaussian_kl(M, M, prior_mu=0.0, prior_std=0.0), ValueError, "prior_std must be > 0, got 0"),
    (
        lambda: fastvae.gaussian_kl(M, M, prior_mu=0.0, prior_std=1.0, prior_logvar=0.0),
        ValueError,
        "at most one of prior_logvar and prior_std may be given, got both",
    ),
    (
        lambda: fastvae.gaussian_kl(M, M, prior_mu="0", prior_std=1.0),
        TypeError,
        "prior_mu must be a number or a floating-point tensor, got str",
    ),
    (
        lambda: fastvae.gaussian_kl(M, M, free_bits_per="group"),
        ValueError,
        "free_bits_per must be one of 'element', 'example', 'dimension', got 'group'",
    ),
    (
        lambda: fastvae.gaussian_kl(M, M, free_bits=torch.ones(3)),
        ValueError,
        "free_bits per element must broadcast to [6, 4], got [3]",
    ),
    (
        lambda: fastvae.gaussian_kl(Laplace(M, 1.0)),
        TypeError,
        "mu must be a Normal, or an Independent of one, got Laplace",
    ),
    (
        lambda: fastvae.gaussian_kl(M, Normal(M, 1.0)),
        TypeError,
        "mu must be a distribution, as logvar is, got a tensor",
    ),
    (
        lambda: fastvae.gaussian_kl(Normal(M, 1.0), std=M),
        ValueError,
        "gaussian_kl(q, p) of distributions takes no mean and no scale besides",
    ),
    (
        lambda: fastvae.reparameterize(M, M, noise=M, seed=1),
        ValueError,
        "noise excludes generator and seed: pass one of them",
    ),
    (
        lambda: fastvae.reparameterize(M, M, noise=M[:2]),
        ValueError,
        "noise must have the shape of z, [6, 4], got [2, 4]",
    ),
    (
        lambda: fastvae.reparameterize(M, M, generator=[torch.Generator()]),
        ValueError,
        "generator must be one, or a list of one for each of 6 examples, got 1",
    ),
    (
        lambda: fastvae.reparameterize(M, M, generator=[0] * B),
        TypeError,
        "generator must be a torch.Generator or a list of them, got a list with int",
    ),
    (
        lambda: fastvae.gaussian_nll(Y, X, 1.0, optimal_sigma=True),
        ValueError,
        "optimal_sigma takes the place of var and logvar, got one of them, too",
    ),
]


@pytest.mark.parametrize(("call", "kind", "message"), BAD, ids=[message[:50] for *_, message in BAD])
def test_errors_say_what_to_type(call: Callable[[], object], kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match="^" + re.escape(message)):
        call()
