"""What users do to a loss: backward twice, scale it, use it twice, transform it, compile it, export it."""

from __future__ import annotations

import contextlib
import copy
import functools
import math
import threading
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import fastvae
from fastvae.kernels.likelihoods import OF_COUNTS

from table import BACKENDS, DEVICE, INTERPRETED, OPS, reduce, value_and_gradients

pytestmark = pytest.mark.parametrize("backend", BACKENDS)


@pytest.fixture(autouse=True)
def on_backend(backend: str):
    with fastvae.use_backend(backend):
        yield


def on_the_device(value: Any) -> Any:
    return value.to(DEVICE) if isinstance(value, Tensor) else value


def logits_target() -> list[Tensor]:
    return [t.float() for t in OPS["bce_with_logits"].inputs(6, 50)]


def want_gradient(logits: Tensor, target: Tensor, upstream: float) -> Tensor:
    return (torch.sigmoid(logits.detach()) - target) * (upstream / len(logits))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("factor", [1.0, 3.0, 0.0, -0.5, 65536.0])
def test_upstream_gradient(backend: str, factor: float, dtype: torch.dtype) -> None:
    """65536 is the first scale of a GradScaler, and more than a float16 holds."""
    logits, target = (t.to(dtype) for t in logits_target())
    logits.requires_grad_()
    (fastvae.bce_with_logits(logits, target) * factor).backward()
    want = want_gradient(logits.float(), target.float(), factor)
    torch.testing.assert_close(
        logits.grad.float(),
        want.to(dtype).float(),
        rtol=1e-6 if dtype == torch.float32 else 2e-2,
        atol=1e-6 * max(1, factor),
    )


def test_backward_twice(backend: str) -> None:
    logits, target = logits_target()
    logits.requires_grad_()
    loss = fastvae.bce_with_logits(logits, target)
    grads = [torch.autograd.grad(loss, logits, torch.tensor(g), retain_graph=True)[0] for g in (3.0, 1.0, 0.0, 2.0)]
    grads[1].mul_(100)  # a caller owns what it was given
    grads.append(torch.autograd.grad(loss, logits)[0])
    for got, factor in zip(grads, (3.0, 100.0, 0.0, 2.0, 1.0), strict=True):
        torch.testing.assert_close(got, want_gradient(logits, target, factor), rtol=1e-5, atol=1e-6)


def test_backward_twice_accumulates(backend: str) -> None:
    logits, target = logits_target()
    logits.requires_grad_()
    loss = fastvae.bce_with_logits(logits, target)
    loss.backward(retain_graph=True)
    first = logits.grad.clone()
    loss.backward()
    torch.testing.assert_close(logits.grad, 2 * first)


def test_loss_used_in_two_places(backend: str) -> None:
    logits, target = logits_target()
    logits.requires_grad_()
    loss = fastvae.bce_with_logits(logits, target)
    (loss + loss.exp() * 0 + 2 * loss).backward()
    torch.testing.assert_close(logits.grad, want_gradient(logits, target, 3.0), rtol=1e-6, atol=1e-7)


def test_elbo_terms_used_one_by_one(backend: str) -> None:
    logits, target = logits_target()
    mu, logvar = (t.float() for t in OPS["gaussian_kl"].inputs(6, 4))
    leaves = [t.requires_grad_() for t in (logits, mu, logvar)]
    out = fastvae.elbo_loss(logits, target, mu, logvar, beta=2.0)
    torch.testing.assert_close(out.loss, out.reconstruction + 2 * out.kl)
    (out.loss + 3 * out.kl - out.reconstruction).backward()
    got = [leaf.grad for leaf in leaves]
    kl = fastvae.gaussian_kl(mu, logvar)
    want = torch.autograd.grad(5 * kl, (mu, logvar))
    assert not got[0].any()
    torch.testing.assert_close(got[1:], list(want))


BETAS = [0.0, 1.0, 4.0, torch.tensor(0.25)]
# half of all: every likelihood and every reduction meets each beta
ELBOS = [
    (likelihood, reduction, beta)
    for k, likelihood in enumerate(fastvae.functional.LIKELIHOODS)
    for j, reduction in enumerate(("example", "sum", "batchmean"))
    for beta in BETAS[(k + j) % 2 :: 2]
]


