"""torch.compile(fullgraph=True) and torch.export in every mode: training, evaluation, annealing, new batch sizes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounter

import fastvae
from fastvae.models import VAE

from table import OPS, REDUCTIONS

MODES = {"no_grad": torch.no_grad, "inference_mode": torch.inference_mode, "grad": torch.enable_grad}


@pytest.fixture(autouse=True)
def forget() -> None:
    torch._dynamo.reset()


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    return torch.compile(function, fullgraph=True, backend="aot_eager")


@pytest.mark.parametrize("needs_grad", [(), (0,), (1,)], ids=["plain", "first", "second"])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("op", OPS)
def test_every_op_with_and_without_gradients(op: str, mode: str, needs_grad: tuple[int, ...]) -> None:
    inputs = [t.requires_grad_(k in needs_grad) for k, t in enumerate(OPS[op].inputs(3, 5))]
    with MODES[mode]():
        got = compiled(lambda *a: [OPS[op].call(*a, reduction=r) for r in REDUCTIONS])(*inputs)
        torch.testing.assert_close(got, [OPS[op].call(*inputs, reduction=r) for r in REDUCTIONS])


@pytest.mark.parametrize("mode", MODES)
def test_what_returns_several(mode: str) -> None:
    mu, logvar, recon, target = torch.randn(6, 4), torch.randn(6, 4), torch.randn(6, 9), torch.rand(6, 9)
    with MODES[mode]():
        for call in (
            lambda: tuple(fastvae.elbo_loss(recon, target, mu, logvar)),
            lambda: fastvae.sample_with_kl(mu, logvar, samples=2),
            lambda: fastvae.sample_with_kl(mu, logvar, logvar_clamp=(-0.5, 0.75)),
            lambda: tuple(fastvae.elbo_loss(recon, target, mu, logvar, logvar_clamp=(-0.5, float("inf")))),
            lambda: (fastvae.reparameterize(mu, logvar), fastvae.vae_loss(target, target, mu, logvar)),
        ):
            torch.manual_seed(1)
            want = call()
            torch.manual_seed(1)
            torch.testing.assert_close(compiled(call)(), want)


@pytest.mark.parametrize("mode", MODES)
def test_a_model_is_evaluated_and_sampled(mode: str) -> None:
    model, x = VAE().eval(), torch.rand(4, 1, 28, 28)
    with MODES[mode]():
        torch.manual_seed(1)
        want = model.loss(x).loss
        torch.manual_seed(1)
        torch.testing.assert_close(compiled(lambda x: model.loss(x).loss)(x), want)
        assert compiled(lambda: model.sample(2))().shape == (2, 1, 28, 28)
        assert compiled(model.reconstruct)(x).shape == x.shape


def test_only_the_target_requires_grad() -> None:
    target = torch.rand(3, 5, requires_grad=True)
    logits = torch.randn(3, 5)
    compiled(lambda t: fastvae.bce_with_logits(logits, t))(target).backward()
    torch.testing.assert_close(target.grad, -logits / 3)


def test_an_annealed_beta_is_one_graph_more_at_most() -> None:
    recon, mu, logvar, target = torch.randn(6, 9, requires_grad=True), *torch.randn(2, 6, 4), torch.rand(6, 9)
    counter = CompileCounter()

    def loss(beta: float) -> Tensor:
        return fastvae.elbo_loss(recon, target, mu, logvar, beta=beta).loss

    step = torch.compile(loss, fullgraph=True, backend=counter)
    for k in range(12):
        torch.testing.assert_close(step(k / 10), loss(k / 10))
    assert counter.frame_count <= 2


@pytest.mark.parametrize("mode", MODES)
def test_beta_in_a_tensor_is_one_graph(mode: str) -> None:
    recon, mu, logvar, target = torch.randn(6, 9, requires_grad=True), *torch.randn(2, 6, 4), torch.rand(6, 9)
    counter = CompileCounter()

    def loss(beta: Tensor) -> Tensor:
        return fastvae.elbo_loss(recon, target, mu, logvar, beta=beta).loss

    step = torch.compile(loss, fullgraph=True, backend=counter)
    with MODES[mode]():
        for k in range(12):
            torch.testing.assert_close(step(torch.tensor(k / 10)), loss(torch.tensor(k / 10)))
    assert counter.frame_count == 1


@pytest.mark.parametrize("mode", MODES)
def test_a_learned_variance_and_a_broadcast_prior(mode: str) -> None:
    mean, logvar, target = torch.randn(6, 9, requires_grad=True), torch.randn(9, requires_grad=True), torch.rand(6, 9)
    prior_mu, prior_logvar = torch.randn(2, 9, dtype=torch.float16)

    def loss(logvar: Tensor) -> Tensor:
        kl = fastvae.gaussian_kl(mean, logvar.expand(6, 9), prior_mu=prior_mu, prior_logvar=prior_logvar)
        return kl + fastvae.gaussian_nll(mean, target, var=logvar.exp())

    with MODES[mode]():
        torch.testing.assert_close(compiled(loss)(logvar), loss(logvar))


def test_reduce_overhead_trains_evaluates_and_draws_afresh() -> None:
    """On a GPU these are CUDA graphs, whose memory the next step writes again: imported by ``test_gpu.py``."""
    torch._dynamo.reset()
    encoder, decoder = torch.nn.Linear(9, 8), torch.nn.Linear(4, 9)
    weights = [*encoder.parameters(), *decoder.parameters()]

    def step(x: Tensor, seed: int | None = 3) -> Tensor:
        mu, logvar = encoder(x).chunk(2, -1)
        return fastvae.elbo_loss(decoder(fastvae.reparameterize(mu, logvar, seed=seed)), x, mu, logvar).loss

    fast = torch.compile(step, fullgraph=True, mode="reduce-overhead")
    for _ in range(4):  # as it is, recorded, replayed, replayed
        x = torch.rand(6, 9)
        want = step(x)
        gradients = torch.autograd.grad(want, weights)
        torch.compiler.cudagraph_mark_step_begin()
        got = fast(x)
        torch.testing.assert_close([g.clone() for g in torch.autograd.grad(got, weights)], list(gradients))
        torch.testing.assert_close(got, want)
    with torch.no_grad():
        for _ in range(4):
            x = torch.rand(6, 9)
            torch.compiler.cudagraph_mark_step_begin()
            torch.testing.assert_close(fast(x).clone(), step(x))
        drawn = []
        for _ in range(4):
            torch.compiler.cudagraph_mark_step_begin()
            drawn.append(fast(x, None).item())
    assert len(set(drawn)) == 4


def test_five_batch_sizes_recompile_once_at_most() -> None:
    model, counter = VAE(), CompileCounter()
    step = torch.compile(lambda x: model.loss(x).loss, fullgraph=True, backend=counter)
    for batch in (3, 5, 7, 9, 11):
        step(torch.rand(batch, 1, 28, 28)).backward()
    assert counter.frame_count <= 2


def test_export_of_a_model_in_eval() -> None:
    model, x = VAE().eval(), torch.rand(4, 1, 28, 28)
    program = torch.export.export(model, (x,))
    assert program.module()(x)[0].shape == (4, 784)
