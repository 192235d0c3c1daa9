"""Likelihoods whose parameter is a tensor: the four ways to broadcast one, through every layer."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import fastvae

from table import BACKENDS, DTYPES, INTERPRETED, OPS, Op, reduce
from test_ops import error, tiny

#: for data of shape [B, C, N]
BROADCAST = {
    "whole": lambda b, c, n: (b, c, n),
    "feature": lambda b, c, n: (c, n),
    "channel": lambda b, c, n: (c, 1),
    "last": lambda b, c, n: (n,),
    "example": lambda b, c, n: (b, 1, 1),
    "example_and_channel": lambda b, c, n: (b, c, 1),
    "scalar": lambda b, c, n: (),
}
WITH_TENSOR = [name for name in OPS if name.startswith(("gaussian_nll_", "laplace_nll_", "negative_binomial_nll_"))]
# the interpreter is slow
SOME_DTYPES = (torch.float32,) if INTERPRETED else DTYPES
SOME_BROADCAST = ("feature", "example") if INTERPRETED else tuple(BROADCAST)


def gradients(loss: Tensor, leaves: list[Tensor], upstream: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(loss, leaves, upstream.to(loss.dtype)))


def magnitudes(op: Op, exact: list[Tensor], x: Tensor, upstream: Tensor, reduction: str, shape: torch.Size) -> float:
    """The largest Σ |gradient of an element| over what a gradient of ``shape`` sums."""
    leaves = [exact[0].detach().requires_grad_(), exact[1].detach().expand(exact[0].shape).clone().requires_grad_()]
    grads = gradients(reduce(op.expected(*leaves, x.double()), reduction), leaves, upstream)
    return max(grad.abs().sum_to_size(shape).max().item() for grad in grads)


@pytest.mark.parametrize("dtype", SOME_DTYPES, ids=str)
@pytest.mark.parametrize("broadcast", BROADCAST)
@pytest.mark.parametrize("name", WITH_TENSOR)
@pytest.mark.parametrize("backend", BACKENDS)
def test_value_and_gradients(backend: str, name: str, broadcast: str, dtype: torch.dtype) -> None:
    """With one of the reductions: each meets every name, every broadcast and every dtype."""
    op = OPS[name]
    turn = WITH_TENSOR.index(name) + list(BROADCAST).index(broadcast) + DTYPES.index(dtype)
    reduction = ("none", "example", "batchmean")[turn % 3]
    data = (37, 3, 11)
    y, p, x = op.inputs(*data)
    p = p.reshape(-1)[: torch.Size(BROADCAST[broadcast](*data)).numel()].reshape(BROADCAST[broadcast](*data))
    leaves = [t.to(dtype).requires_grad_() for t in (y, p)]
    exact = [t.detach().double().requires_grad_() for t in leaves]
    eager = [t.detach().clone().requires_grad_() for t in leaves]
    x = x.to(dtype)
    with fastvae.use_backend(backend):
        ours = op.call(*leaves, x, reduction=reduction)
        upstream = torch.randn(ours.shape).to(ours.dtype)
        our_grads = gradients(ours, leaves, upstream)
    want = reduce(op.expected(*exact, x.double()), reduction)
    theirs = reduce(op.eager(eager[0], eager[1].expand(data), x), reduction)
    assert error(ours, want) <= 2 * error(theirs, want) + tiny(dtype, op, [y], reduction) * (
        1 + want.abs().max().item()
    )
    want_grads, their_grads = gradients(want, exact, upstream), gradients(theirs, eager, upstream)
    for grad, want_grad, their_grad, leaf in zip(our_grads, want_grads, their_grads, leaves, strict=True):
        assert (grad.shape, grad.dtype) == (leaf.shape, leaf.dtype)
        # terms of both signs cancel: what rounding costs is a part of the largest sum of their magnitudes
        slack = tiny(dtype, op, [y], "none") * (1 + magnitudes(op, exact, x, upstream, reduction, leaf.shape))
        assert error(grad, want_grad) <= 2 * error(their_grad, want_grad) + slack


@pytest.mark.parametrize("broadcast", SOME_BROADCAST)
@pytest.mark.parametrize("name", WITH_TENSOR)
@pytest.mark.parametrize("backend", BACKENDS)
def test_gradcheck_and_gradgradcheck(backend: str, name: str, broadcast: str) -> None:
    y, p, x = OPS[name].inputs(3, 2, 4)
    shape = BROADCAST[broadcast](3, 2, 4)
    p = p.reshape(-1)[: torch.Size(shape).numel()].reshape(shape)
    inputs = [y.requires_grad_(), p.requires_grad_(), x if OPS[name].counts else x.requires_grad_()]
    with fastvae.use_backend(backend):
        for reduction in ("none", "sum"):
            call = lambda *a, r=reduction: OPS[name].call(*a, reduction=r)  # noqa: E731
            assert torch.autograd.gradcheck(call, inputs, fast_mode=True)
            assert torch.autograd.gradgradcheck(call, inputs, fast_mode=True)


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_are_summed_in_float64(backend: str) -> None:
    """Numbers of both signs cancel: what float32 loses of them is far more than the sum."""
    rows = 512 if INTERPRETED else 4096
    signs = torch.ones(rows, 64)
    signs[rows // 2 :] = -1
    upstream = signs * 1024 + 0.5  # sums within a row are exact in float32
    for shape in ((), (64,), (rows, 1)):
        logvar = torch.zeros(shape, requires_grad=True)
        with fastvae.use_backend(backend):
            nll = fastvae.gaussian_nll(torch.zeros(rows, 64), torch.zeros(rows, 64), logvar=logvar, reduction="none")
            (grad,) = torch.autograd.grad(nll, logvar, upstream)
        want = 0.5 * upstream.double().sum_to_size(logvar.shape)
        assert torch.equal(grad, want.float())


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_second_backward_and_only_one_leaf(backend: str) -> None:
    y, x = torch.randn(5, 6), torch.rand(5, 6)
    with fastvae.use_backend(backend):
        scale = torch.tensor(0.5, requires_grad=True)
        loss = fastvae.laplace_nll(y, x, scale=scale)
        first = torch.autograd.grad(3 * loss, scale, retain_graph=True)[0]
        second = torch.autograd.grad(3 * loss, scale)[0]
        torch.testing.assert_close(first, second)
        mean = y.clone().requires_grad_()
        (grad,) = torch.autograd.grad(fastvae.gaussian_nll(mean, x, var=torch.full((6,), 2.0)), mean)
    torch.testing.assert_close(grad, (y - x) / 2 / 5)


@pytest.mark.parametrize("shape", [(300,), (8, 1), (8, 300)], ids=["feature", "example", "whole"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_gradient_is_rounded_once(backend: str, shape: tuple[int, ...]) -> None:
    """Not when the forward writes it and again when it is scaled."""
    y, x = torch.randn(8, 300).bfloat16(), torch.rand(8, 300)
    var = (torch.rand(shape) + 0.5).bfloat16().requires_grad_()
    with fastvae.use_backend(backend):
        (got,) = torch.autograd.grad(0.3 * fastvae.gaussian_nll(y, x, var=var), var)
    exact = var.detach().double().requires_grad_()
    loss = fastvae.gaussian_nll(y.double(), x.double(), var=exact)
    (want,) = torch.autograd.grad(torch.tensor(0.3).double() * loss, exact)
    half_ulp = torch.exp2(torch.floor(torch.log2(want.abs()))) * 2.0**-8
    assert ((got.double() - want).abs() <= half_ulp * 1.01).all()


@pytest.mark.parametrize("shape", [(), (8, 1)], ids=["scalar", "example"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_sum_beyond_float32_is_scaled_before_it_is_rounded(backend: str, shape: tuple[int, ...]) -> None:
    """Each element's -½/σ⁴ is within float32, their sum is beyond it, and the gradient is not."""
    y, x = torch.zeros(8, 30_000), torch.ones(8, 30_000)
    var = torch.full(shape, 4.1e-18, requires_grad=True)
    with fastvae.use_backend(backend):
        (got,) = torch.autograd.grad(1e-4 * fastvae.gaussian_nll(y, x, var=var, reduction="sum"), var)
    want = 1e-4 * 0.5 / 4.1e-18 * (1 - 1 / 4.1e-18) * y.numel() / max(var.numel(), 1)
    torch.testing.assert_close(got, torch.full_like(got, want), rtol=1e-5, atol=0)


