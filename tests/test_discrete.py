"""Discrete data and latents, and importance weights: against float64 formulas, in every layer."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import fastvae
from fastvae.benchmarks.mixture import log_probs_of_levels, mixture_in_eager

from formulas import CategoricalKL
from table import DTYPES, INTERPRETED, REDUCTIONS, TARGETS, Op, on, reduce, value_and_gradients
from test_ops import check, error

RGB, GREY = 3, 1


def log_mass(x: Tensor, mean: Tensor, log_scale: Tensor) -> Tensor:
    """PixelCNN++'s, in float64: with u, v the ends of the bin, σ(u) − σ(v) = σ(u)·σ(−v)·(1 − e^(v − u))."""
    log_scale = log_scale.clamp(min=-7)
    u, v, middle = ((x - mean + d) * torch.exp(-log_scale) for d in (1 / 255, -1 / 255, 0))
    mass = F.logsigmoid(u) + F.logsigmoid(-v) + torch.log(-torch.expm1(v - u))
    density = middle - log_scale - 2 * torch.logaddexp(middle, torch.zeros_like(middle)) - math.log(127.5)
    inside = torch.where(mass.exp() > 1e-5, mass, density)
    return torch.where(x < -0.999, F.logsigmoid(u), torch.where(x > 0.999, F.logsigmoid(-v), inside))


def mixture(params: Tensor, x: Tensor) -> Tensor:
    """Of ``[..., 10·K]`` and levels ``[..., 3]`` (or 3·K and 1), a component after the other."""
    channels = x.shape[-1]
    each = 10 if channels == RGB else 3
    count = params.shape[-1] // each
    x = x.to(params.dtype) * 2 / 255 - 1
    terms = []
    for k in range(count):
        at = params[..., k::count]  # logit, then for each channel mean, log scale, coefficient
        if channels == RGB:
            r, g, b = x.unbind(-1)
            green = at[..., 4] + torch.tanh(at[..., 3]) * r
            blue = at[..., 7] + torch.tanh(at[..., 6]) * r + torch.tanh(at[..., 9]) * g
            log_p = log_mass(r, at[..., 1], at[..., 2]) + log_mass(g, green, at[..., 5]) + log_mass(b, blue, at[..., 8])
        else:
            log_p = log_mass(x[..., 0], at[..., 1], at[..., 2])
        terms.append(log_p + at[..., 0])
    return torch.logsumexp(params[..., :count], -1) - torch.logsumexp(torch.stack(terms), 0)


def levels(*shape: int) -> Tensor:
    """Of every kind: a sixth are 0, a sixth 255."""
    x = torch.randint(0, 256, shape, dtype=torch.uint8)
    kind = torch.rand(shape)
    return x.masked_fill(kind < 1 / 6, 0).masked_fill(kind > 5 / 6, 255)


def params(x: Tensor, count: int) -> Tensor:
    """Components around the levels, wide and narrow; some far off, some of a scale below the least."""
    *shape, channels = x.shape
    each = 3 if channels == RGB else 2
    kinds = torch.randn(*shape, channels, each, count, dtype=torch.float64)
    kinds[..., 0, :] = (x.double() / 127.5 - 1)[..., None] + 0.3 * kinds[..., 0, :]
    kinds[..., 1, :] = 1.5 * kinds[..., 1, :] - 3
    return torch.cat([torch.randn(*shape, count, dtype=torch.float64), kinds.flatten(-3)], -1)


def move(t: Tensor, last: bool) -> Tensor:
    return t if last else t.movedim(-1, 1).contiguous()


def eager_mixture(p: Tensor, x: Tensor) -> Tensor:
    """VDVAE's, a pixel after the other."""
    if x.shape[-1] == GREY:
        count = p.shape[-1] // 3
        log_p = log_probs_of_levels(x.to(p.dtype) / 127.5 - 1, p[..., count : 2 * count], p[..., 2 * count :])
        return -torch.logsumexp(log_p + F.log_softmax(p[..., :count], -1), -1)
    flat = zip(p.flatten(0, -2).unbind(), x.flatten(0, -2).unbind(), strict=True)
    return torch.stack([mixture_in_eager(a[None], b[None]) for a, b in flat]).reshape(p.shape[:-1])


