"""Programs that leave Python: ONNX, TorchScript, FX and AOTInductor compute what the kernels compute."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastvae
from fastvae import export, ops
from fastvae.models import VAE

BATCH, OTHER_BATCH, FEATURES = 4, 7, 9
CLOSE = {"rtol": 1e-5, "atol": 1e-5}  # float32 in another order, of sums of tens of nats

# of y, x in [0, 1] and p, one per feature
TERMS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "bce": lambda y, x, p: fastvae.bce(y.sigmoid(), x),
    "bce as torch": lambda y, x, p: fastvae.bce(y.sigmoid(), x, eps=None, reduction="none"),
    "bce_with_logits": lambda y, x, p: fastvae.bce_with_logits(y, x, reduction="example"),
    "continuous": lambda y, x, p: fastvae.continuous_bernoulli_with_logits(y, x),
    "mse": lambda y, x, p: fastvae.mse(y, x, reduction="mean", weight=x > 0.5),
    "l1": lambda y, x, p: fastvae.l1(y, x, reduction="mean"),
    "gaussian": lambda y, x, p: fastvae.gaussian_nll(y, x, logvar=p),
    "laplace": lambda y, x, p: fastvae.laplace_nll(y, x, scale=0.3),
    "poisson": lambda y, x, p: fastvae.poisson_nll(y.exp(), counts(x)),
    "negative binomial": lambda y, x, p: fastvae.negative_binomial_nll(
        y.exp(), counts(x), dispersion=p.exp(), reduction="example"
    ),
    "zero-inflated, from scores": lambda y, x, p: fastvae.zero_inflated_negative_binomial_nll_from_scores(
        y, 100.0, counts(x), dispersion=p.exp(), zero_logits=y
    ),
    "kl": lambda y, x, p: fastvae.gaussian_kl(y, std=x + 0.1, reduction="example"),
    "kl to a prior": lambda y, x, p: fastvae.gaussian_kl(
        y, x, prior_mu=p, prior_std=1.0, free_bits=0.1, free_bits_per="dimension"
    ),
    "several samples": lambda y, x, p: fastvae.sample_with_kl(y, x, samples=3, seed=2)[0],
    "linear": lambda y, x, p: fastvae.linear_bce(y, p.expand(FEATURES, FEATURES), p, x),
    "elbo": lambda y, x, p: fastvae.elbo_loss(y, x, y, x, beta=0.3, capacity=2.0, logvar_clamp=(-1, 0.5)).loss,
    "vae_loss": lambda y, x, p: fastvae.vae_loss(y.sigmoid(), x, y, x),
}


def counts(x: Tensor) -> Tensor:
    return (x * 9).round()


class Terms(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.p = nn.Parameter(torch.randn(FEATURES))

    def forward(self, y: Tensor, x: Tensor) -> tuple[Tensor, ...]:
        return tuple(term(y, x, self.p) for term in TERMS.values())


class Whole(nn.Module):
    """A model, its sampler and its losses; and noise that nobody seeded, much of it."""

    def __init__(self) -> None:
        super().__init__()
        self.vae = VAE(latent=5, hidden=8)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        q = self.vae.encode(x)
        z = fastvae.reparameterize(q.mu, q.logvar, seed=-3)
        recon = self.vae.decode(z)
        drawn = fastvae.reparameterize(torch.zeros(2048, 5), torch.zeros(2048, 5))
        return z, recon, *fastvae.elbo_loss(recon, x.flatten(1), q.mu, q.logvar), drawn


class Sampled(nn.Module):
    def forward(self, recon: Tensor, x: Tensor, mu: Tensor, logvar: Tensor) -> tuple[Tensor, ...]:
        return fastvae.reparameterize(mu, logvar, seed=1), *fastvae.elbo_loss(recon, x, mu, logvar)


def data(batch: int) -> tuple[Tensor, Tensor]:
    return torch.randn(batch, FEATURES), torch.rand(batch, FEATURES)


def onnx_of(model: nn.Module, inputs: tuple[Tensor, ...]) -> Callable[..., list[Tensor]]:
    pytest.importorskip("onnxscript", reason="onnxscript is not installed")
    runtime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    shapes = ({0: torch.export.Dim("batch")},) * len(inputs)
    program = torch.onnx.export(model, inputs, dynamo=True, dynamic_shapes=shapes, verbose=False)
    assert program is not None
    session = runtime.InferenceSession(program.model_proto.SerializeToString())
    names = [given.name for given in session.get_inputs()]

    def run(*inputs: Tensor) -> list[Tensor]:
        named = dict(zip(names, (t.numpy() for t in inputs), strict=True))
        return [torch.from_numpy(found) for found in session.run(None, named)]

    return run


def assert_terms(found: Any, model: nn.Module, inputs: tuple[Tensor, ...]) -> None:
    for name, got, want in zip(TERMS, found, model(*inputs), strict=True):
        torch.testing.assert_close(got, want, **CLOSE, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.filterwarnings("ignore")
def test_every_term_in_onnx() -> None:
    model = Terms().eval()
    run = onnx_of(model, data(BATCH))
    for batch in (BATCH, OTHER_BATCH):
        inputs = data(batch)
        assert_terms(run(*inputs), model, inputs)


@pytest.mark.filterwarnings("ignore")
def test_a_whole_model_in_onnx_draws_the_same_noise() -> None:
    model = Whole().eval()
    run = onnx_of(model, (torch.rand(BATCH, 1, 28, 28),))
    x = torch.rand(OTHER_BATCH, 1, 28, 28)
    *found, drawn = run(x)
    *want, _ = model(x)
    for got, expected in zip(found, want, strict=True):
        torch.testing.assert_close(got, expected, **CLOSE)
    assert abs(drawn.mean()) < 0.05  # 5σ of 10,240
    assert abs(drawn.std() - 1) < 0.04
    assert not torch.equal(run(x)[-1], drawn)


@pytest.mark.filterwarnings("ignore")
def test_a_trace_runs_without_this_library_and_trains(tmp_path: Path) -> None:
    model, path = Terms(), tmp_path / "traced.pt"
    torch.jit.trace(model, data(BATCH)).save(str(path))
    y, x = data(OTHER_BATCH)
    traced = torch.jit.load(str(path))
    assert_terms(traced(y, x), model, (y, x))
    gradients = [torch.autograd.grad(sum(out.sum() for out in m(y, x)), m.parameters()) for m in (traced, model)]
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-4)
    torch.save((y, x), tmp_path / "inputs.pt")
    code = (
        f"import sys, torch; model = torch.jit.load({str(path)!r}); "
        f"model(*torch.load({str(tmp_path / 'inputs.pt')!r})); assert 'fastvae' not in sys.modules"
    )
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True, cwd=tmp_path)


class ByName(nn.Module):
    def forward(self, mu: Tensor, logvar: Tensor) -> Tensor:
        return _reparameterize(mu, logvar)


_reparameterize = fastvae.reparameterize


def test_fx_sees_a_call_as_one_node_or_is_told_how() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.loss = nn.Linear(FEATURES, 2 * FEATURES), fastvae.nn.ELBOLoss(beta=0.5)

        def forward(self, x: Tensor) -> Tensor:
            mu, logvar = self.layer(x).chunk(2, 1)
            z = fastvae.reparameterize(mu, logvar, seed=1)
            return self.loss(z, x, mu, logvar).loss + fastvae.functional.gaussian_kl(mu, logvar)

    model, (_, x) = Model(), data(BATCH)
    graph = torch.fx.symbolic_trace(model)
    called = [node.target for node in graph.graph.nodes if node.op == "call_function"]
    assert {fastvae.reparameterize, fastvae.elbo_loss, fastvae.gaussian_kl} <= set(called)
    assert graph(x) == model(x)
    with pytest.raises(TypeError, match=r"Proxy of torch.fx: .* torch.fx.wrap\('NAME'\)"):
        torch.fx.symbolic_trace(ByName())


def test_decompositions_are_what_the_operators_compute() -> None:
    """Forward and backward, with and without bounds."""
    table = export.decompositions()
    assert set(table) == {op for name, op in ops.BY_NAME.items() if name != "rescale_"}
    (y, x), seed = data(BATCH), torch.tensor([7])
    latent = {"log_scale": True, "samples": 2, "free_bits": 0.0, "reduction": "example"}
    term = {"likelihood": "bernoulli_logits", "parameter": 0.0, "reduction": "sum"}
    elbo = {key: value for key, value in latent.items() if key != "samples"} | {"beta": 0.5, "with_gradient": False}
    up, up_z = torch.randn(BATCH), torch.randn(2, BATCH, FEATURES)
    for low, high in ((-ops.LARGEST, ops.LARGEST), (-0.5, 0.25)):
        bounds = {"low": low, "high": high}
        calls: list[tuple[str, tuple, dict]] = [
            ("latent_forward", (y, x, seed, None, None), latent | bounds),
            ("latent_backward", (up_z, up, y, x, seed, None, None), latent | bounds),
            ("reconstruction_forward", (y, x), term | {"with_gradient": True}),
            ("reconstruction_backward", (torch.tensor(2.0), y, x), term),
            ("elbo_forward", (y, x, y, x), elbo | bounds | term | {"reduction": "example"}),
        ]
        for name, args, options in calls:
            operator = ops.BY_NAME[name]
            torch.testing.assert_close(table[operator](*args, **options), operator(*args, **options), **CLOSE)


@pytest.mark.skipif(shutil.which("g++") is None, reason="AOTInductor needs g++")
def test_a_package_of_aotinductor(tmp_path: Path) -> None:
    def inputs(batch: int) -> tuple[Tensor, ...]:
        return *data(batch), torch.randn(batch, 3), torch.randn(batch, 3)

    with torch.no_grad():
        program = torch.export.export(Sampled(), inputs(BATCH), dynamic_shapes=({0: torch.export.Dim("batch")},) * 4)
    path = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "model.pt2"))
    given = inputs(OTHER_BATCH)
    for got, want in zip(torch._inductor.aoti_load_package(path)(*given), Sampled()(*given), strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=0)


def test_the_other_terms_decompose() -> None:
    """Sums over pairs and terms of rows: exported, and then free of the operators."""
    z, mu, logvar = (torch.randn(6, 3) for _ in range(3))
    bytes_of = torch.zeros(2, 2, 2, 3, dtype=torch.uint8)
    calls: list[tuple[Callable[..., Tensor], tuple[Tensor, ...]]] = [
        (lambda a, b, c: fastvae.aggregate_posterior(a, b, c, dataset_size=100)[0], (z, mu, logvar)),
        (lambda a, b, c: fastvae.gaussian_mixture_log_prob(a, b, c, torch.zeros(6)), (z, mu, logvar)),
        (fastvae.mmd, (z, mu)),
        (fastvae.log_q_minus_log_p, (z, mu, logvar)),
        (fastvae.categorical_kl, (z, mu)),
        (lambda a: fastvae.categorical_nll(a, torch.arange(6) % 3), (z,)),
        (lambda a: fastvae.discretized_logistic_mixture_nll(a, bytes_of), (torch.randn(2, 2, 2, 20),)),
    ]
    for function, inputs in calls:

        class Term(torch.nn.Module):
            def forward(self, *tensors: Tensor) -> Tensor:
                return function(*tensors)  # noqa: B023  (exported at once)

        program = torch.export.export(Term(), inputs)
        free = program.run_decompositions(export.decompositions())
        assert "fastvae" in str(program.graph)
        assert "fastvae" not in str(free.graph)
        torch.testing.assert_close(free.module()(*inputs), function(*inputs), **CLOSE)
