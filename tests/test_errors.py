"""Bad input: a TypeError or ValueError that names the argument, what was expected and what came."""

from __future__ import annotations

import contextvars
import os
import re
import subprocess
import sys
from collections.abc import Callable

import numpy as np
import pytest
import torch

import fastvae
from fastvae.registry import backend_for, backend_name

from table import BACKENDS

M, LV, L, X = torch.zeros(4, 3), torch.zeros(4, 3), torch.zeros(4, 9), torch.full((4, 9), 0.5)
META = torch.zeros(4, 3, device="meta")

BAD: list[tuple[Callable[[], object], type[Exception], str]] = [
    (lambda: fastvae.reparameterize(M), ValueError, "exactly one of logvar and std must be given, got neither"),
    (lambda: fastvae.gaussian_kl(M, LV, std=LV), ValueError, "exactly one of logvar and std must be given, got both"),
    (
        lambda: fastvae.reparameterize(M.int(), LV),
        TypeError,
        "mu must be float64, float32, bfloat16 or float16, got int32",
    ),
    (lambda: fastvae.reparameterize([0.0], LV), TypeError, "mu must be a tensor, got list"),
    (
        lambda: fastvae.gaussian_kl(M, LV[:2]),
        ValueError,
        "logvar must broadcast to the shape of mu, [4, 3], got [2, 3]",
    ),
    (
        lambda: fastvae.gaussian_kl(M, std=LV.long()),
        TypeError,
        "std must be float64, float32, bfloat16 or float16, got int64",
    ),
    (lambda: fastvae.gaussian_kl(M, META), ValueError, "logvar must be on the device of mu, cpu, got meta"),
    (lambda: fastvae.gaussian_kl(torch.tensor(1.0), torch.tensor(1.0)), ValueError, "mu must have a batch dimension"),
    (
        lambda: fastvae.gaussian_kl(M, LV, reduction="average"),
        ValueError,
        "reduction must be one of 'none', 'example', 'sum', 'mean', 'batchmean', got 'average'",
    ),
    (lambda: fastvae.gaussian_kl(M, LV, free_bits=-1), ValueError, "free_bits must be >= 0, got -1"),
    (
        lambda: fastvae.gaussian_kl(M, std=LV, logvar_clamp=(-30, 20)),
        ValueError,
        "logvar_clamp bounds logvar (or 2·log_std), got std: clamp that yourself",
    ),
    (
        lambda: fastvae.reparameterize(M, LV, logvar_clamp=(20, -30)),
        ValueError,
        "logvar_clamp must be (low, high) with low <= high, got (20, -30)",
    ),
    (
        lambda: fastvae.sample_with_kl(M, LV, logvar_clamp=20.0),
        TypeError,
        "logvar_clamp must be a pair of numbers (low, high), got 20.0",
    ),
    (
        lambda: fastvae.elbo_loss(L, X, M, LV, logvar_clamp=(-30, 0, 20)),
        TypeError,
        "logvar_clamp must be a pair of numbers (low, high), got (-30, 0, 20)",
    ),
    (
        lambda: fastvae.gaussian_kl(M, LV, logvar_clamp=(float("nan"), 20)),
        ValueError,
        "logvar_clamp[0] must be >= -3.40282e+38 and <= 3.40282e+38, got nan",
    ),
    (
        lambda: fastvae.nn.GaussianKL(logvar_clamp=(-30, None)),
        TypeError,
        "logvar_clamp[1] must be a number, got NoneType",
    ),
    (
        lambda: fastvae.gaussian_kl(M, LV, prior_mu=M),
        ValueError,
        "prior_mu and prior_logvar (or prior_std) come together, got no prior_logvar or prior_std",
    ),
    (
        lambda: fastvae.gaussian_kl(M, LV, prior_mu=torch.zeros(5), prior_logvar=LV),
        ValueError,
        "prior_mu must broadcast to the shape of mu, [4, 3], got [5]",
    ),
    (lambda: fastvae.reparameterize(M, LV, samples=0), ValueError, "samples must be at least 1, or None"),
    (lambda: fastvae.reparameterize(M, LV, samples=1.5), TypeError, "samples must be an int or None, got float"),
    (lambda: fastvae.reparameterize(M, LV, seed=1 << 64), ValueError, "seed must be a 64-bit int"),
    (lambda: fastvae.reparameterize(M, LV, seed="1"), TypeError, "seed must be an int, got str"),
    (
        lambda: fastvae.reparameterize(M, LV, seed=1, generator=torch.Generator()),
        ValueError,
        "generator and seed exclude each other",
    ),
    (
        lambda: fastvae.bce_with_logits(L, X[:, :5]),
        ValueError,
        "target must have the shape of logits, [4, 9], got [4, 5]",
    ),
    (
        lambda: fastvae.bce_with_logits(L, X.to(torch.complex64)),
        TypeError,
        "target must be real numbers, got complex64",
    ),
    (lambda: fastvae.bce_with_logits(L, X.long() + 2), ValueError, "target must lie in [0, 1]"),
    (lambda: fastvae.bce(L, X, eps=0.0), ValueError, "eps must be > 0 and <= 0.5, got 0.0"),
    (lambda: fastvae.gaussian_nll(L, X, var=0), ValueError, "var must be > 0, got 0"),
    (
        lambda: fastvae.gaussian_nll(L, X, var=M),
        ValueError,
        "var must broadcast to the shape of the data, [4, 9], got [4, 3]",
    ),
    (
        lambda: fastvae.elbo_loss(L, X, M, LV, likelihood="cauchy"),
        ValueError,
        "likelihood must be one of 'bernoulli_logits'",
    ),
    (
        lambda: fastvae.elbo_loss(L, X, M, LV, reduction="mean"),
        ValueError,
        "reduction must be 'example', 'sum' or 'batchmean'",
    ),
    (lambda: fastvae.elbo_loss(L, X, M, LV, beta=-1.0), ValueError, "beta must be >= 0, got -1.0"),
    (
        lambda: fastvae.elbo_loss(L, X, M, LV, beta=10**400),
        ValueError,
        "beta must be >= 0 and <= 1.79769e+308, got 1000",
    ),
    (lambda: fastvae.elbo_loss(L, X, M, LV, beta=torch.tensor(-1.0)), ValueError, "beta must be >= 0, got -1.0"),
    (lambda: fastvae.elbo_loss(L, X, M, LV, beta=torch.tensor(float("nan"))), ValueError, "beta must be >= 0, got nan"),
    (
        lambda: fastvae.elbo_loss(L, X, M, LV, beta=torch.ones(4)),
        ValueError,
        "beta must be a number or a 0-d tensor, got one of shape [4]",
    ),
    (
        lambda: fastvae.elbo_loss(L, X, M, LV, beta=torch.tensor(True)),
        TypeError,
        "beta must be a number or a floating-point tensor, got one of bool",
    ),
    (lambda: fastvae.nn.ELBOLoss(beta="x"), TypeError, "beta must be a number, got str"),
    (lambda: fastvae.nn.ELBOLoss(likelihood="cauchy"), ValueError, "likelihood must be one of 'bernoulli_logits'"),
    (lambda: fastvae.nn.GaussianNLLLoss(var=0), ValueError, "var must be > 0, got 0"),
    (lambda: fastvae.elbo_loss(L, X, M[:2], LV[:2]), ValueError, "mu must have the batch size of recon, 4, got 2"),
    (lambda: fastvae.elbo_loss(L, X, META, META), ValueError, "mu must be on the device of recon, cpu, got meta"),
    (
        lambda: fastvae.vae_loss(X, torch.zeros(4, 1, 4, 4), M, LV),
        ValueError,
        "x must have as many elements as recon_x, [4, 9], got [4, 1, 4, 4]",
    ),
    (lambda: fastvae.use_backend("tpu").__enter__(), ValueError, "backend must be one of 'torch', 'numba'"),
    (lambda: fastvae.nn.BCELoss(reduction="avg"), ValueError, "reduction must be one of"),
]


