"""Mixtures of discretised logistics, categoricals, importance weights: against float64 written out, by each backend."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import fastvae
from fastvae import registry
from fastvae.benchmarks import mixture as eager
from fastvae.kernels.reference.rows import TERMS

from formulas import CategoricalKL
from table import DTYPES, INTERPRETED, REDUCTIONS, TARGETS, on, reduce, value_and_gradients

KINDS = ("none", "example", "batchmean")


def level_log_prob(x: Tensor, mean: Tensor, log_scale: Tensor) -> Tensor:
    """PixelCNN++'s, from the logarithms of probabilities: nothing of the library's."""
    s = log_scale.clamp(min=-7)
    above, below, middle = ((x - mean + d / 255) * torch.exp(-s) for d in (1, -1, 0))
    mass = torch.sigmoid(above) - torch.sigmoid(below)
    narrow = middle - s - 2 * torch.logaddexp(middle, torch.zeros_like(middle)) - math.log(127.5)
    inside = torch.where(mass > 1e-5, torch.log(mass.clamp(min=1e-12)), narrow)
    low, high = (-torch.logaddexp(t, torch.zeros_like(t)) for t in (-above, below))
    return torch.where(x < -0.999, low, torch.where(x > 0.999, high, inside))


def mixture(params: Tensor, levels: Tensor) -> Tensor:
    """PixelCNN++'s formula, component by component, channels last."""
    channels = levels.shape[-1]
    each = 3 if channels == 3 else 2
    count = params.shape[-1] // (1 + channels * each)
    x = levels.to(params.dtype) / 127.5 - 1
    of = lambda c, kind, k: params[..., count + (c * each + kind) * count + k]  # noqa: E731
    log_probs = []
    for k in range(count):
        means = [of(c, 0, k) for c in range(channels)]
        if channels == 3:
            a, b, c = (torch.tanh(of(channel, 2, k)) for channel in range(3))
            means[1] = means[1] + a * x[..., 0]
            means[2] = means[2] + b * x[..., 0] + c * x[..., 1]
        log_probs.append(sum(level_log_prob(x[..., c], means[c], of(c, 1, k)) for c in range(channels)))
    return -torch.logsumexp(torch.stack(log_probs, -1) + params[..., :count].log_softmax(-1), -1)


class Row(NamedTuple):
    call: Callable[..., Tensor]
    expected: Callable[..., Tensor]
    eager: Callable[..., Tensor]
    inputs: Callable[[], list[Tensor]]
    differentiable: int