@pytest.mark.parametrize(("likelihood", "reduction", "beta"), ELBOS, ids=str)
def test_elbo_is_the_sum_of_its_terms(backend: str, likelihood: str, reduction: str, beta: float | Tensor) -> None:
    call: Callable[..., Tensor] = {
        "bernoulli_logits": fastvae.bce_with_logits,
        "bernoulli_probs": fastvae.bce,
        "continuous_bernoulli_logits": fastvae.continuous_bernoulli_with_logits,
        "gaussian": fastvae.gaussian_nll,
        "laplace": fastvae.laplace_nll,
        "mse": fastvae.mse,
        "l1": fastvae.l1,
        "poisson": fastvae.poisson_nll,
        "poisson_log_rate": fastvae.poisson_nll_with_log_rate,
        "negative_binomial": functools.partial(fastvae.negative_binomial_nll, dispersion=0.7),
    }[likelihood]
    parameters = {"dispersion": 0.7} if likelihood == "negative_binomial" else {}
    recon, target = OPS["poisson_nll" if likelihood in OF_COUNTS else "bce"].inputs(5, 3, 7)
    mu, std = OPS["gaussian_kl_std"].inputs(5, 4)

    def parts(recon: Tensor, mu: Tensor, std: Tensor) -> Tensor:
        kl = fastvae.gaussian_kl(mu, std=std, free_bits=0.2, reduction=reduction)
        return call(recon, target, reduction=reduction) + beta * kl

    def whole(recon: Tensor, mu: Tensor, std: Tensor) -> Tensor:
        options = {"likelihood": likelihood, "beta": beta, "free_bits": 0.2, "reduction": reduction}
        return fastvae.elbo_loss(recon, target, mu, std=std, likelihood_parameters=parameters, **options).loss

    want, want_grads = value_and_gradients(parts, [recon, mu, std], 3)
    got, grads = value_and_gradients(whole, [recon, mu, std], 3)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(grads, want_grads)


@pytest.mark.parametrize("beta", [2.0, torch.tensor(2.0, dtype=torch.float64)], ids=str)
@pytest.mark.parametrize("reduction", ["example", "sum"])
def test_the_elbo_of_two_dtypes_has_that_of_the_reconstruction(
    backend: str, reduction: str, beta: float | Tensor
) -> None:
    """A float64 posterior beside float32 data: every backend, and the operator's fake, must agree."""
    logits, target, mu, logvar = torch.randn(3, 5), torch.rand(3, 5), *torch.randn(2, 3, 4, dtype=torch.float64)
    for width in (4, 0):
        out = fastvae.elbo_loss(logits, target, mu[:, :width], logvar[:, :width], reduction=reduction, beta=beta)
        assert [t.dtype for t in out] == [torch.float32, torch.float32, torch.float64]