@pytest.mark.parametrize("target", ["uint8", "float32"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_other_targets(backend: str, target: str) -> None:
    y, logvar = torch.randn(4, 33).bfloat16(), torch.randn(33)
    x = torch.randint(0, 256, (4, 33), dtype=torch.uint8) if target == "uint8" else torch.rand(4, 33)
    plain = x.double() / 255 if target == "uint8" else x.double()
    with fastvae.use_backend(backend):
        got = fastvae.gaussian_nll(y, x, logvar=logvar)
    want = fastvae.gaussian_nll(y.double(), plain, logvar=logvar.double())
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("layout", ["channels_last", "expanded", "sliced", "negated"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_layouts(backend: str, layout: str) -> None:
    y, x, logvar = torch.randn(3, 4, 5, 6), torch.rand(3, 4, 5, 6), torch.randn(4, 1, 1)
    if layout == "channels_last":
        y, x = (t.to(memory_format=torch.channels_last) for t in (y, x))
    elif layout == "expanded":
        logvar = torch.randn(1).expand(4, 5, 6)
    elif layout == "sliced":
        y, logvar = torch.randn(3, 8, 5, 6)[:, ::2], torch.randn(3, 4, 10, 6)[:, :, ::2]
    else:
        logvar = torch._neg_view(logvar)
    y, logvar = y.requires_grad_(), logvar.requires_grad_()
    with fastvae.use_backend(backend):
        got = torch.autograd.grad(fastvae.gaussian_nll(y, x, logvar=logvar), [y, logvar])
    nll = 0.5 * ((x - y) ** 2 * torch.exp(-logvar) + logvar).sum() / 3
    for ours, theirs in zip(got, torch.autograd.grad(nll, [y, logvar]), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", [name for name in BACKENDS if name != "torch"])
def test_the_bits_do_not_depend_on_the_number_of_threads(backend: str) -> None:
    y, x = torch.randn(700, 301, requires_grad=True), torch.rand(700, 301)
    results = []
    before = torch.get_num_threads()
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        for shape in ((), (301,), (700, 1)):
            logvar = torch.linspace(-1, 1, torch.Size(shape).numel()).reshape(shape).requires_grad_()
            with fastvae.use_backend(backend):
                loss = fastvae.gaussian_nll(y, x, logvar=logvar)
                results.append([loss, *torch.autograd.grad(loss, [y, logvar])])
    torch.set_num_threads(before)
    for other in results[3:6], results[6:]:
        for a, b in zip(results[:3], other, strict=True):
            assert all(torch.equal(p, q) for p, q in zip(a, b, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
def test_elbo_loss(backend: str) -> None:
    y, x, mu, logvar = torch.randn(6, 9), torch.rand(6, 9), torch.randn(6, 2), torch.randn(6, 2)
    with fastvae.use_backend(backend):
        for likelihood, term, name in (
            ("gaussian", fastvae.gaussian_nll, "var"),
            ("gaussian", fastvae.gaussian_nll, "logvar"),
            ("laplace", fastvae.laplace_nll, "scale"),
            ("laplace", fastvae.laplace_nll, "log_scale"),
        ):
            for value in (0.5, torch.full((9,), 0.5)):
                out = fastvae.elbo_loss(
                    y, x, mu, logvar, likelihood=likelihood, likelihood_parameters={name: value}, beta=0.5
                )
                torch.testing.assert_close(out.reconstruction, term(y, x, **{name: value}))
                torch.testing.assert_close(out.kl, fastvae.gaussian_kl(mu, logvar))
                torch.testing.assert_close(out.loss, out.reconstruction + 0.5 * out.kl)


def test_a_learned_variance_is_the_mean_squared_error() -> None:
    """The optimum of σ-VAE (Rybkin et al. 2021): the module's parameter finds it."""
    y, x = torch.zeros(64, 10), torch.randn(64, 10) * 0.3
    loss = fastvae.nn.GaussianNLLLoss(logvar=torch.nn.Parameter(torch.zeros(())))
    optimizer = torch.optim.Adam(loss.parameters(), lr=0.1)
    for _ in range(200):
        optimizer.zero_grad()
        loss(y, x).backward()
        optimizer.step()
    torch.testing.assert_close(loss.logvar.exp(), (x**2).mean(), rtol=1e-3, atol=0)


@pytest.mark.parametrize("name", WITH_TENSOR)
def test_compiled(name: str) -> None:
    torch.compiler.reset()
    y, p, x = (t.float() for t in OPS[name].inputs(8, 5))
    for shape in ((8, 5), (5,), (8, 1), ()):
        q = p.reshape(-1)[: torch.Size(shape).numel()].reshape(shape)
        leaves = [y.clone().requires_grad_(), q.clone().requires_grad_()]
        compiled = torch.compile(lambda *a: OPS[name].call(*a), fullgraph=True, dynamic=False)
        want = torch.autograd.grad(OPS[name].call(*leaves, x), leaves)
        for ours, theirs in zip(torch.autograd.grad(compiled(*leaves, x), leaves), want, strict=True):
            torch.testing.assert_close(ours, theirs)
        with torch.no_grad():
            torch.testing.assert_close(compiled(*leaves, x), OPS[name].call(*leaves, x))


def test_vmap_and_func_grad() -> None:
    y, x, logvar = torch.randn(4, 3, 5), torch.rand(4, 3, 5), torch.randn(4, 5)
    loss = lambda y, x, logvar: fastvae.gaussian_nll(y, x, logvar=logvar)  # noqa: E731
    grads = torch.func.vmap(torch.func.grad(loss, argnums=(0, 2)))(y, x, logvar)
    for k in range(4):
        leaves = [y[k].clone().requires_grad_(), logvar[k].clone().requires_grad_()]
        want = torch.autograd.grad(loss(leaves[0], x[k], leaves[1]), leaves)
        for ours, theirs in zip(grads, want, strict=True):
            torch.testing.assert_close(ours[k], theirs)


Y = torch.zeros(2, 3)


@pytest.mark.parametrize(
    ("call", "error", "says"),
    [
        (
            lambda: fastvae.gaussian_nll(Y.cpu(), Y.cpu(), var=torch.zeros(3, device="cpu")),
            ValueError,
            "var must be > 0",
        ),
        (
            lambda: fastvae.gaussian_nll(Y, Y, var=torch.ones(2)),
            ValueError,
            r"var must broadcast to .*\[2, 3\], got \[2\]",
        ),
        (lambda: fastvae.gaussian_nll(Y, Y, var=torch.ones(4, 2, 3)), ValueError, "var must broadcast"),
        (lambda: fastvae.gaussian_nll(Y, Y, var=torch.ones(3).int()), TypeError, "var must be a number or a floating"),
        (lambda: fastvae.gaussian_nll(Y, Y, var="1"), TypeError, "var must be a number, got str"),
        (lambda: fastvae.gaussian_nll(Y, Y, var=1, logvar=0), ValueError, "at most one of var and logvar"),
        (lambda: fastvae.laplace_nll(Y, Y, scale=-1.0), ValueError, "scale must be > 0, got -1.0"),
        (lambda: fastvae.nn.LaplaceNLLLoss(scale=1.0, log_scale=0.0), ValueError, "at most one of scale and log_scale"),
        (
            lambda: fastvae.elbo_loss(Y, Y, Y, Y, likelihood="mse", likelihood_parameters={"var": 1.0}),
            ValueError,
            "likelihood_parameters of 'mse' must be empty, got 'var'",
        ),
        (
            lambda: fastvae.elbo_loss(Y, Y, Y, Y, likelihood="gaussian", likelihood_parameters={"scale": 1.0}),
            ValueError,
            "must be one of 'var', 'logvar', got 'scale'",
        ),
        (
            lambda: fastvae.elbo_loss(
                Y, Y, Y, Y, likelihood="bernoulli_probs", likelihood_parameters={"eps": torch.ones(())}
            ),
            TypeError,
            "eps must be a number, got a tensor",
        ),
    ],
)
def test_errors(call, error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        call()
