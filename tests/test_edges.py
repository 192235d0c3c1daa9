"""The ends of the dtypes: saturated logits, values beyond what a dtype holds, every uint8 number."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

import fastvae

from table import DTYPES, TARGETS, on, value_and_gradients

INF, NAN = math.inf, math.nan
LOGVARS = [-INF, -1e4, -200, -104, -90, -87, 0, 88, 88.7, 88.8, 89, 90, 100, 178, 200, 1e4, INF, NAN]
MEANS = [0.0, 1.0, 1e20, INF]
STDS = [0.0, 1e-30, 1.0, 1e19, 1e20, INF]


@pytest.fixture(params=TARGETS)
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """Every backend in use in turn; cpp by each of its instruction sets."""
    with on(request.param):
        yield request.param.partition("-")[0]


def grid(means: list[float], scales: list[float], dtype: torch.dtype) -> list[Tensor]:
    mu, scale = torch.meshgrid(torch.tensor(means), torch.tensor(scales), indexing="ij")
    return [mu.to(dtype).contiguous(), scale.to(dtype).contiguous()]


def eager_kl(mu: Tensor, logvar: Tensor) -> Tensor:
    return 0.5 * (mu.pow(2) + logvar.exp() - 1 - logvar)


def eager_kl_of_std(mu: Tensor, std: Tensor) -> Tensor:
    return 0.5 * (mu.pow(2) + std.pow(2) - 1 - torch.log(1e-8 + std.pow(2)))


def check(
    call: Callable[..., Tensor], eager: Callable[..., Tensor], inputs: list[Tensor], upstream: Tensor | None = None
) -> None:
    """The value and both gradients are NaN and infinite where eager's in the accumulator's dtype are."""
    dtype = inputs[0].dtype
    wide = [t.float() if dtype != torch.float64 else t for t in inputs]
    want, want_grads = value_and_gradients(eager, wide, 2, upstream)
    got, grads = value_and_gradients(call, inputs, 2, upstream)
    rtol = {torch.bfloat16: 1e-2, torch.float16: 1e-3}.get(dtype, 1e-5)
    for ours, theirs in zip((got, *grads), (want, *want_grads), strict=True):
        torch.testing.assert_close(ours, theirs.to(ours.dtype), rtol=rtol, atol=1e-6, equal_nan=True)


@pytest.mark.parametrize("rows", [1 << 14, (1 << 14) + 1, 40_001])
def test_totals_of_many_rows_with_gaps_between_them(backend: str, rows: int) -> None:
    """A GPU leaves a sum for each of them: so many that one block, or program, alone does not add them up."""
    recon, x = torch.randn(rows, 5)[:, 1:4], torch.rand(rows, 3)
    mu, logvar = torch.randn(rows, 4).chunk(2, 1)
    nll = torch.nn.functional.binary_cross_entropy_with_logits(recon.double(), x.double(), reduction="sum").float()
    kl = eager_kl(mu.double(), logvar.double()).sum().float()
    same = {"rtol": 1e-6, "atol": 0}
    torch.testing.assert_close(fastvae.bce_with_logits(recon, x, reduction="sum"), nll, **same)
    torch.testing.assert_close(fastvae.gaussian_kl(mu, logvar, reduction="sum"), kl, **same)
    torch.testing.assert_close(fastvae.gaussian_kl(mu, logvar.contiguous(), reduction="mean"), kl / rows / 2, **same)
    out = fastvae.elbo_loss(recon, x, mu, logvar)
    torch.testing.assert_close(tuple(out), ((nll + kl) / rows, nll / rows, kl / rows), **same)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_kl_beyond_the_dtype(backend: str, dtype: torch.dtype) -> None:
    inputs = grid(MEANS, LOGVARS, dtype)
    check(lambda mu, logvar: fastvae.gaussian_kl(mu, logvar, reduction="none"), eager_kl, inputs)
    upstream = torch.ones_like(inputs[0])
    kl = value_and_gradients(
        lambda mu, logvar: fastvae.sample_with_kl(mu, logvar, seed=1, reduction="none")[1], inputs, 2
    )
    alone = value_and_gradients(
        lambda mu, logvar: fastvae.gaussian_kl(mu, logvar, reduction="none"), inputs, 2, upstream
    )
    rtol = {torch.bfloat16: 1e-2, torch.float16: 1e-3}.get(dtype, 1e-5)
    torch.testing.assert_close(kl, alone, rtol=rtol, atol=1e-6, equal_nan=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_kl_of_std_beyond_the_dtype(backend: str, dtype: torch.dtype) -> None:
    inputs = grid(MEANS, STDS, dtype)
    check(lambda mu, std: fastvae.gaussian_kl(mu, std=std, reduction="none"), eager_kl_of_std, inputs)


def test_sums_of_a_diverged_kl_are_infinite(backend: str) -> None:
    mu, logvar = torch.zeros(3, 40), torch.zeros(3, 40)
    logvar[1, 7] = 95
    for reduction in ("example", "batchmean", "mean", "sum"):
        kl, (_, grad) = value_and_gradients(
            lambda mu, logvar, r=reduction: fastvae.gaussian_kl(mu, logvar, reduction=r), [mu, logvar], 2
        )
        assert (kl[1] if reduction == "example" else kl) == INF
        assert grad[1, 7] == INF
        assert grad.isinf().sum() == 1


@pytest.mark.parametrize("reduction", ["example", "batchmean", "sum"])
def test_an_elbo_beyond_float32_is_infinite(backend: str, reduction: str) -> None:
    zero = torch.zeros(1, 1)
    for mu, beta, kl in ((1e19, 1e3, 5e37), (3e19, 1.0, INF)):
        losses = fastvae.elbo_loss(zero, zero, torch.full((1, 1), mu), zero, beta=beta, reduction=reduction)
        torch.testing.assert_close(losses.kl.squeeze(), torch.tensor(kl))
        assert losses.loss.item() == INF


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("reduction", ["none", "example", "sum"])
def test_saturated_logits_have_no_gradient(backend: str, reduction: str, dtype: torch.dtype) -> None:
    logits = torch.tensor([40.0, 64, 100, 1000, INF], dtype=dtype).repeat(9)[None]
    if reduction != "none":
        logits = logits[:, logits[0].isfinite()]  # inf − inf·1 in the loss is NaN in eager too
    _, (grad,) = value_and_gradients(
        lambda y, x: fastvae.bce_with_logits(y, x, reduction=reduction), [logits, torch.ones_like(logits)], 1
    )
    assert (grad == 0).all()
    if dtype == torch.float32:
        _, (grad,) = value_and_gradients(fastvae.bce_with_logits, [torch.full((3, 20), 18.0), torch.ones(3, 20)], 1)
        assert (grad == 0).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_uint8_is_the_number_divided_by_255(backend: str, dtype: torch.dtype) -> None:
    """The gradient of l1 says on which side of x the reconstruction is, that of mse how far off."""
    pixels = torch.arange(256, dtype=torch.uint8).repeat(3)[None]
    compute = torch.float64 if dtype == torch.float64 else torch.float32
    exact = (pixels.to(compute) / 255).to(dtype)
    wide = exact.to(compute) - pixels.to(compute) / 255
    for op in (fastvae.l1, fastvae.mse):
        for reduction in ("none", "sum"):
            _, (grad,) = value_and_gradients(
                lambda y, x, op=op, r=reduction: op(y, x, reduction=r), [exact.clone(), pixels], 1
            )
            want = wide.sign() if op is fastvae.l1 else 2 * wide
            torch.testing.assert_close(grad, want.to(dtype), rtol=0, atol=0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("eps", [None, 1e-8])
def test_a_probability_of_minus_zero_is_zero(backend: str, eps: float | None, dtype: torch.dtype) -> None:
    target = torch.tensor([[0.0, 0.25, 1.0]], dtype=dtype).repeat(1, 9)
    losses = [
        fastvae.bce(torch.full_like(target, zero), target, eps=eps, reduction=reduction)
        for reduction in ("none", "sum")
        for zero in (-0.0, 0.0)
    ]
    torch.testing.assert_close(losses[0], losses[1], rtol=0, atol=0)
    torch.testing.assert_close(losses[2], losses[3], rtol=0, atol=0)


def test_a_broadcast_prior_is_summed_in_the_wider_dtype(backend: str) -> None:
    """Each element's gradient leaves float32, their sum does not, in whatever order torch takes them."""
    mu = torch.tensor([[-1e17], [1e17], [3e10]], dtype=torch.float64)
    prior = torch.zeros(1, requires_grad=True), torch.full((1,), -50.0, requires_grad=True)
    kl = fastvae.gaussian_kl(mu, torch.zeros_like(mu), prior_mu=prior[0], prior_logvar=prior[1], reduction="none")
    (got,) = torch.autograd.grad(kl, prior[0], torch.ones_like(kl))
    torch.testing.assert_close(got, torch.tensor([-3e10 * math.exp(50)]))
    half = torch.zeros(1, dtype=torch.float16, requires_grad=True)
    kl = fastvae.gaussian_kl(torch.full((4, 1), 2e-8), torch.zeros(4, 1), prior_mu=half, prior_logvar=half)
    assert torch.autograd.grad(kl, half, torch.tensor(4.0))[0] < 0  # float16 has no number below 6e-8