def mixture_op(x: Tensor, count: int, last: bool) -> Op:
    def back(f: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        return lambda p: f(p if last else p.movedim(1, -1), x)

    return Op(
        lambda p, **kw: fastvae.discretized_logistic_mixture_nll(p, move(x, last), **kw),
        back(mixture),
        lambda *_: [move(params(x, count), last)],
        back(finite(eager_mixture)),
        1,
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("channels", "count", "last"), [(3, 10, True), (3, 3, False), (1, 1, True), (3, 1, False), (1, 7, True)]
)
@pytest.mark.parametrize("backend", TARGETS)
def test_the_mixture(backend: str, channels: int, count: int, last: bool, dtype: torch.dtype) -> None:
    """37 pixels: no number of lanes divides that, nor a tile."""
    x = levels(2, 1, 5 if INTERPRETED else 37, channels)
    op = mixture_op(x, count, last)
    turn = DTYPES.index(dtype) + count
    with on(backend):
        check(op, op.inputs(), dtype, REDUCTIONS[turn % len(REDUCTIONS)])


@pytest.mark.parametrize("backend", TARGETS)
def test_upstream_gradients_of_the_mixture(backend: str) -> None:
    x = levels(3, 2, 5, RGB)
    p = params(x, 2)
    for reduction, shape in (("none", (3, 2, 5)), ("example", (3,)), ("mean", ())):
        upstream = torch.randn(shape, dtype=torch.float64)
        want, (want_grad,) = value_and_gradients(lambda p, r=reduction: reduce(mixture(p, x), r), [p], 1, upstream)
        with on(backend):
            call = lambda p, r=reduction: fastvae.discretized_logistic_mixture_nll(p, x, reduction=r)  # noqa: E731
            got, (grad,) = value_and_gradients(call, [p], 1, upstream)
        torch.testing.assert_close((got, grad), (want, want_grad), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("backend", TARGETS)
def test_every_level_and_the_sum_of_all(backend: str) -> None:
    """All 256, edges among them, for wide and for narrow logistics within and beyond the data; masses add up to 1."""
    x = torch.arange(256, dtype=torch.uint8)[:, None]
    for mean, log_scale in itertools.product((-3.0, -1.0, -0.2, 1.0), (-9.0, -7.0, -4.0, -1.0, 2.0)):
        p = torch.tensor([0.3, mean, log_scale]).expand(256, 3)
        want = log_mass(x[:, 0].double() * 2 / 255 - 1, p[:, 1].double(), p[:, 2].double())
        if log_scale in (-1.0, 2.0):
            assert want.exp().sum().item() == pytest.approx(1, abs=1e-3)
        with on(backend):
            got = -fastvae.discretized_logistic_mixture_nll(p, x, reduction="none")
            one = -fastvae.discretized_logistic_nll(p[:, 1:2], x, log_scale=p[:, 2:], reduction="none")
        torch.testing.assert_close(got.double(), want, rtol=2e-6, atol=2e-5)
        torch.testing.assert_close(one[:, 0].double(), want, rtol=2e-6, atol=2e-5)


def test_kinds_of_targets_and_layouts() -> None:
    """uint8, int64 and k/255 are one image; a strided, an expanded and a channels_last tensor one tensor."""

    def call(p: Tensor, x: Tensor) -> Tensor:
        return fastvae.discretized_logistic_mixture_nll(p, x, reduction="none")

    for backend in TARGETS:
        x = levels(2, 4, 3, RGB)
        p = params(x, 3).float()
        with on(backend):
            want, (grad,) = value_and_gradients(partial(call, x=x), [p], 1)
            torch.testing.assert_close(call(p, x.long()), want, rtol=0, atol=0)
            torch.testing.assert_close(call(p, x.float() / 255), want, rtol=1e-4, atol=1e-4)
            wide = torch.zeros(2, 4, 3, 61)
            strided = wide[..., 1:31].copy_(p)
            first = p.movedim(-1, 1)  # in memory as it was
            for params_, x_, back in (
                (strided, x, 0),
                (first, x.movedim(-1, 1), 1),
                (first.contiguous(), x.movedim(-1, 1), 1),
            ):
                got, (other,) = value_and_gradients(partial(call, x=x_), [params_], 1)
                torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)
                torch.testing.assert_close(other.movedim(1, -1) if back else other, grad, rtol=1e-5, atol=1e-6)
            negative = torch._neg_view(-p)
            torch.testing.assert_close(call(negative, x), want, rtol=0, atol=0)
            same = call(p[:1].expand(2, -1, -1, -1), x[:1].expand(2, -1, -1, -1))
            assert torch.equal(same[0], same[1])


def test_special_numbers() -> None:
    """A component of weight 0, a NaN, a scale of any size: as the formula says, and in no other pixel."""
    x = levels(1, 1, 9, GREY)
    for backend in TARGETS:
        p = params(x, 2).float()
        p[0, 0, 0, 0] = -math.inf
        p[0, 0, 1, 2] = math.nan
        p[0, 0, 2, 4:] = 300.0
        p[0, 0, 3, 4:] = -300.0
        p[0, 0, 4, 2:4] = 1e30
        with on(backend):
            got, (grad,) = value_and_gradients(
                lambda p: fastvae.discretized_logistic_mixture_nll(p, x, reduction="none"), [p], 1
            )
        want = mixture(p.double(), x)
        assert got[0, 0, 1].isnan()
        assert grad[0, 0, 1].isnan().any()
        for pixel in (0, 3, 5, 6, 7, 8):
            torch.testing.assert_close(got[0, 0, pixel].double(), want[0, 0, pixel], rtol=1e-5, atol=1e-4)
            assert grad[0, 0, pixel].isfinite().all()
        assert got[0, 0, 2].isfinite()


def finite(eager: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """What people write, of float16 in float32: there it overflows, and NaN is no tolerance."""

    def call(*inputs: Tensor) -> Tensor:
        if inputs[0].dtype != torch.float16:
            return eager(*inputs)
        return eager(*(t.float() for t in inputs)).half()

    return call


def rows_ops() -> dict[str, Callable[[int, int], Op]]:
    """The other terms of rows, of so many rows and columns; what is not differentiable is closed over."""

    def logistic(b: int, n: int) -> Op:
        x = levels(b, n)
        kinds = params(x[..., None], 1)
        return Op(
            lambda m, s, **kw: fastvae.discretized_logistic_nll(m, x, log_scale=s, **kw),
            lambda m, s: -log_mass(x.to(m.dtype) * 2 / 255 - 1, m, s),
            lambda *_: [kinds[..., 1].clone(), kinds[..., 2].clone()],
            finite(lambda m, s: -log_probs_of_levels(x.to(m.dtype) / 127.5 - 1, m, s)),
            2,
        )

    def nll(b: int, n: int) -> Op:
        target = torch.randint(0, n, (b, 3))
        return Op(
            lambda a, **kw: fastvae.categorical_nll(a, target, **kw),
            lambda a: F.cross_entropy(a.movedim(-1, 1), target, reduction="none"),
            lambda *_: [torch.randn(b, 3, n, dtype=torch.float64) * 4],
            lambda a: F.cross_entropy(a.movedim(-1, 1), target, reduction="none"),
            1,
        )

    def kl(unimix: float) -> Callable[[int, int], Op]:
        def written_out(q: Tensor, p: Tensor) -> Tensor:
            q, p = ((1 - unimix) * t.softmax(-1) + unimix / t.shape[-1] for t in (q, p))
            return (q * (q.log() - p.log())).sum(-1)

        return lambda b, n: Op(
            lambda q, p, **kw: fastvae.categorical_kl(q, p, unimix=unimix, **kw),
            lambda q, p: CategoricalKL.apply(q, p, unimix),
            lambda *_: [torch.randn(b, 3, n, dtype=torch.float64) * 2 for _ in range(2)],
            finite(written_out),
            2,
        )

    return {"logistic": logistic, "nll": nll, "kl": kl(0.0), "kl_unimix": kl(0.01)}


ROWS = rows_ops()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ROWS)
@pytest.mark.parametrize("backend", TARGETS)
def test_rows(backend: str, name: str, dtype: torch.dtype) -> None:
    for k, (b, n) in enumerate([(4, 1), (3, 37), (2, 1500)][: 2 if INTERPRETED else 3]):
        op = ROWS[name](b, n)
        with on(backend):
            for reduction in ("none", REDUCTIONS[1 + (k + DTYPES.index(dtype)) % 4]):
                check(op, op.inputs(), dtype, reduction)


def log_ratio(z: Tensor, mu: Tensor, logvar: Tensor, p_mu: Tensor, p_logvar: Tensor) -> Tensor:
    q, p = (torch.distributions.Normal(m, (a / 2).exp()) for m, a in ((mu, logvar), (p_mu, p_logvar)))
    return (q.log_prob(z) - p.log_prob(z)).sum(-1)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("samples", [None, 3])
@pytest.mark.parametrize("backend", TARGETS)
def test_densities_of_samples(backend: str, samples: int | None, dtype: torch.dtype) -> None:
    """Values and gradients for random upstream ones, with both priors."""
    for latents in (1, 21):
        z = torch.randn(*([samples] if samples else []), 4, latents, dtype=torch.float64)
        others = [torch.randn(4, latents, dtype=torch.float64) for _ in range(4)]
        inputs = [t.to(dtype) for t in (z, *others)]
        upstream = torch.randn(z.shape[:-1])
        zero = torch.zeros_like(others[0])
        cases: list[tuple[int, Callable[..., Tensor], Callable[..., Tensor]]] = [
            (
                5,
                lambda z, m, v, pm, pv: fastvae.log_q_minus_log_p(
                    z, m, v, samples=samples, prior_mu=pm, prior_logvar=pv
                ),
                log_ratio,
            ),
            (
                3,
                lambda z, m, v: fastvae.log_q_minus_log_p(z, m, v, samples=samples),
                lambda z, m, v: log_ratio(z, m, v, torch.zeros_like(m), torch.zeros_like(m)),
            ),
            (
                3,
                lambda z, m, v: fastvae.gaussian_log_prob(z, m, v, samples=samples),
                lambda z, m, v: torch.distributions.Normal(m, (v / 2).exp()).log_prob(z).sum(-1),
            ),
        ]
        for count, ours, theirs in cases:
            want = value_and_gradients(theirs, [t.double() for t in inputs[:count]], count, upstream)
            eager = value_and_gradients(theirs, [t.clone() for t in inputs[:count]], count, upstream)
            with on(backend):
                got = value_and_gradients(ours, inputs[:count], count, upstream)
            assert got[0].dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
            # of terms that cancel
            size = log_ratio(*(t.double() for t in inputs[:3]), zero, zero + 80).abs().max().item()
            eps = 2.0**-50 if dtype == torch.float64 else 2.0**-22
            for a, b, c in zip((got[0], *got[1]), (want[0], *want[1]), (eager[0], *eager[1]), strict=True):
                assert error(a, b) <= 2 * error(c, b) + eps * (size + latents * (1 + b.abs().max().item()))


@pytest.mark.parametrize("backend", TARGETS)
def test_rows_longer_than_a_tile(backend: str) -> None:
    """1,500 classes, the largest last; 600 latents: value and gradient, in float64."""
    target, (q, p) = torch.tensor([3, 1499]), (torch.randn(2, 1500, dtype=torch.float64) * 3 for _ in range(2))
    q[:, -1], p[:, -1] = 20.0, 15.0
    nll = lambda a: F.cross_entropy(a, target, reduction="none")  # noqa: E731
    kl = lambda q, p: (q.softmax(-1) * (q.log_softmax(-1) - p.log_softmax(-1))).sum(-1)  # noqa: E731
    latents = [torch.randn(2, 600, dtype=torch.float64) for _ in range(5)]
    calls: list[tuple[Callable[..., Tensor], Callable[..., Tensor], list[Tensor]]] = [
        (lambda a: fastvae.categorical_nll(a, target, reduction="none"), nll, [q]),
        (lambda q, p: fastvae.categorical_kl(q, p, reduction="none"), kl, [q, p]),
        (lambda z, m, v, a, b: fastvae.log_q_minus_log_p(z, m, v, prior_mu=a, prior_logvar=b), log_ratio, latents),
    ]
    for ours, theirs, inputs in calls:
        want = value_and_gradients(theirs, inputs, len(inputs))
        with on(backend):
            got = value_and_gradients(ours, inputs, len(inputs))
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("backend", TARGETS)
def test_gradcheck_and_gradgradcheck(backend: str) -> None:
    x = levels(2, 2, RGB)
    target = torch.tensor([[0, 4], [2, 2]])
    logits = [torch.randn(2, 2, 5, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    of_z = [torch.randn(s, dtype=torch.float64, requires_grad=True) for s in ((2, 3, 4), (3, 4), (3, 4))]
    p = (params(x, 2) * 0.5).requires_grad_()
    calls: list[tuple[Callable[..., Tensor], list[Tensor]]] = [
        (lambda p: fastvae.discretized_logistic_mixture_nll(p, x), [p]),
        (lambda a: fastvae.categorical_nll(a, target, reduction="example"), logits[:1]),
        (lambda q, p: fastvae.categorical_kl(q, p, unimix=0.1, reduction="none"), logits),
        (lambda z, m, v: fastvae.log_q_minus_log_p(z, m, v, samples=2), of_z),
    ]
    with on(backend):
        for call, inputs in calls:
            assert torch.autograd.gradcheck(call, inputs, atol=1e-5)
            assert torch.autograd.gradgradcheck(call, inputs, atol=1e-4)


def test_balance_shares_the_gradient() -> None:
    for backend in TARGETS:
        logits = [torch.randn(3, 2, 6) for _ in range(2)]
        with on(backend):
            value, grads = value_and_gradients(fastvae.categorical_kl, logits, 2)
            call = lambda q, p: fastvae.categorical_kl(q, p, balance=0.8)  # noqa: E731
            balanced, shared = value_and_gradients(call, logits, 2)
        torch.testing.assert_close(balanced, value)
        torch.testing.assert_close(shared[0], grads[0] * 0.2)
        torch.testing.assert_close(shared[1], grads[1] * 0.8)


def test_classes_that_cannot_be_cost_nothing() -> None:
    """0·log 0 is 0; a class with no mass in p only is an infinite KL, as for torch's distributions."""
    for backend in TARGETS:
        with on(backend):
            q = torch.tensor([[0.0, 0.0, -math.inf]])
            assert fastvae.categorical_kl(q, torch.zeros(1, 3)).item() == pytest.approx(math.log(3 / 2))
            assert fastvae.categorical_kl(torch.zeros(1, 3), q).item() == math.inf
            assert fastvae.categorical_nll(q, torch.tensor([1])).item() == pytest.approx(math.log(2))


def test_the_importance_weighted_bound() -> None:
    log_w = torch.randn(7, 5, dtype=torch.float64) * 30
    want = log_w.exp().mean(0).log()
    torch.testing.assert_close(fastvae.importance_weighted_bound(log_w), want)
    torch.testing.assert_close(fastvae.importance_weighted_bound(log_w[:1]), log_w[0])


def iwae(mu: Tensor, logvar: Tensor, noise: Tensor, double: bool) -> Tensor:
    """Of p(z) = N(0, 1), p(x|z) = N(x; z, 1) at x = 1."""
    z = mu + (logvar / 2).exp() * noise
    q = (mu.detach(), logvar.detach()) if double else (mu, logvar)
    log_p_x = -0.5 * ((1 - z) ** 2).sum(-1)
    log_w = log_p_x - fastvae.log_q_minus_log_p(z, *q, samples=len(noise))
    return fastvae.importance_weighted_bound(log_w, z if double else None).sum()


def test_the_doubly_reparameterised_gradient() -> None:
    """Σ w̃²·∂log w/∂z·∂z/∂φ, written out; in the mean that of the bound, with less variance."""
    mu = torch.full((1, 1), 0.3, dtype=torch.float64, requires_grad=True)
    logvar = torch.full((1, 1), -0.7, dtype=torch.float64, requires_grad=True)
    noise = torch.randn(6, 1, 1, dtype=torch.float64)
    got = torch.autograd.grad(iwae(mu, logvar, noise, True), [mu, logvar])
    z = (mu + (logvar / 2).exp() * noise).detach().requires_grad_()
    log_w = (
        (-0.5 * (1 - z) ** 2 - 0.5 * z**2 + 0.5 * (z - mu) ** 2 * torch.exp(-logvar) + 0.5 * logvar).sum(-1).squeeze(1)
    )
    weights = log_w.softmax(0).detach() ** 2
    slopes = torch.autograd.grad(log_w.sum(), z)[0].flatten() * weights
    torch.testing.assert_close(got[0].item(), slopes.sum().item())
    torch.testing.assert_close(
        got[1].item(), (slopes * noise.flatten() * (logvar.item() / 2 * torch.ones(1).double()).exp() / 2).sum().item()
    )

    batch = 20_000  # examples that are one: the mean of their gradients, and its deviation
    noise = torch.randn(8, batch, 1, dtype=torch.float64)
    each = []
    for double in (False, True):
        leaf = mu.detach().expand(batch, 1).clone().requires_grad_()
        each.append(torch.autograd.grad(iwae(leaf, logvar.detach().expand(batch, 1), noise, double), leaf)[0])
    apart = (each[0].mean() - each[1].mean()).abs().item()
    assert apart < 4 * math.hypot(*(g.std().item() for g in each)) / math.sqrt(batch)
    assert each[1].std() < 0.7 * each[0].std()


def test_samples_of_the_mixture() -> None:
    """Drawn often enough, a pixel of each kind has the frequencies the loss gives its levels."""
    draws, bins = 200_000, 8
    one = torch.tensor([0.2, -0.4, -0.5, 0.3, -2.0, -1.2])  # count = 2, one channel
    x = fastvae.discretized_logistic_mixture_sample(one.expand(draws, 6), channels=1, seed=0)
    every = torch.arange(256, dtype=torch.uint8)[:, None]
    probs = torch.exp(-fastvae.discretized_logistic_mixture_nll(one.double().expand(256, 6), every, reduction="none"))
    want = probs.reshape(bins, -1).sum(1)
    got = torch.histc(x.float(), bins, 0, 256) / draws
    deviation = torch.sqrt(want * (1 - want) / draws)
    assert ((got - want).abs() < 4.5 * deviation + 1e-5).all()
    for level in (0, 255):  # edges hold all that is beyond
        assert (x == level).double().mean().item() == pytest.approx(
            probs[level].item(), abs=4.5 * math.sqrt(0.25 / draws)
        )

    rgb = torch.zeros(draws, 10)  # blue is −red + green·tanh(1), each of a small scale
    rgb[:, [2, 5, 8]] = -4.0
    rgb[:, 2], rgb[:, 6], rgb[:, 9] = -1.5, -20.0, 1.0
    red, green, blue = (fastvae.discretized_logistic_mixture_sample(rgb, seed=1).double() / 127.5 - 1).unbind(-1)
    inside = red.abs() < 0.9
    residual = (blue + red - math.tanh(1) * green)[inside]
    assert residual.std().item() == pytest.approx(math.exp(-4) * math.pi / math.sqrt(3), rel=0.05)
    first = fastvae.discretized_logistic_mixture_sample(
        rgb[:50].reshape(2, 5, 5, 10).movedim(-1, 1), channels_last=False, seed=3
    )
    last = fastvae.discretized_logistic_mixture_sample(rgb[:50].reshape(2, 5, 5, 10), seed=3)
    assert torch.equal(first.movedim(1, -1), last)


def test_samples_of_classes() -> None:
    """One-hot with the softmax's frequencies and gradient; the soft one has the gradient of torch's formula."""
    logits = torch.tensor([0.0, 1.0, 2.0, -1.0])
    probs = logits.softmax(0)
    draws = 100_000
    for one_hot in (
        fastvae.straight_through_sample(logits.expand(draws, 4), seed=0),
        fastvae.gumbel_softmax(logits.expand(draws, 4), hard=True, temperature=0.3, seed=1),
    ):
        assert torch.equal(one_hot.sum(-1), torch.ones(draws))
        assert ((one_hot.mean(0) - probs).abs() < 4.5 * torch.sqrt(probs * (1 - probs) / draws)).all()
    leaf = torch.randn(5, 3, 7, dtype=torch.float64, requires_grad=True)
    upstream = torch.randn(5, 3, 7, dtype=torch.float64)
    (grad,) = torch.autograd.grad(fastvae.straight_through_sample(leaf, unimix=0.1, seed=2), leaf, upstream)
    (want,) = torch.autograd.grad(0.9 * leaf.softmax(-1) + 0.1 / 7, leaf, upstream)
    torch.testing.assert_close(grad, want)
    soft = fastvae.gumbel_softmax(leaf, temperature=0.5, seed=3)
    assert torch.autograd.gradcheck(lambda a: fastvae.gumbel_softmax(a, temperature=0.5, seed=3), leaf)
    hard = fastvae.gumbel_softmax(leaf, temperature=0.5, hard=True, seed=3)
    assert torch.equal(hard.argmax(-1), soft.argmax(-1))
    (grad,) = torch.autograd.grad(hard, leaf, upstream)
    (want,) = torch.autograd.grad(soft, leaf, upstream)
    torch.testing.assert_close(grad, want)
    assert torch.equal(fastvae.straight_through_sample(leaf, seed=5), fastvae.straight_through_sample(leaf, seed=5))


def test_compiled_in_one_graph() -> None:
    """Training, evaluation, another batch size; a target out of range is still an error."""
    torch._dynamo.reset()

    def everything(p: Tensor, x: Tensor, logits: Tensor, target: Tensor, z: Tensor, mu: Tensor) -> Tensor:
        log_w = -fastvae.log_q_minus_log_p(z, mu, mu, samples=2) - fastvae.gaussian_log_prob(z, mu, mu, samples=2)
        return (
            fastvae.discretized_logistic_mixture_nll(p, x)
            + fastvae.discretized_logistic_nll(p[..., :3], x, log_scale=p[..., 3:6], reduction="example").sum()
            + fastvae.categorical_nll(logits, target)
            + fastvae.categorical_kl(logits, logits.flip(0), balance=0.8, unimix=0.01)
            + fastvae.importance_weighted_bound(log_w).mean()
            + (fastvae.straight_through_sample(logits, seed=1) * logits).sum()
        )

    compiled = torch.compile(everything, fullgraph=True, backend="aot_eager")
    for b in (2, 3):
        x = levels(b, 4, RGB).long()
        inputs = [
            params(x, 2).float(),
            x,
            torch.randn(b, 5),
            torch.randint(0, 5, (b,)),
            torch.randn(2, b, 3),
            torch.randn(b, 3),
        ]
        with torch.no_grad():
            torch.testing.assert_close(compiled(*inputs), everything(*inputs))
        places = (0, 2, 4, 5)
        results = []
        for call in (compiled, everything):
            leaves = [t.clone().requires_grad_(k in places) for k, t in enumerate(inputs)]
            value = call(*leaves)
            results.append((value, torch.autograd.grad(value, [leaves[k] for k in places])))
        torch.testing.assert_close(results[0], results[1])
    with pytest.raises(ValueError, match="levels from 0 to 255"):
        compiled(inputs[0], x + 300, *inputs[2:])


def test_vmap_and_functional_gradients() -> None:
    x = levels(3, 2, RGB)
    p = params(x, 2)
    grads = torch.func.vmap(torch.func.grad(lambda p, x: fastvae.discretized_logistic_mixture_nll(p[None], x[None])))(
        p, x
    )
    (want,) = value_and_gradients(lambda p: fastvae.discretized_logistic_mixture_nll(p, x, reduction="sum"), [p], 1)[1]
    torch.testing.assert_close(grads, want)


def test_a_second_backward_and_autocast() -> None:
    x = levels(2, 3, RGB)
    p = params(x, 2).float().requires_grad_()
    loss = fastvae.discretized_logistic_mixture_nll(p, x)
    first = torch.autograd.grad(3 * loss, p, retain_graph=True)[0]
    second = torch.autograd.grad(loss, p)[0]
    torch.testing.assert_close(first, 3 * second)
    with torch.autocast("cpu", torch.bfloat16):
        assert fastvae.discretized_logistic_mixture_nll(p, x).dtype == torch.float32
    target = (x / 255.0).requires_grad_()  # rare, but differentiable
    assert torch.autograd.grad(fastvae.discretized_logistic_mixture_nll(p, target), target)[0].isfinite().all()


P, X = torch.zeros(2, 4, 4, 20), torch.zeros(2, 4, 4, 3, dtype=torch.uint8)
MIX, CAT, ST = fastvae.discretized_logistic_mixture_nll, fastvae.categorical_nll, fastvae.straight_through_sample
ERRORS: list[tuple[Callable[[], Any], type[Exception], str]] = [
    (lambda: MIX(P, X.long() - 1), ValueError, "target must be levels from 0 to 255.* got values from -1 to -1"),
    (lambda: MIX(P, X.int() + 256), ValueError, "target must be levels from 0 to 255.* got values from 256 to 256"),
    (lambda: MIX(P, X.float() + 1.5), ValueError, r"target must be levels .*\[0, 1\].* got values from 1.5 to 1.5"),
    (lambda: MIX(P, X.bool()), TypeError, "target must be levels .* got bool"),
    (lambda: MIX(P[..., :19], X), ValueError, "params must have 10·K parameters .* got 19"),
    (lambda: MIX(P[..., :10], X[..., :1]), ValueError, "params must have 3·K parameters .* got 10"),
    (lambda: MIX(P[..., :0], X), ValueError, "params must have 10·K .* K at least 1, got 0"),
    (lambda: MIX(P[:0], X[:0]), ValueError, r"params must have at least one example, got \[0, 4, 4, 20\]"),
    (lambda: MIX(P, X[:, :3]), ValueError, r"params and target must be .* got \[2, 4, 4, 20\] and \[2, 3, 4, 3\]"),
    (lambda: MIX(P.long(), X), TypeError, "params must be float64"),
    (lambda: MIX(P, X, reduction="avg"), ValueError, "reduction"),
    (
        lambda: fastvae.discretized_logistic_nll(P[..., :3], X.float() - 1, log_scale=0.0),
        ValueError,
        "target must be levels",
    ),
    (
        lambda: CAT(P, torch.full((2, 4, 4), 20)),
        ValueError,
        "target must be classes from 0 to 19.* got values from 20 to 20",
    ),
    (lambda: CAT(P, torch.full((2, 4, 4), -100)), ValueError, "target must be classes from 0 to 19"),
    (lambda: CAT(P, P[..., 0]), TypeError, "target must be classes, a tensor of integers, got float32"),
    (lambda: CAT(P, X[..., 0, 0]), ValueError, r"target must have the shape of logits .* \[2, 4, 4\], got \[2, 4\]"),
    (lambda: CAT(P[..., :0], X[..., 0]), ValueError, "logits must be .* at least one class"),
    (lambda: fastvae.categorical_kl(P, P[:1]), ValueError, "logits_p"),
    (lambda: fastvae.categorical_kl(P, P, unimix=1.5), ValueError, "unimix"),
    (lambda: fastvae.categorical_kl(P, P, balance=-0.5), ValueError, "balance"),
    (lambda: fastvae.gumbel_softmax(P, temperature=0.0), ValueError, "temperature"),
    (lambda: ST(P[..., :0]), ValueError, "logits must be"),
    (lambda: fastvae.discretized_logistic_mixture_sample(P, channels=2), ValueError, "channels must be 3 or 1, got 2"),
    (lambda: fastvae.log_q_minus_log_p(P, P[0], P[0]), ValueError, "z must have the shape of mu"),
    (lambda: fastvae.gaussian_log_prob(P[0], P, P, samples=3), ValueError, r"z must have \[samples, B"),
    (lambda: fastvae.importance_weighted_bound(P[0, 0, :0]), ValueError, r"log_w must be \[K, B\]"),
    (lambda: fastvae.importance_weighted_bound(P[0, 0], P), ValueError, "z must be"),
]


@pytest.mark.parametrize("case", range(len(ERRORS)))
def test_errors_name_the_argument_what_was_expected_and_what_came(case: int) -> None:
    call, kind, message = ERRORS[case]
    for backend in TARGETS:
        with on(backend), pytest.raises(kind, match=message):
            call()


def test_nothing_to_do() -> None:
    """No pixels and no rows give 0 (of a mean NaN, as torch), and a gradient of no elements."""
    for backend in TARGETS:
        with on(backend):
            p = torch.zeros(2, 0, 10, requires_grad=True)
            loss = fastvae.discretized_logistic_mixture_nll(p, torch.zeros(2, 0, 3, dtype=torch.uint8))
            assert loss.item() == 0
            assert torch.autograd.grad(loss, p)[0].shape == p.shape
            logits = torch.zeros(0, 3, requires_grad=True)
            assert fastvae.categorical_nll(logits, torch.zeros(0, dtype=torch.int64), reduction="sum").item() == 0
            z = torch.zeros(0, 4)
            assert fastvae.log_q_minus_log_p(z, z, z).shape == (0,)


def test_threads_change_nothing() -> None:
    if "cpp" not in TARGETS:
        pytest.skip("no compiled loops")
    x = levels(4, 16, 16, RGB)
    p = params(x, 5).float()
    results, before = [], torch.get_num_threads()
    for threads in (1, 2):
        torch.set_num_threads(threads)
        results.append(value_and_gradients(lambda p: fastvae.discretized_logistic_mixture_nll(p, x), [p], 1))
    torch.set_num_threads(before)
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1][0], results[1][1][0])


def test_a_module_for_each_function() -> None:
    """The same value, options as attributes, and what they are in its repr."""
    m, x = torch.randn(4, 5), levels(4, 5)
    rgb, logits, classes = levels(2, 3, 3, RGB), torch.randn(4, 6), torch.randint(0, 6, (4,))
    learned = torch.nn.Parameter(torch.tensor(-1.0))
    modules = fastvae.nn
    scaled = modules.DiscretizedLogisticNLLLoss(log_scale=learned)
    assert [name for name, _ in scaled.named_parameters()] == ["log_scale"]
    loss = scaled(m, x)
    torch.testing.assert_close(loss, fastvae.discretized_logistic_nll(m, x, log_scale=learned))
    loss.backward()
    assert learned.grad is not None
    p = params(rgb, 2)
    pairs = [
        (modules.DiscretizedLogisticMixtureNLLLoss(reduction="sum")(p, rgb),
         fastvae.discretized_logistic_mixture_nll(p, rgb, reduction="sum")),
        (modules.CategoricalNLLLoss()(logits, classes), fastvae.categorical_nll(logits, classes)),
        (modules.CategoricalKL(balance=0.8, unimix=0.01)(logits, -logits),
         fastvae.categorical_kl(logits, -logits, balance=0.8, unimix=0.01)),
        (modules.StraightThroughSample(unimix=0.1)(logits, seed=3),
         fastvae.straight_through_sample(logits, unimix=0.1, seed=3)),
        (modules.GumbelSoftmax(temperature=0.5)(logits, seed=3),
         fastvae.gumbel_softmax(logits, temperature=0.5, seed=3)),
    ]  # fmt: skip
    for got, want in pairs:
        assert torch.equal(got, want)
    assert repr(modules.GumbelSoftmax(hard=True)) == "GumbelSoftmax(temperature=1.0, hard=True)"
    for make, message in (
        (lambda: modules.GumbelSoftmax(temperature=0), "temperature must be > 0, got 0"),
        (lambda: modules.CategoricalKL(balance=2.0), "balance must be"),
        (lambda: modules.CategoricalNLLLoss(reduction="avg"), "reduction must be one of"),
    ):
        with pytest.raises(ValueError, match=message):
            make()