@pytest.mark.parametrize(("call", "kind", "message"), BAD, ids=[message[:60] for _, _, message in BAD])
def test_bad_arguments(call: Callable[[], object], kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match="^" + re.escape(message)):
        call()


@pytest.mark.parametrize("backend", ["torch", "numba"])
@pytest.mark.parametrize("reduction", ["none", "example", "batchmean"])
@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda t, **kw: fastvae.bce_with_logits(L, t, **kw), "target must lie in [0, 1], got values from -0.5 to 255"),
        (lambda t, **kw: fastvae.bce(X, t, **kw), "target must lie in [0, 1], got values from -0.5 to 255"),
        (lambda t, **kw: fastvae.bce(t, X, **kw), "probs must lie in [0, 1], got values from -0.5 to 255"),
        (lambda t, **kw: fastvae.continuous_bernoulli_with_logits(L, t, **kw), "target must lie in [0, 1]"),
    ],
)
def test_values_outside_the_unit_interval(
    backend: str, reduction: str, call: Callable[..., object], message: str
) -> None:
    bad = X.clone()
    bad[0, 0], bad[3, 8], bad[2, 2] = -0.5, 255, float("nan")
    with fastvae.use_backend(backend), pytest.raises(ValueError, match="^" + re.escape(message)):
        call(bad, reduction=reduction)