@pytest.mark.parametrize(
    ("mu", "prior_logvar", "upstream"), [(1e-18, -100.0, 1e-30), (3e38, 80.0, 2.0)], ids=["narrow prior", "wide prior"]
)
def test_the_gradient_with_a_prior_multiplies_the_derivative_last(
    backend: str, mu: float, prior_logvar: float, upstream: float
) -> None:
    """upstream · distance may leave float32's range where distance · precision does not; or vanish beside infinity."""
    leaves = [torch.full((1, 1), value, requires_grad=True) for value in (mu, 0.0)]
    prior = {"prior_mu": leaves[1], "prior_logvar": torch.full((1, 1), prior_logvar)}
    kl = fastvae.gaussian_kl(leaves[0], torch.zeros(1, 1), **prior, reduction="none")
    grads = torch.autograd.grad(kl, leaves, torch.full((1, 1), upstream))
    # float32 has no room for the narrow prior's precision
    want = upstream * mu * math.exp(-prior_logvar) if prior_logvar > 0 else math.inf
    for grad, sign in zip(grads, (1, -1), strict=True):
        torch.testing.assert_close(grad.double(), torch.full((1, 1), sign * want).double(), rtol=1e-5, atol=0)


@pytest.mark.parametrize(("scale", "value"), [("logvar", 0.456), ("std", 1.256)])
def test_the_gradient_in_the_priors_variance_is_infinite_where_the_kl_is(
    backend: str, scale: str, value: float
) -> None:
    """Also where σ²/σ_p² and d²/σ_p² are not, but their sum is: a sum over a broadcast prior is of elements alike."""
    for shape in ((1, 3), (2, 3), (5, 3), (9, 7)):
        upstream = torch.rand(shape) * 0.2 - 0.1
        prior = torch.full(shape, -87.476, requires_grad=True), torch.full((1, 1), -87.476, requires_grad=True)
        for prior_logvar, want in ((prior[0], -INF * upstream), (prior[1], (-INF * upstream).sum())):
            kl = fastvae.gaussian_kl(
                torch.full(shape, -0.46), **{scale: torch.full(shape, value)}, prior_mu=torch.full((1, 1), 1.35),
                prior_logvar=prior_logvar, reduction="none",
            )  # fmt: skip
            assert (kl == INF).all()
            (grad,) = torch.autograd.grad(kl, prior_logvar, upstream)
            torch.testing.assert_close(grad, want.expand(grad.shape), rtol=0, atol=0, equal_nan=True)