USES: dict[str, Callable[[Any], Tensor]] = {
    "the loss": lambda out: out.loss,
    "scaled": lambda out: -2.5 * out.loss,
    "all three": lambda out: out.loss + 0.5 * out.reconstruction - 3 * out.kl,
    "the loss and its KL": lambda out: out.loss + out.kl,
    "the KL": lambda out: 2 * out.kl,
}


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize(
    "options",
    [{}, {"beta": 0.3}, {"beta": 0.0, "reduction": "sum"}, {"beta": torch.tensor(0.4)}, {"free_bits": 0.3}],
    ids=["plain", "beta", "no beta", "tensor beta", "free bits"],
)
def test_elbo_gradients_however_it_is_used(backend: str, options: dict[str, Any], use: str) -> None:
    """Once, and again through the same graph, when nothing is left to hand over."""
    recon, mu, logvar = (torch.randn(6, n, requires_grad=True) for n in (9, 4, 4))
    target, leaves = torch.rand(6, 9), (recon, mu, logvar)
    options = {name: on_the_device(value) for name, value in options.items()}
    loss = USES[use](fastvae.elbo_loss(recon, target, mu, logvar, **options))
    first = [
        g.clone() for g in torch.autograd.grad(loss, leaves, retain_graph=True, allow_unused=True) if g is not None
    ]
    second = torch.autograd.grad(loss, leaves, allow_unused=True)
    with fastvae.use_backend("torch"):
        want_loss = USES[use](fastvae.elbo_loss(recon, target, mu, logvar, **options))
        want = [g for g in torch.autograd.grad(want_loss, leaves, allow_unused=True) if g is not None]
    torch.testing.assert_close(first, want, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close([g for g in second if g is not None], want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("frozen", [(0,), (1,), (2,), (1, 2), (0, 2)], ids=str)
def test_elbo_gradients_of_some_inputs(backend: str, frozen: tuple[int, ...]) -> None:
    leaves = [torch.randn(6, n, requires_grad=k not in frozen) for k, n in enumerate((9, 4, 4))]
    target = torch.rand(6, 9, requires_grad=frozen == (0,))
    fastvae.elbo_loss(leaves[0], target, *leaves[1:], beta=0.5).loss.backward()
    got = [t.grad for t in (*leaves, target)]
    for t in (*leaves, target):
        t.grad = None
    with fastvae.use_backend("torch"):
        fastvae.elbo_loss(leaves[0], target, *leaves[1:], beta=0.5).loss.backward()
    for ours, theirs in zip(got, (t.grad for t in (*leaves, target)), strict=True):
        assert (ours is None) == (theirs is None)
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "shapes", [((3, 0), (3, 4)), ((3, 4), (3, 0)), ((0, 4), (0, 2))], ids=["data", "latent", "batch"]
)
def test_elbo_of_nothing(backend: str, shapes: tuple[tuple[int, int], tuple[int, int]]) -> None:
    """Without data the KL has its gradients still, and without a latent the data theirs."""
    data, latent = shapes
    recon, mu, logvar = (torch.full(shape, 0.5, requires_grad=True) for shape in (data, latent, latent))
    fastvae.elbo_loss(recon, torch.zeros(data), mu, logvar, beta=2.0, reduction="sum").loss.backward()
    torch.testing.assert_close(mu.grad, torch.full(latent, 2.0 * 0.5))
    torch.testing.assert_close(logvar.grad, torch.full(latent, math.exp(0.5) - 1))
    torch.testing.assert_close(recon.grad, torch.full(data, 0.5).sigmoid())


def test_elbo_gradcheck(backend: str) -> None:
    recon, target = (t.requires_grad_() for t in OPS["bce_with_logits"].inputs(2, 3))
    mu, logvar = (t.requires_grad_() for t in OPS["gaussian_kl"].inputs(2, 2))

    def call(*tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(fastvae.elbo_loss(*tensors, beta=1.5))

    assert torch.autograd.gradcheck(call, (recon, target, mu, logvar), fast_mode=INTERPRETED)
    assert torch.autograd.gradgradcheck(call, (recon, target, mu, logvar), fast_mode=INTERPRETED)


def test_vae_loss_is_the_tutorials(backend: str) -> None:
    probs, target = torch.rand(4, 784), torch.rand(4, 1, 28, 28)
    mu, logvar = torch.randn(4, 20), torch.randn(4, 20)

    def tutorial(recon_x: Tensor, mu: Tensor, logvar: Tensor) -> Tensor:
        bce = F.binary_cross_entropy(recon_x, target.view(-1, 784), reduction="sum")
        return bce + -0.5 * torch.sum(1 + logvar - mu.pow(2) - logvar.exp())

    want, want_grads = value_and_gradients(tutorial, [probs, mu, logvar], 3)
    got, grads = value_and_gradients(lambda r, m, s: fastvae.vae_loss(r, target, m, s), [probs, mu, logvar], 3)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(grads, want_grads)


@pytest.mark.parametrize("samples", [None, 3])
@pytest.mark.parametrize("with_prior", [False, True])
@pytest.mark.parametrize("parametrisation", ["logvar", "std"])
def test_sampling_gradcheck(backend: str, parametrisation: str, with_prior: bool, samples: int | None) -> None:
    mu, scale = (t.requires_grad_() for t in OPS["gaussian_kl_std"].inputs(3, 5))
    prior = [torch.randn(5, dtype=torch.float64, requires_grad=True) for _ in range(2 * with_prior)]

    def call(mu: Tensor, scale: Tensor, *prior: Tensor) -> tuple[Tensor, Tensor]:
        named = dict(zip(("prior_mu", "prior_logvar"), prior, strict=False)) | {parametrisation: scale}
        return fastvae.sample_with_kl(mu, **named, seed=11, samples=samples, reduction="example")

    assert torch.autograd.gradcheck(call, (mu, scale, *prior), fast_mode=INTERPRETED)
    assert torch.autograd.gradgradcheck(call, (mu, scale, *prior), fast_mode=INTERPRETED)


def test_only_z_or_only_kl_used(backend: str) -> None:
    mu, logvar = (t.requires_grad_() for t in OPS["gaussian_kl"].inputs(3, 5))
    prior = [torch.randn(3, 5, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    z, kl = fastvae.sample_with_kl(mu, logvar, prior_mu=prior[0], prior_logvar=prior[1], seed=1)
    got = torch.autograd.grad(z.sum(), (mu, logvar, *prior), retain_graph=True)
    torch.testing.assert_close(got[0], torch.ones_like(mu))
    torch.testing.assert_close(got[1], 0.5 * (z - mu).detach())
    assert not got[2].any()
    assert not got[3].any()
    want = torch.autograd.grad(OPS["gaussian_kl_prior"].expected(mu, logvar, *prior).sum() / 3, (mu, logvar, *prior))
    torch.testing.assert_close(torch.autograd.grad(kl, (mu, logvar, *prior)), want)


def test_a_float16_training_step_with_grad_scaler(backend: str) -> None:
    model = nn.Linear(20, 50)
    scaler = torch.amp.GradScaler(DEVICE)
    x, target = torch.randn(8, 20), torch.rand(8, 50)
    with torch.autocast(DEVICE, torch.float16):
        logits = model(x)
        loss = fastvae.bce_with_logits(logits, target)
    assert logits.dtype == torch.float16
    assert loss.dtype == torch.float32
    scaler.scale(loss).backward()
    want = torch.autograd.grad(F.binary_cross_entropy_with_logits(model(x), target, reduction="sum") / 8, model.weight)[
        0
    ]
    torch.testing.assert_close(model.weight.grad / scaler.get_scale(), want, rtol=1e-2, atol=1e-2)


def test_autocast_does_not_forbid_probabilities(backend: str) -> None:
    probs, target = (t.bfloat16() for t in OPS["bce"].inputs(3, 9))
    with torch.autocast(DEVICE, torch.bfloat16):
        assert fastvae.bce(probs, target).isfinite()


def loss_of(mu: Tensor, logvar: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    z = fastvae.reparameterize(mu, logvar)
    out = fastvae.elbo_loss(z @ weight, target, mu, logvar, beta=0.5)
    extra = fastvae.bce(torch.sigmoid(z @ weight), target, reduction="example").mean()
    return out.loss * 2 + extra


def test_compile_fullgraph(backend: str) -> None:
    inputs = [torch.randn(6, 4), torch.randn(6, 4), torch.randn(4, 9), torch.rand(6, 9)]
    results = []
    for function in (loss_of, torch.compile(loss_of, fullgraph=True, backend="aot_eager")):
        torch.manual_seed(3)
        results.append(value_and_gradients(function, inputs, 3))
    torch.testing.assert_close(results[0], results[1])


def test_export(backend: str) -> None:
    class Model(nn.Module):
        def forward(self, mu: Tensor, logvar: Tensor, target: Tensor) -> Tensor:
            return fastvae.elbo_loss(mu, target, mu, logvar).loss + fastvae.reparameterize(mu, logvar).sum() * 0

    inputs = (torch.randn(6, 4), torch.randn(6, 4), torch.rand(6, 4))
    program = torch.export.export(Model(), inputs)
    assert any("fastvae.elbo_forward" in str(node.target) for node in program.graph.nodes)
    torch.testing.assert_close(program.module()(*inputs), Model()(*inputs))


def test_vmap_and_func_grad(backend: str) -> None:
    logits, target = OPS["bce_with_logits"].inputs(4, 6)

    def example_loss(logits: Tensor, target: Tensor) -> Tensor:
        return fastvae.bce_with_logits(logits[None], target[None])

    want = torch.sigmoid(logits) - target
    per_example = torch.func.vmap(torch.func.grad(example_loss))(logits, target)
    torch.testing.assert_close(per_example, want)
    of_sum = torch.func.grad(lambda y: torch.func.vmap(example_loss)(y, target).sum())(logits)
    torch.testing.assert_close(of_sum, want)
    _, pull = torch.func.vjp(lambda y: torch.func.vmap(example_loss)(y, target), logits)
    with torch.no_grad():
        torch.testing.assert_close(pull(torch.full((4,), 2.0, dtype=torch.float64))[0], 2 * want)
    hessian = torch.func.jacrev(torch.func.jacrev(lambda y: example_loss(y, target[0])))(logits[0])
    torch.testing.assert_close(hessian, torch.diag(torch.sigmoid(logits[0]) * torch.sigmoid(-logits[0])))


def test_vmap_of_a_sample_is_the_sample(backend: str) -> None:
    mu, logvar = OPS["gaussian_kl"].inputs(3, 2, 5)

    def sample(mu: Tensor, logvar: Tensor) -> tuple[Tensor, Tensor]:
        return fastvae.sample_with_kl(mu, logvar, seed=9)

    z, kl = torch.func.vmap(sample)(mu, logvar)
    for b in range(3):
        torch.testing.assert_close((z[b], kl[b]), sample(mu[b], logvar[b]), rtol=1e-6, atol=2e-6)
    elbo = torch.func.vmap(lambda m, s: fastvae.elbo_loss(m, torch.sigmoid(m), m, s).loss)(mu, logvar)
    torch.testing.assert_close(elbo[1], fastvae.elbo_loss(mu[1], torch.sigmoid(mu[1]), mu[1], logvar[1]).loss)


def test_activation_checkpointing_draws_the_same_noise(backend: str) -> None:
    mu, logvar = (t.requires_grad_() for t in OPS["gaussian_kl"].inputs(4, 8))

    def block(mu: Tensor, logvar: Tensor) -> Tensor:
        return fastvae.reparameterize(mu, logvar).pow(3).sum()

    grads = []
    for run in (block, lambda *a: torch.utils.checkpoint.checkpoint(block, *a, use_reentrant=False)):
        torch.manual_seed(1)
        grads.append(torch.autograd.grad(run(mu, logvar), (mu, logvar)))
    # a GPU's backward recomputes in a thread where use_backend does not reach: the same noise, other roundings
    tolerance = 0 if DEVICE == "cpu" else 1e-3
    torch.testing.assert_close(grads[0], grads[1], rtol=tolerance, atol=tolerance)


def test_inference_mode_and_no_grad(backend: str) -> None:
    logits, target = logits_target()
    want = fastvae.bce_with_logits(logits, target)
    with torch.inference_mode():
        torch.testing.assert_close(fastvae.bce_with_logits(logits, target), want)
    with torch.no_grad():
        assert not fastvae.bce_with_logits(logits.requires_grad_(), target).requires_grad


def test_modules_do_what_the_functions_do(backend: str) -> None:
    probs, target = OPS["bce"].inputs(4, 6)
    logits = OPS["bce_with_logits"].inputs(4, 6)[0]
    mu, logvar = OPS["gaussian_kl"].inputs(4, 3)
    modules = fastvae.nn
    pairs = [
        (
            modules.BCELoss(eps=None, reduction="sum")(probs, target),
            fastvae.bce(probs, target, eps=None, reduction="sum"),
        ),
        (modules.BCEWithLogitsLoss()(logits, target), fastvae.bce_with_logits(logits, target)),
        (
            modules.ContinuousBernoulliWithLogitsLoss()(logits, target),
            fastvae.continuous_bernoulli_with_logits(logits, target),
        ),
        (modules.MSELoss()(logits, target), fastvae.mse(logits, target)),
        (modules.L1Loss()(logits, target), fastvae.l1(logits, target)),
        (modules.GaussianNLLLoss(var=2.0)(logits, target), fastvae.gaussian_nll(logits, target, var=2.0)),
        (
            modules.GaussianKL(logvar_clamp=(-0.5, 0.5))(mu, logvar),
            fastvae.gaussian_kl(mu, logvar.clamp(-0.5, 0.5)),
        ),
        (
            modules.ELBOLoss(logvar_clamp=(-0.5, 0.5))(logits, target, mu, logvar),
            fastvae.elbo_loss(logits, target, mu, logvar.clamp(-0.5, 0.5)),
        ),
        (modules.GaussianKL(free_bits=0.1)(mu, logvar), fastvae.gaussian_kl(mu, logvar, free_bits=0.1)),
        (
            modules.ELBOLoss(beta=2.0)(logits, target, mu, logvar),
            fastvae.elbo_loss(logits, target, mu, logvar, beta=2.0),
        ),
    ]
    for got, want in pairs:
        torch.testing.assert_close(got, want, rtol=0, atol=0)
    torch.manual_seed(2)
    z = modules.Reparameterize(samples=2)(mu, logvar)
    torch.manual_seed(2)
    assert torch.equal(z, modules.SampleWithKL(samples=2)(mu, logvar)[0])
    torch.manual_seed(2)
    z = modules.Reparameterize(logvar_clamp=(-0.5, 0.5))(mu, logvar)
    torch.manual_seed(2)
    assert torch.equal(z, modules.SampleWithKL(logvar_clamp=(-0.5, 0.5))(mu, logvar)[0])
    torch.manual_seed(2)
    assert torch.equal(z, fastvae.reparameterize(mu, logvar.clamp(-0.5, 0.5)))
    assert repr(modules.BCELoss(eps=1e-6)) == "BCELoss(eps=1e-06, reduction='batchmean')"
    assert repr(copy.deepcopy(modules.GaussianKL())) == (
        "GaussianKL(logvar_clamp=None, free_bits=0.0, reduction='batchmean')"
    )


def opcheck_arguments() -> dict[str, tuple[tuple, dict]]:
    logits, target = logits_target()
    mu, logvar = torch.randn(6, 4), torch.randn(6, 4)
    seed = torch.tensor([7])
    latent = {"log_scale": True, "low": -0.5, "high": math.inf, "samples": 0, "free_bits": 0.1, "reduction": "example"}
    reconstruction = {"likelihood": "bernoulli_logits", "parameter": 0.0, "reduction": "batchmean"}
    gaussian = {**reconstruction, "likelihood": "gaussian_logvar"}
    elbo = {**reconstruction, "log_scale": True, "low": -0.5, "high": 0.75, "beta": 1.0, "free_bits": 0.0}
    elbo["with_gradient"] = True
    return {
        "latent_forward": ((mu, logvar, seed, mu, logvar), latent),
        "latent_backward": ((mu, torch.ones(6), mu, logvar, seed, None, None), latent),
        "reconstruction_forward": ((logits, target), {**reconstruction, "with_gradient": True}),
        "reconstruction_backward": ((torch.ones(()), logits, target), reconstruction),
        "reconstruction_forward with a tensor": ((logits, target, logits[:1]), {**gaussian, "with_gradient": True}),
        "reconstruction_backward with a tensor": ((torch.ones(()), logits, target, logits[:, :1]), gaussian),
        "elbo_forward": ((logits, target, mu, logvar), elbo),
        "rescale_": ((logits, torch.tensor(3.0)), {}),
    }


@pytest.mark.parametrize("name", opcheck_arguments())
def test_opcheck(backend: str, name: str) -> None:
    args, options = opcheck_arguments()[name]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.library.opcheck(getattr(torch.ops.fastvae, name.split()[0]).default, args, options)


def test_elementwise_loss_summed_by_torch(backend: str) -> None:
    """Its upstream gradient is expanded from one number, or from one an example."""
    logits, target = logits_target()
    for total in (lambda e: e.sum(), lambda e: e.sum(dim=1).mean(), lambda e: (e * e.detach()).sum()):
        want = value_and_gradients(lambda y, t=total: t(OPS["bce_with_logits"].expected(y, target)), [logits], 1)
        got = value_and_gradients(
            lambda y, t=total: t(fastvae.bce_with_logits(y, target, reduction="none")), [logits], 1
        )
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_upstream_gradient_by_example_in_half_precision(backend: str, dtype: torch.dtype) -> None:
    """It is converted before it is read, and laid out afresh by that."""
    logits, target = logits_target()
    logits = logits.to(dtype).requires_grad_()
    table = torch.arange(1.0, 1 + 7 * len(logits), device=logits.device, dtype=dtype).reshape(-1, 7)
    upstream = table[:, :1].expand(logits.shape)
    nll = fastvae.bce_with_logits(logits, target, reduction="none")
    (got,) = torch.autograd.grad(nll, logits, upstream)
    want = (torch.sigmoid(logits.detach().double()) - target) * upstream
    torch.testing.assert_close(got.double(), want, rtol=1e-2, atol=1e-2)


def test_scaled_float16_gradients_do_not_vanish(backend: str) -> None:
    """The mean over a large batch divides them by more than float16 has room for, until the scale multiplies them."""
    batch, scale = 1 << 14, 65536.0
    logits = torch.linspace(-8, 8, 2 * batch).reshape(batch, 2).half().requires_grad_()
    mu, logvar = (torch.linspace(-1, 1, batch).reshape(batch, 1).half().requires_grad_() for _ in range(2))
    target = torch.zeros(batch, 2)
    (fastvae.elbo_loss(logits, target, mu, logvar).loss * scale).backward()
    wanted = torch.sigmoid(logits.detach().double()), mu.detach().double()
    for leaf, want in zip((logits, mu), wanted, strict=True):
        assert leaf.grad is not None
        torch.testing.assert_close(leaf.grad.double(), want * (scale / batch), rtol=2**-10, atol=0)


@pytest.mark.parametrize("learned", [False, True])
@pytest.mark.parametrize("alike", [True, False])
def test_losses_by_example_take_one_pass(
    backend: str, alike: bool, learned: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Scaled alike, or each by its own number: only what is learned for all must be computed again then."""
    if DEVICE != "cpu":
        pytest.skip("on a GPU, looking at the numbers would make the host wait")
    module, again = fastvae.backends.__globals__["load"](backend), []
    run = module.reconstruction_backward
    monkeypatch.setattr(module, "reconstruction_backward", lambda *a, **kw: again.append(1) or run(*a, **kw))
    mean, target = logits_target()
    leaves = [mean.requires_grad_(), torch.rand(50).add_(0.5).requires_grad_()][: 2 if learned else 1]
    weights = torch.full((6,), 0.3) if alike else torch.tensor([1.0, 0.0, -2.0, 3.0, 0.5, 0.1])
    losses = fastvae.gaussian_nll(mean, target, leaves[1] if learned else 1.0, reduction="example")
    exact = [leaf.detach().double().requires_grad_() for leaf in leaves]
    var = exact[1] if learned else torch.ones((), dtype=torch.float64)
    wanted = (0.5 * ((exact[0] - target.double()) ** 2 / var + var.log())).sum(1) @ weights.double()
    for _ in range(2):
        got = torch.autograd.grad(losses, leaves, weights, retain_graph=True)
        for grad, want in zip(got, torch.autograd.grad(wanted, exact, retain_graph=True), strict=True):
            torch.testing.assert_close(grad.double(), want, rtol=1e-5, atol=1e-5)
    assert len(again) == (2 if learned and not alike else 1), "the second time what was kept is gone"


@pytest.mark.parametrize("listened_to", [False, True])
def test_backward_runs_on_the_backend_of_the_forward(
    backend: str, listened_to: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also in a thread of autograd's own, which a GPU's backward runs in, and after the block."""
    served: list[str] = []
    logits, target = logits_target()
    loss = fastvae.bce_with_logits(logits.requires_grad_(), target, reduction="none").sum()
    module = fastvae.backends.__globals__["load"](backend)
    run = module.reconstruction_backward

    def spy(*args: Any, **options: Any) -> Any:
        served.append(backend)
        return run(*args, **options)

    monkeypatch.setattr(module, "reconstruction_backward", spy)

    def backward() -> None:
        with FlopCounterMode(display=False) if listened_to else contextlib.nullcontext():
            loss.backward()

    thread = threading.Thread(target=backward)  # where nobody called use_backend
    thread.start()
    thread.join()
    assert served == [backend]
    assert logits.grad is not None


def test_backward_leaves_no_zeros_behind(backend: str) -> None:
    """The gradient the forward wrote is an output; torch would fill that output's own gradient with zeros."""
    logits, target = torch.randn(64, 1000, requires_grad=True), torch.rand(64, 1000)
    loss = fastvae.bce_with_logits(logits, target)
    with torch.profiler.profile(profile_memory=True, activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        loss.backward()
    if backend != "torch":
        names = {event.key for event in profile.key_averages()}
        assert "aten::zeros" not in names
        assert "aten::zero_" not in names


def test_a_wrong_gradient_would_be_seen(backend: str) -> None:
    """The comparison itself can fail: the gradient of a sum is not that of a mean."""
    op, inputs = OPS["bce_with_logits"], OPS["bce_with_logits"].inputs(2, 3)
    _, (mean,) = value_and_gradients(lambda *a: op.call(*a, reduction="mean"), inputs, 1)
    _, (total,) = value_and_gradients(lambda *a: reduce(op.expected(*a), "sum"), inputs, 1)
    with pytest.raises(AssertionError):
        torch.testing.assert_close(mean, total)


def test_tensor_that_outlived_a_transform(backend: str) -> None:
    kept = []

    def loss(y: Tensor) -> Tensor:
        kept.append(y * 1)
        return y.sum()

    logits, target = logits_target()
    torch.func.grad(loss)(logits)
    torch.testing.assert_close(fastvae.bce_with_logits(kept[0], target), fastvae.bce_with_logits(logits, target))


def test_batched_upstream_gradients_of_the_older_vmap(backend: str) -> None:
    """``is_grads_batched`` and ``vectorize=True``, which no mode and no transform announces."""
    leaf, target = torch.randn(3, 5, dtype=torch.float64, requires_grad=True), torch.rand(3, 5, dtype=torch.float64)
    losses = fastvae.bce_with_logits(leaf, target, reduction="none")
    (rows,) = torch.autograd.grad(losses, leaf, torch.eye(15).double().reshape(15, 3, 5), is_grads_batched=True)
    want = torch.diag((torch.sigmoid(leaf.detach()) - target).flatten())
    torch.testing.assert_close(rows.reshape(15, 15), want)

    def elbo(leaf: Tensor) -> Tensor:
        z, kl = fastvae.sample_with_kl(leaf, leaf, seed=1)
        return fastvae.elbo_loss(z, target, leaf, leaf, reduction="example").loss + kl

    jacobian = torch.autograd.functional.jacobian
    torch.testing.assert_close(jacobian(elbo, leaf.detach(), vectorize=True), jacobian(elbo, leaf.detach()))


def test_lazily_negated_and_conjugated_inputs(backend: str) -> None:
    """A view whose sign torch has yet to change must not be read as it lies in memory."""
    plain = torch.rand(6, 9) - 0.5
    negated = torch.complex(torch.zeros(6, 9), -plain).conj().imag
    assert negated.is_neg()
    torch.testing.assert_close(negated, plain)
    target = torch.rand(6, 9)
    torch.testing.assert_close(fastvae.bce_with_logits(negated, target), fastvae.bce_with_logits(plain, target))
    torch.testing.assert_close(fastvae.mse(plain, negated, reduction="example"), torch.zeros(6), rtol=0, atol=1e-12)
    torch.testing.assert_close(
        fastvae.sample_with_kl(negated, negated, prior_mu=negated, prior_logvar=negated, seed=3),
        fastvae.sample_with_kl(plain, plain, prior_mu=plain, prior_logvar=plain, seed=3),
    )
    torch.testing.assert_close(
        fastvae.elbo_loss(negated, target, negated, negated), fastvae.elbo_loss(plain, target, plain, plain)
    )
    leaf = plain.clone().requires_grad_()
    for reduction in ("none", "example"):
        upstream = torch._neg_view(torch.ones(6, 9) if reduction == "none" else torch.ones(6))
        (got,) = torch.autograd.grad(fastvae.mse(leaf, target, reduction=reduction), leaf, upstream)
        torch.testing.assert_close(got, -2 * (plain - target))
        z = fastvae.reparameterize(leaf, leaf, seed=1)
        torch.testing.assert_close(
            torch.autograd.grad(z, leaf, torch._neg_view(torch.ones(6, 9)), retain_graph=True)[0],
            torch.autograd.grad(z, leaf, -torch.ones(6, 9))[0],
        )
