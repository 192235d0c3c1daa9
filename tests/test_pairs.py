"""Sums over pairs equal the dense expressions, in every dtype and on every backend, in memory of the inputs' size."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

import fastvae
from fastvae import nn
from fastvae.benchmarks.memory import peak_extra_bytes

from table import BACKENDS, DEVICE, DTYPES, INTERPRETED, TARGETS, on

DATASET = 1000
Function = Callable[..., Any]


def densities(z: Tensor, mu: Tensor, logvar: Tensor) -> Tensor:
    return -0.5 * (math.log(2 * math.pi) + logvar + (z[:, None] - mu) ** 2 * torch.exp(-logvar))


def dense_posterior(z: Tensor, mu: Tensor, logvar: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    each, log_w = densities(z, mu, logvar), weights.to(z.dtype).log()
    return torch.logsumexp(each.sum(2) + log_w, 1), torch.logsumexp(each + log_w[:, :, None], 1).sum(1)


def stratified(batch: int) -> Tensor:
    """Chen et al. 2018, appendix C.2, row by row: M + 1 = batch, n* first, n_M the example after it."""
    others = batch - 1
    weights = torch.full((batch, batch), 1 / others, dtype=torch.float64)
    for i in range(batch):
        weights[i, (i + 1) % batch] = (DATASET - others) / (DATASET * others)
        weights[i, i] = 1 / DATASET
    return weights


def dense_mixture(z: Tensor, means: Tensor, logvars: Tensor, log_weights: Tensor) -> Tensor:
    return torch.logsumexp(densities(z, means, logvars).sum(2) + log_weights, 1)


def dense_mmd(x: Tensor, y: Tensor, kernel: str, bandwidths: tuple[float, ...], unbiased: bool) -> Tensor:
    def values(a: Tensor, b: Tensor) -> Tensor:
        squared = ((a[:, None] - b) ** 2).sum(2)
        each = [torch.exp(-squared / (2 * s * s)) if kernel == "rbf" else 2 * s * s / (2 * s * s + squared)
                for s in bandwidths]  # fmt: skip
        return torch.stack(each).sum(0)

    within = []
    for a in (x, y):
        k = values(a, a)
        count = len(a)
        within.append((k.sum() - k.diagonal().sum()) / (count * (count - 1)) if unbiased else k.mean())
    return within[0] + within[1] - 2 * values(x, y).mean()


class Term(NamedTuple):
    ours: Function
    dense: Function
    inputs: Callable[[int, int], list[Tensor]]


def posterior(batch: int, dims: int) -> list[Tensor]:
    mu, logvar = torch.randn(batch, dims, dtype=torch.float64), torch.randn(batch, dims, dtype=torch.float64) / 2 - 1
    return [mu + torch.exp(logvar / 2) * torch.randn(batch, dims, dtype=torch.float64), mu, logvar]


def mixture(batch: int, dims: int) -> list[Tensor]:
    z, means, logvars = posterior(batch, dims)
    count = batch // 2 + 1
    return [z, means[:count], logvars[:count], torch.randn(count, dtype=torch.float64).log_softmax(0)]


def samples(batch: int, dims: int) -> list[Tensor]:
    return [torch.randn(batch, dims, dtype=torch.float64), 0.5 + torch.randn(batch + 3, dims, dtype=torch.float64)]


def of_mmd(kernel: str, unbiased: bool) -> Term:
    options = {"kernel": kernel, "unbiased": unbiased}
    return Term(
        lambda x, y: fastvae.mmd(x, y, bandwidth=(1.0, 3.0), **options),
        lambda x, y: dense_mmd(x, y, kernel, (1.0, 3.0), unbiased),
        samples,
    )


TERMS = {
    "posterior": Term(
        fastvae.aggregate_posterior,
        lambda z, mu, logvar: dense_posterior(
            z, mu, logvar, torch.full((len(z),) * 2, 1 / len(z), dtype=torch.float64)
        ),
        posterior,
    ),
    "weighted": Term(
        lambda *a: fastvae.aggregate_posterior(*a, dataset_size=DATASET),
        lambda z, *a: dense_posterior(z, *a, torch.full((len(z),) * 2, 1 / len(z) / DATASET, dtype=torch.float64)),
        posterior,
    ),
    "stratified": Term(
        lambda *a: fastvae.aggregate_posterior(*a, dataset_size=DATASET, sampling="stratified"),
        lambda z, *a: dense_posterior(z, *a, stratified(len(z))),
        posterior,
    ),
    "mixture": Term(fastvae.gaussian_mixture_log_prob, dense_mixture, mixture),
    "rbf": of_mmd("rbf", unbiased=False),
    "imq unbiased": of_mmd("imq", unbiased=True),
}


def values_and_gradients(function: Function, inputs: list[Tensor]) -> list[Tensor]:
    leaves = [t.detach().clone().requires_grad_() for t in inputs]
    outputs = function(*leaves)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    upstream = [torch.linspace(0.5, -2, t.numel(), dtype=t.dtype).view(t.shape) + 0.1 for t in outputs]
    return [*(t.detach() for t in outputs), *torch.autograd.grad(outputs, leaves, upstream)]


def promise(term: Term, inputs: list[Tensor], dtype: torch.dtype) -> None:
    """No further from float64 than twice as far as the dense expression in ``dtype``, or than a few roundings.

    Of a value those are of the largest element's last digit, or a nat's; of a gradient, the steepest's. In float64 both
    are the same expression: a log density of hundreds of nats is known to 2⁻⁴⁵, and e^x of it no better.
    """
    rounded = [t.to(dtype) for t in inputs]
    want = values_and_gradients(term.dense, [t.double() for t in rounded])
    eager = values_and_gradients(term.dense, rounded)
    eps = 2.0**-44 if dtype == torch.float64 else 2.0**-22
    count = len(want) - len(inputs)
    steepest = max(t.abs().max().item() for t in want[count:])
    for k, (ours, theirs, exact) in enumerate(zip(values_and_gradients(term.ours, rounded), eager, want, strict=True)):
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        assert ours.dtype == (wide if k < count else dtype)
        error, allowed = ((t.double() - exact).abs().max().item() for t in (ours, theirs))
        size = max(1.0, exact.abs().max().item()) if k < count else steepest
        assert error <= 2 * allowed + eps * size, (k, error, allowed)


SIZES = [(5, 3), (37, 18)] if INTERPRETED else [(2, 1), (5, 3), (66, 33), (150, 64)]


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("term", TERMS)
@pytest.mark.parametrize("backend", TARGETS)
def test_pairs_equal_the_dense_expressions(backend: str, term: str, dtype: torch.dtype, size: tuple[int, int]) -> None:
    with on(backend):
        promise(TERMS[term], TERMS[term].inputs(*size), dtype)


@pytest.mark.skipif(INTERPRETED, reason="slow there")
@pytest.mark.parametrize("term", ["posterior", "mixture"])
@pytest.mark.parametrize("backend", TARGETS)
def test_many_dimensions_lose_no_digits(backend: str, term: str) -> None:
    """A log density of -1000 nats has lost 4 digits, and the exponential of what is lost is in every gradient."""
    with on(backend):
        promise(TERMS[term], TERMS[term].inputs(66, 1000), torch.float32)


@pytest.mark.parametrize("term", TERMS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_second_derivatives(backend: str, term: str) -> None:
    if INTERPRETED:
        pytest.skip("the reference's, whatever the backend")
    inputs = [t.requires_grad_() for t in TERMS[term].inputs(4, 2)]
    with on(backend):
        assert torch.autograd.gradcheck(TERMS[term].ours, inputs)
        assert torch.autograd.gradgradcheck(TERMS[term].ours, inputs)


@pytest.mark.parametrize("backend", TARGETS)
def test_the_ends_of_the_range(backend: str) -> None:
    """Far away, where every exponential is 0 in float32; density 0; NaN; a component that is switched off."""
    zeros = torch.zeros(3, 2)
    far = torch.tensor([[1e4, 0.0], [0.0, 0.0], [math.inf, 0.0], [math.nan, 0.0]])
    with on(backend):
        for got in fastvae.aggregate_posterior(far, zeros, zeros):
            assert got[0].item() == pytest.approx(-5e7, rel=1e-6)
            assert got[1].item() == pytest.approx(-math.log(2 * math.pi), rel=1e-6)
            assert got[2].item() == -math.inf
            assert math.isnan(got[3].item())
        narrow, exact = torch.full((3, 2), -80.0), 80 - math.log(2 * math.pi)  # e^39 a dimension, 1e34 both
        for got in fastvae.aggregate_posterior(zeros, zeros, narrow):
            assert got.tolist() == pytest.approx([exact] * 3, rel=1e-6)
        weights = torch.tensor([0.0, -math.inf]).requires_grad_()
        means = torch.zeros(2, 2).requires_grad_()
        log_prob = fastvae.gaussian_mixture_log_prob(torch.ones(4, 2), means, zeros[:2], weights)
        of_means, of_weights = torch.autograd.grad(log_prob.sum(), (means, weights))
    assert of_means.tolist() == [[4.0, 4.0], [0.0, 0.0]]
    assert of_weights.tolist() == [4.0, 0.0]


@pytest.mark.parametrize("backend", TARGETS)
def test_a_sample_against_itself(backend: str) -> None:
    """Each pair may be met once: the value is 0, and so is the gradient at one end; and NaN is not lost."""
    z = posterior(70, 5)[0].requires_grad_()
    with on(backend):
        value = fastvae.mmd(z, z.detach())
        (of_one_end,) = torch.autograd.grad(value, z)
    torch.testing.assert_close(value, torch.zeros((), dtype=value.dtype), rtol=0, atol=1e-6)
    torch.testing.assert_close(of_one_end, torch.zeros_like(z), rtol=0, atol=1e-6)
    x, y = z.detach(), z.detach() + 1
    want = values_and_gradients(lambda x, y: dense_mmd(x, y, "rbf", (2.0,), False), [x, y])
    with on(backend):
        got = values_and_gradients(lambda x, y: fastvae.mmd(x, y, bandwidth=2.0), [x, y])
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a, b.to(a.dtype), rtol=1e-5, atol=1e-7)
        infinite = x.clone()
        infinite[66, 2] = math.inf  # from itself it is NaN away
        assert math.isnan(fastvae.mmd(infinite, y).item())
        assert math.isnan(fastvae.mmd(y, infinite).item())


@pytest.mark.parametrize("backend", TARGETS)
def test_layouts_subsets_and_a_second_backward(backend: str) -> None:
    z, mu, logvar = posterior(9, 8)
    want = values_and_gradients(TERMS["posterior"].dense, [z, mu, logvar])
    with on(backend):
        split = torch.cat([mu, logvar], 1).t().contiguous().t()  # transposed in memory, then chunked
        got = values_and_gradients(
            lambda z, both: fastvae.aggregate_posterior(z.view(9, 2, 4), *both.view(9, 4, 4).chunk(2, 1)), [z, split]
        )
        torch.testing.assert_close(torch.cat([*got[2:]], 1), torch.cat([*want[2:]], 1))
        leaf = mu.clone().requires_grad_()
        for part in range(2):
            value = fastvae.aggregate_posterior(z, leaf, logvar)[part].sum()
            dense = TERMS["posterior"].dense(z, leaf, logvar)[part].sum()
            (first,) = torch.autograd.grad(value, leaf, retain_graph=True)
            torch.testing.assert_close(first, torch.autograd.grad(dense, leaf)[0])
            assert torch.equal(first, torch.autograd.grad(value, leaf)[0])
        several = fastvae.gaussian_mixture_log_prob(torch.stack([z, z + 1]), mu, logvar)
        each = [fastvae.gaussian_mixture_log_prob(t, mu, logvar, torch.full((9,), -math.log(9))) for t in (z, z + 1)]
    torch.testing.assert_close(several, torch.stack(each), check_dtype=False)


@pytest.mark.skipif(DEVICE != "cpu" or INTERPRETED, reason="of the CPU's threads")
@pytest.mark.parametrize("backend", ["cpp"] if "cpp" in BACKENDS else [])
def test_any_number_of_threads_gives_the_same_bits(backend: str) -> None:
    before, results = torch.get_num_threads(), []
    inputs = {name: [t.float() for t in TERMS[name].inputs(300, 40)] for name in TERMS}
    try:
        with on(backend):
            for threads in (1, 2, 5):
                torch.set_num_threads(threads)
                results.append([v for name in TERMS for v in values_and_gradients(TERMS[name].ours, inputs[name])])
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(map(torch.equal, results[0], other))


@pytest.mark.skipif(INTERPRETED, reason="of the CPU's allocator")
@pytest.mark.parametrize("backend", ["torch", "cpp"] if "cpp" in BACKENDS else ["torch"])
def test_memory_is_that_of_the_inputs(backend: str) -> None:
    """At most 3% of one tensor over pairs and dimensions times the four the dense expression has at once."""
    z, mu, logvar = (t.float().requires_grad_() for t in posterior(1024, 32))

    def step() -> object:
        log_qz, log_prod = fastvae.aggregate_posterior(z, mu, logvar)
        return torch.autograd.grad((log_qz - log_prod).mean(), (z, mu, logvar))

    with on(backend):
        peak = peak_extra_bytes(step, "cpu")
    pairs = 4 * 1024 * 1024 * 32
    assert peak < (0.03 if backend == "cpp" else 0.3) * 4 * pairs


@pytest.mark.skipif(INTERPRETED, reason="what is compiled is the operator")
def test_under_torch_compile_and_vmap() -> None:
    for name, term in TERMS.items():
        if name in ("posterior", "mixture", "rbf"):
            inputs = term.inputs(6, 3)
            compiled = torch.compile(term.ours, fullgraph=True, backend="aot_eager")
            for got, want in zip(
                values_and_gradients(compiled, inputs), values_and_gradients(term.ours, inputs), strict=True
            ):
                torch.testing.assert_close(got, want)
    x, y = samples(6, 3)
    each = torch.vmap(lambda x: torch.func.grad(fastvae.mmd)(x, y))(torch.stack([x, x + 1]))
    torch.testing.assert_close(each[1], torch.func.grad(fastvae.mmd)(x + 1, y))


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda t: fastvae.aggregate_posterior(t[:0], t, t), ValueError, "z must have at least one row"),
        (lambda t: fastvae.aggregate_posterior(t, t[:0], t[:0]), ValueError, "mu must have at least one row"),
        (lambda t: fastvae.aggregate_posterior(t, t[:, :2], t), ValueError, "mu must have the latent shape of z"),
        (lambda t: fastvae.aggregate_posterior(t, t, t[:2]), ValueError, "logvar must have the shape of mu"),
        (lambda t: fastvae.aggregate_posterior(t, t, t, dataset_size=3), ValueError, "dataset_size must be at least"),
        (lambda t: fastvae.aggregate_posterior(t, t, t, dataset_size=4.0), TypeError, "dataset_size must be an int"),
        (lambda t: fastvae.aggregate_posterior(t, t, t, sampling="mss"), ValueError, "sampling must be one of"),
        (lambda t: fastvae.aggregate_posterior(t, t, t, sampling="stratified"), ValueError, "needs dataset_size"),
        (lambda t: fastvae.aggregate_posterior(t[:1], t[:1], t[:1], sampling="stratified", dataset_size=9), ValueError,
         "at least 2"),
        (lambda t: fastvae.aggregate_posterior(t, t, t.long()), TypeError, "logvar must be float64"),
        (lambda t: fastvae.gaussian_mixture_log_prob(t, t[:0], t[:0]), ValueError, "means must have at least one row"),
        (lambda t: fastvae.gaussian_mixture_log_prob(t[:0], t, t), ValueError, "z must have at least one row"),
        (lambda t: fastvae.gaussian_mixture_log_prob(t, t[:, :2], t), ValueError, "means must be"),
        (lambda t: fastvae.gaussian_mixture_log_prob(t, t, t, t[0]), ValueError, r"log_weights must be \[4\]"),
        (lambda t: fastvae.mmd(t, t[:, :2]), ValueError, "prior_z must have the latent shape of z"),
        (lambda t: fastvae.mmd(t, t[:0]), ValueError, "prior_z must have at least one row"),
        (lambda t: fastvae.mmd(t, t, kernel="gauss"), ValueError, "kernel must be one of"),
        (lambda t: fastvae.mmd(t, t, bandwidth=0.0), ValueError, "bandwidth must be"),
        (lambda t: fastvae.mmd(t, t, bandwidth=[]), ValueError, "bandwidth must be a number or several"),
        (lambda t: fastvae.mmd(t, t[:1], unbiased=True), ValueError, "prior_z must have at least 2 rows"),
    ],
)  # fmt: skip
def test_bad_input_is_one_clear_error(call: Function, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call(torch.zeros(4, 3))


def test_modules() -> None:
    z, mu, logvar = posterior(5, 3)
    module = nn.AggregatePosterior(dataset_size=DATASET, sampling="stratified")
    assert repr(module) == "AggregatePosterior(dataset_size=1000, sampling='stratified')"
    for got, want in zip(module(z, mu, logvar), TERMS["stratified"].dense(z, mu, logvar), strict=True):
        torch.testing.assert_close(got, want)
    torch.testing.assert_close(nn.MMD(kernel="imq", bandwidth=2.0)(z, mu), dense_mmd(z, mu, "imq", (2.0,), False))
    prior = nn.GaussianMixturePrior(4, 3).double()
    torch.testing.assert_close(
        prior(z), dense_mixture(z, prior.means, prior.logvars, torch.full((4,), -math.log(4.0), dtype=torch.float64))
    )
    with pytest.raises(ValueError, match="kernel must be one of"):
        nn.MMD(kernel="cubic")