CLAMPED: dict[str, Callable[..., list[Tensor]]] = {
    "reparameterize": lambda mu, logvar, **clamp: [fastvae.reparameterize(mu, logvar, seed=3, **clamp)],
    "samples": lambda mu, logvar, **clamp: [fastvae.reparameterize(mu, logvar, seed=3, samples=3, **clamp)],
    "gaussian_kl": lambda mu, logvar, **clamp: [fastvae.gaussian_kl(mu, logvar, reduction="none", **clamp)],
    "free_bits": lambda mu, logvar, **clamp: [fastvae.gaussian_kl(mu, logvar, free_bits=0.4, **clamp)],
    "sample_with_kl": lambda mu, logvar, **clamp: list(
        fastvae.sample_with_kl(mu, logvar, seed=3, reduction="example", **clamp)
    ),
    "elbo_loss": lambda mu, logvar, **clamp: list(fastvae.elbo_loss(mu, mu.sigmoid().detach(), mu, logvar, **clamp)),
}


@pytest.mark.parametrize("bounds", [(-30.0, 20.0), (-87.0, 88.0), (-100.0, 89.0), (-INF, 20.0)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("call", CLAMPED)
def test_a_clamped_logvar_is_the_one_of_torch(
    backend: str, call: str, dtype: torch.dtype, bounds: tuple[float, float]
) -> None:
    """Values and gradients: inside the bounds, at them, beyond, at infinity, and NaN.

    To the bit, but for sums, which a compiler may order otherwise where there is a clamp.
    """
    low, high = bounds
    logvars = [-INF, -1e4, low - 1, low, low + 1, -1, 0, 2.5, high - 0.5, high, high + 0.5, 1e4, INF]
    if call in ("reparameterize", "samples", "gaussian_kl"):  # the others are sums, which it would hide
        logvars.append(NAN)
    mu, logvar = grid([-0.5, 1.0, 1.5], logvars, dtype)
    results = []
    for clamp in (True, False):
        leaves = [mu.clone().requires_grad_(), logvar.clone().requires_grad_()]
        given = leaves[1] if clamp else leaves[1].clamp(low, high)
        outputs = CLAMPED[call](leaves[0], given, **({"logvar_clamp": (low, high)} if clamp else {}))
        grads = torch.autograd.grad(outputs, leaves, [torch.ones_like(o) for o in outputs])
        results.append([*(o.detach() for o in outputs), *grads])
    for got, want in zip(*results, strict=True):
        rtol = 0 if got.shape == logvar.shape or got.dim() == 3 else 2**-22
        torch.testing.assert_close(got, want, rtol=rtol, atol=0, equal_nan=True)
    outside = (logvar < low) | (logvar > high)
    assert outside.any()
    assert (results[0][-1][outside] == 0).all()
    assert results[0][-2][outside].isfinite().all()


@pytest.mark.parametrize("call", CLAMPED)
def test_nothing_is_infinite_where_logvar_is_clamped(backend: str, call: str) -> None:
    """Bounds far apart, or on one side only; logvar as far off as float32 goes."""
    mu, logvar = grid([-1.0, 0.5], [-3e38, -1e4, 0, 1e4, 3e38], torch.float32)
    for low, high in ((-30, 20), (-INF, 20), (-86.0, 80.0), (2.0, 2.0)):
        above = logvar.clone() if low > -INF else logvar.clamp(min=-80)
        leaves = [mu.clone().requires_grad_(), above.requires_grad_()]
        outputs = CLAMPED[call](*leaves, logvar_clamp=(low, high))
        grads = torch.autograd.grad(outputs, leaves, [torch.ones_like(o) for o in outputs])
        for t in (*outputs, *grads):
            assert t.isfinite().all()


@pytest.mark.parametrize("backend", TARGETS)
def test_the_least_spread_of_a_log_clamped_bce_is_float64s(backend: str) -> None:
    """y·(1 − y) just below 1e-12, where float32's 1e-12 is below both."""
    y, x = torch.tensor([[1e-12, 1 - 1e-12, 9e-13]], dtype=torch.float64), torch.full((1, 3), 0.3, dtype=torch.float64)
    with on(backend):
        leaf = y.clone().requires_grad_()
        fastvae.bce(leaf, x, eps=None, reduction="sum").backward()
    torch.testing.assert_close(leaf.grad, (y - x) / ((1 - y) * y).clamp(min=1e-12), rtol=1e-15, atol=0)