@pytest.mark.parametrize("backend", ["torch", "numba"])
def test_values_that_are_fine(backend: str) -> None:
    """The ends of the interval and NaN are not outside; other likelihoods take any number."""
    edge = torch.tensor([[0.0, 1.0, float("nan")]])
    with fastvae.use_backend(backend):
        assert fastvae.bce_with_logits(torch.zeros(1, 3), edge).isnan()
        assert fastvae.mse(torch.zeros(1, 3), torch.full((1, 3), -255.0)) == 3 * 255**2


def test_a_backend_that_cannot_serve_says_why() -> None:
    with (
        fastvae.use_backend("numba"),
        pytest.raises(RuntimeError, match="backend 'numba' serves tensors on cpu, got one on"),
    ):
        backend_for("cuda")


def test_backend_from_the_environment() -> None:
    code = "from fastvae.registry import backend_name; print(backend_name('cpu'))"
    for name in ("torch", "numba"):
        run = subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, "FASTVAE_BACKEND": name},
            capture_output=True,
            text=True,
            check=True,
        )
        assert run.stdout.strip() == name


def test_an_unknown_backend_in_the_environment_is_named() -> None:
    code = "import torch, fastvae; fastvae.mse(torch.zeros(1, 1), torch.zeros(1, 1))"
    run = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "FASTVAE_BACKEND": "fpga"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode != 0
    assert "backend must be one of 'torch', 'numba'" in run.stderr


def test_numpys_numbers_are_numbers() -> None:
    one = np.float32(1)
    assert fastvae.elbo_loss(L, X, M, LV, beta=one, free_bits=np.float64(0)).loss == fastvae.elbo_loss(L, X, M, LV).loss
    assert fastvae.gaussian_nll(L, X, var=one) == fastvae.gaussian_nll(L, X)
    assert fastvae.reparameterize(M, LV, samples=np.int64(2)).shape == (2, 4, 3)


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_rounding_leaves_beyond_one_is_a_target(backend: str) -> None:
    """Antialiased bilinear resizing of white gives up to 1 + 2.4e-7; bicubic overshoots by far more."""
    with fastvae.use_backend(backend):
        assert fastvae.bce_with_logits(L, torch.full_like(L, 1 + 3e-7)).isfinite()
        assert fastvae.bce_with_logits(L, torch.full_like(L, -3e-7)).isfinite()
        with pytest.raises(ValueError, match=re.escape("got values from 1.00001001 to 1.00001001: ") + ".*clamp"):
            fastvae.bce_with_logits(L, torch.full_like(L, 1.00001))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_finer_target_is_not_rounded_to_a_coarser_recon(backend: str, dtype: torch.dtype) -> None:
    target = torch.rand(4, 9, dtype=torch.float64)
    with fastvae.use_backend(backend):
        got = fastvae.mse(torch.zeros(4, 9, dtype=dtype), target)
    torch.testing.assert_close(got, (target**2).sum().float() / 4)


def test_use_backend_as_a_call_a_block_and_a_decorator() -> None:
    before = backend_name("cpu")

    @fastvae.use_backend("torch")
    def inside() -> str:
        return backend_name("cpu")

    assert backend_name("cpu") == before, "a decorator changes nothing outside its function"
    assert inside() == inside() == "torch"
    with fastvae.use_backend("numba"):
        assert backend_name("cpu") == "numba"
        with fastvae.use_backend("torch"):
            assert backend_name("cpu") == "torch"
        assert backend_name("cpu") == "numba"
    assert backend_name("cpu") == before
    contextvars.copy_context().run(_switched)
    assert backend_name("cpu") == before


def _switched() -> None:
    fastvae.use_backend("numba")
    assert backend_name("cpu") == "numba"
    fastvae.use_backend("torch")
    assert backend_name("cpu") == "torch"


def test_options_of_a_module_are_attributes_that_count() -> None:
    loss = fastvae.nn.ELBOLoss()
    before = loss(L, X, M, LV)
    loss.beta = 0.5
    torch.testing.assert_close(loss(L, X, M, LV).loss, before.reconstruction + 0.5 * before.kl)
    assert "beta=0.5" in repr(loss)
    annealed = fastvae.nn.ELBOLoss(beta=torch.tensor(0.25))
    assert list(annealed.state_dict()) == ["beta"]
    learned = fastvae.nn.ELBOLoss(beta=torch.nn.Parameter(torch.tensor(1.0)))
    learned(L, X, M, LV).loss.backward()
    (parameter,) = learned.parameters()
    torch.testing.assert_close(parameter.grad, before.kl)


def test_subpackages_are_there_by_name() -> None:
    code = "import fastvae; print(fastvae.models.VAE.__name__)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "VAE"
    with pytest.raises(AttributeError, match="module 'fastvae' has no attribute 'model'"):
        fastvae.model  # noqa: B018