def pixels(*shape: int) -> Tensor:
    x = torch.randint(0, 256, shape, dtype=torch.uint8)
    x.view(-1)[: x.numel() // 3] = torch.randint(0, 2, (x.numel() // 3,), dtype=torch.uint8) * 255
    return x


def of_mixture(channels: int, count: int, *spatial: int) -> list[Tensor]:
    """Near the data and far, narrow and wide."""
    each = 1 + channels * (3 if channels == 3 else 2)
    params = torch.randn(*spatial, each * count, dtype=torch.float64)
    params[..., count:] *= 2
    return [params, pixels(*spatial, channels)]


def first(call: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The same with channels after the batch."""
    return lambda params, x, **kw: call(params.movedim(-1, 1).contiguous(), x.movedim(-1, 1).contiguous(), **kw)


def eager_mixture(params: Tensor, x: Tensor) -> Tensor:
    return mixture(params, x)


def exact_kl(u: float) -> Callable[..., Tensor]:
    return lambda q, p: CategoricalKL.apply(q, p, u)


def kl(q: Tensor, p: Tensor, u: float) -> Tensor:
    q, p = ((1 - u) * t.softmax(-1) + u / t.shape[-1] for t in (q, p))
    return (q * (q.log() - p.log())).sum(-1)


def eager_kl(q: Tensor, p: Tensor) -> Tensor:
    pair = (torch.distributions.Categorical(logits=t, validate_args=False) for t in (q, p))
    return torch.distributions.kl_divergence(*pair)


def normals(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


ROWS: dict[str, Row] = {
    "mixture": Row(
        fastvae.discretized_logistic_mixture_nll, mixture, eager_mixture, lambda: of_mixture(3, 3, 2, 5, 7), 1
    ),
    "mixture first": Row(
        first(fastvae.discretized_logistic_mixture_nll), mixture, eager_mixture, lambda: of_mixture(3, 2, 2, 35), 1
    ),
    "mixture of one channel": Row(
        fastvae.discretized_logistic_mixture_nll, mixture, eager_mixture, lambda: of_mixture(1, 5, 3, 4), 1
    ),
    "logistic": Row(
        lambda mean, scale, x, **kw: fastvae.discretized_logistic_nll(mean, x, log_scale=scale, **kw),
        lambda mean, scale, x: -level_log_prob(x.to(mean.dtype) / 127.5 - 1, mean, scale),
        lambda mean, scale, x: -eager.log_probs_of_levels(x.to(mean.dtype) / 127.5 - 1, mean, scale),
        lambda: [normals(3, 41), normals(3, 41) * 2, pixels(3, 41)],
        2,
    ),
    "categorical_nll": Row(
        fastvae.categorical_nll,
        lambda logits, x: -logits.log_softmax(-1).gather(-1, x[..., None])[..., 0],
        lambda logits, x: F.cross_entropy(logits.movedim(-1, 1), x, reduction="none"),
        lambda: [normals(3, 4, 37) * 3, torch.randint(0, 37, (3, 4))],
        1,
    ),
    "categorical_kl": Row(
        fastvae.categorical_kl, exact_kl(0.0), eager_kl, lambda: [normals(3, 4, 37) * 2, normals(3, 4, 37) * 2], 2
    ),
    "categorical_kl unimix": Row(
        lambda q, p, **kw: fastvae.categorical_kl(q, p, unimix=0.01, **kw),
        exact_kl(0.01),
        lambda q, p: kl(q, p, 0.01),
        lambda: [normals(3, 4, 9) * 4, normals(3, 4, 9) * 4],
        2,
    ),
}


def error(a: Tensor, b: Tensor) -> float:
    return (a.double() - b.double()).abs().max().item()


def of_eager(a: Tensor, b: Tensor) -> float:
    """Where half precision has no 1e-12, it takes the logarithm of 0: any error is less."""
    off = error(a, b)
    return off if math.isfinite(off) else math.inf


@pytest.mark.parametrize("reduction", KINDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ROWS)
@pytest.mark.parametrize("backend", TARGETS)
def test_no_worse_than_twice_eager(backend: str, name: str, dtype: torch.dtype, reduction: str) -> None:
    """The rule of ``test_ops.py``: 2⁻²² (2⁻⁵⁰) besides for each number added."""
    row = ROWS[name]
    rounded = [t.to(dtype) if t.is_floating_point() else t for t in row.inputs()]
    exact = [t.double() if t.is_floating_point() else t for t in rounded]
    want, want_grads = value_and_gradients(lambda *a: reduce(row.expected(*a), reduction), exact, row.differentiable)
    plain, eager_grads = value_and_gradients(lambda *a: reduce(row.eager(*a), reduction), rounded, row.differentiable)
    with on(backend):
        got, grads = value_and_gradients(lambda *a: row.call(*a, reduction=reduction), rounded, row.differentiable)
    tiny = 2.0**-50 if dtype == torch.float64 else 2.0**-22
    if dtype == torch.float64 and row.expected in (mixture, ROWS["logistic"].expected):
        tiny = 2.0**-35  # a difference of two σ that is 1e-5 has lost 17 bits: what is judged is more exact than this
    assert got.shape == want.shape
    assert got.dtype == (dtype if reduction == "none" or dtype == torch.float64 else torch.float32)
    count = 1 if reduction == "none" else math.prod(want_grads[0].shape[1:])
    assert error(got, want) <= 2 * of_eager(plain, want) + tiny * count * (1 + want.abs().max().item())
    for grad, eager_grad, want_grad in zip(grads, eager_grads, want_grads, strict=True):
        assert grad.dtype == dtype
        slack = tiny * (1 + want_grad.abs().max().item())
        assert error(grad, want_grad) <= 2 * of_eager(eager_grad, want_grad) + slack


@pytest.mark.parametrize("name", ROWS)
@pytest.mark.parametrize("backend", [name for name in TARGETS if name in ("torch", "cpp", "triton")])
def test_gradcheck(backend: str, name: str) -> None:
    """Of the kernels; the second derivatives go through the reference."""
    row = ROWS[name]
    inputs = row.inputs()
    if "mixture" in name or name == "logistic":  # finite differences must not jump from one formula to the other
        inputs[0] = inputs[0] * 0.1
        inputs[1] = inputs[1] * 0.1 if inputs[1].is_floating_point() else inputs[1]
    for t in inputs[: row.differentiable]:
        t.requires_grad_()
    for reduction in ("none", "sum"):
        call = lambda *a, r=reduction: row.call(*a, reduction=r)  # noqa: E731
        with on(backend):
            assert torch.autograd.gradcheck(call, inputs, fast_mode=True)
            assert torch.autograd.gradgradcheck(call, inputs, fast_mode=True)


@pytest.mark.parametrize("backend", TARGETS)
def test_edges_and_narrow_bins(backend: str) -> None:
    """Every level, from a bin far away to one that holds all, and log scales beyond the least: float64, to rounding."""
    x = torch.arange(256, dtype=torch.uint8).repeat(6, 1)
    mean = torch.tensor([-3.0, -1.0, 0.0, 0.4, 1.0, 50.0], dtype=torch.float64)[:, None].expand(6, 256)
    for scale in (-9.0, -7.0, -4.0, 0.0, 6.0):
        log_scale = torch.full_like(mean, scale)
        inputs = [mean, log_scale, x]
        want, want_grads = value_and_gradients(lambda *a: ROWS["logistic"].expected(*a), inputs, 2)
        with on(backend):
            got, grads = value_and_gradients(lambda *a: ROWS["logistic"].call(*a, reduction="none"), inputs, 2)
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(grads, want_grads, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("backend", TARGETS)
def test_layouts_targets_and_upstreams(backend: str) -> None:
    params, x = ROWS["mixture"].inputs()
    want, (want_grad,) = value_and_gradients(lambda p: reduce(mixture(p, x), "batchmean"), [params], 1)
    moved = params.movedim(-1, 1), x.movedim(-1, 1)  # channels_last in memory
    strided = torch.stack([params, params], -1)[..., 0]
    cases = [(params, x), (params, x.double() / 255), (params, x.long()), (strided, x)]
    with on(backend):
        for p, target in cases:
            got, (grad,) = value_and_gradients(
                lambda p, t=target: fastvae.discretized_logistic_mixture_nll(p, t), [p], 1
            )
            torch.testing.assert_close(got, want, rtol=1e-9, atol=0)
            torch.testing.assert_close(grad, want_grad, rtol=1e-9, atol=1e-9)
        got, (grad,) = value_and_gradients(
            lambda p: fastvae.discretized_logistic_mixture_nll(p, moved[1]), [moved[0]], 1
        )
        torch.testing.assert_close(grad.movedim(1, -1), want_grad, rtol=1e-9, atol=1e-9)
        leaf = params.clone().requires_grad_()
        for _ in range(2):  # the second finds no kept gradient
            leaf.grad = None
            loss = fastvae.discretized_logistic_mixture_nll(leaf, x)
            (3 * loss).backward(retain_graph=True)
            (3 * loss).backward()
            torch.testing.assert_close(leaf.grad, 6 * want_grad, rtol=1e-9, atol=1e-9)
        upstream = torch.rand(2, 5, 7, dtype=torch.float64)
        _, (by_pixel,) = value_and_gradients(
            lambda p: fastvae.discretized_logistic_mixture_nll(p, x, reduction="none"), [params], 1, upstream
        )
    _, (want_by_pixel,) = value_and_gradients(lambda p: mixture(p, x), [params], 1, upstream)
    torch.testing.assert_close(by_pixel, want_by_pixel, rtol=1e-9, atol=1e-9)


def test_a_target_that_needs_a_gradient() -> None:
    params, x = ROWS["mixture"].inputs()
    x = (x.double() / 255).clamp(0.1, 0.9).requires_grad_()
    (grad,) = torch.autograd.grad(fastvae.discretized_logistic_mixture_nll(params, x, reduction="sum"), x)
    assert grad.isfinite().all()
    assert (grad != 0).any()


@pytest.mark.skipif(INTERPRETED, reason="the interpreter has one thread")
def test_the_same_bits_for_any_number_of_threads() -> None:
    params, x = torch.randn(5, 33, 31, 30), pixels(5, 33, 31, 3)
    threads, seen = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            value, grads = value_and_gradients(lambda p: fastvae.discretized_logistic_mixture_nll(p, x), [params], 1)
            by_example = fastvae.discretized_logistic_mixture_nll(params, x, reduction="example")
            seen.append((value, *grads, by_example))
    finally:
        torch.set_num_threads(threads)
    for other in seen[1:]:
        assert all(torch.equal(a, b) for a, b in zip(seen[0], other, strict=True))


@pytest.mark.parametrize("prior", [False, True])
@pytest.mark.parametrize("samples", [None, 4])
@pytest.mark.parametrize("backend", TARGETS)
def test_log_densities(backend: str, samples: int | None, prior: bool) -> None:
    tensors = [normals(*(() if samples is None else (samples,)), 3, 2, 11), *(normals(3, 2, 11) for _ in range(4))]
    q, p = ((tensors[k], (0.5 * tensors[k + 1]).exp()) for k in (1, 3))
    log_q = torch.distributions.Normal(*q).log_prob(tensors[0]).flatten(-2).sum(-1)
    log_p = torch.distributions.Normal(*(p if prior else (0.0, 1.0))).log_prob(tensors[0]).flatten(-2).sum(-1)

    def call(z: Tensor, mu: Tensor, logvar: Tensor, *of_prior: Tensor) -> Tensor:
        options = dict(zip(("prior_mu", "prior_logvar"), of_prior, strict=False))
        return fastvae.log_q_minus_log_p(z, mu, logvar, samples=samples, **options)

    inputs = tensors if prior else tensors[:3]
    with on(backend):
        torch.testing.assert_close(call(*inputs), log_q - log_p)
        torch.testing.assert_close(fastvae.gaussian_log_prob(*tensors[:3], samples=samples), log_q)
        for t in inputs:
            t.requires_grad_()
        assert torch.autograd.gradcheck(call, inputs, fast_mode=True)
        assert torch.autograd.gradgradcheck(call, inputs, fast_mode=True)
        assert torch.autograd.gradcheck(
            lambda *a: fastvae.gaussian_log_prob(*a, samples=samples), inputs[:3], fast_mode=True
        )
        half = [t.detach().bfloat16() for t in inputs[:3]]
        assert fastvae.gaussian_log_prob(*half, samples=samples).dtype == torch.float32


def test_the_importance_weighted_bound_and_its_doubly_reparameterised_gradient() -> None:
    """Tucker et al. 2019, eq. 8, with every derivative by itself."""
    mu, logvar = (normals(6, 3).requires_grad_() for _ in range(2))
    weight = normals(3).requires_grad_()
    noise = normals(5, 6, 3)

    def log_w(z: Tensor, w: Tensor, mu: Tensor, logvar: Tensor) -> Tensor:
        return -((z * w - 0.3) ** 2).sum(-1) - fastvae.log_q_minus_log_p(z, mu, logvar, samples=5)

    z = mu + (0.5 * logvar).exp() * noise
    weights = log_w(z, weight, mu.detach(), logvar.detach())
    bound = fastvae.importance_weighted_bound(weights, z)
    torch.testing.assert_close(bound, weights.logsumexp(0) - math.log(5))
    got = torch.autograd.grad(bound.sum(), (mu, logvar, weight))
    share = weights.detach().softmax(0)
    leaf = z.detach().requires_grad_()
    by_z, by_weight = torch.autograd.grad(
        (log_w(leaf, weight, mu.detach(), logvar.detach()) * share).sum(), (leaf, weight)
    )
    by_z = by_z * share[..., None]
    want = by_z.sum(0), (by_z * 0.5 * (0.5 * logvar).exp() * noise).sum(0), by_weight
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("balance", [0.0, 0.8])
def test_balance_shares_the_gradient_out(balance: float) -> None:
    inputs = ROWS["categorical_kl"].inputs()
    want, (of_q, of_p) = value_and_gradients(lambda *a: fastvae.categorical_kl(*a), inputs, 2)
    for backend in ("torch", "cpp"):
        with on(backend):
            got, grads = value_and_gradients(lambda *a: fastvae.categorical_kl(*a, balance=balance), inputs, 2)
        torch.testing.assert_close(got, want)
        torch.testing.assert_close(grads, [(1 - balance) * of_q, balance * of_p])


def test_samples_have_the_probabilities_that_the_loss_says() -> None:
    params = torch.tensor([0.3, -0.2, -0.5, 0.6, -1.5, -2.0])
    levels = torch.arange(256, dtype=torch.uint8)
    probs = (-fastvae.discretized_logistic_mixture_nll(params.expand(256, 6), levels[:, None], reduction="none")).exp()
    assert probs.sum().item() == pytest.approx(1, abs=1e-4)
    count = 200_000
    drawn = fastvae.discretized_logistic_mixture_sample(params.expand(count, 6), channels=1, seed=0)
    seen = torch.bincount(drawn.flatten().long(), minlength=256)
    bins = probs * count > 20
    chi = ((seen - probs * count) ** 2 / (probs * count))[bins].sum().item()
    assert chi < bins.sum().item() + 5 * math.sqrt(2 * bins.sum().item()), "five standard deviations of χ²"


def test_samples_of_classes() -> None:
    logits = torch.tensor([0.0, 1.0, -1.0, 0.5]).expand(100_000, 4).clone().requires_grad_()
    probs = logits[0].detach().softmax(-1)
    for draw in (
        lambda: fastvae.straight_through_sample(logits, seed=3),
        lambda: fastvae.gumbel_softmax(logits, hard=True, temperature=0.7, seed=3),
    ):
        one_hot = draw()
        assert torch.equal(one_hot.detach().sum(-1).round(), torch.ones(len(logits)))
        assert (one_hot.detach().mean(0) - probs).abs().max() < 5 * 0.5 / math.sqrt(len(logits))
        (grad,) = torch.autograd.grad((one_hot * torch.arange(4.0)).sum(), logits)
        assert grad.abs().sum() > 0
        assert torch.equal(draw(), one_hot), "one seed, one sample"
    want, _ = value_and_gradients(lambda t: t.softmax(-1), [logits[:3].detach()], 1, torch.arange(4.0).expand(3, 4))
    assert want.shape == (3, 4)


@pytest.mark.parametrize("name", ROWS)
def test_compiled_with_and_without_gradients(name: str) -> None:
    torch._dynamo.reset()
    row = ROWS[name]
    for needed in (False, True):
        inputs = [t.requires_grad_(needed and k < row.differentiable) for k, t in enumerate(row.inputs())]
        function = torch.compile(
            lambda *a: [row.call(*a, reduction=r) for r in KINDS], fullgraph=True, backend="aot_eager"
        )
        got, want = function(*inputs), [row.call(*inputs, reduction=r) for r in KINDS]
        torch.testing.assert_close(got, want)
        if needed:
            given = inputs[: row.differentiable]
            grads = [torch.autograd.grad(sum(t.sum() for t in outputs), given) for outputs in (got, want)]
            torch.testing.assert_close(*grads)


def test_vmap() -> None:
    params, x = ROWS["mixture"].inputs()
    call = lambda p: fastvae.discretized_logistic_mixture_nll(p[None], x[:1])  # noqa: E731
    torch.testing.assert_close(torch.vmap(call)(params), torch.stack([call(p) for p in params]))
    grads = torch.vmap(torch.func.grad(call))(params)
    torch.testing.assert_close(grads, torch.stack([value_and_gradients(call, [p], 1)[1][0] for p in params]))


X = torch.zeros(2, 4, 4, 3, dtype=torch.uint8)
BAD: list[tuple[Callable[[], object], type[Exception], str]] = [
    (lambda: fastvae.discretized_logistic_mixture_nll(torch.zeros(2, 4, 4, 33), X), ValueError, r"10·K.*got 33"),
    (lambda: fastvae.discretized_logistic_mixture_nll(torch.zeros(2, 4, 4, 0), X), ValueError, "K at least 1, got 0"),
    (lambda: fastvae.discretized_logistic_mixture_nll(torch.zeros(0, 4, 4, 10), X[:0]), ValueError, "one example"),
    (
        lambda: fastvae.discretized_logistic_mixture_nll(torch.zeros(2, 4, 5, 10), X),
        ValueError,
        "params and target must",
    ),
    (
        lambda: fastvae.discretized_logistic_mixture_nll(torch.zeros(2, 4, 4, 10), X.int() - 1),
        ValueError,
        "levels from 0 to 255.*got values from -1",
    ),
    (
        lambda: fastvae.discretized_logistic_mixture_nll(torch.zeros(2, 4, 4, 10), X.float() + 37),
        ValueError,
        r"in \[0, 1\].*got values from 37",
    ),
    (
        lambda: fastvae.discretized_logistic_nll(torch.zeros(2, 3), torch.full((2, 3), -1.0), log_scale=0.0),
        ValueError,
        r"in \[0, 1\].*got values from -1",
    ),
    (lambda: fastvae.categorical_nll(torch.zeros(2, 5), torch.tensor([0, 5])), ValueError, "classes from 0 to 4"),
    (lambda: fastvae.categorical_nll(torch.zeros(2, 0), torch.tensor([0, 0])), ValueError, "at least one class"),
    (lambda: fastvae.categorical_nll(torch.zeros(2, 5), torch.zeros(2)), TypeError, "integers, got float32"),
    (lambda: fastvae.categorical_kl(torch.zeros(2, 5), torch.zeros(2, 4)), ValueError, "shape of logits_q"),
    (lambda: fastvae.categorical_kl(torch.zeros(2, 5), torch.zeros(2, 5), balance=2), ValueError, "balance must"),
    (lambda: fastvae.gumbel_softmax(torch.zeros(2, 5), temperature=0), ValueError, "temperature must be > 0"),
    (lambda: fastvae.importance_weighted_bound(torch.zeros(0, 5)), ValueError, "at least one sample"),
    (
        lambda: fastvae.log_q_minus_log_p(torch.zeros(3, 2, 4), torch.zeros(2, 4), torch.zeros(2, 4)),
        ValueError,
        "z must have the shape of mu",
    ),
]


@pytest.mark.parametrize("case", range(len(BAD)))
@pytest.mark.parametrize("backend", ["torch", "cpp"])
def test_one_clear_error(backend: str, case: int) -> None:
    call, kind, message = BAD[case]
    with on(backend), pytest.raises(kind, match=message):
        call()


def test_the_docs_name_the_kernels_there_are() -> None:
    """The table of docs/which-call.md, by what each backend says of itself."""
    have = {}
    for backend in ("cpp", "triton"):
        module = registry.load(backend)
        if not isinstance(module, str):
            primitives = module._primitives
            have[backend] = {*primitives.row_kernels, *(["logistic"] if primitives.logistic_kernel else [])}
    assert have.get("cpp", set(TERMS)) == set(TERMS)


assert set(KINDS) <= set(REDUCTIONS)
